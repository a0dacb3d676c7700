"""The command that scores a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_mythos.checks import PositiveInt, check_int
from open_mythos.cli.options import Exit, ModelOptions
from open_mythos.config import MAX_LOOPS


@dataclass(kw_only=True)
class Eval(ModelOptions):
    """Bits per byte of a text by loops: a table, eval.json and a figure."""

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
    context: PositiveInt | None = None
    """Tokens of a window, half of which at least precede each token; left out: those of a row of training, where
    FOLDER is RUN/final, else the model's max_seq_len."""
    column: str = "text"
    """Field of a JSON line, or column of a parquet file, with the text."""

    def loops(self) -> list[int]:
        """Return the numbers of `n_loops`."""
        try:
            loops = [int(n) for n in self.n_loops.split(",")] if self.n_loops else []
        except ValueError:
            raise ValueError(f"--n-loops {self.n_loops} must be numbers with commas between; use 1,2,4,8") from None
        for n in loops:
            check_int("n_loops", n, 1, MAX_LOOPS, "use n_loops=1,2,4,8")
        return loops

    __post_init__ = loops

    def run(self, rest: list[str]) -> None:
        """bits per byte of a text, by loops"""
        from rich.console import Console

        from open_mythos.evals.by_loops import evaluate_files, print_results

        out = self.folder / "eval" if self.out is None else self.out
        given: dict[str, Any] = {**vars(self), "n_loops": self.loops(), "out": out}
        results = evaluate_files(**given)
        print_results(Console(), results)
        print(f"In {out}: eval.json, bits_per_byte.png, bits_per_byte.svg")
