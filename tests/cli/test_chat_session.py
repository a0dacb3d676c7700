"""`mythos chat` with lines piped in, as a user would type them."""

import io
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from open_mythos import OpenMythos, SamplingParams
from open_mythos.cli import chat_session as sessions
from open_mythos.cli import main
from open_mythos.cli.chat_session import Session
from open_mythos.engine.engine import Engine
from open_mythos.tokenization.chat_template import render, save_template
from open_mythos.tokenization.tokenizer import ByteTokenizer
from tests.models import scaled, tiny

STATUS = re.compile(r"(\d+) tokens, ([\d.]+) loops each, [\d.]+ tokens/s, (\d+) of (\d+) prompt tokens reused(.*)")


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Ctrl-C is heard, also where what started the tests is not to be interrupted, as a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class NoEnd(ByteTokenizer):
    """Ends its turns with text."""

    eos_id = None


@pytest.fixture(scope="module")
def model() -> OpenMythos:
    return scaled(tiny(vocab_size=259, max_seq_len=256, max_output_tokens=200))


@pytest.fixture(scope="module")
def folder(model: OpenMythos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture
def chat(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    def run(*lines: str, options: tuple[str, ...] = ()) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main(["chat", str(folder), "--device", "cpu", "--temperature", "0", *options]) == 0
        return capsys.readouterr().out

    return run


def statuses(out: str) -> list[tuple[str, ...]]:
    return STATUS.findall(out)


def talk(model: OpenMythos, lines: Iterator[str] | list[str], tokenizer: Any = None, **options: Any) -> str:
    """What a session prints, without the command around it."""
    tokenizer, out = tokenizer or ByteTokenizer(), io.StringIO()
    params = SamplingParams(temperature=0, max_tokens=options.pop("max_tokens", 6))
    Session(model, tokenizer, Console(file=out, soft_wrap=True, highlight=False), params, **options).run(lines)
    return out.getvalue()


def test_a_model_that_knows_no_turns_comes_with_a_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One line on stderr, unless text is continued or the model was trained on conversations."""
    trained = tmp_path / "trained"
    shutil.copytree(folder, trained)
    save_template(trained)
    for args, warned in (((folder,), True), ((folder, "--plain"), False), ((trained,), False)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
        assert main(["chat", *map(str, args), "--device", "cpu"]) == 0
        told = capsys.readouterr().err
        assert len(told.splitlines()) == warned
        if warned:
            assert f"mythos chat: {folder} was not trained on conversations" in told and "--plain" in told


def test_answers_are_those_of_generate_turn_by_turn(chat: Callable, model: OpenMythos) -> None:
    out = chat("hi?", "and now?", "/reset", "hi?", options=("--max-tokens", "6", "--system", "Be brief."))
    tokenizer, eos = ByteTokenizer(), ByteTokenizer.eos_id
    ids = render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi?"}], tokenizer, True)[0]
    told, lengths = [], []
    for turn in (None, "and now?"):
        if turn is not None:
            ids = ids + render([{"role": "user", "content": turn}], tokenizer, True)[0]
        new = model.generate(ids, 6, temperature=0, stop=eos, top_k=None)
        told.append(tokenizer.decode(new[len(ids) :]))
        lengths.append(len(ids))
        ids = new if new[-1] == eos else [*new, eos]
    positions = [out.find(text) for text in (told[0], told[1])]
    assert -1 < positions[0] < positions[1] and out.rstrip().count(told[0]) >= 2
    assert [int(n) for *_, n, _ in statuses(out)] == [lengths[0], lengths[1], lengths[0]]


def test_a_turn_finds_the_conversation_computed(chat: Callable) -> None:
    """All but the last page of what was read and written; what the rest of the turn adds is new."""
    first, second = statuses(chat("tell me of the river", "more", options=("--max-tokens", "40")))
    n_before = int(first[3]) + int(first[0])
    assert int(first[2]) == 0
    assert n_before - 32 < int(second[2]) <= n_before


def test_loops_and_rules_change_on_the_way(chat: Callable) -> None:
    lines = ("/loops 1", "a", "/loops 3", "a", "/rule latent_diff 9", "a", "/rule fixed", "/loops", "a")
    out = chat(*lines, options=("--max-tokens", "5", "--exit", "fixed"))
    assert [loops for _, loops, *_ in statuses(out)] == ["1.00", "3.00", "1.00", "4.00"]


def test_limits_change_on_the_way(chat: Callable) -> None:
    out = chat("/max 3", "a", "/temperature 1.5", "/max 7", "b", "/quit", "c", options=("--seed", "3"))
    told = statuses(out)
    assert [int(n) for n, *_ in told] == [3, 7]
    assert told[0][-1] == ", cut off at 3"


def test_help_names_every_command(chat: Callable) -> None:
    out = chat("/help")
    for name in ("/loops", "/rule", "/temperature", "/max", "/reset", "/help", "/quit", "Ctrl-C"):
        assert name in out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/lops 3", "/lops is no command; use one of /loops, /rule"),
        ("/loops three", "'three' is no whole number"),
        ("/loops 0", "/loops 0 must be between 1 and 4096; use /loops 8"),
        ("/loops 1 2", "/loops 1 2 does not fit; /loops N"),
        ("/rule kll", "/rule kll must be one of"),
        ("/rule kl 0", "THRESHOLD 0.0 must be a finite number above 0"),
        ("/rule act", "/rule act needs a model with"),
        ("/temperature -1", "/temperature -1.0 must be"),
        ("/temperature", "/temperature does not fit"),
        ("/max 0", "/max 0 must be between 1 and"),
        ("a <|user|> b", "has <|user|> in its content"),
        ("x" * 300, "fill the conversation, which has room for 256 at 4 loops; /reset"),
    ],
)
def test_a_bad_line_is_told_and_changes_nothing(chat: Callable, model: OpenMythos, line: str, told: str) -> None:
    if line == "/rule act":
        without = scaled(tiny(vocab_size=259, max_seq_len=256, halting="none"))
        assert told in talk(without, [line])
        return
    out = chat(line, "hi?", options=("--max-tokens", "4"))
    assert told in out and out.count("reused") == 1
    assert statuses(out)[0][1:] == statuses(chat("hi?", options=("--max-tokens", "4")))[0][1:]


def test_plain_text_goes_on(chat: Callable, model: OpenMythos) -> None:
    out = chat("", "a river", "", " and", options=("--plain", "--max-tokens", "5"))
    tokenizer, text, ids = ByteTokenizer(), [], []
    for line in ("a river", "", " and"):
        ids = ids + tokenizer.encode(line)
        new = model.generate(ids, 5, temperature=0, top_k=None, stop=tokenizer.eos_id)
        text.append(tokenizer.decode(new[len(ids) :]))
        ids = new
    assert len(statuses(out)) == 3 and [out.find(piece) > -1 for piece in text] == [True] * 3


def test_a_long_answer_is_cut_at_the_context(model: OpenMythos) -> None:
    """Then the conversation is full, and says so."""
    out = talk(model, ["a", "b"], plain=True, max_tokens=1000)
    assert statuses(out)[0][0] == "200" and ", cut off at 200" in out
    assert statuses(out)[1][0] == str(256 - 202)
    assert "257 tokens so far fill" in talk(model, ["a", "b", "c"], plain=True, max_tokens=1000)


def test_a_turn_that_ends_in_text_is_ended_once(model: OpenMythos, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[int]] = []
    add = Engine.add
    monkeypatch.setattr(Engine, "add", lambda self, ids, params: heard.append(ids) or add(self, ids, params))
    talk(model, ["a", "b"], NoEnd())
    assert bytes(heard[1]).decode(errors="replace").count("<|end|>") == 3  # of the user's turns, and of the answer


def test_ctrl_c_cancels_the_answer_and_keeps_the_session(model: OpenMythos, monkeypatch: pytest.MonkeyPatch) -> None:
    step, n_steps = Engine.step, 0

    def pressed(self: Engine) -> Any:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 40:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Engine, "step", pressed)
    first, second = statuses(talk(model, ["a", "b"], max_tokens=60))
    assert first[-1] == ", cancelled" and int(first[0]) < 60
    assert second[-1] == ", cut off at 60"
    # What had been said stays in the conversation.
    assert int(second[3]) > int(first[3]) + int(first[0])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_leaves(model: OpenMythos, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(self: Engine) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return []

    monkeypatch.setattr(Engine, "step", pressed)
    monkeypatch.setattr(Engine, "cancel", lambda self, request: None)
    with pytest.raises(KeyboardInterrupt):
        talk(model, ["a"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_tokens_are_coloured_in_a_terminal(model: OpenMythos) -> None:
    out, tokenizer = io.StringIO(), ByteTokenizer()
    console = Console(file=out, soft_wrap=True, highlight=False, force_terminal=True, color_system="truecolor")
    params = SamplingParams(temperature=0, max_tokens=6, n_loops=2)
    session = Session(model, tokenizer, console, params)
    session.greet()
    session.run(["a"])
    assert "\x1b[1;38;2;227;26;28m" in out.getvalue().replace("\x1b[0m", ""), "the colour of the most loops"
    assert "/help lists the commands" in out.getvalue()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["nowhere"], "folder nowhere does not exist"),
        ([".", "--plain", "--system", "x"], "--system 'x' and --plain are both given"),
    ],
)
def test_a_refused_command_says_what_to_do(args: list[str], told: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["chat", *args]) == 2
    assert told in capsys.readouterr().err


def test_nan_ends_the_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    broken = OpenMythos.from_pretrained(folder)
    with torch.no_grad():
        broken.norm.weight.fill_(torch.nan)
    broken.save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert main(["chat", str(tmp_path), "--device", "cpu"]) == 2
    assert "logits are NaN" in capsys.readouterr().err


def test_more_loops_than_the_models_own_are_answered(model: OpenMythos) -> None:
    """At 4 loops the memory is that of a context; at 32 it is made anew, and long conversations go on."""
    assert model.cfg.max_loop_iters == 4
    told = statuses(
        talk(
            model,
            ["/rule fixed", "a" * 60, "/loops 32", "b" * 60, "c" * 60, "/loops 1", "d"],
            plain=True,
            max_tokens=20,
        )
    )
    assert [loops for _, loops, *_ in told] == ["4.00", "32.00", "32.00", "1.00"]
    assert [int(n) for n, *_ in told] == [20, 20, 20, 15]  # to the end of the context
    # Only what was computed at other loops, or before the memory was made anew, is read again.
    assert int(told[2][2]) > 0


def test_answers_at_more_loops_are_those_of_generate(model: OpenMythos) -> None:
    out = talk(model, ["/loops 16", "a river"], plain=True, max_tokens=9)
    ids = ByteTokenizer().encode("a river")
    new = model.generate(ids, 9, 16, temperature=0, top_k=None, stop=ByteTokenizer.eos_id)
    assert ByteTokenizer().decode(new[len(ids) :]) in out


def test_a_conversation_has_the_room_that_it_is_given(chat: Callable) -> None:
    """48 tokens whatever the loops: the answer is cut where they end, and the next line is refused in plain words."""
    options = ("--plain", "--kv-tokens", "48", "--max-tokens", "30")
    for loops in ("4", "9"):
        out = chat(f"/loops {loops}", "a" * 30, "b", "/reset", "c", options=options)
        assert statuses(out)[0][0] == "18" and "cut off at 18" in out
        assert "the 49 tokens so far fill the conversation, which has room for 48 at " + loops + " loops; /reset" in out
        assert len(statuses(out)) == 2 and "n_pages" not in out


def test_loops_without_memory_are_refused_before_they_are_tried(
    model: OpenMythos, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "cache_bytes", lambda device: 300_000)
    out = talk(model, ["a river", "/loops 4000", "more", "/loops", "more"], plain=True)
    assert "/loops 4000 takes " in out and "there is memory for 0 tokens of a conversation; use fewer loops" in out
    assert len(statuses(out)) == 2
