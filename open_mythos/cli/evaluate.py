"""The command that scores a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from open_mythos.checks import check_int
from open_mythos.cli.options import Exit, read
from open_mythos.config import MAX_LOOPS
from open_mythos.device import Device, Dtype


@dataclass
class EvalArgs:
    """Bits per byte of a text by loops: a table, eval.json and a figure."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the model and its tokenizer, such as RUN/final."""
    text: tuple[str, ...]
    """Files (.txt, .md, .jsonl, .parquet), or folders that hold such. Every token of them is scored once."""
    n_loops: str = ""
    """Loops to score at, as in 1,2,4,8,16; left out: doubling, up to twice the model's max_loop_iters."""
    out: Path | None = None
    """Folder for eval.json and the figure; left out: FOLDER/eval."""
    exit: Exit | None = None
    """Rule that lets a token leave the loop early; left out: the model's own."""
    exit_threshold: float | None = None
    """Threshold of that rule; left out: its default."""
    context: int | None = None
    """Tokens of a window, half of which at least precede each token; left out: those of a row of training, where
    FOLDER is RUN/final, else the model's max_seq_len."""
    column: str = "text"
    """Field of a JSON line, or column of a parquet file, with the text."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    threads: int | None = None


def evaluate(rest: list[str]) -> None:
    """bits per byte of a text, by loops"""
    args = read(EvalArgs, "mythos eval", rest)
    if not args.folder.is_dir():
        raise FileNotFoundError(f"folder {args.folder} does not exist; give a model's folder, such as RUN/final")
    try:
        n_loops = [int(n) for n in args.n_loops.split(",")] if args.n_loops else []
    except ValueError:
        raise ValueError(f"--n-loops {args.n_loops} must be numbers with commas between; use 1,2,4,8") from None
    for n in n_loops:
        check_int("n_loops", n, 1, MAX_LOOPS, "use n_loops=1,2,4,8")
    if args.context is not None:
        check_int("context", args.context, 1)
    from rich.console import Console

    from open_mythos.evals.by_loops import evaluate_files, print_results

    out = args.folder / "eval" if args.out is None else args.out
    results = evaluate_files(
        args.folder,
        args.text,
        n_loops,
        out,
        exit=args.exit,
        exit_threshold=args.exit_threshold,
        context=args.context,
        column=args.column,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
    )
    print_results(Console(), results)
    print(f"In {out}: eval.json, bits_per_byte.png, bits_per_byte.svg")
