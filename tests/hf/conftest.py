"""Model folders of several shapes, each with the model that was saved there."""

from pathlib import Path

import pytest

from open_mythos.model import OpenMythos
from tests.models import scaled, tiny

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
