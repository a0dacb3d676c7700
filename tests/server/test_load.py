"""Many clients at once, with `make test-slow`. Times are figures, not tests: see load.py."""

import asyncio
import os
from pathlib import Path

import pytest

from tests.server.load import QUEUE, ROWS, Figures, run

pytestmark = pytest.mark.slow
SOAK_S = int(os.environ.get("OPEN_MYTHOS_SOAK_S", "600"))


def loaded(tmp_path: Path, name: str, size: int) -> Figures:
    figures = asyncio.run(run(tmp_path / "model", name, size))
    for before, after in (figures["files_before_after"], figures["tasks_before_after"]):
        assert after <= before + 1, figures
    return figures


def test_a_crowd(tmp_path: Path) -> None:
    figures = loaded(tmp_path, "crowd", 1000)
    assert figures["most_in_work"] == ROWS + QUEUE and figures["finished"] == figures["accepted"]
    assert figures["rss_growth_mib"] < 64, figures


def test_clients_that_leave(tmp_path: Path) -> None:
    figures = loaded(tmp_path, "leavers", 2000)
    assert figures["rows_left"] == figures["waiting_left"] == figures["pages_left"] == 0


def test_clients_that_drip(tmp_path: Path) -> None:
    figures = loaded(tmp_path, "drips", 500)
    assert figures["closed_after_s"] < 60 and figures["files_left"] <= 1


def test_a_long_time(tmp_path: Path) -> None:
    figures = loaded(tmp_path, "soak", SOAK_S)
    assert figures["answers"][200] and figures["answers"][400] and set(figures["answers"]) <= {200, 400, 429}
    assert figures["rss_growth_mib"] < 64, figures


def test_many_bodies(tmp_path: Path) -> None:
    figures = loaded(tmp_path, "bodies", 2000)
    assert figures["health"] == 200 and figures["statuses"].get(429, 0) > 1000, figures
    assert figures["rss_most_mib"] - figures["rss_before_mib"] < 256, figures
    assert figures["rss_after_mib"] - figures["rss_before_mib"] < 64, figures
