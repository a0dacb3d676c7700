"""Many clients at once: small here, in full with `make test-slow`. Times are figures, not tests: see load.py."""

import asyncio
import os
from pathlib import Path

import pytest

from tests.serve.load import QUEUE, ROWS, Figures, run

SOAK_S = int(os.environ.get("OPEN_MYTHOS_SOAK_S", "600"))


def loaded(tmp_path: Path, name: str, size: int) -> Figures:
    figures = asyncio.run(run(tmp_path / "model", name, size))
    for before, after in (figures["files_before_after"], figures["tasks_before_after"]):
        assert after <= before + 1, figures
    return figures


@pytest.mark.parametrize("n", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_crowd(tmp_path: Path, n: int) -> None:
    figures = loaded(tmp_path, "crowd", n)
    assert figures["most_in_work"] == ROWS + QUEUE and figures["finished"] == figures["accepted"]
    assert figures["rss_growth_mib"] < 64, figures


@pytest.mark.parametrize("n", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_clients_that_leave(tmp_path: Path, n: int) -> None:
    figures = loaded(tmp_path, "leavers", n)
    assert figures["rows_left"] == figures["waiting_left"] == figures["pages_left"] == 0


@pytest.mark.parametrize("n", [pytest.param(500, marks=pytest.mark.slow)])
def test_clients_that_drip(tmp_path: Path, n: int) -> None:
    figures = loaded(tmp_path, "drips", n)
    assert figures["closed_after_s"] < 60 and figures["files_left"] <= 1


@pytest.mark.slow
def test_a_long_time(tmp_path: Path) -> None:
    figures = loaded(tmp_path, "soak", SOAK_S)
    assert figures["answers"][200] and figures["answers"][400] and set(figures["answers"]) <= {200, 400, 429}
    assert figures["rss_growth_mib"] < 64, figures
