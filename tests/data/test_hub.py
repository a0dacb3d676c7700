"""Datasets of the hub, from a server on this machine that speaks its protocol: subsets, commits, and prepare-data."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from open_mythos.cli import main
from open_mythos.data import documents, hub
from open_mythos.data.hub import HubDataset
from open_mythos.data.parquet import _remote_metadata, row_group_bytes
from open_mythos.data.prepare import Settings, prepare
from open_mythos.data.shards import TokenShards
from tests.data.fake_hub import FakeHub, serve, use

NAME = "HuggingFaceFW/fineweb-edu"
CARD = {
    "configs": [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]},
        {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": ["sample/10BT/*"]}]},
        {"config_name": "halves", "data_files": [{"split": "test", "path": "a/*"}, {"split": "train", "path": "b/*"}]},
        {"config_name": "none", "data_files": "c/*"},
    ]
}
HELD_OUT = Settings(held_out=0.2)


def write(path: Path, texts: list[str | None], rows: int = 10) -> None:
    """As the published files are: other columns beside the text, in row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    other = [rng.bytes(2000) for _ in texts]
    parquet.write_table(pyarrow.table({"text": texts, "other": other}), path, row_group_size=rows)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = tmp_path / "repository"
    for i in range(3):
        write(folder / f"sample/10BT/{i:03}_00000.parquet", [f"sample {i} {j}" for j in range(60)])
    write(folder / "data/CC-1/000_00000.parquet", ["of everything"])
    write(folder / "b/train.parquet", ["of half"])
    (folder / "c").mkdir()
    (folder / "c" / "d.jsonl.zst").write_text("x")
    monkeypatch.setattr(documents.cut_into_units, "__defaults__", (1000,))
    _remote_metadata.cache_clear()
    with serve(FakeHub(NAME, folder)) as fake:
        fake.card = CARD
        use(fake, tmp_path / "cache", monkeypatch)
        yield fake


def contents(folder: Path, pattern: str = "*/*") -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.glob(pattern))}


def test_a_subset_is_what_the_card_says(server: FakeHub) -> None:
    def names(subset: str | None = None, limit: int | None = None) -> list[str]:
        prefix = f"hf://datasets/{NAME}@{'a' * 40}/"
        files = HubDataset(NAME, subset, limit_files=limit).files()
        assert all(file.startswith(prefix) for file in files)
        return [file.removeprefix(prefix) for file in files]

    assert names() == names("default") == ["data/CC-1/000_00000.parquet"]
    assert names("sample-10BT") == [f"sample/10BT/{i:03}_00000.parquet" for i in range(3)]
    assert names("sample-10BT", 2) == [f"sample/10BT/{i:03}_00000.parquet" for i in range(2)]
    assert names("halves") == ["b/train.parquet"]
    with pytest.raises(ValueError, match=r"no subset 'sample'; use one of default, sample-10BT"):
        names("sample")
    with pytest.raises(ValueError, match=r"no parquet files in subset none \(\.zst\)"):
        names("none")
    server.card = {"configs": CARD["configs"][1:2]}
    assert len(names()) == 3
    server.card = {"configs": CARD["configs"][1:]}
    with pytest.raises(ValueError, match="no subset 'none given'; use one of sample-10BT, halves, none"):
        names()
    server.card = {}
    assert names() == ["b/train.parquet"]
    assert names("sample/10BT", 1) == ["sample/10BT/000_00000.parquet"]
    with pytest.raises(ValueError, match=r"no parquet files in subset x \(no files\)"):
        names("x")


def test_what_the_hub_does_not_give(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r"'some/thing' is no local path, and the Hugging Face hub does not give"):
        HubDataset("some/thing").pinned()
    with pytest.raises(OSError, match="at revision 'v2'"):
        HubDataset(NAME, revision="v2").files()
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.HfFileSystem, "glob", lambda self, pattern: 1 / 0)
        with pytest.raises(OSError, match=r"does not list the files of .*division.*; check the connection"):
            HubDataset(NAME).files()
    with pytest.raises(ValueError, match=r"dataset 'fineweb' must be OWNER/NAME"):
        HubDataset("fineweb")
    with pytest.raises(ValueError, match="limit_files=0 must be at least 1"):
        HubDataset(NAME, limit_files=0)
    assert hub.looks_like_a_dataset("a-b/c.d_e-1") and not hub.looks_like_a_dataset("open_mythos/data")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface-hub is missing; run: pip install .*huggingface.hub"):
        HubDataset(NAME).files()


@pytest.mark.parametrize("workers", [1, 2])
def test_prepared_as_the_same_files_on_disk_are(server: FakeHub, tmp_path: Path, workers: int) -> None:
    dataset = HubDataset(NAME, "sample-10BT")
    info = prepare(dataset, tmp_path / "remote", "bytes", HELD_OUT, workers, progress=False)
    prepare([str(server.folder / "sample")], tmp_path / "local", "bytes", HELD_OUT, progress=False)
    assert info["counts"]["train"]["documents"] + info["counts"]["validation"]["documents"] == 180
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    # Once each, whole.
    downloads = [path for _, path, n in server.requests if path.endswith("parquet") and n > 65536]
    assert len(downloads) == len(set(downloads)) == 3


def test_an_interrupted_call_goes_on_with_its_commit(server: FakeHub, tmp_path: Path) -> None:
    dataset, out = HubDataset(NAME, "sample-10BT"), tmp_path / "out"
    prepare(dataset, tmp_path / "whole", "bytes", HELD_OUT, progress=False)
    shutil.rmtree(tmp_path / "cache" / "hub")
    server.broken = [404, 200]  # the second file is cut short, then refused
    with pytest.raises(OSError, match=r"@a+/sample/10BT/000_00000.parquet cannot be downloaded .*; repeat the command"):
        prepare(dataset, out, "bytes", HELD_OUT, progress=False)
    plan = json.loads((out / "plan.json").read_text())
    assert plan["dataset"] == {"name": NAME, "subset": "sample-10BT", "revision": "a" * 40, "limit_files": None}
    # Meanwhile somebody pushes to the dataset.
    server.known[server.commit] = shutil.copytree(server.folder, tmp_path / "before")
    server.commit = "b" * 40
    write(server.folder / "sample/10BT/000_00000.parquet", ["changed"] * 7)
    server.broken = []
    prepare(dataset, out, "bytes", HELD_OUT, progress=False)
    assert contents(out) == contents(tmp_path / "whole")
    prepare(dataset, tmp_path / "new", "bytes", HELD_OUT, progress=False)
    assert contents(tmp_path / "new") != contents(out)
    assert json.loads((tmp_path / "new" / "plan.json").read_text())["dataset"]["revision"] == "b" * 40
    for other in (HubDataset(NAME), HubDataset(NAME, "sample-10BT", limit_files=1), HubDataset(NAME, "halves", "main")):
        with pytest.raises(ValueError, match="holds data made with other dataset; use another folder"):
            prepare(other, out, "bytes", HELD_OUT, progress=False)


def test_footers_that_were_read_are_kept(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time, the second of three fails; the first is not asked for again, nor any by another process."""
    monkeypatch.setattr(hub, "CONNECTIONS", 1)
    files = HubDataset(NAME, "sample-10BT").files()
    look_up = iter(([1, 2], ConnectionError("gone"), [4]))

    def once(address: str) -> list[int]:
        value = next(look_up)
        if isinstance(value, Exception):
            raise value
        return value

    with pytest.raises(ConnectionError):
        hub.remember(files, once, progress=False)
    assert hub.remember(files[:1], once, progress=False) == [[1, 2]]
    shutil.rmtree(tmp_path / "cache" / "assets")
    server.requests.clear()
    sizes = row_group_bytes(files)
    assert [len(size) for size in sizes] == [6, 6, 6] and len(server.requests) >= 3
    server.requests.clear()
    _remote_metadata.cache_clear()
    assert row_group_bytes(files) == sizes and not server.requests


def test_the_commands(server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bpe, out = str(tmp_path / "bpe"), str(tmp_path / "out")
    tokenizer = ["train-tokenizer", NAME, "--subset", "sample-10BT", "--out", bpe, "--vocab-size", "260"]
    assert main([*tokenizer, "--max-mb", "0.0001"]) == 0
    assert f"mythos prepare-data {NAME} --subset sample-10BT --tokenizer" in capsys.readouterr().out
    # Of one file the footer and a row group's text, of the others nothing.
    assert server.bytes_sent("/000_00000.parquet") < 70_000
    assert not server.bytes_sent("/001_00000.parquet")
    command = ["prepare-data", "--out", out, "--tokenizer", bpe, "--limit-files", "2", "--held-out", "0.1"]
    assert main(command) == 0
    assert "documents" in capsys.readouterr().out
    assert sum(TokenShards(out, split).n_documents for split in ("train", "validation")) == 120
    assert main([*command[:1], NAME, "--subset", "sample-10BT", *command[1:]]) == 0
    for arguments, message in (
        ([str(tmp_path), "--subset", "x"], "--subset x is for one dataset of the hub"),
        ([NAME, "some/thing"], "input HuggingFaceFW/fineweb-edu does not exist"),
        (["data/no.txt"], "input data/no.txt does not exist"),
        ([NAME, "--revision", "v2"], "at revision 'v2'"),
    ):
        assert main(["prepare-data", *arguments, "--out", str(tmp_path / "other")]) == 2
        assert message in capsys.readouterr().err
