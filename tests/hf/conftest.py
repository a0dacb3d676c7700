"""Model folders of several shapes, each with the model that was saved there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from open_mythos.model import OpenMythos
from tests.models import random_ids, scaled, tiny

SHAPES = {
    "gqa-experts": tiny(),
    "gqa-dense": tiny(n_experts=0, halting="none", qk_norm=True),
    "mla-experts": tiny(attn_type="mla"),
    "mla-dense": tiny(attn_type="mla", n_experts=0, initial_state="normal"),
}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    scaled(SHAPES[request.param]).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def net(folder: Path) -> OpenMythos:
    return OpenMythos.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from open_mythos.hf import MythosForCausalLM

    return MythosForCausalLM.from_pretrained(folder)


def padded(side: str, net: OpenMythos) -> tuple[Tensor, Tensor]:
    """Three prompts of 7, 5 and 2 tokens, and their mask."""
    ids, mask = random_ids(net.cfg, 3, 7), torch.ones(3, 7, dtype=torch.int64)
    for row, n in enumerate((0, 2, 5)):
        mask[row, slice(n) if side == "left" else slice(7 - n, 7)] = 0
    return ids * mask, mask


N = 12


def greedy(model: Any, ids: Tensor, **options: Any) -> Any:
    return model.generate(ids, **{"max_new_tokens": N, "do_sample": False, "pad_token_id": 0, **options})
