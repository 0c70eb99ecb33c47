"""How the page behaves when things go wrong or slowly, with a keyboard, on a phone, and in the dark."""

from pathlib import Path

import numpy as np
from page_visit import Visit
from playwright.sync_api import Route

NAMELESS = """() => [...document.querySelectorAll("button, input, select, canvas, dialog, [role]")]
    .filter((e) => !["alert", "status"].includes(e.role))
    .filter((e) => !(e.labels?.length || e.getAttribute("aria-label") || e.getAttribute("aria-labelledby")
        || e.textContent.trim() || e.querySelector("img[alt]:not([alt=''])")))
    .map((e) => e.outerHTML)"""


def test_a_file_that_is_no_image_gives_a_readable_problem_and_loses_nothing(visit: Visit) -> None:
    visit.open().take_sample()
    title, pixels = visit.title(), visit.pixels()
    visit.refusals_expected = True
    visit.page.locator("#image-file").set_input_files(
        {"name": "notes.png", "mimeType": "image/png", "buffer": b"These are only notes.\n" * 20}
    )
    problem = visit.page.locator("#problem")
    problem.wait_for()
    assert len(problem.locator("strong").inner_text()) > 5
    assert len(problem.locator("p").inner_text()) > 20
    assert "undefined" not in problem.inner_text()
    assert visit.title() == title
    assert np.array_equal(visit.pixels(), pixels)
    visit.explain(1)
    assert problem.is_hidden()
    assert visit.title() != title


def test_a_file_that_is_no_network_gives_a_readable_problem_and_loses_nothing(
    visit: Visit, tmp_path: Path
) -> None:
    text = tmp_path / "notes.onnx"
    text.write_text("These are only notes.\n" * 20)
    visit.open().take_sample()
    networks = visit.page.locator("#networks .network").count()
    visit.refusals_expected = True
    visit.page.locator("#upload-box summary").click()
    visit.page.locator("#network-file").set_input_files(text)
    problem = visit.page.locator("#problem")
    problem.wait_for(timeout=120_000)
    assert len(problem.inner_text()) > 40
    assert visit.page.locator("#upload-progress").is_hidden()
    assert visit.page.locator("#networks .network").count() == networks
    visit.explain(1)


def test_a_server_that_is_gone_is_said_so(visit: Visit) -> None:
    visit.open().take_sample()
    visit.refusals_expected = True
    visit.page.route("**/explain*", lambda route: route.abort())
    visit.page.locator("#classes button").nth(1).click()
    visit.page.locator("#problem", has_text="can't be reached").wait_for()
    visit.page.unroute("**/explain*")
    visit.explain(1)


def test_a_link_to_an_unknown_network_says_so_and_the_page_works(visit: Visit) -> None:
    visit.open("#model=0123456789abcdef&target=1")
    visit.page.locator("#problem", has_text="not on this server").wait_for()
    visit.take_sample()


def test_a_network_that_fails_leaves_the_one_in_use_chosen(visit: Visit, second_network: str) -> None:
    visit.open().take_sample()
    chosen = visit.page.locator("#networks input:checked")
    before, title = chosen.get_attribute("value"), visit.title()
    visit.refusals_expected = True
    visit.page.route("**/preview", lambda route: route.abort())
    visit.page.locator(f'#networks input[value="{second_network}"]').click()
    visit.page.locator("#problem").wait_for()
    assert chosen.get_attribute("value") == before
    assert visit.title() == title
    visit.page.unroute("**/preview")
    visit.explain(1)


def test_a_running_explanation_shows_progress_and_can_be_cancelled(visit: Visit) -> None:
    visit.open().take_sample()
    title, pixels = visit.title(), visit.pixels()
    held: list[Route] = []
    visit.page.route("**/explain*", lambda route: held.append(route))
    visit.page.locator("#classes button").nth(1).click()
    visit.page.locator("#busy").wait_for()
    visit.page.locator("#cancel").click()
    visit.page.locator("#busy").wait_for(state="hidden")
    assert held
    assert visit.title() == title
    assert np.array_equal(visit.pixels(), pixels)
    assert visit.page.locator("#problem").is_hidden()
    visit.page.unroute("**/explain*")
    visit.explain(1)


def test_a_stale_answer_never_overwrites_a_newer_one(visit: Visit) -> None:
    visit.open()
    order = visit.imported("""
        const { Latest } = await load("tasks");
        const latest = new Latest(), written = [], open = {};
        const task = (name) => latest.run(async (signal, commit) => {
            await new Promise((resolve) => (open[name] = resolve)); // goes on although it was aborted
            commit(() => written.push(name));
        });
        const [slow, quick] = [task("slow"), task("quick")];
        open.quick(); const second = await quick;
        open.slow(); const first = await slow;
        return [written, first, second];
    """)
    assert order == [["quick"], "superseded", "done"]


def test_the_last_of_many_quick_clicks_wins(visit: Visit) -> None:
    visit.open().take_sample()
    names = [name.strip() for name in visit.page.locator("#classes .label").all_inner_texts()]
    for place in (1, 2, 1, 2, 1):
        visit.page.locator("#classes button").nth(place).click()
    visit.page.locator("#stage-title", has_text=names[1]).wait_for()
    visit.settled()
    visit.page.wait_for_timeout(300)
    assert visit.title().startswith(names[1])


def test_a_pixel_is_read_with_the_mouse_and_the_keyboard(visit: Visit) -> None:
    visit.open().take_sample()
    readout = visit.page.locator("#readout")
    box = visit.page.locator("#canvas").bounding_box()
    assert box
    visit.page.mouse.move(box["x"] + 1, box["y"] + 1)
    assert readout.inner_text().startswith("row 0, column 0: ")
    visit.page.mouse.move(2, 2)
    assert readout.inner_text().startswith("Point at")
    visit.page.locator("#canvas").focus()
    visit.page.keyboard.press("ArrowRight")
    visit.page.keyboard.press("Shift+ArrowDown")
    assert "row 10, column 1: " in readout.inner_text()
    assert "row 10, column 1" in visit.page.locator("#live").inner_text()


def test_everything_works_with_the_keyboard_alone(visit: Visit) -> None:
    visit.open()
    visit.page.locator("#samples button").first.focus()
    visit.page.keyboard.press("Enter")
    visit.settled()
    visit.page.locator("#classes button").nth(1).focus()
    visit.page.keyboard.press("Enter")
    visit.settled()
    assert visit.page.evaluate("document.activeElement.ariaPressed") == "true", "the focus stayed"
    visit.page.locator("#view input[value=overlay]").focus()
    visit.page.keyboard.press("ArrowRight")
    assert visit.page.evaluate("document.activeElement.value") == "heatmap"
    ring = visit.page.evaluate("getComputedStyle(document.activeElement.nextElementSibling).outlineStyle")
    assert ring == "solid"


def test_every_control_has_a_name(visit: Visit) -> None:
    visit.open().take_sample()
    assert visit.page.evaluate(NAMELESS) == []


def test_a_narrow_screen_needs_no_sideways_scrolling(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": 400, "height": 800})
    visit.open().take_sample()
    visit.page.locator("#pin").click()
    visit.page.locator("#upload-box summary").click()
    visit.page.locator("#description summary").click()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 400


def test_dark_is_dark(visit: Visit) -> None:
    visit.open()
    tones = []
    for scheme in ("light", "dark"):
        visit.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        colour = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        tones.append(sum(int(part) for part in colour[4:-1].split(",")))
    assert tones[0] > 600
    assert tones[1] < 150
