"""What a run writes beside its model for the hub."""

import json
from pathlib import Path

import pytest
import yaml

from open_mythos.assets import novel
from open_mythos.model import OpenMythos
from open_mythos.recipes import load_recipe
from open_mythos.tokenization.tokenizer import BPETokenizer
from open_mythos.train.config import TrainConfig
from open_mythos.train.run_folder import save_model_folder


@pytest.fixture(scope="module")
def run() -> TrainConfig:
    return load_recipe("tiny-text")


@pytest.fixture(scope="module")
def final(run: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "final"
    tokenizer = BPETokenizer.train_from_text(novel()[:20_000], run.model.vocab_size)
    save_model_folder(run.model, OpenMythos(run.model).state_dict(), tokenizer, folder, run)
    return folder


def test_the_card_states_the_run(run: TrainConfig, final: Path) -> None:
    card = (final / "README.md").read_text("utf-8")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "transformers"
    config = body.split("```yaml\n")[1].split("```")[0]
    assert TrainConfig.from_yaml(config) == run
    assert f"{sum(x.numel() for x in OpenMythos(run.model).parameters()):,} parameters" in body


def test_generation_knows_the_special_tokens(final: Path) -> None:
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    assert json.loads((final / "generation_config.json").read_text()) == ids
    transformers = pytest.importorskip("transformers")
    import open_mythos.hf  # noqa: F401

    config = transformers.AutoModelForCausalLM.from_pretrained(final).generation_config
    assert {name: getattr(config, name) for name in ids} == ids
