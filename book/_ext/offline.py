"""The book runs no code in the browser, and shows its maths without the network.

sphinx-thebe's scripts are left out: they are added twice, and the second copy throws
"THEBE_JS_URL has already been declared". MathJax is served from the book itself.
"""

import importlib
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

NEEDED = ("tex-chtml.js", "input/tex/extensions", "output/chtml/fonts/woff-v2")


def drop_thebe(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    def is_thebe(script: Any) -> bool:
        body = getattr(script, "attributes", {}).get("body") or ""
        return "thebe" in f"{script} {body}".lower()

    scripts = context.get("script_files", [])
    context["script_files"] = [script for script in scripts if not is_thebe(script)]


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
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
