"""The page colours the numbers itself: at once, without a request, and in the library's colours."""

import io

import numpy as np
import pytest
from page_visit import Visit

from lrp import heatmap

PAINT = """
    const { lut } = await load("colormap"), { limitOf, paint, pool } = await load("heatmap");
    const { DEFAULT_VIEW } = await load("state");
    const map = pool({ shape: argument.shape, values: Float32Array.from(argument.values) });
    const { width, height } = map;
    const picture = { width, height, rgba: new Uint8ClampedArray(width * height * 4) };
    const view = { ...DEFAULT_VIEW, show: "heatmap", ...argument.view };
    return [...paint(map, picture, lut(argument.cmap), limitOf(map, view.clip), view)];
"""


def relevance(channels: int = 3) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    rng = np.random.default_rng(7)
    return (rng.normal(size=(channels, 21, 34)) ** 3 * 1e-4).astype(np.float32)


@pytest.mark.parametrize(
    ("control", "value"), [("opacity", 0.25), ("cmap", "puor"), ("clip", 90), ("gain", 1.5)]
)
def test_a_control_changes_the_picture_without_a_request(visit: Visit, control: str, value: object) -> None:
    visit.open().take_sample()
    before, asked = visit.pixels(), len(visit.requests)
    visit.set(control, value)
    assert not np.array_equal(visit.pixels(), before)
    assert len(visit.requests) == asked


def test_sign_view_and_reset_change_the_picture_without_a_request(visit: Visit) -> None:
    visit.open().take_sample()
    asked, overlay = len(visit.requests), visit.pixels()
    visit.choose("show", "heatmap")
    both = visit.pixels().astype(int)
    visit.choose("sign", "positive")
    positive = visit.pixels().astype(int)
    visit.choose("sign", "negative")
    negative = visit.pixels().astype(int)
    assert (positive[..., 0] == 255).all(), "nothing blue is left in bwr"
    assert (negative[..., 2] == 255).all(), "nothing red is left in bwr"
    assert np.array_equal(np.minimum(positive, negative), both)
    visit.choose("show", "image")
    image = visit.pixels()
    assert not np.array_equal(image, overlay)
    visit.page.locator("#reset-view").click()
    assert np.array_equal(visit.pixels(), overlay)
    assert len(visit.requests) == asked


def test_the_heatmap_on_screen_is_the_servers_array_in_the_librarys_colours(visit: Visit) -> None:
    visit.open()
    with visit.page.expect_response(
        lambda answer: "/explain" in answer.url and answer.headers["content-type"] == "application/x-npy"
    ) as waiting:
        visit.take_sample()
    array = np.load(io.BytesIO(waiting.value.body()), allow_pickle=False)
    visit.choose("show", "heatmap")
    expected = np.asarray(heatmap.colorize(array.sum(axis=0), cmap="bwr", clip=99.5)).astype(int)
    assert np.abs(visit.pixels().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("cmap", heatmap.COLORMAPS)
def test_colour_maps_are_the_librarys(visit: Visit, cmap: str) -> None:
    visit.open()
    array = relevance()
    for clip, gain in [(99.5, 1.0), (95.0, 0.5), (100.0, 2.0)]:
        view = {"clip": clip, "gain": gain}
        argument = {"shape": list(array.shape), "values": array.ravel().tolist(), "cmap": cmap, "view": view}
        painted = np.array(visit.imported(PAINT, argument)).reshape(21, 34, 4)[..., :3]
        expected = np.asarray(heatmap.colorize(array.sum(axis=0), cmap=cmap, clip=clip, gain=gain))
        assert np.abs(painted - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "|u1"])
def test_npy_files_are_read(visit: Visit, dtype: str) -> None:
    visit.open()
    array = (np.arange(24).reshape(2, 3, 4) * 1.25).astype(dtype)
    for version in [(1, 0), (2, 0)]:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, version=version)
        shape, values = visit.imported(
            'const { parseNpy } = await load("npy"); const a = parseNpy(new Uint8Array(argument).buffer);'
            "return [a.shape, [...a.values]];",
            list(buffer.getvalue()),
        )
        assert shape == [2, 3, 4]
        assert np.array_equal(np.array(values, np.float32), array.astype(np.float32).ravel())


def test_npy_files_that_are_cut_off_or_something_else_are_refused(visit: Visit) -> None:
    visit.open()
    buffer = io.BytesIO()
    np.save(buffer, relevance())
    whole = buffer.getvalue()
    columns = io.BytesIO()
    np.save(columns, np.asfortranarray(relevance()))
    for content, reason in [
        (whole[:-8], "cut off"),
        (b"<html>" * 9, "not a NumPy"),
        (columns.getvalue(), "column order"),
    ]:
        message = visit.imported(
            'const { parseNpy } = await load("npy");'
            "try { parseNpy(new Uint8Array(argument).buffer); } catch (error) { return error.message; }",
            list(content),
        )
        assert reason in message


def test_the_percentile_is_numpys_and_a_nearly_empty_map_keeps_its_peak(visit: Visit) -> None:
    visit.open()
    limits = """
        const { limitOf, pool } = await load("heatmap");
        const map = pool({ shape: argument.shape, values: Float32Array.from(argument.values) });
        return [50, 99.5, 100].map((q) => limitOf(map, q));
    """
    array = relevance(1)
    found = visit.imported(limits, {"shape": list(array.shape), "values": array.ravel().tolist()})
    np.testing.assert_allclose(found, np.percentile(np.abs(array), [50, 99.5, 100]), rtol=1e-5)
    lonely = np.zeros((1, 40, 40), np.float32)
    lonely[0, 3, 3] = -2
    found = visit.imported(limits, {"shape": list(lonely.shape), "values": lonely.ravel().tolist()})
    assert found == [2, 2, 2]
