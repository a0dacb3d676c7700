"""The playground as a person uses it: in a browser, against a server with a tiny model."""

import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.server.playground import FILE, playground
from open_mythos.tokenization.tokenizer import ByteTokenizer
from tests.models import scaled, tiny
from tests.server.browser import DESKTOP, PHONE, TOKENS, Visit, check_shades, chunk, fulfill, stream, visits
from tests.server.browser import browser as open_browser


class NoEnd(ByteTokenizer):
    """Lets answers go on until `max_tokens`."""

    eos_id = None


@contextmanager
def tiny_server(key: str | None = None, max_seq_len: int = 2048, **changes: Any) -> Iterator[str]:
    """The address of a server with a tiny model, in this process."""
    from tests.server.served import serving

    def make() -> Engine:
        model = scaled(tiny(vocab_size=259, max_seq_len=max_seq_len, max_output_tokens=2000, **changes))
        return Engine(model, NoEnd(), EngineConfig(max_rows=4, max_queue=8, kv_tokens=8192))

    with serving(key, make, max_rows=4) as served:
        yield f"{served.url}/"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with open_browser() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def server(chromium: Any) -> Iterator[str]:
    with tiny_server() as url:
        yield url


@pytest.fixture(scope="module")
def guarded(chromium: Any) -> Iterator[tuple[str, str]]:
    with tiny_server("a-key") as url:
        yield url, "a-key"


@pytest.fixture
def visit(chromium: Any, server: str) -> Iterator[Callable[..., Visit]]:
    """Opens the playground; in the end nothing may have been complained of, nor asked of another host."""
    with visits(chromium, server) as open_page:
        yield open_page


# What needs no browser.


def test_page_asks_for_nothing_from_elsewhere_and_sets_text_as_text() -> None:
    text = FILE.read_text("utf-8")
    assert len(text.splitlines()) <= 495
    assert set(re.findall(r"https?://[^\"'`\s]*", text)) == {"http://www.w3.org/${vector"}  # names, not addresses
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\bstyle=|\son\w+=|@import|url\(", text
    )
    assert not re.search(r"localStorage|document\.cookie", text)


def test_policy_allows_this_script_and_this_style_only() -> None:
    policy = playground()[1]["Content-Security-Policy"]
    assert "unsafe" not in policy and "*" not in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "connect-src 'self'" in policy


# Asking.


@pytest.mark.parametrize(
    ("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop-light", "phone-dark"]
)
def test_answer_streams_and_every_token_is_shaded(visit: Callable, viewport: dict, scheme: str) -> None:
    one = visit(viewport, color_scheme=scheme).ready()
    one.evaluate("""() => {
        window.batches = [];
        const look = () => batches.push([stop.disabled, document.querySelectorAll(".tokens span").length]);
        new MutationObserver(look).observe(answers, { subtree: true, childList: true });
    }""")
    more = {"min-loops": 2, "top-k": 200, "top-p": 0.99, "max-tokens": 3 * TOKENS}
    one.ask("She had been", exit="kl", threshold=0.03, seed=7, **more)
    one.wait()
    while_running = {n for over, n in one.evaluate("batches") if not over}
    assert len(while_running) > 3, "the answer did not come bit by bit"
    (body,) = one.bodies()
    assert (body["exit"], body["exit_threshold"], body["seed"], body["max_tokens"]) == ("kl", 0.03, 7, 3 * TOKENS)
    assert (body["min_loops"], body["top_k"], body["top_p"]) == (2, 200, 0.99)
    whole = one.direct(body)
    assert one.pieces() == whole["pieces"] and "".join(one.pieces()) == whole["text"]
    assert one.loops() == whole["loops"] and len(set(one.loops())) > 1
    told = one.facts(".pane")
    assert (told["Tokens"], told["Total loops"]) == (str(3 * TOKENS), str(sum(whole["loops"])))
    assert float(told["Mean loops"]) == pytest.approx(sum(whole["loops"]) / (3 * TOKENS), abs=0.005)
    check_shades(one)
    assert one.locator(".chart path:not(.top)").count() == len(set(whole["loops"]))
    assert f"{3 * TOKENS} tokens" in one.locator(".chart svg").get_attribute("aria-label")
    assert one.evaluate("document.documentElement.scrollWidth") == viewport["width"], "it scrolls sideways"


def test_a_token_tells_its_loops_to_pointer_and_finger(visit: Callable) -> None:
    one = visit(PHONE, has_touch=True).ready()
    chunks = chunk("Anne", loops=3), chunk(" was", loops=1), chunk("\n", loops=4)
    one.route("**/v1/completions", stream(*chunks, "[DONE]"))
    one.ask()
    one.wait()
    one.locator(".tokens span").nth(1).tap()
    assert one.locator(".told").inner_text() == 'Token 2 of 3: " was", 1 loop'
    one.locator(".tokens span").nth(0).hover()
    assert one.locator(".told").inner_text() == 'Token 1 of 3: "Anne", 3 loops'
    check_shades(one)  # the sign of a line break too
    one.emulate_media(forced_colors="active")
    check_shades(one)


def test_two_depths_answer_the_same_prompt_with_the_same_seed(visit: Callable) -> None:
    one = visit().ready()
    assert not one.locator("#loops2").is_visible()
    one.check("#compare")
    one.ask(loops=4, loops2=1)
    one.wait()
    first, second = one.bodies()
    assert (first.pop("n_loops"), second.pop("n_loops")) == (4, 1)
    assert first == second and isinstance(first["seed"], int)
    for pane, n_loops in enumerate((4, 1)):
        whole = one.direct({**first, "n_loops": n_loops})
        assert (one.pieces(pane), one.loops(pane)) == (whole["pieces"], whole["loops"])
    same = next(i for i, (a, b) in enumerate(zip(one.pieces(0), one.pieces(1), strict=True)) if a != b)
    told = f"are the same for {same} token" if same else "differ from the first token on"
    assert told in one.locator("#differ").inner_text()
    # The charts share their scale, so that heights and shades can be compared.
    assert one.locator(".chart .y span:first-child").all_inner_texts() == ["4", "4"]


def test_model_without_a_loop_answers_too(chromium: Any) -> None:
    with tiny_server(recurrent_layers=0) as url, visits(chromium, url) as open_page:
        one = open_page().ready()
        assert one.locator("#loops").is_disabled() and one.locator("#exit option").count() == 1
        one.ask()
        one.wait()
        assert one.loops() == [0] * TOKENS and "n_loops" not in one.bodies()[-1]


def test_a_short_context_is_not_overrun_by_what_the_page_asks_for(chromium: Any) -> None:
    with tiny_server(max_seq_len=32) as url, visits(chromium, url) as open_page:
        one = open_page().ready()
        one.fill("#prompt", "She had been")
        one.click("#send")
        one.wait()
        assert len(one.pieces()) == 16


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_the_answer_here_and_in_the_engine(visit: Callable, how: str) -> None:
    one = visit().ready()
    one.ask(**{"max-tokens": 1900})
    one.locator(".tokens span").nth(5).wait_for(state="attached")
    one.click("#stop") if how == "button" else one.keyboard.press("Escape")
    one.wait()
    assert one.locator("#status").inner_text().startswith("Stopped: ")
    assert one.facts(".pane")["Ended by"] == "you"
    assert 5 < len(one.pieces()) < 1900 and not one.locator(".problem:visible").count()
    one.skip(3)
    one.locator("#facts dd:has-text('0 of')").wait_for()
    one.ask()
    one.wait()
    assert one.locator("#status").inner_text().startswith("Done: ")


def test_everything_can_be_done_with_the_keyboard(visit: Callable) -> None:
    one = visit().ready()
    order = []
    for _ in range(40):
        one.keyboard.press("Tab")
        here, outline = one.evaluate("""() => {
            const e = document.activeElement;
            return [e.id || e.name || e.tagName, parseFloat(getComputedStyle(e).outlineWidth)];
        }""")
        if here == "BODY" or here in order:
            break
        order.append(here)
        assert outline >= 2, f"{here} does not show that it has the focus"
    wanted = [
        "mode",
        "prompt",
        "send",
        "loops",
        "compare",
        "SUMMARY",
        "max-tokens",
        "temperature",
        "top-k",
        "top-p",
        "exit",
        "min-loops",
        "seed",
        "key",
    ]
    assert order[: len(wanted)] == wanted
    one.check("#compare")
    for name in ("Loops per token, at most 4", "Loops of the second answer 2"):
        assert one.get_by_role("slider", name=name).count() == 1
    one.uncheck("#compare")
    one.focus("#prompt")
    one.keyboard.type("She had")
    one.keyboard.press("Tab")
    one.keyboard.press("Enter")
    assert one.evaluate("document.activeElement.id") in ("stop", "send")
    one.wait()
    assert one.evaluate("document.activeElement.id") == "send"
    assert one.bodies()[-1]["prompt"] == "She had"
    one.focus("#prompt")
    one.keyboard.press("Control+Enter")
    one.locator("#status:has-text('Generating.')").wait_for()
    one.wait()
    assert len(one.bodies()) == 2
    one.focus(".tokens")
    for key in ("End", "ArrowLeft", "ArrowRight", "Home", "ArrowRight"):
        one.keyboard.press(key)
    assert one.locator(".told").inner_text().startswith(f"Token 2 of {len(one.pieces())}: ")
    assert one.locator(".chosen").count() == 1


def test_chat_goes_on_with_what_was_said(visit: Callable) -> None:
    one = visit().ready()
    one.check("input[value=chat]")
    one.ask("Who was she?", system="Be brief.")
    one.wait()
    said = "".join(one.pieces())
    assert one.bodies()[-1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who was she?"},
    ]
    assert said == one.direct(one.bodies()[-1])["message"]["content"]
    assert one.input_value("#prompt") == ""
    one.route("**/v1/chat/completions", stream({"error": {"message": "no"}}))
    one.ask("Not answered")
    one.wait()
    assert one.input_value("#prompt") == "Not answered"
    one.unroute("**/v1/chat/completions")
    one.route("**/v1/chat/completions", stream(chunk("Anne"), "[DONE]"))
    one.ask("And he?")
    one.wait()
    assert [m["content"] for m in one.bodies()[-1]["messages"]] == ["Be brief.", "Who was she?", said, "And he?"]
    assert one.locator("#turns li").count() == 3
    one.click("#fresh")
    one.ask("Hello")
    one.wait()
    assert len(one.bodies()[-1]["messages"]) == 2


def test_nothing_that_is_said_becomes_markup(visit: Callable) -> None:
    bad = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    one = visit().ready()
    one.check("input[value=chat]")
    one.route("**/v1/chat/completions", stream(chunk(bad, "<b>bold</b>"), "[DONE]"))
    for _ in range(2):
        one.ask(bad)
        one.wait()
    assert one.pieces() == [bad, "<b>bold</b>"]
    assert one.locator("#turns li").all_inner_texts()[:2] == [f"You\n{bad}", f"Model\n{bad}<b>bold</b>"]
    assert one.locator("img, .tokens script, .tokens b").count() == 0


# When something is wrong.


def test_key_is_asked_for_refused_and_taken(chromium: Any, guarded: tuple[str, str]) -> None:
    url, key = guarded
    with visits(chromium, url, complaints=("401 (Unauthorized)",)) as open_page:
        one = open_page()
        one.locator("#notice:has-text('needs a key')").wait_for()
        assert one.evaluate("document.activeElement.id") == "key"
        one.fill("#key", "wrong")
        one.keyboard.press("Enter")
        one.locator("#notice:has-text('does not accept this key')").wait_for()
        one.fill("#key", key)
        one.keyboard.press("Tab")
        one.ready()
        assert not one.locator("#notice").is_visible()
        one.ask()
        one.wait()
        assert len(one.pieces()) == TOKENS
        one.reload()
        one.ready()
        assert key not in one.evaluate("JSON.stringify({ ...localStorage }) + document.cookie + location.href")


WORDS = {
    400: ("temperature=-1 must be at least 0; use temperature=0", "cannot use this request"),
    413: ("the body is too large", "Shorten the prompt"),
    429: ("the queue is full", "busy. Try again in 7 seconds"),
    500: ("something broke", "failed (status 500)"),
    503: ("draining", "not ready"),
}


def test_refusals_are_told_in_words(chromium: Any, server: str) -> None:
    with visits(chromium, server, complaints=("Failed to load resource",)) as open_page:
        one = open_page().ready()
        for status, (said, words) in WORDS.items():
            body, headers = json.dumps({"error": {"message": said}}), {"Retry-After": "7"}
            answer = functools.partial(fulfill, status=status, headers=headers, body=body)
            one.route("**/v1/completions", answer)
            one.ask()
            one.wait()
            told = one.locator(".pane .problem").inner_text()
            assert words in told and (said in told or status in (429, 503))
            assert one.locator("#status").inner_text().startswith("Failed")
            one.unroute("**/v1/completions")
        one.ask()
        one.wait()
        assert one.locator("#status").inner_text().startswith("Done")


def test_an_answer_that_breaks_off_is_kept_and_told(visit: Callable) -> None:
    one = visit().ready()
    for end, words in (
        ([{"error": {"message": "the engine stopped"}}], "The server said: the engine stopped"),
        ([], "ended before its end"),
        (["{half"], "connection broke"),
    ):
        one.route("**/v1/completions", stream(chunk("Anne"), *end))
        one.ask()
        one.wait()
        assert words in one.locator(".pane .problem").inner_text()
        assert one.pieces() == ["Anne"] and one.facts(".pane")["Ended by"] == "an error"
        one.unroute("**/v1/completions")


def test_server_that_is_away_is_told_and_found_again(chromium: Any, server: str) -> None:
    with visits(chromium, server, complaints=("ERR_FAILED",)) as open_page:
        one = open_page().ready()
        one.route("**/v1/**", lambda route: route.abort())
        one.ask()
        one.wait()
        assert "does not answer" in one.locator(".pane .problem").inner_text()
        one.skip(3)
        one.locator("#notice:has-text('does not answer')").wait_for()
        one.unroute("**/v1/**")
        one.skip(4)
        one.locator("#notice").wait_for(state="hidden")


def test_another_model_at_the_same_address_is_noticed(visit: Callable) -> None:
    one = visit().ready()
    assert one.get_attribute("#loops", "max") == "8"
    now = one.page.request.get(one.url + "v1/engine").json()
    card = one.page.request.get(one.url + "v1/models").json()["data"][0]
    other = {"id": "other", "max_loops": 6, "default_loops": 5}
    one.route("**/v1/models", lambda route: route.fulfill(json={"data": [{**card, **other}]}))
    one.route("**/v1/engine", lambda route: route.fulfill(json={**now, "max_loops": 6, "model": "other", "rules": []}))
    one.skip(3)
    one.locator("#model:has-text('other')").wait_for()
    assert (one.get_attribute("#loops", "max"), one.input_value("#loops")) == ("6", "5")
    assert one.locator("#bars > div").count() == 6 and one.locator("#exit option").count() == 1


def test_a_field_that_cannot_be_used_is_shown(visit: Callable) -> None:
    one = visit(PHONE).ready()
    one.ask(**{"max-tokens": 0})
    one.locator("#settings").evaluate("settings => { settings.open = false }")
    one.click("#send")
    assert one.evaluate("document.activeElement.id") == "max-tokens" and one.locator("#max-tokens").is_visible()
    one.fill("#max-tokens", "3")
    one.fill("#prompt", "")
    one.click("#send")
    assert one.locator("#status").inner_text() == "Type a prompt first." and not one.bodies()


# The engine.


def test_engine_is_shown_while_the_page_is(visit: Callable) -> None:
    one = visit().ready()
    now = one.page.request.get(one.url + "v1/engine").json()
    live = {**now, "rows_by_loop": [[1, 2], [4, 5]], "looping": 7, "waiting": 3, "admitted": 9, "tokens_per_s": 12.34}
    live["pages"] = {"used": 30, "reusable": 10, "free": 60, "total": 100}
    one.route("**/v1/engine", lambda route: route.fulfill(json=live))
    one.skip(3)
    one.locator("#bars > div:first-child span:has-text('2')").first.wait_for()
    assert (
        one.locator("#bars").get_attribute("aria-label")
        == "Rows by loops done: 2 rows after 1 loop, 5 rows after 4 loops"
    )
    assert one.locator("#bars > div").count() == now["max_loops"]
    told = one.facts("#engine")
    assert (told["Slots"], told["Waiting"]) == (f"9 of {now['max_rows']}", "3")
    assert (told["In the loop"], told["Tokens/s"]) == ("7", "12.3")
    assert one.locator("#pages-told").inner_text() == "Pages: 30 used, 10 reusable, of 100"

    def polls() -> int:
        return sum(request.url.endswith("v1/engine") for request in one.asked)

    hide = "value => { Object.defineProperty(document, 'hidden', { value, configurable: true }); "
    hide += "document.dispatchEvent(new Event('visibilitychange')) }"
    before = polls()
    one.skip(3)
    one.wait_for_timeout(200)
    assert polls() == before + 1
    one.evaluate(hide, True)
    for _ in range(3):
        one.skip(10)
        one.wait_for_timeout(100)
    assert polls() == before + 1
    one.evaluate(hide, False)
    one.wait_for_timeout(200)
    assert polls() == before + 2
