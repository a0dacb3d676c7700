"""Model folders made to do harm: each ends in an error that names the file, soon, and before anything large is made."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from open_mythos import OpenMythos
from open_mythos.model_folder import MAX_HEADER_BYTES, MAX_TENSORS
from open_mythos.tokenization.tokenizer import ByteTokenizer, load_tokenizer
from tests.models import scaled, tiny

WEIGHTS, CONFIG, OWN = "model.safetensors", "config.json", "mythos_tokenizer.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    scaled(tiny(vocab_size=259)).save_pretrained(path)
    ByteTokenizer().save(path)
    return path


def load(folder: Path) -> None:
    """What every command does with a folder."""
    load_tokenizer(folder)
    OpenMythos.from_pretrained(folder)


def header(folder: Path, data: bytes, size: int | None = None) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(data) if size is None else size) + data)


def config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors(folder: Path, **changes: torch.Tensor) -> None:
    good = {name: x.clone() for name, x in load_file(folder / WEIGHTS).items()}
    save_file({**good, **changes}, folder / WEIGHTS)


def link(folder: Path, name: str) -> None:
    secret = folder.parent / "secret"
    (folder / name).replace(secret) if (folder / name).exists() else secret.write_text("{}")
    (folder / name).symlink_to(secret)


def many_tensors(folder: Path) -> None:
    entry = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    header(folder, ("{" + ",".join(entry.format(i) for i in range(MAX_TENSORS + 1)) + "}").encode())


def entry(start: int, end: int, shape: list[int] | None = None) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape or [(end - start) // 4], "data_offsets": [start, end]}


def described(folder: Path, n_bytes: int = 8, **entries: object) -> None:
    data = json.dumps(entries).encode()
    header(folder, data + b"\0" * n_bytes, len(data))


def index_that_leads_out(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / WEIGHTS)
    (folder / (WEIGHTS + ".index.json")).write_text(json.dumps({"weight_map": {"norm.weight": f"../{WEIGHTS}"}}))


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a header longer than the file": (lambda f: header(f, b"{}", 1000), "cannot be read"),
    "a giant header": (lambda f: header(f, b" " * 10, MAX_HEADER_BYTES + 1), "a header of 8388609 bytes"),
    "a header of 2**63": (lambda f: header(f, b"{}", 2**63), "a header of"),
    "a header that is no JSON": (lambda f: header(f, b"\x80\x05."), "cannot be read"),
    "a nested header": (lambda f: header(f, b"[" * 10**6), "cannot be read"),
    "many tensors": (many_tensors, "more than 100000"),
    "tensors that overlap": (lambda f: described(f, a=entry(0, 8), b=entry(4, 8)), "cannot be read"),
    "tensors with a gap": (lambda f: described(f, a=entry(0, 4), b=entry(8, 12), n_bytes=12), "cannot be read"),
    "a tensor beyond the file": (lambda f: described(f, a=entry(0, 2**62)), "cannot be read"),
    "a tensor of no end": (lambda f: described(f, a=entry(0, 8, [2**63, 2**63])), "cannot be read"),
    "a negative tensor": (lambda f: described(f, a=entry(0, 8, [-2, -1])), "cannot be read"),
    "a tensor of many dimensions": (
        lambda f: described(f, n_bytes=4, **{"norm.weight": entry(0, 4, [1] * 10**6)}),
        "does not fit",
    ),
    "a long name": (lambda f: described(f, n_bytes=4, **{"a" * 10**6: entry(0, 4)}), "does not fit"),
    "an index that leads out": (index_that_leads_out, "does not exist"),
    "a name twice": (
        lambda f: header(f, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},' * 2, None),
        "cannot be read",
    ),
    "no tensors": (lambda f: header(f, b"{}"), "does not fit"),
    "an empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), "cannot be read"),
    "a pickle": (lambda f: (f / WEIGHTS).write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR."), "cannot be read"),
    "wrong shapes": (lambda f: tensors(f, **{"norm.weight": torch.zeros(3)}), "norm.weight has shape"),
    "extra tensors": (lambda f: tensors(f, **{"../../x": torch.zeros(1)}), "../../x is unknown"),
    "an extra tensor of much": (lambda f: tensors(f, extra=torch.zeros(10**7)), "extra is unknown"),
    "a tensor of numbers": (lambda f: tensors(f, **{"norm.weight": torch.zeros(32, dtype=torch.int32)}), "in I32"),
    "a linked file": (lambda f: link(f, WEIGHTS), "leads out of its folder"),
    "a linked configuration": (lambda f: link(f, CONFIG), "leads out of its folder"),
    "a linked tokenizer": (lambda f: link(f, OWN), "leads out of its folder"),
    "a linked other tokenizer": (lambda f: link(f, "tokenizer.json"), "leads out of its folder"),
    "a pipe": (lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), "a pipe or a device"),
    "a wide model": (lambda f: config(f, dim=2**20, n_heads=4), "does not fit"),
    "a deep model": (lambda f: config(f, prelude_layers=4096), "does not fit"),
    "a large vocabulary": (lambda f: config(f, vocab_size=2**30), "does not fit"),
    "many experts": (lambda f: config(f, n_experts=2**16), "does not fit"),
    "a fraction": (lambda f: config(f, dim=0.5), "dim=0.5 must be int"),
    "an unknown field": (lambda f: config(f, rope_scaling={}), "'rope_scaling' is no field"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "no JSON object"),
    "a nested configuration": (lambda f: (f / CONFIG).write_text("[" * 10**5), "cannot be read as JSON"),
    "no JSON": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), "is no UTF-8 text"),
    "a large configuration": (lambda f: (f / CONFIG).write_bytes(b" " * 2**21), "more than 1048576 bytes"),
    "a tokenizer of no type": (lambda f: (f / OWN).write_text('{"type": "pickle"}'), "has no type"),
    "a nested tokenizer": (lambda f: (f / OWN).write_text("[" * 10**5), "cannot be read"),
    "symbols that are none": (lambda f: (f / OWN).write_text('{"type": "symbols", "symbols": [1]}'), "cannot be read"),
    "many symbols": (
        lambda f: (f / OWN).write_text(json.dumps({"type": "symbols", "symbols": ["a"] * 10**5})),
        "must be different",
    ),
    "another tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "x"}}'), "is no tokenizer"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_folder_is_refused_by_name(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, message = CASES[name]
    spoil(folder)
    # The tensors are read last, if at all.
    monkeypatch.setattr("open_mythos.model_folder.load_file", lambda path: pytest.fail("tensors were read"))
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as error:
        load(folder)
    assert message in str(error.value) and len(str(error.value)) < 2000


def test_the_cache_of_the_hub_may_link_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    """Its folders hold links and nothing else."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1f0", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.replace(blobs / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    load(snapshot)
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of its folder"):
        load(snapshot)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    path = tmp_path_factory.mktemp("spoiled")
    scaled(tiny(vocab_size=259)).save_pretrained(path)
    ByteTokenizer().save(path)
    return path, {name: (path / name).read_bytes() for name in (WEIGHTS, CONFIG, OWN)}


def spoil_and_load(spoiled: tuple[Path, dict[str, bytes]], name: str, changes: list[tuple[int, int]]) -> None:
    """Bytes changed anywhere in the first kilobytes: an error of ours, or a model."""
    folder, good = spoiled
    data = bytearray(good[name])
    for place, value in changes:
        data[place % min(len(data), 4096)] = value
    (folder / name).write_bytes(data)
    try:
        load(folder)
    except (ValueError, TypeError, FileNotFoundError):
        pass
    finally:
        (folder / name).write_bytes(good[name])


CHANGES = {
    "name": st.sampled_from([WEIGHTS, CONFIG, OWN]),
    "changes": st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=8),
}


@settings(max_examples=60)
@given(**CHANGES)
def test_changed_bytes(spoiled: tuple[Path, dict[str, bytes]], name: str, changes: list[tuple[int, int]]) -> None:
    spoil_and_load(spoiled, name, changes)


@pytest.mark.slow
@settings(max_examples=5000)
@given(**CHANGES)
def test_many_changed_bytes(spoiled: tuple[Path, dict[str, bytes]], name: str, changes: list[tuple[int, int]]) -> None:
    spoil_and_load(spoiled, name, changes)
