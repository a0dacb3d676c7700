"""Bits per byte against a reference that scores one token per call, in float64; and the command."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from open_mythos.assets import novel
from open_mythos.cli import main
from open_mythos.evals.bits_per_byte import bits_per_byte, cut
from open_mythos.evals.by_loops import evaluate_files, trained_context
from open_mythos.model import OpenMythos
from open_mythos.tokenization.tokenizer import BPETokenizer, ByteTokenizer, SymbolTokenizer, Tokenizer
from tests.models import scaled, tiny

TEXTS = ["It was a dark night. " * 5, "x", "Caf\u00e9, na\u00efve, \u4f60\u597d: bytes are not characters. "]


def reference(model, tokenizer: Tokenizer, text: str, context: int, **call) -> tuple[float, int, int]:
    """nats, tokens and loops of one text: a call for every token, which reads exactly what its window holds before."""
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    nats, loops = 0.0, 0
    for t in range(1, len(ids)):
        if t <= context:
            start = 0
        else:
            # The half windows behind the first whole one; the last may be cut short, and reaches back the farther.
            half = max(1, context // 2)
            end = min(context + half * math.ceil((t - context) / half), len(ids) - 1)
            start = end - context
        trace = model(torch.tensor([ids[start:t]]), trace=True, **call)
        nats -= trace.logits[0, -1].double().log_softmax(-1)[ids[t]].item()
        loops += int(trace.exit_loop[0, -1]) + 1
    return nats, len(ids) - 1, loops


@pytest.mark.parametrize(
    ("context", "call"), [(16, {}), (7, {"n_loops": 2}), (64, {"n_loops": 3, "exit": "kl", "exit_threshold": 0.3})]
)
def test_is_the_slow_reference(context: int, call: dict) -> None:
    model = scaled(tiny(vocab_size=259), dtype=torch.float64)
    tokenizer = ByteTokenizer()
    expected = [
        sum(x) for x in zip(*(reference(model, tokenizer, text, context, **call) for text in TEXTS), strict=True)
    ]
    score = bits_per_byte(model, tokenizer, TEXTS, context=context, **call)
    assert score.nats == pytest.approx(expected[0], rel=1e-10)
    assert score.n_tokens == expected[1] == score.n_bytes == sum(len(text.encode()) for text in TEXTS)
    assert score.mean_loops == expected[2] / expected[1]
    if "exit" in call:
        assert 1 < score.mean_loops < 3
    assert score.bits_per_byte == pytest.approx(expected[0] / math.log(2) / score.n_bytes)


def test_bytes_are_the_texts_and_not_the_tokens() -> None:
    tokenizer = BPETokenizer.train_from_text(novel()[:20_000], 400)
    text = novel()[30_000:30_300]
    model = scaled(tiny(vocab_size=400), dtype=torch.float64)
    score = bits_per_byte(model, tokenizer, [text], 2, context=32)
    assert score.n_bytes == len(text.encode()) > 1.5 * score.n_tokens
    assert score.n_tokens == len(tokenizer.encode(text))
    nats, _, _ = reference(model, tokenizer, text, 32, n_loops=2)
    assert score.nats == pytest.approx(nats, rel=1e-10)


@pytest.mark.parametrize("n_tokens", [1, 2, 15, 16, 17, 24, 25, 63, 200])
@pytest.mark.parametrize("context", [1, 2, 7, 16])
def test_every_token_is_scored_once_with_context(n_tokens: int, context: int) -> None:
    seen = []
    for start, end, n in cut(n_tokens, context):
        assert 0 <= start and end - start == min(context, n_tokens)
        for t in range(end - n, end):
            seen.append(t)
            # Prediction t reads the tokens [start, t].
            assert start == 0 or t + 1 - start >= context / 2
    assert seen == list(range(n_tokens))


def test_a_plain_transformer_has_one_loop() -> None:
    model = scaled(tiny(vocab_size=259, recurrent_layers=0, halting="none"))
    score = bits_per_byte(model, ByteTokenizer(), ["some text"])
    assert (score.n_loops, score.mean_loops) == (1, 1.0)


def test_refuses() -> None:
    model = scaled(tiny(vocab_size=259))
    for named, call in (
        ("context=65 must be between 1 and 64", lambda: bits_per_byte(model, ByteTokenizer(), ["a"], context=65)),
        ("n_loops=0", lambda: bits_per_byte(model, ByteTokenizer(), ["a"], 0)),
        ("the texts are empty", lambda: bits_per_byte(model, ByteTokenizer(), [""])),
        ("the tokenizer has no end token", lambda: bits_per_byte(model, SymbolTokenizer(["a"]), ["a"])),
        ("259 tokens and the model vocab_size=53", lambda: bits_per_byte(scaled(tiny()), ByteTokenizer(), ["a"])),
    ):
        with pytest.raises(ValueError, match=named):
            call()


def test_windows_are_as_long_as_the_rows_of_training(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "final"
    scaled(tiny(vocab_size=259)).save_pretrained(folder)
    ByteTokenizer().save(folder)
    (tmp_path / "text.txt").write_text(TEXTS[0])
    evaluation = {"n_loops": [1], "device": "cpu", "progress": False}
    assert evaluate_files(folder, [str(tmp_path / "text.txt")], **evaluation)["context"] == 64
    config = folder.parent / "config.yaml"
    config.write_text("data: {task: text, seq_len: 20}")
    assert evaluate_files(folder, [str(tmp_path / "text.txt")], **evaluation)["context"] == 20
    for other in ("data: {task: addition}", "[1, 2]", ""):
        config.write_text(other)
        assert trained_context(folder) is None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Several files; the same numbers, and the same files byte for byte, a second time."""
    folder, text, lines = tmp_path / "model", tmp_path / "text.txt", tmp_path / "more.jsonl"
    scaled(tiny(vocab_size=259, halting="none")).save_pretrained(folder)
    ByteTokenizer().save(folder)
    text.write_text(TEXTS[0])
    lines.write_text(json.dumps({"text": TEXTS[2]}) + "\nno json\n")
    command = ["eval", str(folder), "--text", str(text), str(lines), "--device", "cpu", "--threads", "1"]
    assert main([*command, "--n-loops", "1,3", "--exit", "kl", "--exit-threshold", "0.3", "--context", "20"]) == 0
    out = capsys.readouterr().out
    assert "bits per byte" in out and "mean loops" in out and "skipped 1 records" in out
    results = json.loads((folder / "eval" / "eval.json").read_text())
    assert results["bytes"] == len((TEXTS[0] + TEXTS[2]).encode()) and results["documents"] == 2
    assert [score["loops"] for score in results["scores"]] == [1, 3]
    assert min(score["ratio_to_best"] for score in results["scores"]) == 1
    first = {path.name: path.read_bytes() for path in (folder / "eval").iterdir()}
    assert set(first) == {"eval.json", "bits_per_byte.png", "bits_per_byte.svg"}
    again = {"n_loops": (1, 3), "exit": "kl", "exit_threshold": 0.3, "context": 20, "device": "cpu"}
    evaluate_files(folder, [str(text), str(lines)], out=tmp_path / "again", **again, progress=False)
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}

    assert main(command) == 0  # doubling, up to twice max_loop_iters
    assert [s["loops"] for s in json.loads((folder / "eval" / "eval.json").read_text())["scores"]] == [1, 2, 4, 8]
    assert "mean loops" not in capsys.readouterr().out
    for wrong, told in (
        (["--n-loops", "1;2"], "must be numbers with commas between"),
        (["--n-loops", "1,0"], "--n-loops 0"),
        (["--context", "1000"], "--context 1000"),
        (["--context", "0"], "--context 0"),
        (["--exit-threshold", "1"], "needs a rule"),
    ):
        assert main([*command, *wrong]) == 2
        assert told in capsys.readouterr().err
    assert main(["eval", "nowhere", "--text", str(text)]) == 2
    assert main(["eval", str(folder), "--text", "nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_the_command_says_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Without a terminal: a line on stderr with the share, loss and speed, and the table alone on stdout."""
    folder = tmp_path / "model"
    OpenMythos(tiny(vocab_size=259)).save_pretrained(folder)
    ByteTokenizer().save(folder)
    (tmp_path / "a.txt").write_text("a river ran past Eve and Adam")
    assert main(["eval", str(folder), "--text", str(tmp_path / "a.txt"), "--n-loops", "1,2", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"(eval at \d loops?: \d+%  loss [\d.]+  [\d,.]+ tokens/s(  \d+ s left)?\n)+", err)
    assert err.splitlines()[-1].startswith("eval at 2 loops: 100%") and "eval at" not in out
