"""Prepared text for experiments: how it is made, the windows that score a model, and what needs no network."""

import gzip
from pathlib import Path

import numpy as np

from open_mythos.data.corpus import build_corpus
from open_mythos.data.documents import first_text
from open_mythos.data.prepare import Settings, prepare
from open_mythos.data.records import Reading
from open_mythos.data.shards import INDEX, SPLITS, TokenShards
from open_mythos.tasks import Shards
from open_mythos.tasks.task import Batch
from open_mythos.tokenization.tokenizer import BPETokenizer
from open_mythos.train.config import TrainConfig


def prepare_corpus(folder: Path, vocab_size: int) -> None:
    """Do what the commands in the docstring of the recipe `small-text` do, as far as it is not done."""
    if (folder / INDEX).exists():
        return
    corpus, bpe = folder.parent / "corpus.jsonl", folder.parent / f"bpe-{vocab_size}"
    if not corpus.exists():
        build_corpus(corpus)
    if not bpe.exists():
        text = first_text([str(corpus)], Reading(max_document_bytes=2**62), 100 * 2**20)
        BPETokenizer.train(text, vocab_size).save(bpe)
    prepare([str(corpus)], folder, str(bpe), Settings(held_out=0.03))


def prepared(cfg: TrainConfig) -> Shards:
    """Return the prepared text that a run trains on.

    Raises:
        TypeError: it trains on something else.
    """
    if not isinstance(cfg.data, Shards):
        raise TypeError(f"the run trains on {cfg.data.name!r}, not on shards; use a recipe of prepared text")
    return cfg.data


def split(cfg: TrainConfig, name: str) -> TokenShards:
    """Open "train" or "validation" of a run's only folder."""
    return TokenShards(prepared(cfg).paths[0], name)


def hashes(cfg: TrainConfig) -> list[str]:
    """Return the hashes of the text, on which numbers depend."""
    return [shard.sha256 for name in SPLITS for shard in split(cfg, name).shards]


def held_out(cfg: TrainConfig, n: int) -> Batch:
    """Return `n` windows of the held-out text, or all if there are fewer, at even distances and without overlap."""
    tokens, size = split(cfg, "validation"), cfg.data.seq_len
    there = (tokens.n_tokens - 1) // size
    places = np.linspace(0, there - 1, min(n, there)).astype(int)
    return Batch.shifted(np.stack([tokens.read(int(i) * size, size + 1) for i in places]))


def unread(cfg: TrainConfig, rows: int) -> Batch:
    """Return the last windows of the first epoch, in the order of the run: training text that the run never reads.

    Raises:
        ValueError: the run reads them.
    """
    n = (split(cfg, "train").n_tokens - 1) // cfg.data.seq_len
    if cfg.steps * cfg.batch_size > n - rows:
        raise ValueError(
            f"{prepared(cfg).paths[0]} has {n} windows for the {cfg.steps * cfg.batch_size} of a run and {rows} that "
            "it does not read; use more text"
        )
    return cfg.data.batch(np.random.default_rng(0), rows, first_row=n - rows)


def null_lines(cfg: TrainConfig, batch: Batch) -> dict[str, float]:
    """Return bits per byte without a network: from counts of the training text, and by gzip of the held-out text."""
    train, held, data = split(cfg, "train"), split(cfg, "validation"), prepared(cfg)
    V, ids = train.vocab_size, train.read(0, train.n_tokens)
    before, token = batch.input_ids.numpy(), batch.labels.numpy()
    counts = np.bincount(ids, minlength=V)
    single = (counts + 1.0) / (len(ids) + V)
    pairs = np.bincount(ids[:-1] * V + ids[1:], minlength=V * V)
    # The weight of the single tokens is that of 100 tokens seen (a Dirichlet prior).
    pair = (pairs[before * V + token] + 100 * single[token]) / (counts[before] + 100)
    text = data.tokenizer().decode(held.read(0, held.n_tokens).tolist()).encode()
    return {
        "counts of tokens": float(-np.log2(single[token]).mean() / data.bytes_per_token),
        "counts of pairs of tokens": float(-np.log2(pair).mean() / data.bytes_per_token),
        "gzip -9 of the held-out text": 8 * len(gzip.compress(text, 9)) / len(text),
    }
