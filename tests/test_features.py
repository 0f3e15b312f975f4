"""fmnlib.paper.features: the last layer, on the features, predicts what the network does."""

import dataclasses

import numpy as np
import pytest
import torch

from fmnlib import RunConfig, runs
from fmnlib.data import load
from fmnlib.distillation import Member, load_network
from fmnlib.paper import features
from fmnlib.paper.features import last_layer_inputs, pixels
from fmnlib.paper.theory import truncated_predictions
from fmnlib.training import build_model, predict

SMALL = RunConfig(noise="symmetric", noise_rate=0.4, train_samples=200, eval_samples=100, epochs=2)


@pytest.mark.parametrize("model", ["convnet", "mlp", "resnet8"])
def test_the_last_layer_of_the_features_is_the_network(model):
    config = dataclasses.replace(SMALL, model=model)
    data = load(config)
    net = build_model(config, data)
    features = last_layer_inputs(net, data, data.eval_images)
    last = [layer for layer in net.modules() if isinstance(layer, torch.nn.Linear)][-1]
    again = features @ last.weight.detach().double().numpy().T + last.bias.detach().numpy()
    logits = predict(net, data, data.eval_images).numpy()
    np.testing.assert_allclose(again, logits, atol=1e-4)
    assert not last._forward_pre_hooks


def test_pixels_are_the_images():
    images = load(SMALL).eval_images
    flat = pixels(images)
    assert flat.shape == (100, 64)
    assert (flat[3].reshape(8, 8) * 255).round().astype(int).tolist() == images[3, 0].tolist()


def test_the_record_of_a_networks_features(runs_root):
    job = features.truncated(SMALL)
    [record] = runs.obtain([job], device="cpu", progress=False)
    assert runs.folder(SMALL).joinpath("record.npz").exists()  # its network was trained first
    data = load(SMALL)
    net = load_network(Member(SMALL, runs.folder(SMALL), 1, 1.0), data)
    train, evaluated = (last_layer_inputs(net, data, x) for x in (data.images, data.eval_images))
    expected = truncated_predictions(train, data.labels.numpy(), evaluated, 10)
    np.testing.assert_array_equal(record.predicted, expected)
    np.testing.assert_array_equal(record.labels, data.eval_labels)
    assert record.probs is None
    assert record.config == job.config
    assert record.epochs <= 129
    [again] = runs.obtain([job], device="cpu", progress=False)
    np.testing.assert_array_equal(again.predicted, expected)
