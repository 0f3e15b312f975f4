import dataclasses
import re
from pathlib import Path

import pytest
from torchvision.models import get_model_weights

from fmnlib import InputError, RunConfig
from fmnlib.training.recipes import read, scaled

FOLDER = Path(__file__).parent.parent / "recipes"
TEXT = (FOLDER / "README.md").read_text()
WEIGHTS = {
    "resnet50": "IMAGENET1K_V1",
    "resnet50_new": "IMAGENET1K_V2",
    "convnext_tiny": "IMAGENET1K_V1",
    "vit_b_16": "IMAGENET1K_V1",
    "maxvit_t": "IMAGENET1K_V1",
}
ROW = r"^\| `(\w+)\.json` \|.*?\| (\d+) \| ([\d ×a-zGPU]+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$"


def recipe(name, **changes):
    return read(FOLDER / f"{name}.json", **changes)


def test_the_table_lists_every_recipe_as_its_file_has_it():
    rows = {row[0]: row[1:] for row in re.findall(ROW, TEXT, re.MULTILINE)}
    assert set(rows) == set(WEIGHTS) == {path.stem for path in FOLDER.glob("*.json")}
    for name, (epochs, published_on, batch, lr, _) in rows.items():
        config = recipe(name)
        assert (config.epochs, config.batch_size) == (int(epochs), int(batch))
        assert config.lr == float(lr)
        product = 1
        for number in re.findall(r"\d+", published_on):
            product *= int(number)
        assert product == config.batch_size


@pytest.mark.parametrize("name", WEIGHTS)
def test_evaluation_is_that_of_torchvisions_weights(name):
    config = recipe(name)
    weights = get_model_weights(config.model.removeprefix("torchvision:"))[WEIGHTS[name]]
    steps = weights.transforms()
    assert [config.eval_size, config.eval_resize] == [*steps.crop_size, *steps.resize_size]
    assert config.interpolation == steps.interpolation.value
    published = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    listed = float(re.search(rf"`{name}.json`.* ([\d.]+) \|$", TEXT, re.MULTILINE)[1])
    if name == "resnet50_new":  # torchvision's weights add repeated augmentation
        assert listed < published
    else:
        assert listed == published


@pytest.mark.parametrize("name", sorted(set(WEIGHTS) - {"resnet50"}))
def test_the_moving_average_forgets_as_fast_as_in_the_published_script(name):
    config = recipe(name)
    every_32_steps = 1 - (1 - 0.99998) * 32 * config.batch_size / config.epochs
    assert config.ema**32 == pytest.approx(every_32_steps, abs=1e-6)


def test_another_batch_scales_as_the_table_says():
    names, *rows = re.findall(r"^\| (?:batch|\d+) \| .*\|$", TEXT, re.MULTILINE)
    columns = [re.findall(r"`(\w+)`", cell) for cell in names.split("|")[2:-1]]
    assert {name for column in columns for name in column} == set(WEIGHTS)
    for row in rows:
        batch, *rates = (float(cell) for cell in row.split("|")[1:-1])
        for column, rate in zip(columns, rates, strict=True):
            for name in column:
                config = recipe(name, batch_size=int(batch))
                assert (config.lr, config.batch_size) == (pytest.approx(rate), batch)


def test_scaling_there_and_back_changes_nothing():
    config = recipe("maxvit_t")
    half = scaled(config, 2048)
    assert half.lr_min == pytest.approx(5e-6)
    assert 1 - half.ema == pytest.approx((1 - config.ema) / 2, rel=1e-3)
    back = scaled(half, 4096)
    assert dataclasses.replace(back, ema=config.ema) == config
    assert back.ema == pytest.approx(config.ema, abs=1e-12)


def test_what_is_given_goes_before_what_is_scaled():
    config = recipe("resnet50", batch_size=64, lr=0.3, dataset="stream:elsewhere", seed=2)
    assert (config.lr, config.batch_size, config.seed) == (0.3, 64, 2)
    assert config.dataset == "stream:elsewhere"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "is no recipe .*; give JSON"),
        ("{", "is no recipe"),
        ("[1]", "is no recipe"),
        ('{"epoch": 3}', "no setting 'epoch'; did you mean epochs"),
    ],
)
def test_bad_recipes_are_told_in_one_line(tmp_path, text, told):
    if text is not None:
        (tmp_path / "bad.json").write_text(text)
    with pytest.raises(InputError, match=told) as error:
        read(tmp_path / "bad.json")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="lr is -1"):
        recipe("resnet50", lr=-1.0)
    assert recipe("resnet50") == RunConfig(**dataclasses.asdict(recipe("resnet50")))
