"""A model folder: what was saved is what is loaded, and what does not fit is refused by name."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from open_mythos import OpenMythos
from tests.models import ATTENTIONS, CASES, PARTS, random_ids, scaled, tiny

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize(("attn_type", "part"), CASES)
def test_round_trip(attn_type: str, part: str, tmp_path: Path) -> None:
    model = scaled(tiny(attn_type=attn_type, **PARTS[part]))
    model.save_pretrained(tmp_path)
    loaded = OpenMythos.from_pretrained(tmp_path)
    assert loaded.cfg == model.cfg and not loaded.training
    assert loaded.head.weight is loaded.embed.weight
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    if loaded.recurrent is not None and model.recurrent is not None:
        loaded.recurrent.compaction = model.recurrent.compaction  # a policy is no part of the weights, and rounds
    ids = random_ids(model.cfg, 2, 7)
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS]


def test_loaded_model_trains(tmp_path: Path) -> None:
    scaled(tiny()).save_pretrained(tmp_path)
    model = OpenMythos.from_pretrained(tmp_path).train()
    model(random_ids(model.cfg, 1, 5)).sum().backward()
    before = model.embed.weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.embed.weight, before) and model.head.weight is model.embed.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_of_the_file_and_of_the_call(dtype: torch.dtype, tmp_path: Path) -> None:
    model = scaled(tiny()).to(dtype)
    model.save_pretrained(tmp_path)
    assert OpenMythos.from_pretrained(tmp_path).dtype == dtype
    assert OpenMythos.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    bias = OpenMythos.from_pretrained(tmp_path).recurrent.block.ffn.router_bias
    assert bias.dtype == torch.float32 and torch.equal(bias, model.recurrent.block.ffn.router_bias)


def test_saving_again_replaces(tmp_path: Path) -> None:
    scaled(tiny()).save_pretrained(tmp_path)
    second = scaled(tiny(attn_type="mla"), seed=2)
    second.save_pretrained(tmp_path)
    loaded = OpenMythos.from_pretrained(tmp_path)
    assert loaded.cfg == second.cfg and torch.equal(loaded.embed.weight, second.embed.weight)


@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_tensors_that_do_not_fit_are_named(attn_type: str, tmp_path: Path) -> None:
    scaled(tiny(attn_type=attn_type)).save_pretrained(tmp_path)
    good = load_file(tmp_path / WEIGHTS)
    good = {name: x.clone() for name, x in good.items()}
    for state, message in (
        ({name: x for name, x in good.items() if name != "norm.weight"}, "norm.weight is missing"),
        ({**good, "recurrent.extra": torch.zeros(2)}, "recurrent.extra is unknown"),
        ({**good, "norm.weight": torch.zeros(3)}, "norm.weight has shape \\(3,\\), not \\(32,\\)"),
    ):
        save_file(state, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=message) as error:
            OpenMythos.from_pretrained(tmp_path)
        assert "config.json" in str(error.value)


def test_configurations_that_do_not_fit_are_named(tmp_path: Path) -> None:
    scaled(tiny()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for changes, message in (
        ({"n_headz": 4}, "did you mean 'n_heads'"),
        ({"n_kv_heads": 3}, "n_kv_heads=3 must divide"),
        ({"dim": "32"}, "dim='32' must be int"),
        ({"dim": 64}, "has shape"),
        ({"model_type": "llama"}, "model_type='llama'"),
    ):
        path.write_text(json.dumps({**good, **changes}))
        with pytest.raises((ValueError, TypeError), match=message):
            OpenMythos.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist; give a folder"):
        OpenMythos.from_pretrained(tmp_path)
    scaled(tiny()).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        OpenMythos.from_pretrained(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    scaled(tiny()).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .* save it again"):
        OpenMythos.from_pretrained(tmp_path)


def test_a_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scaled(tiny())
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: str(tmp_path))
    assert torch.equal(OpenMythos.from_pretrained("owner/name").embed.weight, model.embed.weight)


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no connection"), HFValidationError("no such name")])
def test_a_path_that_is_neither_here_nor_on_the_hub(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repo: str, allow_patterns: list[str]) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"'runs/typo' is no folder here .* check the path"):
        OpenMythos.from_pretrained("runs/typo")
