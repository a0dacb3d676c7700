"""What is skipped: listed whole in a file, shown bounded in a table, refused by --strict."""

import json
from pathlib import Path

import pytest

from open_mythos.cli import main
from open_mythos.data import documents
from open_mythos.data import prepare as module
from open_mythos.data.prepare import Settings, prepare
from open_mythos.data.records import Reading
from open_mythos.data.shards import TokenShards
from open_mythos.data.skipped import SkipLog, Skipped


def listed(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents.cut_into_units, "__defaults__", (300,))


def test_lines_are_numbered_in_the_file(small_units: None, tmp_path: Path) -> None:
    """Whichever unit they are in, and however many workers there are."""
    path = tmp_path / "a.jsonl"
    bad = [3, 40, 41, 99, 160]
    lines = [
        b'{"text": "\xff"}' if n in bad else json.dumps({"text": "word " * (n % 9 + 1)}).encode() for n in range(161)
    ]
    path.write_bytes(b"\n".join(lines))
    for workers in (1, 2):
        prepare([str(path)], tmp_path / str(workers), settings=Settings(held_out=0.2), workers=workers, progress=False)
    assert len(list((tmp_path / "1" / "units").iterdir())) > 10
    assert [entry["place"] for entry in listed(tmp_path / "1")] == [f"line {n + 1}" for n in bad]
    assert listed(tmp_path / "1") == listed(tmp_path / "2")


def test_the_list_is_bounded_and_the_count_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LISTED", 7)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": "better"}\n' + "[]\n" * 1000)
    log = SkipLog()
    info = prepare([str(path)], tmp_path / "out", settings=Settings(held_out=0.4), progress=False, skipped=log)
    assert info["skipped"] == log.counts == {"no text in the record": 1000}
    assert [entry["records"] for entry in listed(tmp_path / "out")] == [1] * 7 + [993]
    assert len(list(log.lines())) < 10


def test_the_table_is_bounded() -> None:
    log = SkipLog()
    for file in range(1000):
        for line in range(50):
            log.add(Skipped("not UTF-8", "byte 255", "convert it", f"line {line}", f"file {file}"))
    lines = list(log.lines())
    assert len(lines) < 50 and lines[0] == "Skipped, not UTF-8: 50,000 in 1,000 files"
    assert lines[1:3] == ["  file 0, lines 0, 1, 2, 3, 4 and 45 more: byte 255", "      -> convert it"]
    assert lines[-1] == "  and 49,000 more"


def test_strict_writes_no_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And the same command without it goes on; passed-over files count too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    Path("mine/a.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(50)))
    command = ["prepare-data", "mine", "--out", "out", "--held-out", "0.2"]
    Path("mine/page.html").write_text("<p>")
    assert main([*command, "--strict"]) == 2
    err = capsys.readouterr().err
    assert "mine/page.html: it ends in .html" in err and "listed in" in err
    with pytest.raises(FileNotFoundError, match="holds no finished data"):
        TokenShards("out", "train")
    assert listed(Path("out"))[0]["file"] == "mine/page.html"
    assert main(command) == 0 and TokenShards("out", "train").n_documents > 30
    Path("mine/page.html").unlink()
    assert main([*command, "--strict"]) == 0
    assert not Path("out/skipped.jsonl").exists()


def test_the_field_to_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As it is typed, and typing it reads the text."""
    monkeypatch.chdir(tmp_path)
    records = [{"id": f"{i}", "data": {"main text": f"the text of document {i}"}} for i in range(40)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert main(["prepare-data", "a.jsonl", "--out", "out"]) == 2
    assert "-> --column 'data.main text'" in capsys.readouterr().err
    assert main(["prepare-data", "a.jsonl", "--out", "out", "--column", "data.main text", "--held-out", "0.2"]) == 0
    assert TokenShards("out", "train").n_documents + TokenShards("out", "validation").n_documents == 40
    Path("chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}')
    assert main(["prepare-data", "chat.jsonl", "--out", "out2"]) == 2
    assert "mythos train chat --init-from RUN/final --data.paths chat.jsonl" in capsys.readouterr().err


def test_a_record_of_an_older_list_is_counted(small_units: None, tmp_path: Path) -> None:
    """A folder that an earlier version began, whose units say how many records were skipped and not which."""
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\nthree\n")
    settings = Settings(Reading(cut="lines"), held_out=0.4)
    prepare([str(path)], tmp_path / "out", settings=settings, progress=False)
    unit = tmp_path / "out" / "units" / "00000.json"
    found = json.loads(unit.read_text())
    unit.write_text(json.dumps({name: found[name] for name in ("shards", "skipped")}))
    prepare([str(path)], tmp_path / "out", settings=settings, progress=False)
    assert [(entry["reason"], entry["records"]) for entry in listed(tmp_path / "out")] == [("empty", 1)]


def test_names_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """In the name of a file or a field: line ends, escapes of the terminal, halves of surrogate pairs, no UTF-8."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/a.txt").write_text("one\n\ntwo\n\nthree\n\nfour\n")
    Path("mine/\x1b[31mred\n.html").write_text("x")
    with open(b"mine/caf\xe9.csv", "w") as file:
        file.write("x")
    Path("mine/b.jsonl").write_text('{"\\ud800\\u001b": "text"}\n{"a\\nb": "text"}')
    assert main(["prepare-data", "mine", "--cut", "paragraphs", "--held-out", "0.4", "--out", "out"]) == 0
    err = capsys.readouterr().err
    assert "\x1b" not in err and "\\x1b[31mred\\n.html" in err and "caf\\udce9.csv" in err and "\\ud800" in err
    assert [entry["file"] for entry in listed(Path("out"))][:2] == ["mine/\x1b[31mred\n.html", "mine/caf\udce9.csv"]
    assert main(["train-tokenizer", "mine", "--vocab-size", "260", "--out", "bpe"]) == 0
