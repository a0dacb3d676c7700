"""The commands that measure a model: its bits per byte, and what it does in each of its loops."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_mythos.checks import PositiveInt, check_int
from open_mythos.cli.options import Exit, ModelOptions
from open_mythos.config import MAX_LOOPS
from open_mythos.device import AutoDtype

if TYPE_CHECKING:
    from open_mythos.analysis.section import Subject
    from open_mythos.tasks.task import Batch

PROMPTS_OF_TASK = 64


@dataclass(kw_only=True)
class Analyze(ModelOptions):
    """What a model does in each loop: tables, analysis.json, figures and report.html. docs/analysis.md explains each
    number."""

    prompt: tuple[str, ...] = ()
    """Texts; of several, the last tokens of each, as many as the shortest has. Left out: prompts of the task that the
    model was trained on, where FOLDER is RUN/final and the task draws its own."""
    loops: int | None = None
    """Loops to go to, to see what happens beyond training; left out: four times the model's max_loop_iters."""
    swap: str | None = None
    """The prompt whose input is put in the place of the first prompt's; left out: the prompts with their tokens in
    random order, or other prompts of the task."""
    out: Path | None = None
    """Folder of the report; left out: FOLDER/analysis."""
    seed: int = 0
    dtype: AutoDtype = "float32"
    """As for the other commands; loops are compared, so the exact one is the default."""

    def run(self, rest: list[str]) -> None:
        """look at what a model does in each loop"""
        import platform

        import torch
        from rich.console import Console
        from rich.text import Text

        from open_mythos.analysis import SECTIONS
        from open_mythos.experiments.study import commit
        from open_mythos.reports.document import Report, Table, write_record
        from open_mythos.reports.figures import require_matplotlib
        from open_mythos.reports.terminal import ProgressLine, table

        require_matplotlib()
        subject = _subject(self)
        sections, parts = {}, []
        with ProgressLine(len(SECTIONS), "analyze", unit="part", stderr=True) as line:
            for name, section in SECTIONS.items():
                found = sections[name] = section(subject)
                parts += [f"## {found.title}\n\n{found.finding}", *found.parts]
                line.advance(label=name)
        (rows, tokens), dtype = subject.input_ids.shape, str(subject.model.dtype).removeprefix("torch.")
        results = {
            "name": "analyze",
            "title": f"What {self.folder} does in each loop",
            "question": "What does each loop do, and where does the state go?",
            "protocol": f"{rows} prompt{'s' * (rows > 1)} of {tokens} tokens, halting off, {dtype}. "
            f"Trained depth: {subject.model.cfg.max_loop_iters} loops; run to {subject.n_beyond}. "
            "docs/analysis.md explains what each number means and what it cannot show.",
            "command": f"mythos analyze {shlex.join(rest)}",
            "commits": [commit()],
            "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
            "seeds": [self.seed],
            "quick": False,
            "prompts": subject.input_ids.tolist(),
            "results": {name: found.numbers for name, found in sections.items()},
        }
        out = self.folder / "analysis" if self.out is None else self.out
        report = Report(" ".join(found.finding for found in sections.values()), parts)
        write_record(results, report, out, "analysis.json")
        console = Console()
        for found in sections.values():
            console.print(Text(f"\n{found.title}", style="bold"), Text(found.finding), sep="\n")
            for part in found.parts:
                if isinstance(part, Table):
                    console.print(table(part.head, part.rows))
        print(f"The report is {out / 'report.html'} (also .md, analysis.json and the figures).")


def _subject(args: Analyze) -> "Subject":
    """Load the model and its prompts; refuse before any work what cannot be analysed."""
    import torch

    from open_mythos.analysis.fixed_point import FEWEST
    from open_mythos.analysis.section import Subject
    from open_mythos.analysis.sweep import IGNORE

    model, tokenizer = args.load()
    if model.recurrent is None:
        raise ValueError(f"{args.folder} holds a plain transformer (recurrent_layers=0), which has no loops to analyse")
    n_beyond = max(FEWEST, 4 * model.cfg.max_loop_iters) if args.loops is None else args.loops
    check_int("loops", n_beyond, FEWEST, MAX_LOOPS - 1)

    def ends(texts: Sequence[str], n_tokens: int | None = None) -> torch.Tensor:
        """Encode texts and return the last `n_tokens` ids of each, or as many as the shortest has: (B, T)."""
        ids = [tokenizer.encode(text) for text in texts]
        shortest = min(map(len, ids))
        T = shortest if n_tokens is None else n_tokens
        if shortest < T:
            raise ValueError(f"--swap has {shortest} tokens, but the prompt {T}; give a text at least as long")
        return torch.tensor([x[len(x) - T :] for x in ids], dtype=torch.int64)

    if args.prompt:
        task, ids = None, ends(args.prompt)
        if ids.shape[1] < 2:
            raise ValueError("--prompt has less than two tokens; give a longer text")
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)
        where = torch.ones_like(ids, dtype=torch.bool)
        others = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(args.seed))]
    else:
        task, batch = _of_task(args.folder, args.seed)
        ids, labels, where = batch.input_ids, batch.labels, batch.labels != IGNORE
        # Each prompt gets the input of the next one.
        others = ids.roll(-1, dims=0)
    if args.swap is not None:
        others = ends([args.swap] * len(ids), ids.shape[1])
    tensors = [x.to(model.device) for x in (ids, labels, where, others)]
    return Subject(model, tokenizer, *tensors, min(model.cfg.max_loop_iters, n_beyond), n_beyond, task == "khop")


def _of_task(folder: Path, seed: int) -> "tuple[str, Batch]":
    """Draw prompts and labels (B, T) of the task in the run's config.yaml, and return its name and these."""
    import numpy as np

    from open_mythos.train.config import TrainConfig

    path = folder.resolve().parent / "config.yaml"
    data: Any = TrainConfig.load(path).data if path.is_file() else None
    if data is None or data.on_disk or data.bytes_per_token is not None:
        raise ValueError(f"--prompt is missing, and {path} names no task that draws prompts; use --prompt 'TEXT'")
    return data.name, data.validation_batch(np.random.default_rng(seed), PROMPTS_OF_TASK)


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
    dtype: AutoDtype = "float32"
    """As for the other commands; scores are compared, so the exact one is the default."""

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
