"""Rows whose documents are kept apart: where documents begin, what is predicted, and what bits per byte then mean."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from open_mythos.config import MythosConfig
from open_mythos.data import documents
from open_mythos.data.documents import Reading
from open_mythos.data.prepare import Settings, prepare
from open_mythos.data.shards import TokenShards
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import LoopPlan
from open_mythos.tasks import Shards
from open_mythos.tasks.task import IGNORE
from open_mythos.tokenization.tokenizer import BPETokenizer, load_tokenizer, n_bytes
from open_mythos.train.config import TrainConfig
from open_mythos.train.evaluate import evaluate
from open_mythos.train.trainer import Trainer

OPENINGS = ("a", "\u201cYes", "\u00e9", "\u65e5\u672c", "the ", "\u2014")
"""Texts begin with tokens of 1 to 4 bytes, some of them part of a character."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of 2 to 40 tokens in several shards, tokens and documents of which some end together with a window."""
    made = tmp_path_factory.mktemp("separate")
    rng = np.random.default_rng(0)
    texts = [OPENINGS[i % 6] + "the cat \u201csat\u201d " * int(rng.integers(0, 4)) for i in range(400)]
    (made / "text.txt").write_text("\n".join(texts), encoding="utf-8")
    BPETokenizer.train(texts, 264).save(made / "bpe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents.cut_into_units, "__defaults__", (2000,))
        prepare(
            [str(made / "text.txt")],
            made / "data",
            str(made / "bpe"),
            Settings(Reading(cut="lines"), 0.3),
            progress=False,
        )
    assert len(TokenShards(made / "data", "train").shards) > 2
    return str(made / "data")


def test_documents_of_a_window(folder: str) -> None:
    """Against counting end tokens, from every place and over several shards."""
    shards = TokenShards(folder, "train")
    tokens = shards.read(0, shards.n_tokens)
    number = np.append(0, (tokens == load_tokenizer(folder).eos_id).cumsum()[:-1])
    assert number[-1] + 1 == shards.n_documents
    for n in (1, 2, 50, 700):
        for start in range(0, shards.n_tokens - n, 1 if n == 50 else 37):
            assert np.array_equal(shards.documents(start, n), number[start : start + n] - number[start])
    assert np.array_equal(shards.documents(0, shards.n_tokens), number)
    assert shards.documents(5, 0).shape == (0,)
    begins = np.append(0, np.flatnonzero(np.diff(number)) + 1)
    assert np.array_equal(shards.first_tokens(), tokens[begins])
    with pytest.raises(ValueError, match="ask for fewer"):
        shards.documents(shards.n_tokens, 1)


@pytest.mark.parametrize("validation", [False, True])
def test_the_first_token_of_a_document_is_not_predicted(folder: str, validation: bool) -> None:
    plain = Shards((folder,), seq_len=60)
    apart = dataclasses.replace(plain, separate_documents=True)
    before, batch = (
        task.validation_batch(np.random.default_rng(3), 20) if validation else task.batch(np.random.default_rng(0), 20)
        for task in (plain, apart)
    )
    assert before.documents is None and batch.documents is not None
    assert torch.equal(batch.input_ids, before.input_ids)
    end = batch.input_ids == load_tokenizer(folder).eos_id
    assert end.any() and torch.equal(batch.labels, before.labels.masked_fill(end, IGNORE))
    assert torch.equal(batch.documents[:, 1:] - batch.documents[:, :-1], end[:, :-1].long())
    assert not batch.documents[:, 0].any()


def test_bytes_are_those_of_what_is_predicted(folder: str) -> None:
    """With all that is held out in one row: the labels' bytes over their number."""
    held_out = TokenShards(folder, "validation")
    task = Shards((folder,), seq_len=held_out.n_tokens - 1, separate_documents=True)
    (labels,) = task.validation_batch(np.random.default_rng(0), 1).labels
    tokenizer = load_tokenizer(folder)
    predicted = labels != IGNORE
    assert predicted.sum() == held_out.n_tokens - held_out.n_documents
    assert isinstance(tokenizer, BPETokenizer)
    # A byte-level vocabulary writes each byte as a character.
    names = [tokenizer.backend.id_to_token(i) for i in labels[predicted].tolist() if i != tokenizer.eos_id]
    assert task.bytes_per_token == pytest.approx(sum(map(len, names)) / predicted.sum().item())
    plain = dataclasses.replace(task, separate_documents=False)
    assert plain.bytes_per_token == held_out.n_bytes / held_out.n_tokens != task.bytes_per_token
    assert len({n_bytes(tokenizer, i) for i in held_out.first_tokens().tolist()}) > 2


def model_of(task: Shards, **changes: object) -> MythosConfig:
    values = {"n_experts": 0, "expert_dim": 32, "lora_rank": 0, "injection": "diagonal", "halting": "none", **changes}
    return MythosConfig(
        vocab_size=task.vocab_size, dim=32, n_heads=2, n_kv_heads=1, max_seq_len=64, max_loop_iters=2,
        prelude_layers=1, coda_layers=1, attn_type="gqa", **values,
    )  # fmt: skip


def test_evaluation_keeps_documents_apart(folder: str) -> None:
    """The loss of every chunk size is that of the documents, each in a call of its own."""
    task = Shards((folder,), seq_len=50, separate_documents=True)
    batch = task.validation_batch(np.random.default_rng(0), 5)
    model = OpenMythos(model_of(task))
    for p in model.parameters():
        p.data.mul_(8)
    losses = []
    with torch.no_grad():
        for ids, labels, numbers in zip(batch.input_ids, batch.labels, batch.documents, strict=True):
            for i in numbers.unique():
                logits = model(ids[None, numbers == i], plan=LoopPlan((2,))).logits[0]
                losses.append(F.cross_entropy(logits, labels[numbers == i], ignore_index=IGNORE, reduction="none"))
    expected = torch.cat(losses).sum().item() / (batch.labels != IGNORE).sum().item()
    for rows in (2, 256):
        assert evaluate(model, batch, 2, rows).loss == pytest.approx(expected, rel=1e-5)
    without = dataclasses.replace(batch, documents=None)
    assert abs(evaluate(model, without, 2).loss - expected) > 1e-3


def test_a_run_keeps_documents_apart(folder: str, tmp_path: Path) -> None:
    """What the trainer's step sees is the packed call, and a run with the option goes through its configuration."""
    task = Shards((folder,), seq_len=50, separate_documents=True)
    cfg = TrainConfig(model=model_of(task), data=task, steps=2, batch_size=4, dtype="float64", log_every=1)
    assert TrainConfig.from_yaml(cfg.to_yaml()) == cfg
    trainer = Trainer(cfg, tmp_path / "run", device="cpu", progress=False)
    batch = task.batch(np.random.default_rng(0), 4)
    plan = LoopPlan(tuple(cfg.loops.depths(cfg.seed, 0, 4).tolist()))
    with torch.no_grad():
        apart, mixed = (
            F.cross_entropy(trainer.model(batch.input_ids, plan=plan, documents=x).logits.mT, batch.labels).item()
            for x in (batch.documents, None)
        )
    trainer.run()
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["train/loss"] == pytest.approx(apart, rel=1e-9) != pytest.approx(mixed, rel=1e-9)


def test_refuses_a_row_that_may_hold_no_label(folder: str) -> None:
    with pytest.raises(ValueError, match=r"data\.seq_len=1"):
        Shards((folder,), seq_len=1, separate_documents=True)
    with pytest.raises((TypeError, ValueError), match=r"data\.separate_documents='yes'"):
        Shards((folder,), separate_documents="yes")  # ty: ignore[invalid-argument-type]
