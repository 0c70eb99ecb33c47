"""The shipped network: small, loadable, and right about images it has never seen."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from models.zoo.dataset import Dataset
from models.zoo.evaluate import measure, predict
from models.zoo.network import (
    INPUT_SHAPE,
    MEAN,
    STD,
    WEIGHTS_FILE,
    BuiltinNetwork,
    load_builtin,
    normalize,
    read_card,
)
from models.zoo.objects import CLASSES, batch
from models.zoo.samples import read_sample, sample_files
from models.zoo.seeds import Seed
from models.zoo.train import Settings, augment, train, write


@pytest.fixture(scope="module")
def network() -> BuiltinNetwork:
    return load_builtin()


@pytest.fixture(scope="module")
def unseen() -> Dataset:
    images, labels, _ = batch(Seed.TESTS, range(500))
    return Dataset(images, labels)


def test_weights_are_a_small_safetensors_file() -> None:
    assert WEIGHTS_FILE.stat().st_size <= 3_000_000
    with safe_open(WEIGHTS_FILE, framework="pt") as file:
        names = set(file.keys())
    assert names == set(BuiltinNetwork().state_dict())


def test_weights_are_finite_and_single_precision(network: BuiltinNetwork) -> None:
    for name, tensor in network.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)


def test_biases_stand_only_where_no_normalization_follows(network: BuiltinNetwork) -> None:
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(convolution.bias is None for convolution in convolutions)
    assert network.fc.bias is not None


def test_normalize_is_the_documented_one() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 4, 5, 3), dtype=np.uint8)
    expected = (image[0].transpose(2, 0, 1) / 255.0 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(
        STD, (3, 1, 1)
    )
    assert np.allclose(normalize(image)[0].numpy(), expected, atol=1e-6)


def test_unseen_images_are_named_rightly(network: BuiltinNetwork, unseen: Dataset) -> None:
    result = measure(network, unseen)
    assert result.images == 500
    assert result.accuracy >= 0.97


def test_measure_counts_mistakes(network: BuiltinNetwork, unseen: Dataset) -> None:
    """With every label moved on by one, every right answer becomes a mistake that is listed."""
    few = Dataset(unseen.images[:50], unseen.labels[:50])
    named = predict(network, few.images)
    moved = Dataset(few.images, (named + 1) % len(CLASSES))
    result = measure(network, moved)
    assert result.accuracy == 0.0
    assert sum(result.confusion.values()) == 50


def test_card_describes_the_weights(network: BuiltinNetwork) -> None:
    card = read_card()
    assert tuple(card["classes"]) == CLASSES
    assert tuple(card["input_shape"]) == INPUT_SHAPE
    assert (tuple(card["mean"]), tuple(card["std"])) == (MEAN, STD)
    assert card["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert card["evaluation"]["images"] >= 5000
    assert card["evaluation"]["accuracy"] >= 0.97
    assert set(card["evaluation"]["per_class"]) == set(CLASSES)
    seeds = {card["training"]["seed"], card["evaluation"]["seed"], int(Seed.SAMPLES), int(Seed.TESTS)}
    assert len(seeds) == 4


def test_samples_are_named_rightly(network: BuiltinNetwork) -> None:
    files = sample_files()
    assert 3 <= len({file.name for file in files}) == len(files)
    for file in files:
        sample = read_sample(file)
        assert sample.image.shape == (*INPUT_SHAPE[1:], INPUT_SHAPE[0])
        assert 0.02 < sample.mask.mean() < 0.45
        assert predict(network, sample.image[None])[0] == sample.label


def test_augmentation_keeps_shape_and_is_reproducible() -> None:
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    first, second = (augment(images, Settings(), torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.shape == images.shape
    assert torch.equal(first, second)


def test_a_short_training_run_writes_loadable_weights(tmp_path: Path, unseen: Dataset) -> None:
    few = Dataset(unseen.images[:32], unseen.labels[:32])
    trained = train(few, Settings(images=32, epochs=1, batch_size=16), torch.device("cpu"))
    write(trained, {"name": "short"}, tmp_path)
    again = load_builtin(tmp_path / "builtin.safetensors")
    x = normalize(few.images[:2])
    with torch.inference_mode():
        assert torch.equal(trained(x), again(x))


def test_evaluate_writes_json(tmp_path: Path) -> None:
    target = tmp_path / "accuracy.json"
    command = [sys.executable, "-m", "models.zoo.evaluate", "--images", "40", "--json", str(target)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert json.loads(target.read_text(encoding="utf-8"))["images"] == 40
