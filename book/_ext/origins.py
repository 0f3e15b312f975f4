"""Where each figure and table came from, in a line under it; and how to open a notebook.

A figure or a table of a notebook was measured by it. One of a page was measured if it shows a
picture from results/figures or holds numbers of the role {result}; what else there is says itself
whether it is quoted. A table that a notebook's cell shows gets its number and the caption that the
cell's metadata hold, {"fmnlib": {"table": "caption"}}; one without a caption is an error.

{provenance} runs, device   a table of all notebooks with these columns, and the caption below it
{versions}                  a table of what built this copy of the book
"""

import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from results import read

TOOLS = "jupyter-book sphinx myst-nb papermill matplotlib pandas scikit-learn scipy".split()
COLUMNS = {
    "runs": "runs",
    "seconds": "training, s",
    "date": "trained on",
    "device": "device",
    "threads": "threads",
    "python": "Python",
    "torch": "torch",
    "numpy": "numpy",
    "commit": "commit",
}


class Origins(SphinxTransform):
    """Before the domains number what has a caption, which they do at 850."""

    default_priority = 700

    def apply(self, **_: Any) -> None:
        self.about = read(self.env, "provenance.json")
        place, _, name = self.env.docname.partition("/")
        if place == "notebooks":
            self.open_in(name)
            self.number_tables(name)
        for node in list(self.document.findall(shown)):
            items = sorted(set(self.items(node, name)))
            if items:
                line = nodes.paragraph("", "", *self.line(items), classes=["origin"])
                if isinstance(node, nodes.figure):
                    node += nodes.legend("", line)
                else:
                    node.parent.insert(node.parent.index(node) + 1, line)

    def items(self, node: nodes.Element, name: str) -> Iterator[str]:
        """The experiments whose numbers a figure or a table shows."""
        for item, about in self.about.items():
            pictures = [image["uri"].rpartition("/")[2] for image in node.findall(nodes.image)]
            if name == about["notebook"] or set(about["figures"]) & set(pictures):
                yield item
        yield from (part["item"] for part in node.findall(nodes.inline) if "item" in part)
        if "item" in node.parent:
            yield node.parent["item"]

    def line(self, items: list[str]) -> Iterator[nodes.Node]:
        yield nodes.Text("Measured: ")
        for number, item in enumerate(items):
            about = self.about[item]
            yield nodes.Text("; " if number else "")
            yield page(self.env, f"/notebooks/{about['notebook']}", about["notebook"])
            yield nodes.Text(f", {in_short(about)}")
        yield nodes.Text(" (")
        yield page(self.env, "/book/provenance", "provenance")
        yield nodes.Text(").")

    def open_in(self, name: str) -> None:
        """One press each to Colab, the source and the file, under the notebook's title."""
        theme = self.config.html_theme_options
        repository, branch = theme["repository_url"], theme["repository_branch"]
        path = f"{repository.split('github.com/')[1]}/blob/{branch}/notebooks/{name}.ipynb"
        colab = f"{theme['launch_buttons']['colab_url']}/github/{path}"
        source = f"https://github.com/{path}"
        file = addnodes.download_reference(
            "", "Download", reftarget=f"/notebooks/{name}.ipynb", refdoc=self.env.docname
        )
        links = [
            nodes.reference("", "Open in Colab", refuri=colab),
            nodes.reference("", "Source", refuri=source),
            file,
        ]
        bar = nodes.bullet_list(
            "", *(nodes.list_item("", nodes.paragraph("", "", k)) for k in links)
        )
        bar["classes"] = ["open-in"]
        title = next(self.document.findall(nodes.title))
        title.parent.insert(1, bar)

    def number_tables(self, name: str) -> None:
        number = 0
        for cell in list(self.document.findall(is_code_cell)):
            caption = cell["cell_metadata"].get("fmnlib", {}).get("table")
            for bundle in list(cell.findall(is_bundle)):
                markup = "".join(raw.astext() for raw in bundle.findall(nodes.raw))
                if "<table" not in markup:
                    continue
                if not caption:
                    told = f"cell {cell['cell_index']} of {name} shows a table without a caption"
                    logging.getLogger(__name__).warning(told, location=cell)
                number += 1
                table = table_of(markup, caption or "")
                table["names"] = [f"tab-{name}-{number}".replace("_", "-")]
                self.document.note_explicit_target(table)
                bundle.replace_self(table)


def in_short(about: Mapping[str, Any]) -> str:
    """Commit, device and day of an experiment; of several the number, or the first and last."""
    commits, days = about["commit"].split(", "), about["date"].split(", ")
    commit = f"commit {commits[0]}" if len(commits) == 1 else f"{len(commits)} commits"
    parts = [commit + " with local changes" * about["changed"]]
    parts += [f"on {about['device']}"] if about["device"] else []
    if about["date"]:
        parts += [f"on {days[0]}" if len(days) == 1 else f"{days[0]} to {days[-1]}"]
    return ", ".join(parts)


def shown(node: nodes.Node) -> bool:
    return isinstance(node, nodes.table | nodes.figure)


def is_code_cell(node: nodes.Node) -> bool:
    return isinstance(node, nodes.container) and node.get("nb_element") == "cell_code"


def is_bundle(node: nodes.Node) -> bool:
    return isinstance(node, nodes.container) and node.get("nb_element") == "mime_bundle"


def table_of(markup: str, caption: str) -> nodes.table:
    """A table of the document from the HTML of a data frame."""
    source = ElementTree.fromstring(markup[markup.index("<table") : markup.rindex("</div>")])
    heads, body = (
        [["".join(cell.itertext()) for cell in row] for row in source.find(part).iter("tr")]
        for part in ("thead", "tbody")
    )
    head = [
        max(cells, key=len) for cells in zip(*heads, strict=True)
    ]  # a second row names the index
    # A row lacks the outer names of its index where they are those of the row above.
    return grid([head, *([""] * (len(head) - len(row)) + row for row in body)], caption)


def grid(rows: list[list[str]], caption: str) -> nodes.table:
    """The first row and the first column are heads."""
    group = nodes.tgroup(cols=len(rows[0]))
    for column in range(len(rows[0])):
        group += nodes.colspec(colwidth=1, stub=int(column == 0))
    lines = [nodes.row("", *map(entry, row)) for row in rows]
    group += [nodes.thead("", lines[0]), nodes.tbody("", *lines[1:])]
    title = nodes.title("", "", *strong(caption))
    return nodes.table("", title, group, classes=["numbers"])


def entry(text: str) -> nodes.entry:
    """A cell; an interval stands below its number, so that many fit beside each other."""
    lines = text.replace(" [", "\n[").split("\n")
    return nodes.entry("", *(nodes.paragraph(text=line) for line in lines))


def strong(text: str) -> list[nodes.Node]:
    """Text, with what stands between double asterisks in strong."""
    parts = enumerate(text.split("**"))
    return [nodes.strong(text=part) if n % 2 else nodes.Text(part) for n, part in parts if part]


def page(env: BuildEnvironment, target: str, text: str) -> nodes.Node:
    about = {"refdomain": "std", "reftype": "doc", "reftarget": target, "refdoc": env.docname}
    about |= {"refexplicit": "true", "refwarn": "true"}
    return addnodes.pending_xref("", nodes.inline(text, text), **about)


class Provenance(SphinxDirective):
    """What the notebooks' numbers rest on: the columns named, and the caption as content."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[nodes.Node]:
        keys = self.arguments[0].split()
        rows = [["notebook", *(COLUMNS[key] for key in keys)]]
        for about in read(self.env, "provenance.json").values():
            told = about | {"seconds": round(about["seconds"])}
            told["date"] = about["date"].replace("-", "\N{NON-BREAKING HYPHEN}")
            rows.append([about["notebook"], *(str(told[key]) or "not noted" for key in keys)])
        table = grid(rows, " ".join(self.content))
        table["names"] = [f"tab-{'-'.join(keys)}"]
        table["classes"].append("wraps")  # a notebook may rest on a dozen commits
        self.state.document.note_explicit_target(table)
        return [table]


class Versions(SphinxDirective):
    """A table of the tools and the commit that built this copy; nothing to set."""

    def run(self) -> list[nodes.Node]:
        git = ["git", "-C", str(self.env.srcdir), "log", "-1", "--format=%h of %cs"]
        done = subprocess.run(git, capture_output=True, text=True)
        rows = [["what", "version"], ["commit of the checkout", done.stdout.strip() or "none"]]
        rows += [["Python", f"{platform.python_version()}, {platform.machine()}"]]
        rows += [[tool, version(tool)] for tool in TOOLS]
        table = grid(rows, "What built this copy of the book.")
        table["names"] = ["tab-versions"]
        self.state.document.note_explicit_target(table)
        return [table]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_transform(Origins)
    app.add_directive("provenance", Provenance)
    app.add_directive("versions", Versions)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
