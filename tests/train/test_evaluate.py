"""Scores of a batch against decoding it token by token."""

import numpy as np
import pytest

from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.tasks import Addition
from open_mythos.train.evaluate import Score, evaluate

ROWS = 20


def scaled_model() -> OpenMythos:
    cfg = MythosConfig(
        vocab_size=16, dim=32, n_heads=2, n_kv_heads=1, max_seq_len=32, prelude_layers=1, coda_layers=0,
        attn_type="gqa", n_experts=0, expert_dim=32, lora_rank=0, injection="diagonal", halting="none",
    )  # fmt: skip
    model = OpenMythos(cfg)
    for p in model.parameters():
        p.data.mul_(8)
    return model


def test_accuracy_is_that_of_greedy_decoding() -> None:
    """Exact match with the labels at hand is exact match of writing the answer token by token."""
    model = scaled_model().eval()
    batch = Addition(1, 1).batch(np.random.default_rng(0), ROWS)
    right = 0
    for row, (ids, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
        written = ids.clone()
        places = (labels >= 0).nonzero().flatten().tolist()
        guesses = []
        for t in places:
            guesses.append(int(model(written[None], n_loops=2)[0, t].argmax()))
            if t + 1 < len(written):
                written[t + 1] = guesses[-1]
        if row % 2:
            # What the model writes becomes the label of every other row, so that both outcomes occur.
            labels[places] = labels.new_tensor(guesses)
            ids.copy_(written)
        right += guesses == labels[places].tolist()
    score = evaluate(model, batch, n_loops=2, chunk_rows=7)
    assert score.accuracy == right / ROWS
    assert 0.5 <= score.accuracy < 1
    assert score.loss == pytest.approx(evaluate(model, batch, n_loops=2).loss, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_no_gradient_is_left(training: bool) -> None:
    model = scaled_model().train(training)
    evaluate(model, Addition(1, 1).batch(np.random.default_rng(0), 3), n_loops=1)
    assert model.training == training
    assert all(p.grad is None for p in model.parameters())


def test_bits_per_byte() -> None:
    # 8 bits per token of 4 bytes.
    assert Score(nats=24 * np.log(2), n_labels=3, n_right=0, n_rows=1).bits_per_byte(4.0) == pytest.approx(2.0)
