"""The report: one set of numbers in four forms, the HTML alone in one file."""

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from open_mythos.reports.document import Figure, Report, Table, write_record

RESULTS = {
    "name": "made-up", "title": "Does <this> work?", "question": "Does it?", "protocol": "We *look*; see `khop`.",
    "command": "mythos exp made-up", "quick": False, "seeds": [0, 1], "commits": ["abc1234", "def5678"],
    "machine": "a machine, 1 thread", "results": {"x": [1.0, math.nan, -math.inf]},
}  # fmt: skip
PNG = b"\x89PNG made up"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><text>made up</text></svg>'


def draw(path: Path) -> None:
    path.write_bytes(PNG if path.suffix == ".png" else SVG)


REPORT = Report(
    "It does, in 2 of 2 seeds.",
    [
        "## What it says",
        Figure("curve", "Accuracy by loops", draw),
        Table(["loops", "P(a|b)"], [["1", "0.5"], ["2", "<b>1</b>"]]),
    ],
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_record(RESULTS, REPORT, tmp_path / "report")
    return tmp_path / "report"


def test_there_are_all_four_forms(out: Path) -> None:
    names = {"report.json", "report.md", "report.html", "curve.png", "curve.svg"}
    assert {path.name for path in out.iterdir()} == names
    assert (out / "curve.png").read_bytes() == PNG


def test_json_is_strict_and_holds_the_raw_numbers(out: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads((out / "report.json").read_text(), parse_constant=refuse)
    assert read == RESULTS | {"finding": REPORT.finding, "results": {"x": [1.0, None, None]}}


def test_markdown_says_what_was_asked_found_and_done(out: Path) -> None:
    text = (out / "report.md").read_text()
    for said in ("Does it?", REPORT.finding, "`mythos exp made-up`", "abc1234, def5678", "a machine", "seeds 0, 1"):
        assert said in text
    assert "![Accuracy by loops](curve.png)" in text
    assert "| loops | P(a\\|b) |\n| --- | --- |\n| 1 | 0.5 |" in text
    assert "quick form" not in text


def test_the_quick_form_says_so(tmp_path: Path) -> None:
    write_record(RESULTS | {"quick": True}, REPORT, tmp_path)
    for ending in ("md", "html"):
        assert "This is the quick form" in (tmp_path / f"report.{ending}").read_text()


def test_html_stands_alone(out: Path) -> None:
    text = (out / "report.html").read_text()
    sources = re.findall(r'(?:src|href|srcset|data|action)="([^"]*)"', text)
    assert len(sources) == 1 and sources[0].startswith("data:image/svg+xml;base64,")
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)


def test_html_holds_the_figure_and_the_table(out: Path) -> None:
    import base64

    text = (out / "report.html").read_text()
    body = ElementTree.fromstring(re.sub(r"<meta[^>]*>", "", text.removeprefix("<!doctype html>")))
    image = body.find(".//img")
    assert image is not None and image.get("alt") == "Accuracy by loops"
    assert base64.b64decode(image.get("src", "").partition(",")[2]) == SVG
    cells = [["".join(cell.itertext()) for cell in row] for row in body.iterfind(".//tr")]
    # What stands in a cell is text, whatever it looks like.
    assert cells == [["loops", "P(a|b)"], ["1", "0.5"], ["2", "<b>1</b>"]]
    assert body.findtext(".//title") == RESULTS["title"]
    assert [heading.text for heading in body.iterfind(".//h2")] == ["Protocol", "What it says"]
