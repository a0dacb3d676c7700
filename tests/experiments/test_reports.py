"""What every study's page says: of its recorded numbers, and of numbers changed in both directions."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from open_mythos.experiments import EXPERIMENTS
from open_mythos.experiments.study import Study, load, write

RECORDS = Path(__file__).parents[2] / "docs" / "results"
STUDIES = [name for name in EXPERIMENTS if isinstance(load(name), Study)]


@functools.cache
def _recorded(name: str) -> dict[str, Any]:
    return json.loads((RECORDS / name / "report.json").read_text(encoding="utf-8"))


def recorded(name: str) -> dict[str, Any]:
    """The raw numbers of a record, to be changed."""
    return copy.deepcopy(_recorded(name)["results"])


@pytest.mark.parametrize("name", STUDIES)
def test_the_record_says_what_its_numbers_say(name: str, tmp_path: Path) -> None:
    """The recorded page is made again from the raw numbers, with every figure."""
    record = _recorded(name)
    write(name, record, tmp_path)
    for file in ("report.md", "report.json"):
        assert (tmp_path / file).read_text(encoding="utf-8") == (RECORDS / name / file).read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (RECORDS / name).iterdir()}


@pytest.mark.parametrize("name", STUDIES)
def test_one_seed_claims_nothing(name: str) -> None:
    raw = recorded(name)
    raw["runs"] = {arm: runs[:1] for arm, runs in raw["runs"].items()}
    report = load(name).report(raw)
    assert "nan" not in report.finding
    if len(load(name).seeds) > 1:
        assert any(word in report.finding for word in ("one seed", "not told apart"))


Change = Callable[[dict[str, Any]], None]


def put(arms: str, **changes: Any) -> Change:
    """Set numbers of arms in every seed: to one value, or to a function of the array; __ leads into a nested one."""

    def change(raw: dict[str, Any]) -> None:
        for run in (run for arm in arms.split(", ") for run in raw["runs"][arm]):
            for path, value in changes.items():
                *outer, last = path.split("__")
                inner = functools.reduce(lambda node, key: node[key], outer, run)
                old = np.array(inner[last], dtype=float)
                inner[last] = np.broadcast_to(value(old) if callable(value) else value, old.shape).tolist()

    return change


CASES: list[tuple[str, list[Change], list[str]]] = [
    (
        "khop",
        [
            put("diagonal, root", forest=0.97, cycle__right=0.97),
            put("prelude", forest=0.1),
            put("plain-depth, plain-parameters", forest=0.1),
        ],
        ["at 64 that is above chance (0.042)", "0.870 [0.870, 0.870], above 0; plain, equal parameters 0.100",
         "they do not hurt.", "the loops are worth more", "0.000 [0.000, 0.000] against the recipe: not told apart",
         "-0.870 [-0.870, -0.870] against the recipe: worse", "above chance | 96 |"],
    ),
    (
        "khop",
        [
            put("diagonal", forest=lambda x: 0.1 + 0.05 * (np.arange(x.shape[1]) == 9), cycle__right=0.01),
            put("root", forest=0.2),
            put("plain-depth", forest=0.8),
        ],
        ["at 64 that is below chance", "-0.700 [-0.700, -0.700], below 0", "they hurt.", "the loops are worth less",
         "0.100 [0.100, 0.100] against the recipe: better"],
    ),
    ("khop", [put("diagonal", cycle__one_after=0.6)], ["| diagonal | 0.600 [0.600, 0.600] | 0.600"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "says"), CASES, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(CASES)])
def test_the_page_says_what_changed_numbers_say(name: str, changes: list[Change], says: list[str]) -> None:
    raw = recorded(name)
    before = "\n".join(map(str, [load(name).report(raw).finding, *load(name).report(raw).parts]))
    for change in changes:
        change(raw)
    report = load(name).report(raw)
    after = "\n".join(map(str, [report.finding, *report.parts]))
    for text in says:
        assert text in after
    assert not all(text in before for text in says), "the recorded numbers say so too, so the case shows nothing"
