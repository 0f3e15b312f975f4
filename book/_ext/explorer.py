"""<!-- forgetting explorer -->: sliders over one recorded run, in a page or a notebook's text.

In a notebook the comment shows nothing, so that it does no harm in Colab. Only the pages that hold
it load the explorer's files; without scripts they show its still.
"""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

MARK = "<!-- forgetting explorer -->"
MARKUP = Path(__file__).with_suffix(".html")


class Explorer(SphinxTransform):
    default_priority = 700

    def apply(self, **_: Any) -> None:
        self.env.note_dependency(str(MARKUP))
        root = "../" * self.env.docname.count("/")
        for node in list(self.document.findall(is_mark)):
            text = MARKUP.read_text().replace("{root}", root)
            node.replace_self(nodes.raw("", text, format="html", explorer=True))


def is_mark(node: nodes.Node) -> bool:
    return isinstance(node, nodes.raw) and node.astext().strip() == MARK


def is_explorer(node: nodes.Node) -> bool:
    return isinstance(node, nodes.raw) and "explorer" in node


def add_files(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    if tree is not None and any(tree.findall(is_explorer)):
        app.add_css_file("explorer/explorer.css")
        for name in ("digits", "explorer"):
            app.add_js_file(f"explorer/{name}.js", loading_method="defer")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(Explorer)
    app.connect("html-page-context", add_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
