"""`mythos eval`: bits per byte of files by loops, as a table, as JSON and as a figure."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from open_mythos.checks import check_int
from open_mythos.data.documents import cut_into_units, find_files, read_documents
from open_mythos.data.records import Reading
from open_mythos.data.skipped import SkipLog, Skipped
from open_mythos.device import AutoDtype, Device, setup_device
from open_mythos.evals.bits_per_byte import TextScore, bits_per_byte, windows
from open_mythos.files import blamed_on, read_yaml, write_text
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import check_n_loops
from open_mythos.reports.figures import Curve, draw_curves, require_matplotlib
from open_mythos.reports.terminal import ProgressLine, table
from open_mythos.tokenization.tokenizer import Tokenizer, load_tokenizer

RESULTS_FILE, FIGURE = "eval.json", "bits_per_byte"
MAX_DOCUMENT_BYTES = 2**30
"""Largest size of one document; all texts are in memory as a whole."""


def evaluate_files(
    folder: Path,
    text: Sequence[str],
    n_loops: Sequence[int] = (),
    out: Path | None = None,
    *,
    exit: str | None = None,
    exit_threshold: float | None = None,
    context: int | None = None,
    column: str = "text",
    device: Device = "auto",
    dtype: AutoDtype = "float32",
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score the documents of `text` at each of `n_loops`, write eval.json and the figure into `out`, and return the
    content of eval.json.

    Args:
        text: files, or folders of files, as `mythos prepare-data` reads them.
        n_loops: none: 1, 2, 4 and so on up to twice the model's `max_loop_iters`; 1 for a plain transformer.
        out: None: FOLDER/eval.
        context: tokens of a window; None: those of a row that the model was trained on, if the run's config.yaml
            stands beside its folder, else `max_seq_len`.

    Raises:
        ValueError, OSError: an argument is unusable; nothing has been scored.
    """
    require_matplotlib()
    model = OpenMythos.from_pretrained(folder, setup_device(device, threads), dtype)
    tokenizer, cfg = load_tokenizer(folder), model.cfg
    if not n_loops:
        most = 2 * cfg.max_loop_iters if cfg.recurrent_layers else 1
        n_loops = [2**i for i in range(most.bit_length())]
    for n in n_loops if cfg.recurrent_layers else ():
        check_n_loops(n, cfg)
    texts, skipped = read_texts(text, column)
    context = (trained_context(folder) or cfg.max_seq_len) if context is None else context
    how = {"context": context, "exit": exit, "exit_threshold": exit_threshold}
    scores = _score(model, tokenizer, texts, n_loops, progress, **how)
    results = {
        "model": str(folder),
        "text": list(text),
        "documents": len(texts),
        "skipped": dict(skipped.counts),
        "skipped_places": list(skipped.lines()),
        "bytes": scores[0].n_bytes,
        "tokens": scores[0].n_tokens,
        **how,
        "dtype": str(model.dtype).removeprefix("torch."),
        "scores": _rows(scores),
    }
    out = folder / "eval" if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RESULTS_FILE, json.dumps(results, indent=1, allow_nan=False) + "\n")
    title = f"{folder}: {results['bytes']:,} bytes, context {context}" + (f", exit={exit}" if exit else "")
    curve = Curve([score.n_loops for score in scores], [score.bits_per_byte for score in scores], "")
    for ending in (".png", ".svg"):
        draw_curves({title: [curve]}, out / (FIGURE + ending), ("loops", "bits per byte"), ticks=curve.xs, log="x")
    return results


def _rows(scores: Sequence[TextScore]) -> list[dict[str, Any]]:
    """Return the scores as eval.json lists them."""
    best = min(score.bits_per_byte for score in scores)
    return [
        {
            "loops": score.n_loops,
            "bits_per_byte": score.bits_per_byte,
            "nats_per_token": score.nats_per_token,
            "ratio_to_best": score.bits_per_byte / best,
            "mean_loops": score.mean_loops,
        }
        for score in scores
    ]


def _score(
    model: OpenMythos, tokenizer: Tokenizer, texts: list[str], n_loops: Sequence[int], progress: bool, **how: Any
) -> list[TextScore]:
    """Score the texts at each number of loops, and show how far that is."""
    cfg = model.cfg
    # A window costs about as much as it has loops, plus the layers around the loop.
    around = (cfg.prelude_layers + cfg.coda_layers) / max(1, cfg.recurrent_layers)
    total = len(windows(tokenizer, texts, how["context"])) * sum(n + around for n in n_loops)
    scores, n_tokens, began = [], 0, time.perf_counter()
    with ProgressLine(total, "eval", progress, stderr=True, unit="") as line:
        for n in n_loops:

            def advance(windows: int, tokens: int, loss: float, n: int = n) -> None:
                nonlocal n_tokens
                n_tokens += tokens
                numbers = {"loss": loss, "tokens/s": n_tokens / (time.perf_counter() - began)}
                line.advance(numbers, windows * (n + around), f"eval at {n} loop{'s' * (n > 1)}")

            depth = n if cfg.recurrent_layers else None
            scores.append(bits_per_byte(model, tokenizer, texts, depth, advance=advance, **how))
    return scores


def trained_context(folder: Path) -> int | None:
    """Find how many tokens the rows of training had, in RUN/config.yaml for RUN/final; None if it does not say.

    The model has not learned longer windows: docs/training.md says what they cost a small model.
    """
    path = folder.resolve().parent / "config.yaml"
    run = read_yaml(path) if path.exists() else None
    data = run.get("data") if isinstance(run, dict) else None
    seq_len = data.get("seq_len") if isinstance(data, dict) else None
    if seq_len is not None:
        with blamed_on(path):
            check_int("data.seq_len", seq_len, 1)
    return seq_len


def read_texts(inputs: Sequence[str], column: str = "text") -> tuple[list[str], SkipLog]:
    """Read the documents of files of text, JSON or parquet, and count the skipped records."""
    reading, skipped = Reading(column, max_document_bytes=MAX_DOCUMENT_BYTES), SkipLog()
    passed_over: list[Skipped] = []
    units = cut_into_units(find_files(list(inputs), passed_over), reading)
    found = [*passed_over, *(document for unit in units for document in read_documents(unit, reading))]
    for document in found:
        if isinstance(document, Skipped):
            skipped.add(document)
    if texts := [document for document in found if not isinstance(document, Skipped)]:
        return texts, skipped
    counts = dict(skipped.counts) or "none"
    raise ValueError(f"--text {' '.join(inputs)} holds no text (skipped: {counts}); name others")


def print_results(console: Console, results: dict[str, Any]) -> None:
    """Print the table of `evaluate_files`, and what was skipped."""
    columns = {"loops": "d", "bits per byte": ".4f", "nats per token": ".4f", "ratio to best": ".4f"}
    if any(round(score["mean_loops"], 2) != score["loops"] for score in results["scores"]):
        columns["mean loops"] = ".2f"
    rows = [
        [f"{score[name.replace(' ', '_')]:{form}}" for name, form in columns.items()] for score in results["scores"]
    ]
    title = f"{results['bytes']:,} bytes, {results['tokens']:,} tokens, context {results['context']:,}"
    console.print(table(list(columns), rows, title))
    for reason, n in results["skipped"].items():
        console.print(f"skipped {n:,} records: {reason}")
    for line in results["skipped_places"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
