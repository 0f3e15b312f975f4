"""A page loads what it needs, and nothing from elsewhere.

sphinx-thebe's scripts are left out: they are added twice, and the second copy throws
"THEBE_JS_URL has already been declared". MathJax is served from the book itself, to the pages with
maths: Sphinx takes the root of the book for one, since its chapters have some. The theme's icons
are in its fonts; the script of 1.5 MB that holds them again is left out.
"""

import importlib
import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

CHEAT_SHEET = "book/cheat_sheet"  # the page with a style of its own, for paper
NEEDED = ("tex-chtml.js", "input/tex/extensions", "output/chtml/fonts/woff-v2")
ICONS = re.compile(r"<script [^>]*scripts/fontawesome\.js[^>]*></script>")


def choose_files(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any
) -> None:
    if page == CHEAT_SHEET:
        app.add_css_file("cheat_sheet.css")
    maths = tree is not None and any(tree.findall(is_maths))

    def wanted(script: Any) -> bool:
        body = getattr(script, "attributes", {}).get("body") or ""
        text = f"{script} {body}".lower()
        return "thebe" not in text and (maths or "mathjax" not in text)

    context["script_files"] = [s for s in context.get("script_files", []) if wanted(s)]


def is_maths(node: nodes.Node) -> bool:
    return isinstance(node, nodes.math | nodes.math_block)


def drop_icons(app: Sphinx, error: Exception | None) -> None:
    for page in Path(app.outdir).rglob("*.html") if error is None else ():
        page.write_text(ICONS.sub("", page.read_text()))


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    package = importlib.import_module("sphinx-mathjax-offline").__file__ or ""
    source, target = Path(package).parent / "static" / "mathjax", Path(app.outdir, "_static")
    for name in NEEDED if error is None else ():
        place = target / "mathjax" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, place, dirs_exist_ok=True)
        else:
            shutil.copy(source / name, place)


def setup(app: Sphinx) -> dict[str, bool]:
    app.config.mathjax_path = "mathjax/tex-chtml.js"
    app.connect("html-page-context", choose_files, priority=900)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", drop_icons)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
