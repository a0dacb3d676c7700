"""Files that may come from anywhere: each fault is one error that names the file and, where there is one, the field."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from open_mythos.files import MAX_DEPTH, MAX_YAML_BYTES, inside, parse_json, parse_yaml, read_json, read_yaml

JSON_FAULTS = {
    "empty": ("", "cannot be read as JSON"),
    "cut short": ('{"a": ', "cannot be read as JSON"),
    "deep beyond the parser": ("[" * 50_000, "nested too deeply"),
    "deep": ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"nested deeper than {MAX_DEPTH} levels"),
    "NaN": ('{"a": {"b": [1, NaN]}}', r"a.b\[1\] must be a finite number"),
    "a float beyond all": ('{"a": {"b": 1e400}}', "a.b must be a finite number"),
    "4,000 digits": ('{"a": {"b": %s}}' % ("1" * 4000), "a.b must be a finite number"),
    "40,000 digits": ('{"a": {"b": -%s}}' % ("1" * 40_000), "a.b must be a finite number"),
    "a key twice": ('{"a": {"b": 1, "b": 2}}', "has the key 'b' twice"),
    "half a pair": (r'{"a": "\ud83d\ude00 \ud800"}', "a has half of a surrogate pair"),
    "half a pair in a key": (r'{"\ud800": 1}', r"some.json: \\ud800 has half of a surrogate pair"),
}
YAML_FAULTS = {
    "aliases": ("a: &x [1]\nb: *x", r"line 2 has the alias \*x"),
    "brackets": ("[" * 50_000, f"nested deeper than {MAX_DEPTH} levels"),
    "braces": ("{" * 50_000, f"nested deeper than {MAX_DEPTH} levels"),
    "dashes": ("- " * 30_000, f"nested deeper than {MAX_DEPTH} levels"),
    "a field twice": ("a: {b: 1, b: 2}", "has the field 'b' twice"),
    "4,000 digits": ("a: {b: " + "1" * 4000 + "}", "a.b must be a finite number"),
    "4,000 digits to base 16": ("a: 0x" + "1" * 4000, "a must be a finite number"),
    "base 60": ("a: 1" + ":1" * 30_000, "a must be a finite number"),
    "base 60 with a fraction": ("a: 1" + ":1" * 30_000 + ".5", "is no YAML"),
    "infinity": ("a: [.inf]", r"a\[0\] must be a finite number"),
    "half a pair": (r'a: "\ud800"', "a has half of a surrogate pair"),
    "an escape that is no character": (r'"\UFFFFFFFF"', "is no YAML"),
    "an empty int": ("!!int ''", "is no YAML"),
    "a bool that is none": ("!!bool x", "is no YAML"),
    "a date that is none": ("a: 2001-13-45", "is no YAML"),
    "code": ("!!python/object/apply:os.system [ls]", "is no YAML"),
    "two documents": ("a: 1\n---\nb: 1", "is no YAML"),
    "long": ("#" * (MAX_YAML_BYTES + 1), f"more than {MAX_YAML_BYTES}"),
}


@pytest.mark.parametrize("name", JSON_FAULTS)
def test_json_that_is_refused(name: str) -> None:
    text, message = JSON_FAULTS[name]
    with pytest.raises(ValueError, match=message) as error:
        parse_json(text, "some.json")
    assert "some.json" in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("name", YAML_FAULTS)
def test_yaml_that_is_refused(name: str) -> None:
    text, message = YAML_FAULTS[name]
    with pytest.raises(ValueError, match=message) as error:
        parse_yaml(text, "some.yaml")
    assert "some.yaml" in str(error.value) and len(str(error.value)) < 600


def test_ordinary_values_come_back() -> None:
    values = {"a": [1, -2.5, True, None, "\xe4\0\U0001f600"], "b": {"c": 10**300}}
    assert (
        parse_json(r'{"a": [1, -2.5, true, null, "\u00e4\u0000\ud83d\ude00"], "b": {"c": 1%s}}' % ("0" * 300), "")
        == values
    )
    assert parse_yaml("a: [1, -2.5, yes, null]\nb: &x {<<: {d: 1}, c: 1:30}", "") == {
        "a": [1, -2.5, True, None],
        "b": {"c": 90, "d": 1},
    }


def pipe(path: Path) -> None:
    os.mkfifo(path)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda p: None, "does not exist"),
    "a folder": (Path.mkdir, "Is a directory"),
    "a pipe": (pipe, "a pipe or a device"),
    "a device": (lambda p: p.symlink_to("/dev/zero"), "a pipe or a device"),
    "a loop of links": (lambda p: p.symlink_to(p.name), "Too many levels of symbolic links"),
    "a dangling link": (lambda p: p.symlink_to("nothing"), "does not exist"),
    "UTF-16": (lambda p: p.write_text('{"a": 1}', "utf-16"), "is no UTF-8 text"),
    "a picture": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n"), "is no UTF-8 text"),
    "a large file": (lambda p: os.truncate(os.open(p, os.O_CREAT | os.O_WRONLY), 2**40), "more than"),
}


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_refused(name: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    make, message = FILES[name]
    make(tmp_path / "some.file")
    with pytest.raises((ValueError, OSError), match=message) as error:
        read(tmp_path / "some.file")
    assert "some.file" in str(error.value)


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_a_byte_order_mark_is_no_part_of_a_file(read: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a": 1}', "utf-8-sig")
    assert read(tmp_path / "file") == {"a": 1}


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", "a\0b", "\ud800", "a/" * 300, None, 3, ["a"]])
def test_names_that_are_no_path_inside(name: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no path inside"):
        inside(tmp_path, name)  # ty: ignore[invalid-argument-type]


def test_links_stay_inside(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "out").symlink_to(tmp_path / "x")
    (folder / "up").symlink_to("..")
    (folder / "here").symlink_to("file")
    assert inside(folder, "here") == folder / "here"
    for name, message in (("loop", "loop"), ("out", "leads out"), ("up/x", "leads out"), ("up/folder/../x", "no path")):
        with pytest.raises((ValueError, OSError), match=message):
            read_json(inside(folder, name))
