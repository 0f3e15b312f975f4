"""A diagnosis as one self-contained HTML page: text, tables and figures."""

import base64
import html
import io

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from fmnlib import plots, scores
from fmnlib.diagnosis import Diagnosis
from fmnlib.fusion import Fusion
from fmnlib.record import RunRecord

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 1rem/1.5 sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }}
img {{ max-width: 100%; height: auto; }}
figure {{ margin: 1.5rem 0; }}
figcaption {{ font-size: 0.9rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
.wide {{ overflow-x: auto; }}
th, td {{ text-align: right; padding: 0.1rem 0.8rem; border-bottom: 1px solid #ccc; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""


def page(record: RunRecord, diagnosis: Diagnosis, fusion: Fusion | None, *, title: str) -> str:
    """The HTML page of a diagnosis; `record` is a validation half, `fusion` its fusion or None."""
    parts = [f"<p>{html.escape(sentence)}</p>" for sentence in diagnosis.sentences]
    parts += [_forgetting(record, diagnosis)]
    parts += [_weights(fusion)] if fusion is not None else []
    options = diagnosis.table().reset_index()
    options = options.rename(columns={"gain": "gain over the final network"})
    parts += [f"<h2>What can be done</h2>\n{_wide(options)}", _classes(diagnosis)]
    return PAGE.format(title=html.escape(title), body="\n".join(parts))


def _forgetting(record: RunRecord, diagnosis: Diagnosis) -> str:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    retained = scores.retained_fraction(record.correct)
    plots.accuracy_and_retained(figure.add_subplot(), record.accuracy[None], retained[None])
    final, best = record.accuracy[-1], record.accuracy.max()
    alt = (
        f"Accuracy by epoch, at most {best:.0%} and {final:.0%} at the end, and the part of it "
        f"that the final network retains. They are widest apart at epoch {diagnosis.epoch}."
    )
    return _figure(figure, alt, "The space between the curves is what the final network forgot.")


def _weights(fusion: Fusion) -> str:
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    plots.weights(figure.add_subplot(), fusion.weights)
    chosen = [f"{w:.0%} at epoch {e}" for e, w in enumerate(fusion.weights) if w > 0]
    alt = f"Weight of each epoch's network in the fusion: {', '.join(chosen)}."
    return _figure(figure, alt, "What Knowledge Fusion mixes, chosen on the validation half.")


def _classes(diagnosis: Diagnosis) -> str:
    shown = diagnosis.classes.reset_index()
    for column in ("forgotten", "lost", "low", "high"):
        shown[column] = (100 * shown[column]).map("{:.1f}%".format)
    caption = (
        "Forgotten: the share of each class that is right after an earlier epoch and wrong at the "
        f"end. Lost: what the networks around epoch {diagnosis.around} get right of it and the "
        "last ones do not, less what only the last ones get right; with the ends of an interval "
        "that holds for all classes together."
    )
    return f"<h2>Classes</h2>\n<p>{caption}</p>\n{_wide(shown)}"


def _wide(table: pd.DataFrame) -> str:
    return f'<div class="wide">{table.to_html(index=False, border=0)}</div>'


def _figure(figure: Figure, alt: str, caption: str) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fmnlib"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(alt)}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
