"""Comments that stand for what moves: sliders over one recorded run, a film of one.

<!-- forgetting explorer -->            book/explorer.py makes what it shows
<!-- film of the decision regions -->   book/film.py does

In a notebook a comment shows nothing, so that it does no harm in Colab. Only the pages that hold
one load its files; without scripts they show its still.
"""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

FOLDER = Path(__file__).parent
# For each comment: its markup and folder of files, and of these more styles and the scripts.
APPS = {
    "<!-- forgetting explorer -->": ("explorer", [], ["digits", "explorer"]),
    "<!-- film of the decision regions -->": ("film", ["film"], ["wave", "film"]),
}


class Explorer(SphinxTransform):
    default_priority = 700

    def apply(self, **_: Any) -> None:
        root = "../" * self.env.docname.count("/")
        for node in list(self.document.findall(nodes.raw)):
            mark = node.astext().strip()
            if mark in APPS:
                markup = FOLDER / f"{APPS[mark][0]}.html"
                self.env.note_dependency(str(markup))
                text = markup.read_text().replace("{root}", root)
                node.replace_self(nodes.raw("", text, format="html", app=mark))


def add_files(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    for node in tree.findall(nodes.raw) if tree is not None else ():
        if "app" in node:
            folder, styles, scripts = APPS[node["app"]]
            app.add_css_file("explorer/explorer.css")
            for name in styles:
                app.add_css_file(f"{folder}/{name}.css")
            for name in scripts:
                app.add_js_file(f"{folder}/{name}.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(Explorer)
    app.connect("html-page-context", add_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
