"""From an image to its heatmap: samples, own files, other classes, other networks, links."""

import re
from io import BytesIO
from pathlib import Path

import numpy as np
from page_visit import Visit
from PIL import Image


def picture(side: int = 90, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (side, side + 30, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


HAND_OVER = """([name, type, bytes, kind]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
    const event = kind === "paste"
        ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true })
        : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.body.dispatchEvent(event);
}"""


def test_a_sample_shows_classes_and_a_painted_heatmap(visit: Visit) -> None:
    visit.open().take_sample()
    shares = visit.page.locator("#classes .share").all_inner_texts()
    assert len(shares) >= 2
    assert all("%" in share for share in shares)
    assert visit.page.locator("#classes button[aria-pressed=true]").count() == 1
    pixels = visit.pixels()
    assert min(pixels.shape[:2]) > 1
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_the_account_says_where_the_score_went(visit: Visit) -> None:
    visit.open().take_sample()
    words = visit.page.locator("#account").inner_text()
    assert "The score of" in words
    assert "The pixels carry" in words
    assert "kept" in words
    assert "The books close" in words


def test_another_class_is_a_new_request_and_another_picture(visit: Visit) -> None:
    visit.open().take_sample()
    before, asked = visit.pixels(), len(visit.explained())
    name = visit.page.locator("#classes .label").nth(1).inner_text().strip()
    visit.explain(1)
    assert len(visit.explained()) > asked
    assert visit.title().startswith(name)
    assert not np.array_equal(visit.pixels(), before)
    assert visit.page.locator("#classes button").nth(1).get_attribute("aria-pressed") == "true"


def test_a_class_is_found_by_index_and_by_name(visit: Visit) -> None:
    visit.open().take_sample()
    search = visit.page.locator("#class-search")
    search.fill("3")
    visit.page.locator("#class-results li").first.wait_for()
    search.press("Enter")
    visit.settled()
    third = visit.title().splitlines()[0]
    assert any("target=3" in url for url in visit.explained())
    visit.explain(0)
    search.fill(third.upper())
    search.press("Enter")
    visit.settled()
    assert visit.title().splitlines()[0] == third


def test_search_ranks_exact_before_beginning_before_within(visit: Visit) -> None:
    visit.open()
    found = visit.imported(
        """const { matches } = await load("classes");
        return argument.map((query) => matches(query, ["cat", "tomcat", "catfish", "cat"], 4));""",
        ["cat", "2", "dog", " "],
    )
    assert found == [[0, 3, 2, 1], [2], [], []]


def test_another_composite_is_asked_for_and_shown(visit: Visit) -> None:
    visit.open().take_sample()
    before = visit.pixels()
    visit.set("composite", "EpsilonPlus")
    visit.settled()
    assert any(re.search(r"composite=EpsilonPlus(&|$)", url) for url in visit.explained())
    assert "EpsilonPlus" in visit.title()
    assert not np.array_equal(visit.pixels(), before)


def test_a_parameter_of_the_composite_is_asked_for_and_shown(visit: Visit) -> None:
    visit.open().take_sample()
    visit.page.locator("#parameters-box summary").click()
    epsilon = visit.page.locator("#parameters input[name=epsilon]")
    epsilon.fill("0.1")
    epsilon.press("Tab")
    visit.settled()
    assert "epsilon=0.1" in visit.explained()[-1]
    assert "epsilon 0.1" in visit.title()
    assert "p.epsilon=0.1" in visit.page.evaluate("location.hash")
    asked = len(visit.explained())
    epsilon.fill("much")
    epsilon.press("Tab")
    assert not epsilon.evaluate("input => input.validity.valid")
    assert len(visit.explained()) == asked


def test_another_method_keeps_no_ledger_and_says_so(visit: Visit) -> None:
    visit.open().take_sample()
    before = visit.pixels()
    visit.set("method", "InputXGradient")
    visit.settled()
    assert visit.page.locator("#composite").is_hidden()
    assert "method=InputXGradient" in visit.explained()[-1]
    assert "composite" not in visit.explained()[-1]
    assert "InputXGradient" in visit.title()
    assert not np.array_equal(visit.pixels(), before)
    words = visit.page.locator("#account").inner_text()
    assert "InputXGradient keeps no ledger" in words
    assert "The score of" in words
    assert visit.page.locator("#account table").count() == 0
    visit.page.locator("#canvas").hover()
    assert "of the score" not in visit.page.locator("#readout").inner_text()
    visit.set("method", "LRP")
    visit.settled()
    assert visit.page.locator("#account table").count() == 1
    assert np.array_equal(visit.pixels(), before)


def test_a_map_of_one_channel_is_painted_from_zero_up(visit: Visit) -> None:
    visit.open().take_sample()
    visit.set("method", "GradCAM")
    visit.settled()
    visit.choose("show", "heatmap")
    pixels = visit.pixels().astype(int)
    assert (pixels[..., 0] == 255).all(), "nothing speaks against"
    assert (pixels[..., 1] < 50).any()
    assert (pixels[..., 1] > 200).any()


def test_options_of_a_method_are_checked_asked_for_and_kept_in_the_link(visit: Visit) -> None:
    visit.open().take_sample()
    visit.set("method", "Occlusion")
    visit.settled()
    visit.page.locator("#parameters-box summary").click()
    options = visit.page.locator("#parameters [name]")
    assert [options.nth(i).get_attribute("name") for i in range(4)] == [
        "window",
        "stride",
        "baseline",
        "batch",
    ]
    window = visit.page.locator("#parameters input[name=window]")
    asked = len(visit.explained())
    window.fill("wide")
    window.press("Tab")
    assert "28x14" in window.evaluate("input => input.validationMessage")
    assert len(visit.explained()) == asked
    window.fill("64x32")
    window.press("Tab")
    visit.settled()
    assert "window=64x32" in visit.explained()[-1]
    assert "Occlusion (window 64x32)" in visit.title()
    link, title, pixels = visit.page.evaluate("location.hash"), visit.title(), visit.pixels()
    assert "method=Occlusion&p.window=64x32" in link
    visit.page.goto("about:blank")
    visit.open(link).settled()
    assert visit.page.locator("#method").input_value() == "Occlusion"
    assert visit.title() == title
    assert np.array_equal(visit.pixels(), pixels)


def test_a_choice_and_bounds(visit: Visit) -> None:
    visit.open().take_sample()
    visit.set("method", "GradCAM")
    visit.settled()
    visit.page.locator("#parameters-box summary").click()
    smooth = visit.pixels()
    visit.page.locator("#parameters select[name=interpolate]").select_option("nearest")
    visit.settled()
    assert "interpolate=nearest" in visit.explained()[-1]
    assert not np.array_equal(visit.pixels(), smooth)
    found = visit.imported(
        """const { readOption } = await load("method");
        return argument.map(([type, text]) => readOption({ type, minimum: 1, maximum: 64 }, text));""",
        [["integer", "8"], ["integer", "65"], ["integer", "1.5"], ["number", "1.5"], ["number", "-1"],
         ["size", "28x14"], ["size", "x14"], ["layer", "conv1"]],
    )  # fmt: skip
    assert [entry.get("value") for entry in found] == [8, None, None, 1.5, None, "28x14", None, "conv1"]
    assert "from 1 to 64" in found[1]["wrong"]


def test_maps_by_other_methods_have_a_scale_of_their_own(visit: Visit) -> None:
    visit.open().take_sample()
    alone = visit.pixels()
    visit.page.locator("#pin").click()
    visit.set("method", "InputXGradient")
    visit.settled()
    assert visit.page.locator("#pins li").count() == 2
    assert np.array_equal(visit.pixels("#pins li:nth-child(1) canvas"), alone)
    assert np.array_equal(visit.pixels("#pins li:nth-child(2) canvas"), visit.pixels())


def test_an_image_from_a_file_a_drop_and_the_clipboard(visit: Visit) -> None:
    visit.open()
    visit.page.locator("#image-file").set_input_files(
        {"name": "mine.png", "mimeType": "image/png", "buffer": picture()}
    )
    visit.settled()
    assert "mine.png" in visit.title()
    for kind in ("drop", "paste"):
        visit.page.evaluate(HAND_OVER, [f"{kind}.jpg", "image/jpeg", list(picture(kind="JPEG")), kind])
        visit.page.locator("#stage-title", has_text=f"{kind}.jpg").wait_for()
        visit.settled()


def test_a_link_leads_to_the_same_network_class_and_composite(visit: Visit) -> None:
    visit.open().take_sample(1).explain(2)
    visit.set("composite", "EpsilonPlus")
    visit.settled()
    link, title, pixels = visit.page.evaluate("location.hash"), visit.title(), visit.pixels()
    assert re.search(r"model=\w+&target=\d+&composite=EpsilonPlus", link)
    visit.page.goto("about:blank")
    visit.requests.clear()
    visit.open(link).settled()
    assert visit.title() == title
    assert np.array_equal(visit.pixels(), pixels)


def test_a_network_is_uploaded_listed_explained_and_removed(visit: Visit, tiny_onnx: Path) -> None:
    visit.open().take_sample()
    builtin = visit.page.locator("#networks .network").count()
    visit.page.locator("#upload-box summary").click()
    visit.page.locator("#upload-options input[name=name]").fill("Tiny")
    visit.page.locator("#network-file").set_input_files(tiny_onnx)
    visit.page.locator("#networks .network", has_text="Tiny").wait_for(timeout=120_000)
    visit.page.locator("#stage-title", has_text="Tiny").wait_for()
    visit.settled()
    assert visit.pixels().shape == (24, 24, 3)
    assert visit.page.locator("#networks .network").count() == builtin + 1
    visit.page.locator("#description", has_text="folded away").wait_for()
    visit.page.locator("#description button", has_text="Layer by layer").click()
    assert "bn" in visit.page.locator("#sheet").inner_text()
    visit.page.locator("#sheet button").click()

    names = "\n".join(["oak", "beech", "birch", "maple", "pine"]).encode()
    visit.page.locator("#labels-file").set_input_files(
        {"name": "names.txt", "mimeType": "text/plain", "buffer": names}
    )
    visit.page.locator("#classes .label", has_text="beech").wait_for()
    visit.settled()

    visit.page.on("dialog", lambda dialog: dialog.accept())
    visit.page.get_by_text("Remove…").click()
    visit.page.locator("#networks .network", has_text="Tiny").wait_for(state="detached")
    visit.settled()
    assert "Tiny" not in visit.title()


def test_explanations_are_pinned_side_by_side(visit: Visit) -> None:
    visit.open().take_sample()
    visit.page.locator("#pin").click()
    visit.explain(1)
    asked = len(visit.requests)
    cards = visit.page.locator("#pins li")
    assert cards.count() == 2
    pinned, shared = (visit.pixels(f"#pins li:nth-child({place}) canvas") for place in (1, 2))
    assert np.array_equal(shared, visit.pixels()), "the stage and its card have one scale"
    visit.page.locator("#shared").uncheck()
    own = [visit.pixels(f"#pins li:nth-child({place}) canvas") for place in (1, 2)]
    assert not (np.array_equal(own[0], pinned) and np.array_equal(own[1], shared))
    visit.page.locator("#pins button").first.click()
    assert visit.page.locator("#compare").is_hidden()
    assert len(visit.requests) == asked


def test_downloads_are_the_numbers_and_the_pictures(visit: Visit, tmp_path: Path) -> None:
    visit.open().take_sample()
    saved = {}
    for kind in ("npy", "heatmap", "overlay"):
        with visit.page.expect_download() as waiting:
            visit.page.locator(f"#save-{kind}").click()
        saved[kind] = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(saved[kind])
    relevance = np.load(saved["npy"], allow_pickle=False)
    height, width, _ = visit.pixels().shape
    assert relevance.dtype == np.float32
    assert relevance.shape[-2:] == (height, width)
    with Image.open(saved["overlay"]) as overlay:
        times = overlay.width // width
        assert overlay.size == (width * times, height * times)
        assert np.array_equal(np.asarray(overlay.convert("RGB"))[::times, ::times], visit.pixels())
    visit.choose("show", "heatmap")
    with Image.open(saved["heatmap"]) as heatmap:
        assert np.array_equal(np.asarray(heatmap.convert("RGB"))[::times, ::times], visit.pixels())


DROP_ALL = """([selector, files]) => {
    const transfer = new DataTransfer();
    for (const [name, bytes] of files) transfer.items.add(new File([new Uint8Array(bytes)], name));
    const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.querySelector(selector).dispatchEvent(event);
}"""


def added(visit: Visit) -> None:
    """The network that is split is there and explained; then it is gone again."""
    visit.page.locator("#stage-title", has_text="split").wait_for(timeout=120_000)
    visit.settled()
    assert visit.pixels().shape == (24, 24, 3)
    visit.page.once("dialog", lambda dialog: dialog.accept())
    visit.page.get_by_text("Remove…").click()
    visit.page.locator("#networks .network", has_text="split").wait_for(state="detached")
    visit.settled()


def test_a_network_and_its_data_files_are_chosen_together(
    visit: Visit, split_onnx: tuple[Path, Path]
) -> None:
    visit.open().take_sample()
    visit.page.locator("#upload-box summary").click()
    visit.page.locator("#network-file").set_input_files(list(reversed(split_onnx)))
    visit.page.locator("#description details[open]", has_text="Fusion report").wait_for(timeout=120_000)
    added(visit)


def test_a_network_and_its_data_files_are_dropped_together(
    visit: Visit, split_onnx: tuple[Path, Path]
) -> None:
    visit.open().take_sample()
    files = [[file.name, list(file.read_bytes())] for file in reversed(split_onnx)]
    visit.page.evaluate(DROP_ALL, ["body", files])
    added(visit)


def test_data_files_that_are_missing_are_named(visit: Visit, split_onnx: tuple[Path, Path]) -> None:
    visit.refusals_expected = True
    visit.open()
    visit.page.locator("#upload-box summary").click()
    visit.page.locator("#network-file").set_input_files(split_onnx[0])
    visit.page.locator("#problem", has_text="split.onnx.data").wait_for(timeout=120_000)


def test_it_must_be_clear_which_file_is_the_network(
    visit: Visit, tiny_onnx: Path, split_onnx: tuple[Path, Path]
) -> None:
    visit.open()
    visit.page.locator("#upload-box summary").click()
    visit.page.locator("#network-file").set_input_files([tiny_onnx, *split_onnx])
    visit.page.locator("#problem", has_text="which file is the network").wait_for()
    assert not [request for request in visit.requests if request.method == "POST"]
