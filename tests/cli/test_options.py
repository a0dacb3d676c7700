"""What the command line refuses: in the words that were typed, and before torch is imported."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from open_mythos.checks import as_typed
from open_mythos.cli import COMMANDS, _flags, main

REFUSALS = [
    ("trian", "'trian' is no command; did you mean train?"),
    ("trian tiny-text --out run", "'trian' is no command; did you mean train?"),
    ("generate . a --n-loops 0", "--n-loops 0 must be between 1 and 4096; use --n-loops 8, or leave --n-loops out"),
    ("chat . --n-loops 5000", "--n-loops 5000 must be between 1 and 4096"),
    ("generate . a --n-loops 2.5", "--n-loops 2.5 must be a whole number"),
    ("generate . a --max-new-tokens -1", "--max-new-tokens -1 must be at least 1; use --max-new-tokens 1"),
    ("chat . --max-tokens 0", "--max-tokens 0 must be at least 1"),
    ("generate . a --exit foo", "--exit foo must be one of fixed, act, ouro, latent_diff, second_difference, kl"),
    ("generate . a --exit latent_dif", "; did you mean latent_diff?"),
    ("generate . a --exit-threshold 0", "--exit-threshold 0.0 must be a finite number above 0"),
    ("chat . --temperature -1", "--temperature -1.0 must be a finite number of at least 0"),
    ("generate . a --top-k -1", "--top-k -1 must be at least 0; use --top-k 0 to keep all"),
    ("generate . a --seed 9223372036854775808", "--seed 9223372036854775808 must be between -9223372036854775808 and"),
    ("chat . --kv-tokens 0", "--kv-tokens 0 must be at least 1"),
    ("eval . --text a --n-loops 1,0", "--n-loops 0 must be between 1 and 4096; use --n-loops 1,2,4,8"),
    ("eval . --text a --n-loops one", "--n-loops one must be numbers with commas between"),
    ("eval . --text a --context 0", "--context 0 must be at least 1"),
    ("exp nope", "nope must be one of"),
    ("exp kohp", "use khop"),
    ("exp khop --seeds a", "--seeds a must be a whole number"),
    ("exp khop --seeds 1 1", "--seeds 1 1 names a seed twice"),
    ("exp show", "must be one of"),
    ("exp khop khop", "'khop' follows khop; leave it out"),
    ("demo --threads 0", "--threads 0 must be at least 1"),
    ("demo --device gpu", "--device gpu must be one of auto, cpu, cuda, mps"),
    ("train tiny-txet --out run", "tiny-txet must be one of"),
    ("train tiny-text", "--out is missing"),
    ("train chat --out run", "--init-from is missing"),
    ("train tiny-text --out run --steps -5", "--steps -5 must be at least 1; use --steps 1"),
    ("train tiny-text --out run --steps many", "--steps many must be a whole number"),
    ("train tiny-text --out run --eval.loops 1 0", "--eval.loops 0 must be between 1 and 4096; use --eval.loops 1"),
    ("train tiny-text --out run --data.held-out 7", "--data.held-out 7.0 must be a finite number above 0 and"),
    ("train tiny-text --out run --optim.lr 0", "--optim.lr 0.0 must be a finite number above 0"),
    ("train tiny-text --out run --model.n-heads 7", "--model.n-heads 7 must divide --model.dim 128"),
    ("train tiny-khop --out run --data.target root", "use --losses.per-loop with 'hop', --no-losses.per-loop with"),
    ("train tiny-text --out run --checkpoint-every -1", "--checkpoint-every -1 must be at least 0"),
    ("train tiny-text --out run --stesp 4", "--steps INT"),
    ("train tiny-text --config a --out run", "give either a recipe"),
    ("plan tiny-text --steps 0", "--steps 0 must be at least 1"),
    ("plan tiny-text --gpu h1000", "--gpu h1000 must be one of"),
]


@pytest.mark.parametrize(("line", "said"), REFUSALS, ids=[line for line, _ in REFUSALS])
def test_refusals_name_what_was_typed(line: str, said: str, capsys: pytest.CaptureFixture) -> None:
    try:
        status = main(line.split())
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert said in err and "None" not in err and "NoneType" not in err


def test_refusals_come_before_torch() -> None:
    """What the arguments alone decide is decided without the second or more that importing torch takes."""
    code = f"""
import sys
from open_mythos.cli import main
for line in {[line for line, _ in REFUSALS]!r}:
    try:
        status = main(line.split())
    except SystemExit as end:
        status = end.code
    assert status == 2, line
    assert "torch" not in sys.modules, line
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_messages_name_flags_as_they_are_typed() -> None:
    train = _flags(COMMANDS["train"])
    for message, typed in (
        ("data.held_out=0.05 holds out none; use 0", "--data.held-out 0.05 holds out none; use 0"),
        ("use eval.loops=(1, 4)", "use --eval.loops 1 4"),
        ("data.path='my file.txt' does not exist", "--data.path 'my file.txt' does not exist"),
        ("use losses.per_loop=false, or n_experts=2.", "use --no-losses.per-loop, or --model.n-experts 2."),
        # Of two fields of this name it is not known which is meant.
        ("kind='ddp' and vocab_size=3", "kind='ddp' and --model.vocab-size 3"),
        ("lengthen schedule.warmup_steps", "lengthen --schedule.warmup-steps"),
        ("the run's steps and my_steps=3 stay", "the run's steps and my_steps=3 stay"),
    ):
        assert as_typed(message, train) == typed
    assert as_typed("name='nope'; use name='khop'", _flags(COMMANDS["exp"])) == "nope; use khop"


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"mythos {version('open-mythos-rdt')}, torch {version('torch')}, ")


@pytest.mark.parametrize("line", ["info 1t", "train --help"])
def test_a_reader_that_leaves_is_no_error(line: str) -> None:
    """As with `| head -1`: what is printed after that has no reader."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "open_mythos", *line.split()]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == "" and done.returncode == 1
