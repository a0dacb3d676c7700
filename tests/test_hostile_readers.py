"""Every field of every file that a folder or a run brings, with values made to do harm, through its reader."""

import copy
import datetime
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from open_mythos.cli import main
from open_mythos.config import MythosConfig
from open_mythos.data.shards import TokenShards, write_shard
from open_mythos.evals.by_loops import trained_context
from open_mythos.files import parse_yaml
from open_mythos.model_folder import read_config
from open_mythos.recipes import load_recipe
from open_mythos.tasks import TASKS
from open_mythos.tokenization.tokenizer import ByteTokenizer
from open_mythos.train.config import TrainConfig
from tests.models import scaled, tiny

# As they stand in a file: numbers that no type holds, other types, text that is none, and long ones.
HOSTILE = [
    "1000000000001",
    "1" * 400,
    "-" + "1" * 4000,
    "1e400",
    "NaN",
    "-0.0",
    "0.5",
    "true",
    "null",
    "[]",
    "{}",
    "[[[[[[[[1]]]]]]]]",
    '""',
    '"nan"',
    r'"\u0000"',
    r'"\ud800"',
    '"' + "9" * 10_000 + '"',
    "[" + "1, " * 5000 + "1]",
    '{"a": {"b": 1}}',
]
MARK = "@@@"


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in nested dictionaries, the dictionaries themselves included."""
    if place:
        yield place
    for key, each in value.items() if isinstance(value, dict) else ():
        yield from leaves(each, (*place, key))


def spoiled(values: dict[str, Any], place: tuple[Any, ...], text: str) -> str:
    """The JSON of the values with `text` in one place."""
    values = json.loads(json.dumps(values))
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = MARK
    return json.dumps(values).replace(json.dumps(MARK), text)


def refuse_or_read(read: Callable[[Path], object], path: Path, field: str, errors: Any = ValueError) -> bool:
    """Whether the file was refused, by its name and the field's, in few words."""
    try:
        read(path)
    except errors as error:
        message = str(error)
        assert str(path.parent) in message and field in message and len(message) < 1000, message
        return True
    return False


def check_all(read: Callable[[Path], object], path: Path, values: dict[str, Any]) -> int:
    """Put every hostile text into every field; returns how many were refused."""
    n = 0
    for place in leaves(values):
        for text in HOSTILE:
            path.write_text(spoiled(values, place, text))
            n += refuse_or_read(read, path, str(place[-1]))
    return n


def test_every_field_of_a_model_folder(tmp_path: Path) -> None:
    values = {"model_type": "open_mythos", **MythosConfig().to_dict()}
    n = check_all(lambda path: read_config(path.parent), tmp_path / "config.json", values)
    assert n > 16 * len(values)  # few of the texts are a value that a field may have


@functools.cache
def harmful() -> list[Any]:
    """What YAML makes of the texts that it takes: it reads NaN and 1e400 as words."""
    values: list[Any] = [10**300, "1e400", ".inf", datetime.date(2026, 1, 1), b"a", {"a"}]
    for text in HOSTILE:
        try:
            values.append(parse_yaml(text, ""))
        except ValueError:
            continue
    return values


@pytest.mark.parametrize("task", TASKS)
def test_every_field_of_a_run(task: str) -> None:
    values = load_recipe("tiny-khop" if task == "khop" else "tiny-addition").to_dict()
    places = list(leaves(values))
    if task not in ("khop", "addition"):
        given = {"paths": ("a",), "dataset": "a/b"}
        fields = {name: given[name] for name in given if name in TASKS[task].__dataclass_fields__}
        values["data"] = {"task": task, **asdict(TASKS[task](**fields))}
        values["model"] |= {"max_seq_len": 4096, "vocab_size": 4096}
        places = [("data", name) for name in values["data"]]
    values["init_from"] = "a"
    n = 0
    for place in places:
        for value in harmful():
            changed = copy.deepcopy(values)
            inner = changed
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            try:
                TrainConfig.from_dict(changed)
            except (TypeError, ValueError) as error:
                # A value may be one that the field takes and the model has no room for.
                named = place[-1] in str(error) or str(error).startswith(("model.max_seq_len", "model.vocab_size"))
                assert named and len(str(error)) < 600, (place, value, error)
                n += 1
    assert n > 10 * len(places)


def test_every_field_of_prepared_data(tmp_path: Path) -> None:
    values = prepared(tmp_path)
    shard = values["splits"]["train"][0]

    def read(path: Path) -> None:
        shards = TokenShards(path.parent, "train")
        assert shards.vocab_size and isinstance(shards.tokenizer_sha256, str)
        assert shards.read(0, shards.n_tokens).tolist() in ([1, 2, 3, 4], [])

    n = check_all(read, tmp_path / "dataset.json", values)
    assert n > 16 * 5  # format, dtype, vocab_size, tokenizer, splits
    for place in leaves(shard):
        for text in HOSTILE:
            values["splits"]["train"] = [json.loads(json.dumps(shard))]
            values["splits"]["train"][0][place[0]] = MARK
            (tmp_path / "dataset.json").write_text(json.dumps(values).replace(json.dumps(MARK), text))
            refuse_or_read(read, tmp_path / "dataset.json", "")


def prepared(folder: Path) -> dict[str, Any]:
    """Write a folder of prepared data, and return its index."""
    shards = [asdict(write_shard(folder, "train/0.bin", [np.array([1, 2]), np.array([3, 4])], 4, "uint16"))]
    index = {"format": 1, "dtype": "uint16", "vocab_size": 259, "tokenizer": "a", "settings": {}, "counts": {}}
    index |= {"skipped": {}, "splits": {"train": shards, "validation": []}}
    (folder / "dataset.json").write_text(json.dumps(index))
    return index


PATHS = [
    "/etc/passwd",
    "../../../../etc/passwd",
    "train/../../x.bin",
    "out.bin",
    "loop.bin",
    "up/x.bin",
    "train",
    "",
    "a\0b",
    ".",
    "..",
]


@pytest.mark.parametrize("name", PATHS)
def test_prepared_data_names_nothing_outside(name: str, tmp_path: Path) -> None:
    folder, outside = tmp_path / "data", tmp_path / "x.bin"
    folder.mkdir()
    index = prepared(folder)
    outside.write_bytes((folder / "train/0.bin").read_bytes())
    outside.with_suffix(".ends").write_bytes((folder / "train/0.ends").read_bytes())
    for link, target in (
        ("out.bin", outside),
        ("out.ends", outside.with_suffix(".ends")),
        ("loop.bin", "loop.bin"),
        ("up", ".."),
    ):
        (folder / link).symlink_to(target)
    index["splits"]["train"][0]["path"] = name
    (folder / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"no path inside|leads out|loop|should have 8 bytes and there is nothing|path="
    ):
        TokenShards(folder, "train")


def test_documents_that_end_nowhere(tmp_path: Path) -> None:
    """The lengths of the files are right, and what stands in them is not."""
    prepared(tmp_path)
    for ends in ([4, 2], [-1, 4], [2**62, 4], [9, 9]):
        np.array(ends, "<i8").tofile(tmp_path / "train/0.ends")
        shards = TokenShards(tmp_path, "train")
        with pytest.raises(ValueError, match=r"0\.ends is damaged"):
            shards.documents(0, 4)
            shards.first_tokens()


def test_an_index_of_50000_brackets(tmp_path: Path) -> None:
    for text in ("[" * 50_000, '{"a":' * 50_000, "null", "[]", "{}", '{"format": 1}', ""):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match=r"dataset\.json"):
            TokenShards(tmp_path, "train")


def test_the_context_of_a_run_is_checked(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    for text in ("data: {seq_len: [1]}", "data: {seq_len: 0}", "data: {seq_len: x}", "data: &a [*a]", "[" * 50_000):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml"):
            trained_context(tmp_path / "final")
    (tmp_path / "config.yaml").write_text("data: {seq_len: 64}")
    assert trained_context(tmp_path / "final") == 64


BOMB = "a: &a [1, 1]\n" + "".join(f"{y}: &{y} [*{x}, *{x}]\n" for x, y in zip("abcdefghi", "bcdefghij", strict=True))
CONFIGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a picture": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n\0\0"), "run.yaml is no UTF-8 text"),
    "UTF-16": (lambda p: p.write_text("steps: 1", "utf-16"), "run.yaml is no UTF-8 text"),
    "aliases of aliases": (lambda p: p.write_text(BOMB), "has the alias *a; write the value out"),
    "brackets": (lambda p: p.write_text("[" * 50_000), "nested deeper than"),
    "a pipe": (lambda p: os.mkfifo(p), "run.yaml is a pipe or a device"),
    "a device": (lambda p: p.symlink_to("/dev/zero"), "run.yaml is a pipe or a device"),
    "a folder": (lambda p: p.mkdir(), "Is a directory"),
    "a loop of links": (lambda p: p.symlink_to(p.name), "Too many levels of symbolic links"),
    "nothing": (lambda p: None, "run.yaml does not exist"),
    "an empty file": (lambda p: p.write_text(""), "must be a YAML mapping"),
    "a large file": (lambda p: p.write_text("#" * 10**6), "run.yaml has more than 65536 bytes"),
    "4,000 digits": (lambda p: p.write_text("model: {dim: " + "1" * 4000 + "}"), "run.yaml: model.dim must be"),
}


@pytest.mark.parametrize("command", ["train", "plan"])
@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_on_the_command_line(
    name: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = CONFIGS[name]
    make(tmp_path / "run.yaml")
    out = ["--out", str(tmp_path / "out")] if command == "train" else []
    assert main([command, "--config", str(tmp_path / "run.yaml"), *out]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error) < 800 and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    scaled(tiny(vocab_size=259)).save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: (path.unlink(), make(path))


FOLDERS: dict[str, Callable[[Path], object]] = {
    "a width without divisors": lambda p: p.write_text(p.read_text().replace('"dim": 32', f'"dim": {10**12 + 1}')),
    "4,000 digits": lambda p: p.write_text(p.read_text().replace('"dim": 32', '"dim": ' + "1" * 4000)),
    "a loop of links": replace_by(lambda p: p.symlink_to(p.name)),
    "a link to nothing": replace_by(lambda p: p.symlink_to("nothing")),
    "a link out": replace_by(lambda p: p.symlink_to("/dev/zero")),
    "a pipe": replace_by(os.mkfifo),
    "a folder": replace_by(Path.mkdir),
    "brackets": lambda p: p.write_text("[" * 50_000),
    "UTF-16": lambda p: p.write_text(p.read_text(), "utf-16"),
    "an empty file": lambda p: p.write_text(""),
}
COMMANDS: dict[str, Callable[[str, str], list[str]]] = {
    "info": lambda folder, text: ["info", folder],
    "generate": lambda folder, text: ["generate", folder, "a"],
    "eval": lambda folder, text: ["eval", folder, "--text", text],
    "chat": lambda folder, text: ["chat", folder, "--plain"],
    "serve": lambda folder, text: ["serve", folder, "--port", "0"],
    "analyze": lambda folder, text: ["analyze", folder],
    "train": lambda folder, text: [
        "train",
        "chat",
        "--init-from",
        folder,
        "--data.paths",
        text,
        "--out",
        folder + "/out",
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_model_folders_on_the_command_line(
    command: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jsonl").write_text("{}")
    for name, spoil in FOLDERS.items():
        folder = tmp_path / name
        shutil.copytree(model, folder)
        assert '"dim": 32' in (folder / "config.json").read_text()
        spoil(folder / "config.json")
        assert main(COMMANDS[command](str(folder), str(tmp_path / "text.jsonl"))) == 2, name
        error = capsys.readouterr().err
        assert str(folder / "config.json") in error and len(error) < 900, (name, error)


def test_a_run_that_is_written_can_be_read(tmp_path: Path) -> None:
    """No recipe's own file meets a limit, and neither does a byte order mark."""
    cfg = load_recipe("mythos-1t")
    (tmp_path / "run.yaml").write_text(cfg.to_yaml(), "utf-8-sig")
    assert TrainConfig.load(tmp_path / "run.yaml") == cfg
    assert "&" not in yaml.safe_dump(cfg.to_dict())
