"""The generated images: reproducible, balanced, and with a mask that tells the truth."""

from collections import Counter

import numpy as np
import pytest

from models.zoo.dataset import generate_dataset
from models.zoo.objects import CLASSES, SIZE, Sample, batch, generate
from models.zoo.objects.geometry import Pose, fit, place, rasterize
from models.zoo.objects.sample import class_of
from models.zoo.objects.scene import background
from models.zoo.objects.shapes import DISTRACTORS, OBJECTS
from models.zoo.objects.surfaces import TEXTURES, paint_over
from models.zoo.seeds import Seed

SEED = int(Seed.TESTS)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [generate(SEED, index) for index in range(100)]


def test_a_sample_is_a_function_of_seed_and_index() -> None:
    generate(SEED, 6)  # a sample made in between must not matter
    first, second = generate(SEED, 7), generate(SEED, 7)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.mask, second.mask)
    assert first.label == second.label


@pytest.mark.parametrize("other", [(SEED, 8), (SEED + 1, 7)])
def test_other_seeds_and_indices_give_other_images(other: tuple[int, int]) -> None:
    assert not np.array_equal(generate(SEED, 7).image, generate(*other).image)


def test_shapes_and_types(samples: list[Sample]) -> None:
    for sample in samples:
        assert sample.image.shape == (SIZE, SIZE, 3)
        assert sample.image.dtype == np.uint8
        assert sample.mask.shape == (SIZE, SIZE)
        assert sample.mask.dtype == np.bool_


def test_every_run_of_ten_holds_every_class() -> None:
    for start in (0, 10, 990):
        assert sorted(class_of(SEED, index) for index in range(start, start + 10)) == list(range(10))
    labels = [class_of(SEED, index) for index in range(1000)]
    assert set(Counter(labels).values()) == {100}


def test_the_order_of_classes_differs_between_runs() -> None:
    runs = {tuple(class_of(SEED, index) for index in range(start, start + 10)) for start in range(0, 100, 10)}
    assert len(runs) == 10


def test_batch_equals_single_samples() -> None:
    images, labels, masks = batch(SEED, [3, 1])
    for row, index in enumerate((3, 1)):
        sample = generate(SEED, index)
        assert np.array_equal(images[row], sample.image)
        assert labels[row] == sample.label
        assert np.array_equal(masks[row], sample.mask)


def test_an_empty_batch_has_the_right_shapes() -> None:
    images, labels, masks = batch(SEED, [])
    assert (images.shape, labels.shape, masks.shape) == ((0, SIZE, SIZE, 3), (0,), (0, SIZE, SIZE))


def test_worker_processes_change_nothing() -> None:
    data = generate_dataset(SEED, 12, workers=2)
    images, labels, _ = batch(SEED, range(12))
    assert np.array_equal(data.images, images)
    assert np.array_equal(data.labels, labels)


def test_mask_area_is_bounded(samples: list[Sample]) -> None:
    areas = np.array([sample.mask.mean() for sample in samples])
    assert areas.min() > 0.02
    assert areas.max() < 0.45


def test_objects_lie_inside_the_image(samples: list[Sample]) -> None:
    for sample in samples:
        border = np.concatenate([sample.mask[0], sample.mask[-1], sample.mask[:, 0], sample.mask[:, -1]])
        assert not border.any()


def test_another_scene_keeps_mask_and_label() -> None:
    for index in range(10):
        one, other = generate(SEED, index), generate(SEED, index, scene_seed=SEED + 1)
        assert one.label == other.label
        assert np.array_equal(one.mask, other.mask)
        assert not np.array_equal(one.image, other.image)


def test_only_covered_pixels_change() -> None:
    """Painting an object leaves everything outside of its coverage alone, and replaces what is inside."""
    rng = np.random.default_rng(0)
    behind = background(rng, SIZE)
    for name, shape in OBJECTS.items():
        patch = rasterize(place(fit(shape(rng)), Pose(64.0, 64.0, 40.0, 1.0)), SIZE)
        changed = (paint_over(behind, (patch,), rng, light=0.5) != behind).any(axis=0)
        coverage = np.zeros((SIZE, SIZE), dtype=np.float32)
        coverage[patch.window] = patch.coverage
        assert not changed[coverage == 0].any(), name
        assert changed[coverage >= 0.5].mean() > 0.99, name


@pytest.mark.parametrize("index", range(5))
def test_the_image_has_its_edges_where_the_mask_has(index: int) -> None:
    """Over many scenes, neighbouring pixels differ most across the outline of the mask."""
    outline = (mask := generate(SEED, index).mask) ^ np.roll(mask, 1, axis=1)
    steps = np.zeros((SIZE, SIZE))
    for scene in range(20):
        image = generate(SEED, index, scene_seed=1000 + scene).image.astype(float)
        steps += np.abs(image - np.roll(image, 1, axis=1)).mean(axis=2)
    assert steps[outline].mean() > 1.5 * steps[~outline].mean()


def test_colours_do_not_tell_the_class() -> None:
    """The mean colour of the objects is the same for all classes, up to chance."""
    per_class: dict[int, list[np.ndarray]] = {label: [] for label in range(len(CLASSES))}
    for index in range(300):
        sample = generate(SEED, index)
        per_class[sample.label].append(sample.image[sample.mask].mean(axis=0))
    means = np.array([np.mean(tones, axis=0) for tones in per_class.values()])
    spread = np.std([tone for tones in per_class.values() for tone in tones], axis=0)
    # The mean of 30 images strays by spread / sqrt(30); four times that is beyond chance.
    assert (np.abs(means - means.mean(axis=0)) < 4.0 * spread / np.sqrt(30)).all()


@pytest.mark.parametrize("name", [*OBJECTS, *DISTRACTORS])
def test_every_shape_fits_the_unit_circle(name: str) -> None:
    shape = {**OBJECTS, **DISTRACTORS}[name]
    for seed in range(20):
        outline = fit(shape(np.random.default_rng(seed)))
        reach = np.sqrt((np.concatenate(outline.rims) ** 2).sum(axis=1))
        assert reach.max() == pytest.approx(1.0)


@pytest.mark.parametrize("name", list(TEXTURES))
@pytest.mark.parametrize("size", [(5, 9), (90, 40)])
def test_every_texture_is_a_field_in_range(name: str, size: tuple[int, int]) -> None:
    field = TEXTURES[name](np.random.default_rng(0), *size)
    assert field.shape == size
    assert field.dtype == np.float32
    assert -0.2 <= field.min() <= field.max() <= 1.2


def test_coverage_measures_the_area() -> None:
    """A disc of radius 20 covers its area, wherever it lies on the pixel grid."""
    disc = fit(DISTRACTORS["disc"](np.random.default_rng(0)))
    for shift in (0.0, 0.25, 0.6):
        patch = rasterize(place(disc, Pose(60.0 + shift, 50.0 - shift, 20.0, 0.3)), SIZE)
        assert patch.coverage.sum() == pytest.approx(np.pi * 20.0**2, rel=0.02)


def test_shapes_are_clipped_at_the_border() -> None:
    disc = fit(DISTRACTORS["disc"](np.random.default_rng(0)))
    patch = rasterize(place(disc, Pose(0.0, 127.0, 10.0, 0.0)), SIZE)
    rows, columns = patch.window
    assert (rows.start, columns.start) >= (0, 0)
    assert rows.stop <= SIZE
    assert columns.stop <= SIZE
    assert np.zeros((SIZE, SIZE))[patch.window].shape == patch.coverage.shape
