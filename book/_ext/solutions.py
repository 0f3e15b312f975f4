"""What the code in the solutions of exercises prints, computed when the book is built.

The first code of the page is what all solutions begin with. One that fails breaks the build.
"""

import contextlib
import io
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx_exercise.nodes import solution_node


class Solutions(SphinxTransform):
    default_priority = 700

    def apply(self, **_: Any) -> None:
        solutions = list(self.document.findall(solution_node))
        if not solutions:
            return
        for number, part in enumerate(self.document.findall(nodes.section)):
            if part["ids"] in (["exercise-content"], ["solution-content"]):  # all alike
                part["ids"] = [f"{part['ids'][0]}-{number}"]
        begin = next(self.document.findall(is_code)).astext()
        shared: dict[str, Any] = {}
        exec(begin, shared)
        for solution in solutions:
            names = dict(shared)
            for block in list(solution.findall(is_code)):
                try:
                    printed = run(block.astext(), names)
                except Exception as error:
                    told = f"the code of a solution fails: {type(error).__name__}: {error}"
                    logging.getLogger(__name__).warning(told, location=block)
                    continue
                output = nodes.literal_block(printed, printed, classes=["output"])
                output["language"] = "text"
                block.parent.insert(block.parent.index(block) + 1, output)


def run(code: str, names: dict[str, Any]) -> str:
    """Run code with these names, which it adds to; return what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    return printed.getvalue().rstrip()


def is_code(node: nodes.Node) -> bool:
    return isinstance(node, nodes.literal_block) and node.get("language") == "python"


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(Solutions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
