"""fmnlib.config: the id names every field, and bad input is told in one line."""

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from fmnlib import InputError, RunConfig
from fmnlib.config import PROFILES, StudentConfig

BASE = RunConfig(noise="symmetric", noise_rate=0.4)
FIELDS = [field.name for field in dataclasses.fields(RunConfig)]


@pytest.fixture(autouse=True)
def no_type_checker(monkeypatch):
    """Let the config itself tell of wrong types, as it does outside the tests."""
    monkeypatch.setattr(RunConfig, "__init__", inspect.unwrap(RunConfig.__init__))


def changed(name):
    """Another allowed value of a field of BASE."""
    kind, value = get_type_hints(RunConfig)[name], getattr(BASE, name)
    if name == "keep":
        return (1, 2)
    if name == "loss_parameters":
        return (0.5,)
    if name in ("resize", "keep_best"):
        return 40
    if name == "validation_half":
        return "added:0"
    if name == "student":
        return StudentConfig(teacher="kf")
    if choices := get_args(kind):
        return next(choice for choice in choices if choice != value)
    if kind is bool:
        return not value
    others = {int: lambda: value + 1, float: lambda: value / 2 + 0.1, str: lambda: "asymmetric"}
    return others[kind]()


@pytest.mark.parametrize("name", FIELDS)
def test_the_id_changes_with_every_field(name):
    base = dataclasses.replace(BASE, loss="gce") if name == "loss_parameters" else BASE
    other = dataclasses.replace(base, **{name: changed(name)})
    assert other.id != base.id
    assert other.id.rpartition("-")[2] != base.id.rpartition("-")[2]
    assert RunConfig.from_dict(other.changes()) == other
    assert RunConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(other)))) == other


def test_the_id_is_the_same_in_another_process():
    code = "from fmnlib import RunConfig; print(RunConfig(noise='symmetric', noise_rate=0.4).id)"
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        shown = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
        assert shown.strip() == BASE.id


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "digits-convnet-clean-s0"),
        ({"noise": "asymmetric", "noise_rate": 0.2}, "digits-convnet-asym20-s0"),
        ({"noise": "symmetric", "noise_rate": 0.29}, "digits-convnet-sym29-s0"),
        ({"noise": "symmetric", "noise_rate": 0.125}, "digits-convnet-sym12.5-s0"),
        ({"noise": "human", "seed": 12}, "digits-convnet-human-s12"),
        ({"noise": "matrix:a/b.csv"}, "digits-convnet-matrix-s0"),
        ({"dataset": "folder:pets/", "model": "torchvision:vit"}, "pets-torchvision_vit-clean-s0"),
        ({"dataset": "folder:/data/my/pets"}, "pets-convnet-clean-s0"),
        ({"student": StudentConfig(teacher="kf")}, "digits-convnet-clean-kf-s0"),
    ],
)
def test_the_id_reads_as_the_run(fields, name):
    readable, _, digest = RunConfig(**fields).id.rpartition("-")
    assert readable == name
    assert re.fullmatch("[0-9a-f]{8}", digest)


def test_an_integer_is_the_same_as_its_float():
    whole = RunConfig(lr=1, width=2)
    assert (type(whole.lr), type(whole.width)) == (float, float)
    assert whole.id == RunConfig(lr=1.0, width=2.0).id


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": "60"}, "epochs is '60'; it must be of type int"),
        ({"epochs": 60.0}, "epochs is 60.0; it must be of type int"),
        ({"epochs": True}, "epochs is True; it must be of type int"),
        ({"lr": "0.1"}, "lr is '0.1'; it must be of type float"),
        ({"lr": None}, "lr is None; it must be of type float"),
        ({"dataset": 10}, "dataset is 10; it must be of type str"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; choose one of sgd, adamw"),
        ({"resize": 8, "image_size": 32}, "resize is 8 and image_size is 32; make resize 0 or at"),
        ({"schedule": 1}, "schedule is 1; choose one of cosine, step, constant, cyclic"),
        ({"epochs": 0}, "epochs is 0; allowed is at least 1"),
        ({"lr": -0.1}, "lr is -0.1; allowed is at least 0"),
        ({"lr": float("nan")}, "lr is nan; allowed is at least 0"),
        ({"lr": float("inf")}, "lr is inf; allowed is at least 0"),
        ({"momentum": 1.0}, "momentum is 1.0; allowed is at least 0 and below 1"),
        ({"student": {"soft_share": 1.5}}, "soft_share is 1.5; allowed is from 0 to 1"),
        ({"noise": "gaussian"}, "noise is 'gaussian'; allowed are none, symmetric"),
        ({"noise": "matrix:"}, "noise is 'matrix:'; allowed are none, symmetric"),
        ({"noise": "human:x"}, "noise is 'human:x'; allowed are none, symmetric"),
        (
            {"validation_half": "alone:x"},
            "validation_half is 'alone:x'; allowed are unused, added:SPLIT",
        ),
        ({"noise": "symmetric"}, "noise_rate is 0.0 with noise=symmetric; make it above 0"),
        ({"noise_rate": 0.2}, "noise_rate is 0.2 with noise=none; make it 0"),
        ({"loss": "mse"}, "loss is 'mse'; choose one of cross_entropy, gce, sce, elr, sat, ps_kd"),
        ({"loss_parameters": [1]}, "loss_parameters is (1.0,) with loss=cross_entropy; give none"),
        ({"loss": "gce", "loss_parameters": [0]}, "(0.0,) with loss=gce; give q from 0.01 to 1"),
        ({"loss": "gce", "loss_parameters": [float("nan")]}, "give q from 0.01 to 1"),
        ({"loss": "sat", "loss_parameters": [1]}, "give momentum from 0 to 1 and start from 0 to"),
        ({"loss_parameters": ["1"]}, "loss_parameters is ('1',); give a tuple of numbers"),
        ({"loss_parameters": 7}, "loss_parameters is 7; give a tuple of numbers"),
        ({"loss": "elr", "label_smoothing": 0.1}, "loss is 'elr' with label_smoothing=0.1; make"),
        ({"loss": "sce", "student": {"teacher": "kf"}}, "loss is 'sce' with a student; make it"),
        ({"epoch": 3}, "a run has no setting 'epoch'; did you mean epochs?"),
        ({"learning_rte": 3}, "a run has no setting 'learning_rte'; "),
        (
            {"keep_best": 1},
            "keep_best is 1; make it 2 or more without keep, keep_every and a sche",
        ),
        (
            {"keep_best": 8, "keep_every": 2},
            "keep_best is 8; make it 2 or more without keep, keep",
        ),
        (
            {"keep_best": 8, "keep": (1,)},
            "keep_best is 8; make it 2 or more without keep, keep_ev",
        ),
        (
            {"keep_best": 8, "schedule": "constant_tail"},
            "keep_best is 8; make it 2 or more withou",
        ),
        ({"xyzzy": 3}, f"a run has no setting 'xyzzy'; known are {', '.join(FIELDS)}"),
    ],
)
def test_bad_input_is_told_in_one_line(fields, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        RunConfig.from_dict(fields)
    assert len(str(caught.value).splitlines()) == 1


def test_a_student_is_a_config():
    with pytest.raises(InputError, match="student is 'kf'; give a StudentConfig or None"):
        RunConfig(student="kf")


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.epochs = 3


def test_profiles_are_configs_and_give_way_to_changes():
    assert RunConfig.of_profile("quick") == RunConfig()
    for profile, fields in PROFILES.items():
        config = RunConfig.of_profile(profile, seed=5)
        assert {name: getattr(config, name) for name in fields} == fields
        assert config.seed == 5
        assert RunConfig.of_profile(profile, epochs=3).epochs == 3
    with pytest.raises(
        InputError, match="profile is 'fast'; choose one of quick, standard, paper"
    ):
        RunConfig.of_profile("fast")


def test_a_pipe_is_no_config(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="is not a config .it is not a file.; move its folder"):
        RunConfig.load(tmp_path / "config.json")
