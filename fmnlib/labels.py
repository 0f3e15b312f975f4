"""Find wrong training labels: those that a mixture of the run's checkpoints contradicts.

A network learns most right labels before it memorises the wrong ones; then it forgets its correct
predictions for their images. A mixture with earlier epochs, run once over the unaugmented training
images, therefore contradicts wrong labels, though all of its networks were trained on them.
"""

import base64
import dataclasses
import functools
import html
import io
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from fmnlib.config import InputError
from fmnlib.fusion import Fusion, fuse
from fmnlib.record import RunRecord, as_array, as_names, check_integers
from fmnlib.tracker import as_probs, load_tracked

_SHOWN = 60  # images of the page
_SIDE = 224  # pixels of the larger ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSamples:
    """What a mixture predicts for the samples that its networks were trained on."""

    probs: Float[np.ndarray, "samples classes"]  #: Predicted by the mixture, unaugmented images
    given: Int[np.ndarray, " samples"]  #: The labels that were trained on
    files: Sequence[str] | None = None  #: Names of the samples; none where they are no files
    classes: Sequence[str] = ()  #: Names of the classes; empty where nothing gives them
    wrong: Bool[np.ndarray, " samples"] | None = None  #: Which labels are wrong, if known
    #: Function from indices of samples to their images, uint8 `[chosen, channels, height, width]`
    images: Any = None


def suspects(
    probs: Any, labels: Any, *, files: Sequence[str] | None = None, classes: Sequence[str] = ()
) -> pd.DataFrame:
    """Rank training labels, the most suspicious first.

    The score is the margin by which the strongest other class is ahead of the given one,
    max_{c != y} p_c - p_y (cleanlab's normalized margin is an affine function of it): above 0 the
    mixture predicts another class. The share of such labels estimates the noise rate.

    Args:
        probs: Probabilities of a mixture for the training samples, `[samples, classes]`.
        labels: The given labels, integers `[samples]`.
        files: Names of the samples, such as their paths.
        classes: Names of the classes, in order; by default their numbers.

    Returns:
        One row per sample: index, file (if given), given, suggested, score.

    Raises:
        InputError: If shapes or names do not fit.

    >>> table = suspects([[0.75, 0.25], [0.75, 0.25]], [0, 1])
    >>> table["index"].tolist(), table["suggested"].tolist(), table["score"].tolist()
    ([1, 0], [0, 1], [0.5, -0.5])
    """
    p, given = as_probs(probs, "probs"), as_array(labels)
    check_integers("labels", given, p.shape[:1], p.shape[1])
    if classes and len(classes) != p.shape[1]:
        raise InputError(f"{len(classes)} names of {p.shape[1]} classes; give each its name")
    names = as_names("files", files, len(p))
    rows = np.arange(len(p))
    others = p.copy()
    others[rows, given] = -1
    suggested = others.argmax(axis=1)
    score = others[rows, suggested] - p[rows, given]
    columns: dict[str, Any] = {"index": rows}
    columns |= {} if names is None else {"file": names}
    for column, values in (("given", given), ("suggested", suggested)):
        columns[column] = np.array(classes)[values] if classes else values
    table = pd.DataFrame(columns | {"score": score})
    return table.sort_values("score", ascending=False, kind="stable", ignore_index=True)


def noise_rate(table: pd.DataFrame) -> float:
    """The estimated share of wrong labels of a table that `suspects` made."""
    return float((table["score"] > 0).mean())


def detection(table: pd.DataFrame, wrong: Bool[np.ndarray, " samples"]) -> dict[str, float]:
    """How well a ranking finds the labels that are known to be wrong.

    Returns:
        The area under the ROC curve, and the precision among the labels of score above 0; empty
        if all labels are right, all are wrong, or no score is above 0.
    """
    from sklearn.metrics import roc_auc_score

    ranked = wrong[table["index"]]
    count = int((table["score"] > 0).sum())
    if ranked.all() or not ranked.any() or not count:
        return {}
    auroc = float(roc_auc_score(ranked, table["score"]))
    return {"AUROC": auroc, "precision": float(ranked[:count].mean())}


def of_run(folder: Path, record: RunRecord, fusion: Fusion, device: str) -> TrainingSamples:
    """The training samples of a run of `fmn train`."""
    from fmnlib.data import load
    from fmnlib.distillation import load_network, members_of, predict_views
    from fmnlib.training import pick_device

    assert record.config is not None
    config, data = record.config, load(record.config, pick_device(device))
    members = members_of(config, folder, fusion)
    networks = [(load_network(member, data), member.weight) for member in members]
    [probs] = predict_views(config, data, networks)  # one view: the images as they are
    images = data.files or data.images
    return TrainingSamples(
        probs=probs.cpu().numpy(),
        given=data.labels.cpu().numpy(),
        files=None if data.files is None else data.files.names,
        classes=() if data.files is None else data.files.classes,
        wrong=data.flipped.cpu().numpy(),
        images=functools.partial(read_images, images),
    )


def of_tracked(train: Path, fusion: Fusion) -> TrainingSamples:
    """The training samples whose outputs a second `Tracker` has noted, with the same epochs."""
    record = load_tracked(train)
    files = None if record.ids is None else record.ids.astype(str).tolist()
    return TrainingSamples(probs=fuse(record, fusion), given=record.labels, files=files)


def page(samples: TrainingSamples, table: pd.DataFrame, *, title: str) -> str:
    """The most suspicious images beside their labels, as one HTML page."""
    from fmnlib.report import PAGE

    top = table[table["score"] > 0].head(_SHOWN)
    images = samples.images(top["index"].to_numpy()) if len(top) else []
    cells = [_card(row, image) for row, image in zip(top.to_dict("records"), images, strict=True)]
    share = f"About {noise_rate(table):.1%} of {len(table)} labels look wrong"
    body = f"""<style>ol {{ display: grid; grid-template-columns: repeat(auto-fill, 8rem);
  gap: 1rem; padding: 0; list-style: none; }} li img {{ width: 8rem; image-rendering: pixelated; }}
</style>
<p>{share}: the mixture of the run's networks predicts another class for their images. The
{len(top)} that it believes least:</p>
<ol>{"".join(cells)}</ol>"""
    return PAGE.format(title=html.escape(title), body=body)


def _card(row: Mapping[Hashable, Any], image: np.ndarray) -> str:
    from PIL import Image

    given, suggested = (html.escape(str(row[column])) for column in ("given", "suggested"))
    name = html.escape(str(row.get("file", row["index"])))
    picture = Image.fromarray(image.transpose(1, 2, 0).squeeze())
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    alt = f"Training sample {name}"
    words = f"given <b>{given}</b><br>suggested <b>{suggested}</b><br><small>{name}</small>"
    return f'<li><img src="data:image/png;base64,{data}" alt="{alt}"><br>{words}</li>\n'


def read_images(images: Any, index: np.ndarray) -> np.ndarray:
    """The images at the given indices, uint8, from a tensor or from files."""
    import torch

    if isinstance(images, torch.Tensor):
        return images[torch.tensor(index, device=images.device)].cpu().numpy()
    return images[index].load().numpy()
