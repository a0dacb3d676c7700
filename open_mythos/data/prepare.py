"""Files of text to token shards: in parallel, resumable, the same whatever the number of workers.

    prepare(["corpus/"], "data/corpus", tokenizer="bytes")

A document goes to the validation split by a hash of its text, so copies of one document are all on the same side.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from open_mythos.checks import check_int, check_number
from open_mythos.data.documents import (
    Reading,
    Skipped,
    Unit,
    cut_into_units,
    encode,
    find_files,
    fingerprint,
    is_held_out,
    read_documents,
)
from open_mythos.data.hub import HubDataset, fetch, is_remote
from open_mythos.data.shards import FORMAT, INDEX, MAX_INDEX_BYTES, SPLITS, Shard, find_problem, write_shard
from open_mythos.files import inside, read_json, sha256, write_text
from open_mythos.tokenizer import Tokenizer, load_tokenizer, open_tokenizer

PLAN = "plan.json"


@dataclass(frozen=True)
class Settings:
    """What decides the tokens."""

    reading: Reading = field(default_factory=Reading)
    held_out: float = 0.01
    """Share of the documents that goes to the validation split."""

    def __post_init__(self) -> None:
        check_number("held_out", self.held_out, 0, 0.5)


def prepare(
    inputs: list[str] | HubDataset,
    out: str | Path,
    tokenizer: str = "bytes",
    settings: Settings | None = None,
    workers: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Tokenize files into the folder `out`, and return what `dataset.json` says.

    A call that was interrupted goes on where it stopped when it is repeated; at most the units in work are done again.

    Args:
        inputs: files and folders (see `find_files`), or a dataset of the hub, whose files are downloaded to the cache
            of huggingface_hub as their turn comes. A repeated call goes on with the commit that the first one found.
        tokenizer: "bytes", a folder or file that holds one, or the name of a model on the Hugging Face hub.

    Raises:
        ValueError: `out` holds the data of other inputs or settings, or the inputs have no document to train on.
    """
    check_int("workers", workers, 1)
    settings, out = settings or Settings(), Path(out).resolve()
    dataset = None
    if isinstance(inputs, HubDataset):
        dataset = _pin(inputs, out)
        files = dataset.files()
    else:
        files = find_files(inputs)
    units = cut_into_units(files, settings.reading, progress=progress)
    encoder = open_tokenizer(tokenizer)
    if encoder.eos_id is None:
        raise ValueError(f"tokenizer={tokenizer!r} has no end token, which documents are told apart by; use another")
    plan = {
        "format": FORMAT,
        "settings": asdict(settings),
        "dataset": asdict(dataset) if dataset else None,
        "units": [fingerprint(unit) for unit in units],
    }
    plan = _claim(out, plan, encoder)
    job = _Job(out, settings, "uint16" if encoder.vocab_size <= 2**16 else "uint32")
    done = {i for i in range(len(units)) if _is_done(out, i, job.dtype)}
    waiting = [(i, unit) for i, unit in enumerate(units) if i not in done]
    with _progress(units, progress) as advance:
        for i in chain(done, _work(job, waiting, workers)):
            advance(units[i])
    results = [_read_mark(_unit_file(out, i)) for i in range(len(units))]
    info = _index(results, encoder, job.dtype, plan)
    if not info["splits"]["train"]:
        shutil.rmtree(out)  # so that the call can be corrected
        skipped = ", ".join(f"{n:,} records: {reason}" for reason, n in info["skipped"].items())
        raise ValueError(
            f"the inputs have no document to train on (skipped: {skipped or 'none'}); add text, or name the field that "
            "holds it with --column"
        )
    _write_json(out / INDEX, info)
    return info


@dataclass(frozen=True)
class _Job:
    """What a worker knows. It reads the tokenizer back from `out`."""

    out: Path
    settings: Settings
    dtype: str

    def run(self, tokenizer: Tokenizer, i: int, unit: Unit) -> int:
        """Write the shards of unit i, then the file that says it is done."""
        documents: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        n_bytes: Counter[str] = Counter()
        skipped: Counter[str] = Counter()
        if is_remote(unit.path):
            unit = replace(unit, path=str(fetch(unit.path)))
        for text in read_documents(unit, self.settings.reading):
            if isinstance(text, Skipped):
                skipped[text.reason] += 1
                continue
            ids = encode(text, tokenizer)
            if isinstance(ids, Skipped):
                skipped[ids.reason] += 1
                continue
            split = SPLITS[is_held_out(text, self.settings.held_out)]
            documents[split].append(ids.astype(self.dtype))
            n_bytes[split] += len(text.encode("utf-8"))
        shards = {
            split: asdict(write_shard(self.out, f"{split}/{i:05d}.bin", kept, n_bytes[split], self.dtype))
            for split, kept in documents.items()
            if kept
        }
        _write_json(_unit_file(self.out, i), {"shards": shards, "skipped": dict(skipped)})
        return i


_worker: tuple[_Job, Tokenizer] | None = None


def _start_worker(job: _Job) -> None:
    global _worker
    _worker = job, load_tokenizer(job.out)


def _run_unit(item: tuple[int, Unit]) -> int:
    assert _worker is not None
    job, tokenizer = _worker
    return job.run(tokenizer, *item)


def _work(job: _Job, waiting: list[tuple[int, Unit]], workers: int) -> Iterator[int]:
    """Run the units, and give the number of each as it is done."""
    if workers == 1 or len(waiting) < 2:
        tokenizer = load_tokenizer(job.out)
        for i, unit in waiting:
            yield job.run(tokenizer, i, unit)
        return
    # One process is one unit's work; the library's own threads would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(waiting)), context, _start_worker, (job,)) as pool:
        try:
            for done in as_completed([pool.submit(_run_unit, item) for item in waiting]):
                yield done.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process died, perhaps for want of memory; repeat the command, which goes on from here, with "
                "fewer workers (in a script of your own, call prepare under if __name__ == '__main__')"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _pin(dataset: HubDataset, out: Path) -> HubDataset:
    """The dataset at the commit that the plan in `out` names, if there is one, else at today's."""
    if dataset.revision is None and (out / PLAN).is_file():
        before = _read_plan(out).get("dataset")
        if isinstance(before, dict) and before.get("name") == dataset.name and isinstance(before.get("revision"), str):
            return replace(dataset, revision=before["revision"])
    return dataset.pinned()


def _claim(out: Path, plan: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Make `out` the folder of this plan, or find that it is; returns the plan with the tokenizer's SHA-256.

    Raises:
        ValueError: it is the folder of another plan; nothing in it has changed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        tokenizer.save(partial)
        plan = json.loads(json.dumps({**plan, "tokenizer": sha256(*sorted(partial.iterdir()))}))
        if (out / PLAN).is_file():
            old = _read_plan(out)
            if other := [key for key in plan if old.get(key) != plan[key]]:
                what = {"units": "inputs", "tokenizer": "tokenizers"}.get(other[0], other[0])
                raise ValueError(f"out={out} holds data made with other {what}; use another folder, or remove this one")
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"out={out} is not empty and holds no prepared data; use another folder")
        else:
            _write_json(partial / PLAN, plan)
            partial.chmod(0o755)
            partial.rename(out)  # all of it at once, also over an empty folder
        return plan
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_done(out: Path, i: int, dtype: str) -> bool:
    """Whether a unit has its mark, and its shards the sizes that the mark says."""
    if not _unit_file(out, i).is_file():
        return False
    shards = _read_mark(_unit_file(out, i))["shards"].values()
    return all(find_problem(out, Shard.from_dict(shard), dtype) is None for shard in shards)


def _read_plan(out: Path) -> dict[str, Any]:
    plan = read_json(inside(out, PLAN), MAX_INDEX_BYTES)
    if not isinstance(plan, dict):
        raise ValueError(f"{out / PLAN} is damaged: it holds no object; use another folder, or remove this one")
    return plan


def _read_mark(path: Path) -> dict[str, Any]:
    """Return what the file of a unit that is done says, once it has the form that `_Job.run` gives it."""
    mark = read_json(path)
    remedy = f"remove it and repeat the command: {path}"
    if not isinstance(mark, dict) or not all(isinstance(mark.get(name), dict) for name in ("shards", "skipped")):
        raise ValueError(f"the mark of a finished unit is damaged: it has no shards and skipped; {remedy}")
    try:
        for shard in mark["shards"].values():
            Shard.from_dict(shard)
        for reason, n in mark["skipped"].items():
            check_int(f"skipped.{reason:.40}", n, 0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the mark of a finished unit is damaged ({error}); {remedy}") from error
    return mark


def _unit_file(out: Path, i: int) -> Path:
    return out / "units" / f"{i:05d}.json"


def _index(results: list[dict[str, Any]], tokenizer: Tokenizer, dtype: str, plan: dict[str, Any]) -> dict[str, Any]:
    skipped = sum((Counter(result["skipped"]) for result in results), Counter())
    splits = {split: [result["shards"][split] for result in results if split in result["shards"]] for split in SPLITS}
    counts = {
        split: {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "bytes")}
        for split, shards in splits.items()
    }
    return {
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "end_token": tokenizer.eos_id,
        "tokenizer": plan["tokenizer"],
        "settings": plan["settings"],
        "counts": counts,
        "skipped": dict(sorted(skipped.items())),
        "splits": splits,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1))


@contextmanager
def _progress(units: list[Unit], shown: bool) -> Generator[Callable[[Unit], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not shown) as bar:
        task = bar.add_task("tokenizing", total=sum(unit.n_bytes for unit in units))
        yield lambda unit: bar.advance(task, unit.n_bytes)
