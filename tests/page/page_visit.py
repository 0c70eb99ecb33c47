"""One visit to the page: what a user does there, and a record of what the page did."""

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray
from playwright.sync_api import ConsoleMessage, Page, Request

REFUSAL = "Failed to load resource"  # the browser's own note of a 4xx answer


class Visit:
    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.address = address
        self.requests: list[Request] = []
        self.complaints: list[str] = []
        self.refusals_expected = False
        page.set_default_timeout(30_000)
        page.on("request", lambda request: self.requests.append(request))
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not (self.refusals_expected and REFUSAL in message.text):
            self.complaints.append(f"console: {message.text}")

    def open(self, link: str = "") -> "Visit":
        self.page.goto(f"{self.address}/{link}")
        self.page.locator("html[data-ready=true]").wait_for(state="attached")
        return self

    def take_sample(self, place: int = 0) -> "Visit":
        self.page.locator("#samples button").nth(place).click()
        return self.settled()

    def settled(self) -> "Visit":
        """The heatmap is there, and so are the books if there are any, which come last."""
        self.page.locator("#frame[aria-busy=false]").wait_for()
        self.page.locator("#account[data-complete=true]").wait_for()
        return self

    def explain(self, place: int) -> "Visit":
        """Choose the class at this place of the list, best first."""
        self.page.locator("#classes button").nth(place).click()
        return self.settled()

    def pixels(self, selector: str = "#canvas") -> NDArray[np.uint8]:
        """[H, W, 3] of what a canvas shows."""
        encoded, width, height = self.page.locator(selector).first.evaluate(
            """canvas => {
                const { width, height } = canvas;
                const bytes = canvas.getContext("2d").getImageData(0, 0, width, height).data;
                let text = "";
                for (let i = 0; i < bytes.length; i += 8192) {
                    text += String.fromCharCode(...bytes.subarray(i, i + 8192));
                }
                return [btoa(text), width, height];
            }"""
        )
        rgba = np.frombuffer(base64.b64decode(encoded), dtype=np.uint8)
        return rgba.reshape(height, width, 4)[..., :3]

    def set(self, control: str, value: Any) -> None:
        """Move a slider or choose from a list, as a user's input would."""
        self.page.locator(f"#{control}").evaluate(
            """(control, value) => {
                control.value = value;
                control.dispatchEvent(new Event("input", { bubbles: true }));
                control.dispatchEvent(new Event("change", { bubbles: true }));
            }""",
            str(value),
        )

    def choose(self, name: str, value: str) -> None:
        self.page.locator(f'#view input[name={name}][value="{value}"] + span').click()

    def title(self) -> str:
        return self.page.locator("#stage-title").inner_text()

    def explained(self) -> list[str]:
        """The explain requests so far."""
        return [request.url for request in self.requests if "/explain" in request.url]

    def imported(self, body: str, argument: Any = None) -> Any:
        """Run a function body inside the page; `load(name)` imports one of its modules."""
        return self.page.evaluate(
            "async (argument) => { const load = (name) => import(`/static/js/${name}.js`); " + body + " }",
            argument,
        )

    def check(self) -> None:
        assert not self.complaints
        away = [r.url for r in self.requests if not r.url.startswith((self.address + "/", "blob:", "data:"))]
        assert not away, "requests left the origin"
