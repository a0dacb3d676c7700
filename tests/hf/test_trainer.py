"""The Trainer of transformers: steps, evaluation, and a checkpoint that is a model folder."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

from open_mythos.hf import MythosForCausalLM
from open_mythos.model import OpenMythos
from tests.models import random_ids, scaled, tiny


def test_three_steps(tmp_path: Path) -> None:
    scaled(tiny()).save_pretrained(tmp_path / "model")
    model = MythosForCausalLM.from_pretrained(tmp_path / "model")
    rows = [{"input_ids": row, "labels": row} for row in random_ids(model.net.cfg, 8, 12)]
    args = TrainingArguments(
        tmp_path / "run", max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=3, report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    saved = OpenMythos.from_pretrained(tmp_path / "run" / "checkpoint-3")
    assert all(torch.equal(x, y) for x, y in zip(saved.parameters(), model.net.parameters(), strict=True))
