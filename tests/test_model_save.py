"""A model folder: what was saved is what is loaded, and what does not fit is refused by name."""

import hashlib
import json
import os
import random
import resource
import shutil
import time
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from open_mythos import OpenMythos
from open_mythos.model_folder import SAVED_CONFIG, SAVED_DIGEST, read_config
from tests.models import ATTENTIONS, CASES, PARTS, random_ids, scaled, tiny
from tests.train.ranks import CONTEXT

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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS, "modeling_open_mythos.py"]


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


def states_of_saving(folder: Path, model: OpenMythos, monkeypatch: pytest.MonkeyPatch, copies: Path) -> list[Path]:
    """Save a model, and return what a crash would have left behind before and after every rename."""
    found: list[Path] = []
    replace = os.replace

    def look() -> None:
        found.append(shutil.copytree(folder, copies / str(len(found))))

    def watched(*paths: str | Path) -> None:
        look()
        replace(*paths)
        look()

    monkeypatch.setattr(os, "replace", watched)
    model.save_pretrained(folder)
    monkeypatch.undo()
    return found


@pytest.mark.filterwarnings("ignore:.*belongs to other weights:UserWarning")
@pytest.mark.parametrize("earlier_version", [False, True])
def test_saving_again_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier_version: bool) -> None:
    """Models of the same shapes, which differ in what no tensor shows, never load under each other's configuration."""
    old, new = scaled(tiny(rope_theta=1e4, max_loop_iters=3)), scaled(tiny(rope_theta=10.0, max_loop_iters=3), seed=2)
    folder, ids = tmp_path / "model", random_ids(old.cfg, 1, 9)
    old.save_pretrained(folder)
    if earlier_version:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != SAVED_DIGEST}))
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "README.md").write_text("Mine.")
    with torch.no_grad():
        expected = {name: model(ids) for name, model in (("old", old), ("new", new))}
        found = []
        for state in states_of_saving(folder, new, monkeypatch, tmp_path / "states"):
            logits = OpenMythos.from_pretrained(state)(ids)
            found.append([name for name, x in expected.items() if torch.allclose(x, logits, atol=1e-4)])
            assert (state / "README.md").read_text() == "Mine."
    assert found == [["old"], ["new"], ["new"], ["new"]]


def save_for_ever(folder: str) -> None:
    models = [scaled(tiny(rope_theta=theta), seed=seed) for seed, theta in enumerate((1e4, 10.0))]
    while True:
        for model in models:
            model.save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*belongs to other weights:UserWarning")
def test_saving_again_is_one_step_for_a_killed_process(tmp_path: Path) -> None:
    models = {theta: scaled(tiny(rope_theta=theta), seed=seed) for seed, theta in enumerate((1e4, 10.0))}
    models[1e4].save_pretrained(tmp_path)
    rng = random.Random(0)
    for _ in range(3):
        process = CONTEXT.Process(target=save_for_ever, args=(str(tmp_path),), daemon=True)
        process.start()
        first = (tmp_path / WEIGHTS).stat().st_mtime_ns
        while process.is_alive() and (tmp_path / WEIGHTS).stat().st_mtime_ns == first:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        loaded = OpenMythos.from_pretrained(tmp_path)
        assert torch.equal(loaded.embed.weight, models[loaded.cfg.rope_theta].embed.weight)


def test_a_configuration_that_was_edited_by_hand_is_used(tmp_path: Path) -> None:
    scaled(tiny()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_theta": 77.0}))
    assert OpenMythos.from_pretrained(tmp_path).cfg.rope_theta == 77.0


def test_files_of_two_folders(tmp_path: Path) -> None:
    """The weights say which model they are; a rewritten file without metadata goes with the configuration beside it."""
    one, two = scaled(tiny(rope_theta=7.0)), scaled(tiny(rope_theta=8.0), seed=3)
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two")
    shutil.copy(tmp_path / "two" / WEIGHTS, tmp_path / "one" / WEIGHTS)
    with pytest.warns(
        UserWarning, match=r"one/config\.json belongs to other weights than the model\.safetensors beside"
    ):
        assert OpenMythos.from_pretrained(tmp_path / "one").cfg == two.cfg
    save_file(load_file(tmp_path / "two" / WEIGHTS), tmp_path / "one" / WEIGHTS)
    assert OpenMythos.from_pretrained(tmp_path / "one").cfg == one.cfg


@pytest.mark.parametrize("saved", ["[", "[1]", "x" * 2**21, "[" * 100_000, '{"model_type": "llama"}', "\ud800", ""])
def test_a_saved_configuration_that_is_none_is_refused(tmp_path: Path, saved: str) -> None:
    """Whatever the metadata of a file from elsewhere says."""
    scaled(tiny()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    digest = hashlib.sha256(saved.encode(errors="replace")).hexdigest()
    header = {"__metadata__": {SAVED_CONFIG: f"{digest} {saved}"}}
    data = b""
    for name, x in tensors.items():
        raw = x.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": [*x.shape], "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=WEIGHTS):
        warnings.simplefilter("ignore")
        read_config(tmp_path)


def test_a_damaged_header_is_not_taken_for_another_configuration(tmp_path: Path) -> None:
    model = scaled(tiny())
    model.save_pretrained(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    at = data.index(b'\\"rope_theta\\": ') + len(b'\\"rope_theta\\": ')
    (tmp_path / WEIGHTS).write_bytes(data[:at] + b"9" + data[at + 1 :])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged in its header; copy or save it again"):
        OpenMythos.from_pretrained(tmp_path)


def test_the_same_model_is_the_same_file(tmp_path: Path) -> None:
    """The library writes metadata in an order that differs from call to call."""
    model = scaled(tiny())
    files = set()
    for i in range(8):
        model.save_pretrained(tmp_path / str(i))
        files.add((tmp_path / str(i) / WEIGHTS).read_bytes())
    assert len(files) == 1


def test_a_full_disk_leaves_the_old_model(tmp_path: Path) -> None:
    old = scaled(tiny())
    old.save_pretrained(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors\.partial is not written"):
            scaled(tiny(), seed=2).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(OpenMythos.from_pretrained(tmp_path).embed.weight, old.embed.weight)


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


def test_the_dtype_may_be_named_or_chosen(tmp_path, monkeypatch) -> None:
    scaled(tiny()).to(torch.float32).save_pretrained(tmp_path)
    load = OpenMythos.from_pretrained
    assert load(tmp_path, dtype="bfloat16").dtype is load(tmp_path, dtype=torch.bfloat16).dtype is torch.bfloat16
    assert load(tmp_path, dtype="auto").dtype is torch.float32  # small
    monkeypatch.setattr("open_mythos.model.faster_dtype", lambda weights, device: torch.bfloat16)
    assert load(tmp_path, dtype="auto").dtype is torch.bfloat16
    with pytest.raises(ValueError, match="dtype='half'"):
        load(tmp_path, dtype="half")
