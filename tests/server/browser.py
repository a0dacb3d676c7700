"""A person at the playground: a browser, if this machine has one, and what is done and seen in it."""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from open_mythos.server.playground import playground

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
TOKENS = 24
"""Of an answer, unless a test says otherwise."""

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW = "see 'Tests' in CONTRIBUTING.md"


@contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium: the one on PATH, else the one that Playwright has installed; the test is skipped without."""
    api = pytest.importorskip("playwright.sync_api", reason=f"Playwright is not installed; {HOW}")
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = next(filter(None, map(shutil.which, NAMES)), own)
        if not Path(found).exists():
            pytest.skip(f"there is no Chromium; {HOW}")
        # Chromium's sandbox refuses to run for root, as which containers often run.
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=found, args=args)
        yield chromium
        chromium.close()


class Visit:
    """A page with the playground, and everything that it asked for and complained of."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.complaints: list[str] = []
        self.asked: list[Any] = []
        page.clock.install()
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request))
        self.headers = page.goto(url).headers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.page, name)

    def ready(self) -> "Visit":
        self.page.locator("#facts dd").first.wait_for()
        return self

    def ask(self, prompt: str = "She had been", **fields: Any) -> None:
        """Fill the form in and press the button."""
        self.page.locator("#settings").evaluate("settings => { settings.open = true }")
        self.page.fill("#prompt", prompt)
        for name, value in {"max-tokens": TOKENS, **fields}.items():
            if name == "exit":
                self.page.select_option("#exit", value)
            elif name.startswith("loops"):
                self.slide(name, value)
            else:
                self.page.fill(f"#{name}", str(value))
        self.page.click("#send")

    def slide(self, name: str, to: int) -> None:
        """Move a slider with the arrow keys."""
        slider = self.page.locator(f"#{name}")
        steps = to - int(slider.input_value())
        for _ in range(abs(steps)):
            slider.press("ArrowRight" if steps > 0 else "ArrowLeft")
        assert slider.input_value() == str(to)

    def skip(self, seconds: int) -> None:
        """Let the page's clock jump on, so that it looks at the engine again."""
        self.page.clock.fast_forward(1000 * seconds)

    def wait(self) -> None:
        """Until the answers have ended."""
        self.page.locator("body:has(#stop:disabled) .pane").first.wait_for()

    def pieces(self, pane: int = 0) -> list[str]:
        return self.page.locator(".tokens").nth(pane).locator("span").evaluate_all("all => all.map(e => e.textContent)")

    def loops(self, pane: int = 0) -> list[int]:
        titles = self.page.locator(".tokens").nth(pane).locator("span").evaluate_all("all => all.map(e => e.title)")
        return [int(title.split()[0]) for title in titles]

    def facts(self, selector: str) -> dict[str, str]:
        cells = self.page.locator(f"{selector} dt, {selector} dd").all_inner_texts()
        return dict(zip(cells[::2], cells[1::2], strict=True))

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.post_data) for request in self.asked if request.method == "POST"]

    def direct(self, body: dict[str, Any]) -> dict[str, Any]:
        """The same request without a stream and without the page."""
        chat = "messages" in body
        body = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
        path = "v1/chat/completions" if chat else "v1/completions"
        answer = self.page.request.post(self.url + path, data=body)
        assert answer.ok, answer.text()
        return answer.json()["choices"][0]


@contextmanager
def visits(chromium: Any, url: str, complaints: tuple[str, ...] = ()) -> Iterator[Callable[..., Visit]]:
    seen, contexts = [], []

    def open_page(viewport: dict[str, int] = DESKTOP, **options: Any) -> Visit:
        contexts.append(chromium.new_context(viewport=viewport, **options))
        contexts[-1].set_default_timeout(20_000)
        seen.append(Visit(contexts[-1].new_page(), url))
        return seen[-1]

    yield open_page
    for one in seen:
        assert one.headers["content-security-policy"] == playground()[1]["Content-Security-Policy"]
        assert not [text for text in one.complaints if not any(known in text for known in complaints)]
        hosts = {urlsplit(request.url).netloc for request in one.asked if not request.url.startswith("data:")}
        assert hosts == {urlsplit(url).netloc}
    for context in contexts:
        context.close()


def stream(*chunks: dict[str, Any] | str) -> Callable[[Any], None]:
    """A route that answers with these events."""
    body = "".join(f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n" for chunk in chunks)
    return functools.partial(fulfill, status=200, content_type="text/event-stream", body=body)


def fulfill(route: Any, **answer: Any) -> None:
    route.fulfill(**answer)


def chunk(*pieces: str, loops: int = 1) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "".join(pieces), "pieces": pieces, "loops": [loops] * len(pieces)}]}


def check_shades(one: Visit) -> None:
    """A shade for each number of loops, in order, and text that can be read on all of them."""
    drawn = one.evaluate("""() => {
        const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const rgb = (colour) => {
            brush.fillStyle = colour;
            brush.fillRect(0, 0, 1, 1);
            return [...brush.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        };
        const back = (element) => rgb(getComputedStyle(element).backgroundColor);
        const tokens = [...document.querySelectorAll(".tokens span")].map((e) => [parseInt(e.title), back(e)]);
        const ink = [...document.querySelectorAll(".tokens span")].flatMap((e) =>
            [null, "::before"].map((part) => rgb(getComputedStyle(e, part).color)));
        return { ink, card: back(document.querySelector(".pane")), tokens,
            legend: [...document.querySelectorAll(".legend .cell")].map(back) };
    }""")
    inks, card = {luminance(rgb) for rgb in drawn["ink"]}, luminance(drawn["card"])
    legend = [luminance(shade) for shade in drawn["legend"]]
    distances = [abs(shade - card) for shade in legend]
    assert distances == sorted(set(distances)), "more loops do not stand out more"
    assert min(contrast(ink, shade) for ink in inks for shade in legend) >= 4.5
    assert all(shade == drawn["legend"][loops - 1] for loops, shade in drawn["tokens"])


def luminance(rgb: list[int]) -> float:
    """Relative luminance as in WCAG 2."""
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)
