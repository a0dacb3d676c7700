"""Files of text to token shards: parallel, resumable, and independent of the number of workers.

    prepare(["corpus/"], "data/corpus", tokenizer="bytes")

A document goes to the validation split by a hash of its text, so copies of one document are all on the same side.
"""

import json
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from open_mythos.checks import check_int, check_number
from open_mythos.data.documents import cut_into_units, encode, find_files, fingerprint, place_of, read_documents
from open_mythos.data.hub import HubDataset, fetch, is_remote
from open_mythos.data.records import Reading, Unit, name_lines
from open_mythos.data.shards import FORMAT, GO_ON, INDEX, MAX_INDEX_BYTES, SPLITS, Shard, find_problem, write_shard
from open_mythos.data.skipped import SkipLog, Skipped
from open_mythos.files import inside, read_json, sha256, write_text, writing
from open_mythos.tokenization.tokenizer import Tokenizer, load_tokenizer, open_tokenizer

PLAN = "plan.json"
SKIPPED = "skipped.jsonl"
LISTED = 10_000
"""Skipped records of one unit and reason that are listed with their places; the others are counted."""


@dataclass(frozen=True)
class Settings:
    """Settings on which the tokens of a prepared folder depend."""

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
    *,
    strict: bool = False,
    skipped: SkipLog | None = None,
) -> dict[str, Any]:
    """Tokenize files into the folder `out`, and return what `dataset.json` says.

    An interrupted call resumes when it is repeated; only the units in progress are done again.
    Files and records that give no document are listed in `skipped.jsonl`.

    Args:
        inputs: files and folders (see `find_files`), or a dataset of the hub, whose files are downloaded to the cache
            of huggingface_hub as their turn comes. A repeated call goes on with the commit that the first one found.
        tokenizer: "bytes", a folder or file that holds one, or the name of a model on the Hugging Face hub.
        strict: refuse inputs of which something is skipped. A call without it goes on from what has been done.
        skipped: gets what is skipped, also if the call ends with an error.

    Raises:
        ValueError: `out` holds the data of other inputs or settings, the inputs have no document to train on, or
            something is skipped and `strict` is set.
        OSError: a file cannot be read, or there is no room for the data.
    """
    check_int("workers", workers, 1)
    settings, out, skipped = settings or Settings(), Path(out).resolve(), SkipLog() if skipped is None else skipped
    dataset, passed_over = None, list[Skipped]()
    is_hub = isinstance(inputs, HubDataset)
    files = (dataset := _pin(inputs, out)).files() if is_hub else find_files(inputs, passed_over)
    units = cut_into_units(files, settings.reading, progress=progress)
    encoder = open_tokenizer(tokenizer)
    if encoder.eos_id is None:
        raise ValueError(f"tokenizer={tokenizer!r} has no end token to separate documents; use another")
    plan = {
        "format": FORMAT,
        "settings": asdict(settings),
        "dataset": asdict(dataset) if dataset else None,
        "units": [fingerprint(unit) for unit in units],
    }
    plan = _claim(out, plan, encoder)
    dtype = "uint16" if encoder.vocab_size <= 2**16 else "uint32"
    done = {i for i in range(len(units)) if _is_done(out, i, dtype)}
    waiting = [(i, unit) for i, unit in enumerate(units) if i not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not progress) as bar:
        task = bar.add_task("tokenizing", total=sum(unit.n_bytes for unit in units))
        for i in chain(done, _work(partial(_tokenize, out, settings, dtype), waiting, workers)):
            bar.advance(task, units[i].n_bytes)
    results = [_read_mark(_unit_file(out, i)) for i in range(len(units))]
    entries = chain(((entry, 1) for entry in passed_over), _skipped_records(units, results))
    _list_skipped(out / SKIPPED, entries, skipped)
    info = _index(results, encoder, dtype, plan)
    _check_complete(info, out, len(skipped) if strict else 0)
    _write_json(out / INDEX, info)
    return info


def _check_complete(info: dict[str, Any], out: Path, n_refused: int) -> None:
    """Refuse data without a document to train on, and data of which so many records should not have been skipped."""
    if not info["splits"]["train"]:
        shutil.rmtree(out)  # so that the call can be corrected
        reasons = ", ".join(f"{n:,} records: {reason}" for reason, n in info["skipped"].items())
        raise ValueError(
            f"the inputs have no document to train on (skipped: {reasons or 'none'}); add text, or name the field that "
            "holds it with --column"
        )
    if n_refused:
        raise ValueError(
            f"--strict refuses inputs of which something is skipped ({n_refused:,} here; {out / SKIPPED} lists it); "
            f"correct them, remove {out} and repeat the command, or go on from here without --strict"
        )


def least_share(out: Path) -> float:
    """Return the smallest share, in thousandths, that puts a document into validation; 1 if there are none."""
    places = [_read_mark(path).get("nearest", 1.0) for path in (out / "units").glob("*.json")]
    return (int(1000 * min(places, default=1.0)) + 1) / 1000


def _list_skipped(path: Path, entries: Iterator[tuple[Skipped, int]], log: SkipLog) -> None:
    """Write what was skipped, a line each, and put it into `log`; no file if there is nothing."""
    partial = path.with_name(path.name + ".partial")
    with writing(path, GO_ON):
        # Half of a surrogate pair, as in the name of a field, is written as its escape, which JSON has too.
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for entry, n in entries:
                log.add(entry, n)
                values = {name: getattr(entry, name) for name in ("file", "place", "reason", "why", "remedy")}
                file.write(json.dumps({**values, "records": n}, ensure_ascii=False) + "\n")
        if log:
            partial.replace(path)
    if not log:
        partial.unlink()
        path.unlink(missing_ok=True)


def _skipped_records(units: list[Unit], results: list[dict[str, Any]]) -> Iterator[tuple[Skipped, int]]:
    """Yield the skipped records of all units with their line numbers, and the number of records in each entry."""
    for path, group in groupby(zip(units, results, strict=True), lambda pair: pair[0].path):
        parts = [result for _, result in group]
        listed = [Skipped(**entry, file=path) for result in parts for entry in result.get("listed", [])]
        places = [entry.place for entry in listed]
        for entry, place in zip(listed, places if is_remote(path) else name_lines(path, places), strict=True):
            yield replace(entry, place=place), 1
        rest = sum((Counter(result["skipped"]) for result in parts), Counter[str]())
        if not rest and not any(result["shards"] for result in parts):
            yield Skipped("empty", "it has no records", file=path), 1
        rest.subtract(entry.reason for entry in listed)
        for reason, n in rest.items():
            if n:
                yield Skipped(reason, "only counted", file=path), n


_tokenizer = lru_cache(maxsize=1)(load_tokenizer)
"""The tokenizer of a folder, which a process loads once."""


def _tokenize(out: Path, settings: Settings, dtype: str, i: int, unit: Unit) -> int:
    """Write the shards of unit i with the tokenizer in `out`, then the file that says it is done; returns i."""
    documents: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    n_bytes, skipped, listed, nearest = Counter[str](), Counter[str](), list[dict[str, str]](), 1.0
    local = replace(unit, path=str(fetch(unit.path))) if is_remote(unit.path) else unit
    for text in read_documents(local, settings.reading):
        ids = encode(text, _tokenizer(out)) if isinstance(text, str) else text
        if isinstance(ids, Skipped):
            skipped[ids.reason] += 1
            if skipped[ids.reason] <= LISTED:
                entry = {name: getattr(ids, name) for name in ("reason", "why", "remedy", "place")}
                # Half of a surrogate pair, as in the name of a field, would be no text in the file of the unit.
                listed.append({k: v.encode("utf-8", "backslashreplace").decode() for k, v in entry.items()})
        elif isinstance(text, str):
            place = place_of(text)
            nearest = min(nearest, place)
            split = SPLITS[place < settings.held_out]
            documents[split].append(ids.astype(dtype))
            n_bytes[split] += len(text.encode("utf-8"))
    shards = {
        split: asdict(write_shard(out, f"{split}/{i:05d}.bin", found, n_bytes[split], dtype))
        for split, found in documents.items()
        if found
    }
    mark = {"shards": shards, "skipped": dict(skipped), "listed": listed, "nearest": nearest}
    _write_json(_unit_file(out, i), mark)
    return i


def _work(run: Callable[[int, Unit], int], waiting: list[tuple[int, Unit]], workers: int) -> Iterator[int]:
    """Run the units, and give the number of each as it is done."""
    _tokenizer.cache_clear()  # an earlier call may have had another one in the same folder
    if workers == 1 or len(waiting) < 2:
        yield from (run(*item) for item in waiting)
        return
    # One process is one unit's work; the library's own threads would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with ProcessPoolExecutor(min(workers, len(waiting)), multiprocessing.get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(run, *item) for item in waiting]):
                yield done.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a worker process died, perhaps for want of memory; repeat the command, which goes on from here, with "
                "fewer workers (in a script of your own, call prepare under if __name__ == '__main__')"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _pin(dataset: HubDataset, out: Path) -> HubDataset:
    """Return the dataset at the commit that the plan in `out` names, if there is one, else at today's."""
    if dataset.revision is None and (out / PLAN).is_file():
        match _read_plan(out).get("dataset"):
            case {"name": dataset.name, "revision": str(commit)}:
                return replace(dataset, revision=commit)
    return dataset.pinned()


def _claim(out: Path, plan: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Make `out` the folder of this plan, or find that it is; returns the plan with the tokenizer's SHA-256.

    Raises:
        ValueError: it is the folder of another plan; nothing in it has changed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with writing(out, GO_ON):
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
            with writing(out, GO_ON):
                write_text(partial / PLAN, json.dumps(plan, indent=1))
            partial.chmod(0o755)
            partial.rename(out)  # all of it at once, also over an empty folder
        return plan
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_done(out: Path, i: int, dtype: str) -> bool:
    """Return whether a unit has its mark, and its shards the sizes that the mark says."""
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
        for entry in mark.get("listed", []):
            Skipped(**entry)
        check_number("nearest", mark.get("nearest", 1.0), 0, 1)
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
    with writing(path, GO_ON):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(value, indent=1))
