"""The drawings: they count what the library counts, and are legible on a phone."""

import base64
import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from docutils import nodes
from PIL import Image

from fmnlib import fusion, scores

ROOT = Path(__file__).parent.parent
PHONE = 343  # px that a window of 375 px leaves for a drawing
SMALLEST = 9  # px of text
COLUMN = 624  # px that a window of 1200 px leaves for a figure
DPI, TICKS = (
    180,
    11,
)  # of `fmnlib.plots.set_theme`; points of the smallest text, where none is given


@pytest.fixture(scope="module")
def drawings():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "book" / "_ext")
        import drawings

        yield drawings


def cells(markup, name):
    return len(re.findall(rf'<g class="cell {name}"', markup))


def words(markup):
    root = ElementTree.fromstring(markup)
    return ["".join(text.itertext()).replace("\u200b", "") for text in root.iter("text")]


def test_the_table_shows_what_the_scores_count(drawings):
    correct = drawings.example().correct
    markup = drawings.definitions()
    key = 1  # each kind of cell stands once in the key
    assert cells(markup, "forgotten") == (correct & ~correct[-1]).sum() + key
    assert cells(markup, "later") == (~correct & correct[-1]).sum() + key
    assert cells(markup, "kept") == (correct & correct[-1]).sum() + key
    samples = correct.shape[1]
    shown = [text for text in words(markup) if re.fullmatch(r"\d/\d", text)]
    rows = np.array([[int(text[0]) for text in shown[n : n + 3]] for n in range(0, len(shown), 3)])
    counted = [correct.mean(1), scores.learn_fraction(correct), scores.forget_fraction(correct)]
    np.testing.assert_array_equal(rows / samples, np.transpose(counted))


def test_the_example_is_local_overfitting_and_nothing_else(drawings):
    record = drawings.example()
    assert (np.diff(record.accuracy) >= 0).all()
    assert scores.forget_fraction(record.correct).argmax() == drawings.EPOCH == 2
    forgotten = np.flatnonzero(record.correct[2] & ~record.correct[-1])
    given_up = np.flatnonzero(~record.correct[2] & record.correct[-1])
    # As the page says, which counts samples from 1.
    assert (forgotten + 1).tolist() == [7, 8]
    assert (given_up + 1).tolist() == [3, 4, 5]


def test_the_page_computes_from_the_table_that_is_drawn(drawings):
    page = (ROOT / "book" / "definitions.md").read_text()
    table = re.search(r'table = """\n(.*?)\n"""', page, re.DOTALL)[1]
    typed = np.array([row.split() for row in table.splitlines()]) == "1"
    np.testing.assert_array_equal(typed, drawings.example().correct)


def test_knowledge_fusion_is_drawn_as_it_runs(drawings):
    record = drawings.example()
    found = fusion.knowledge_fusion(record, window=1)
    [(epoch, share)] = found.picks
    markup = drawings.knowledge_fusion()
    assert epoch == 2
    assert f"{share:.2f}" in words(markup)
    assert fusion.accuracy(record, found) == 1
    assert cells(markup, "back") == 2 == cells(markup, "wrong")
    assert "the middle of its best plateau" in markup


@pytest.mark.parametrize("name", ["definitions", "fusion", "student"])
def test_a_drawing_is_described_and_legible(drawings, name):
    markup = drawings.DRAWINGS[name]()
    root = ElementTree.fromstring(markup)
    assert root.get("role") == "img"
    said = {
        element.get("id"): element.text for element in root if element.tag in ("title", "desc")
    }
    assert root.get("aria-labelledby").split() == list(said)
    assert len(said[f"drawing-{name}-desc"]) > 60
    css = (ROOT / "book" / "_static" / "style.css").read_text()
    sizes = [float(size) for size in re.findall(r"\.drawing[^{]*\{ font-size: ([\d.]+)px", css)]
    assert len(sizes) == 2
    assert min(*sizes, float(root.get("font-size"))) * PHONE / drawings.WIDTH > SMALLEST
    assert not re.search(r"(?<!&)#[0-9a-f]{3,6}\b|http", markup), "colours are those of the page"
    right = max(float(rect.get("x", 0)) + float(rect.get("width")) for rect in root.iter("rect"))
    assert right <= drawings.WIDTH


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem
)
def test_no_figure_of_a_notebook_has_letters_too_small_to_read(path):
    for cell in json.loads(path.read_text())["cells"]:
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                width = struct.unpack(">I", base64.b64decode(picture)[16:20])[0] / DPI
                source = "".join(cell["source"])
                given = re.findall(r"(?:label|font|\b)size=(\d+)", source)
                least = min([TICKS, *map(int, given)])
                assert least / 72 * min(COLUMN / width, DPI) >= SMALLEST, cell["id"]


def test_a_picture_says_how_wide_its_letters_need_it_on_a_phone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "book" / "_ext")
    import figures

    Image.new("RGB", (10 * DPI, 20)).save(tmp_path / "wide.png", dpi=(DPI, DPI))
    builder = SimpleNamespace(images={"wide.png": "hash.png"})
    app, tree = SimpleNamespace(srcdir=tmp_path, builder=builder), nodes.document(None, None)
    pictures = '<img alt="A plot." src="../_images/hash.png" />', '<img src="_images/other.png">'
    context = {"body": " ".join(pictures)}
    figures.mark(app, "page", "page.html", context, tree)
    marked, other = context["body"].split("> ")
    [width] = re.findall(r'src="../_images/hash.png" style="--least: (\d+)px" /', marked)
    assert int(width) / 10 * 9 / 72 >= 7  # px of a letter of 9 points
    assert other == pictures[1]
