"""How wide a picture has to be shown at least, so that its letters can be read on a phone.

The least width stands at each picture as --least; style.css has a figure that is narrower scroll.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from PIL import Image
from sphinx.application import Sphinx

LEAST = 56  # px an inch: letters of 9 points are 7 px high


@cache
def least(picture: Path) -> int:
    with Image.open(picture) as image:
        return round(image.width / image.info.get("dpi", (72, 72))[0] * LEAST)


def mark(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    if not isinstance(tree, nodes.document):
        return
    sources = {name: Path(app.srcdir, path) for path, name in app.builder.images.items()}

    def with_least(found: re.Match[str]) -> str:
        source = sources.get(found["name"])
        return f'{found[0]} style="--least: {least(source)}px"' if source else found[0]

    pattern = r'<img (?:alt="[^"]*" )?src="[./]*_images/(?P<name>[^"]+\.png)"'
    context["body"] = re.sub(pattern, with_least, context["body"])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
