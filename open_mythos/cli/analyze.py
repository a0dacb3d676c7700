"""The command that looks at what a model does in each of its loops."""

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from open_mythos.cli.options import read
from open_mythos.device import Device, Dtype, setup_device

if TYPE_CHECKING:
    from open_mythos.analysis.section import Section, Subject

PROMPTS_OF_TASK = 64


@dataclass
class AnalyzeArgs:
    """What a model does in each loop: tables, analysis.json, figures and report.html. docs/analysis.md tells what each
    number means."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the model and its tokenizer, such as RUN/final."""
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
    device: Device = "auto"
    dtype: Dtype = "float32"
    threads: int | None = None


def analyze(rest: list[str]) -> None:
    """look at what a model does in each loop"""
    args = read(AnalyzeArgs, "mythos analyze", rest)
    if not args.folder.is_dir():
        raise FileNotFoundError(f"folder {args.folder} does not exist; give a model's folder, such as RUN/final")
    from rich.console import Console

    from open_mythos.cli.analyze_parts import PARTS
    from open_mythos.reports.figures import require_matplotlib
    from open_mythos.reports.terminal import ProgressLine

    require_matplotlib()
    subject = _subject(args)
    sections: dict[str, Section] = {}
    with ProgressLine(len(PARTS), "analyze", unit="part", stderr=True) as line:
        for name, part in PARTS.items():
            sections[name] = part(subject)
            line.advance(label=name)
    out = args.folder / "analysis" if args.out is None else args.out
    _write(args, f"mythos analyze {shlex.join(rest)}", subject, sections, out)
    _print(Console(), sections.values())
    print(f"The report is {out / 'report.html'} (also .md, analysis.json and the figures).")


def _subject(args: AnalyzeArgs) -> "Subject":
    """The model and its prompts; refuses what cannot be analysed before any work."""
    import torch

    from open_mythos.analysis.fixed_point import FEWEST
    from open_mythos.analysis.section import Subject
    from open_mythos.analysis.sweep import IGNORE
    from open_mythos.checks import check_int
    from open_mythos.config import MAX_LOOPS
    from open_mythos.model import OpenMythos
    from open_mythos.tokenization.tokenizer import load_tokenizer

    device = setup_device(args.device, args.threads)
    model = OpenMythos.from_pretrained(args.folder, device=device, dtype=getattr(torch, args.dtype))
    if model.recurrent is None:
        raise ValueError(f"{args.folder} holds a plain transformer (recurrent_layers=0), which has no loops to analyse")
    n_beyond = max(FEWEST, 4 * model.cfg.max_loop_iters) if args.loops is None else args.loops
    check_int("loops", n_beyond, FEWEST, MAX_LOOPS - 1)
    tokenizer = load_tokenizer(args.folder)
    n_loops = min(model.cfg.max_loop_iters, n_beyond)
    if not args.prompt:
        ids, labels, name = _of_task(args.folder, args.seed)
        # Each prompt gets the input of the one after it.
        others = ids.roll(-1, dims=0) if args.swap is None else _cut([args.swap] * len(ids), tokenizer, ids.shape[1])
        where = labels != IGNORE
        return Subject(model, tokenizer, *_on(device, ids, labels, where, others), n_loops, n_beyond, name == "khop")
    ids = _cut(args.prompt, tokenizer)
    if ids.shape[1] < 2:
        raise ValueError("--prompt has less than two tokens; give a longer text")
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)
    if args.swap is None:
        others = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(args.seed))]
    else:
        others = _cut([args.swap] * len(ids), tokenizer, ids.shape[1])
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    return Subject(model, tokenizer, *_on(device, ids, labels, everywhere, others), n_loops, n_beyond, False)


def _on(device: Any, *tensors: Any) -> list[Any]:
    return [x.to(device) for x in tensors]


def _cut(texts: Any, tokenizer: Any, n_tokens: int | None = None) -> Any:
    """(B, T) ids of the texts' ends: `n_tokens` of each, or as many as the shortest has."""
    import torch

    ids = [tokenizer.encode(text) for text in texts]
    T = min(map(len, ids)) if n_tokens is None else n_tokens
    if min(map(len, ids)) < T:
        raise ValueError(f"--swap has {min(map(len, ids))} tokens, but the prompt {T}; give a text at least as long")
    return torch.tensor([x[len(x) - T :] for x in ids], dtype=torch.int64)


def _of_task(folder: Path, seed: int) -> tuple[Any, Any, str]:
    """Prompts and labels (B, T) of the task in the run's config.yaml, and its name."""
    import numpy as np

    from open_mythos.train.config import TrainConfig

    path = folder.resolve().parent / "config.yaml"
    data = TrainConfig.load(path).data if path.is_file() else None
    if data is None or data.on_disk or data.bytes_per_token is not None:
        raise ValueError(f"--prompt is missing, and {path} names no task that draws prompts; use --prompt 'TEXT'")
    batch = data.validation_batch(np.random.default_rng(seed), PROMPTS_OF_TASK)
    return batch.input_ids, batch.labels, data.name


def _write(args: AnalyzeArgs, command: str, subject: "Subject", sections: "dict[str, Section]", out: Path) -> None:
    import platform

    import torch

    from open_mythos.experiments.study import commit
    from open_mythos.reports.document import Report, write_record

    rows, tokens = subject.input_ids.shape
    results = {
        "name": "analyze",
        "title": f"What {args.folder} does in each loop",
        "question": "What does each loop do, and where does the state go?",
        "protocol": f"{rows} prompt{'s' * (rows > 1)} of {tokens} tokens, halting off, {args.dtype}. Trained depth: "
        f"{subject.model.cfg.max_loop_iters} loops; run to {subject.n_beyond}. docs/analysis.md tells what each "
        "number means and what it cannot tell.",
        "command": command,
        "commits": [commit()],
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "seeds": [args.seed],
        "quick": False,
        "prompts": subject.input_ids.tolist(),
        "results": {name: section.numbers for name, section in sections.items()},
    }
    parts = [part for s in sections.values() for part in (f"## {s.title}\n\n{s.finding}", *s.parts)]
    finding = " ".join(section.finding for section in sections.values())
    write_record(results, Report(finding, parts), out, "analysis.json")


def _print(console: Any, sections: "Iterable[Section]") -> None:
    from rich.table import Table as RichTable
    from rich.text import Text

    from open_mythos.reports.document import Table

    for section in sections:
        console.print(Text(f"\n{section.title}", style="bold"))
        console.print(Text(section.finding))
        for part in section.parts:
            if isinstance(part, Table):
                table = RichTable()
                for name in part.head:
                    table.add_column(Text(name), justify="right", overflow="fold")
                for row in part.rows:
                    table.add_row(*(Text(cell.replace("\\|", "|")) for cell in row))
                console.print(table)
