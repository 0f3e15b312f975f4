"""No sentence of the book types what was measured: a number or its comparison is computed.

A typed comparison is found like this: a sentence of markdown names a method or measured quantity
(`SUBJECT`) with a word that compares or a typed amount (`COMPARES`). It may stay where it
quotes the papers, asks a question, lets a role decide (versus, finding, given), or is true by
construction and marked so, with the comment `<!-- by definition -->`.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "book").glob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]

SUBJECT = re.compile(
    r"\b(KF|Knowledge Fusion|fusions?|early stopping|final networks?|students?|ensembles?|"
    r"independent networks?|averag\w+|checkpoints?|greedy|likelihood|SWA|FGE|EMA|snapshot|search|"
    r"gains?|intervals?|forgets?|test-time augmentation|windows?)\b",
    re.IGNORECASE,
)
COMPARES = re.compile(
    r"\b(better|worse|beats?|higher|lower|ahead of|behind|level with|as good as|outperforms?|"
    r"(above|below) (the|that|those|it|KF|Knowledge|early)|several times|twice as|nearly all|"
    r"nearly nothing|next to nothing|the fusion nothing|gains? nothing|most of (it|its|the gain)|"
    r"comes? close|tenths of|half of (it|its)|at every noise|on every seed|in every run|"
    r"took .* alone|less than|"
    r"(takes?|took|carry|carries|carried) ((about|only|almost|at least|at most) )?"
    r"(most|much|more|less|fewer|half|little|no|none|nothing|all|hardly|nearly|\d[\d.]*|"
    r"two|three|four|five|six|seven|eight|nine|ten)|"
    r"lies? on the side|"
    r"(one|two|three|four|five|ten|\d[\d.]*) (percent(age)? )?points?)\b",
    re.IGNORECASE,
)
MAY_STAY = re.compile(
    r"\b(papers?|papers?'|Stern|claims?|published|quoted|whether|if|unless|would|could|may|can)\b"
    r"|\bwhere (it|the (whole )?interval)\b"
    r"|\?|<!-- by definition -->|\{(versus|finding|given|cite:?\w*)\}",
    re.IGNORECASE,
)

# What the book said once, and what a book trained anew contradicted.
CONTRADICTED = """\
With all training images Knowledge Fusion is the final network itself on every seed and split.
Only with 20% noise does the interval of the difference lie on the side of Knowledge Fusion.
On clean labels Knowledge Fusion took the final network alone.
Averaging the weights is at least as good as the student, at 40% asymmetric noise better.
At 40% asymmetric noise the fusion without a window is even better, by about three points.
Test-time augmentation gives the final network a good ten points, and the fusion nothing.
With ten samples Knowledge Fusion loses one or two points, less than early stopping mostly does.
Greedy selection and the search over all epochs are better than Knowledge Fusion.
Knowledge Fusion keeps about nine tenths of its gain at every noise.
Early stopping comes close here too.
The final network carries most of the weight in the fusion.
On clean labels Knowledge Fusion took two networks.
The final network carries only 3% of the weight of the fusion.
"""


def sentences(markdown):
    """The sentences of a text, without code, tables, directives' options and headings."""
    prose = re.sub(r"^(`{3,})(?!\{figure).*?^\1\s*$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    lines = [
        line
        for line in prose.splitlines()
        if not re.match(r"\s*(#|\||:\w+:|\* -|-\s+\{|  - \{|:::)", line)
    ]
    text = re.sub(r"\s+", " ", "\n".join(line if line.strip() else ". " for line in lines))
    return [s.strip() for s in re.split(r"(?<=[.?!:;])\s+(?!<!--)", text) if s.strip(" .")]


def typed(markdown):
    return [
        sentence
        for sentence in sentences(markdown)
        if SUBJECT.search(sentence) and COMPARES.search(sentence) and not MAY_STAY.search(sentence)
    ]


def markdown_of(page):
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_sentence_types_a_comparison_of_results(page):
    assert typed(markdown_of(page)) == []


@pytest.mark.parametrize("sentence", CONTRADICTED.splitlines())
def test_a_typed_comparison_is_found(sentence):
    assert typed(f"Some text.\n\n{sentence} And more text.") == [sentence]


def test_a_quotation_a_question_and_a_role_may_stay():
    assert typed("The papers find that KF is better than SWA by three points.") == []
    assert typed("Is KF better than early stopping?") == []
    assert typed("Early stopping, window, averages as many networks as KF took.") == []
    assert typed("KF {versus}`cifar100.augmented_sym40.kf.window` it, above all.") == []
    assert typed("The retained part is below accuracy by F_e points. <!-- by definition -->") == []
