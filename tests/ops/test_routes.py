"""The table of libraries for products: measured once, shared by processes, and never trusted blindly."""

import json
import logging
import threading
from pathlib import Path

import pytest
import torch

from open_mythos.ops import routes


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a measurement that gives another table each time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = iter(range(100))

    def measure() -> routes.Table:
        n = next(made)
        return [[(n >> (i * 5 + j)) % 2 == 0 for j in range(len(routes.ROWS))] for i in range(len(routes.WEIGHTS))]

    monkeypatch.setattr(routes, "measure", measure)
    routes.table.cache_clear()
    yield tmp_path / "open_mythos"
    routes.table.cache_clear()


def test_a_table_is_measured_once(folder: Path) -> None:
    first = routes.table(1)
    routes.table.cache_clear()  # as in another process
    assert routes.table(1) == first != routes.table(2)
    assert sorted(json.loads(file.read_text())["machine"][-9:] for file in folder.glob("*.json")) == [
        "1 threads",
        "2 threads",
    ]


def test_processes_that_start_together_get_one_table(folder: Path) -> None:
    found, barrier = [], threading.Barrier(4)

    def start() -> None:
        barrier.wait()
        found.append(routes.table.__wrapped__(1))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(each == found[0] for each in found)
    assert len(list(folder.glob("*.json"))) == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"measured": 1}', '{"measured": [[true]]}', '{"measured": [[1,1,1,1,1]]}', "null"]
)
def test_a_damaged_table_is_replaced(folder: Path, text: str) -> None:
    first = routes.table(1)
    (file,) = folder.glob("*.json")
    file.write_text(text)
    routes.table.cache_clear()
    assert routes.table(1) != first
    assert json.loads(file.read_text())["measured"] == routes.table(1)


def test_without_a_place_for_the_table_torch_chooses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert not any(map(any, routes.table(1)))
    assert "cannot be stored" in caplog.text


@pytest.mark.skipif(not routes.HAS_ONEDNN, reason="no oneDNN with AVX-512")
def test_both_libraries_compute_the_same_products() -> None:
    for n_rows in routes.ROWS:
        for n, k in routes.WEIGHTS[:2]:
            x, weight = torch.randn(n_rows, k), torch.randn(n, k)
            torch.testing.assert_close(routes.onednn(x, weight), x @ weight.T, atol=1e-3, rtol=1e-4)


def test_measuring_disturbs_nothing() -> None:
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [len(row) for row in routes.measure()] == [len(routes.ROWS)] * len(routes.WEIGHTS)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("gain", "dtype"), [(1.29, torch.float32), (1.3, torch.bfloat16)])
def test_bfloat16_is_taken_where_it_is_clearly_faster(
    gain: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(routes, "bfloat16_gain", lambda shapes: asked.append(shapes) or gain)
    weights = [torch.empty(2, 1024, 512), torch.empty(512, 1024), torch.empty(512), torch.empty(2**20, 64)]
    assert routes.faster_dtype(weights, torch.device("cpu")) is dtype
    assert asked == [(((512, 1024), 1), ((1024, 512), 1), ((2**14, 64), 1))]


def test_small_models_stay_in_float32_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "bfloat16_gain", lambda shapes: 100.0)
    assert routes.faster_dtype([torch.empty(64, 64), torch.empty(64)], torch.device("cpu")) is torch.float32


def test_the_gain_is_measured_and_stored(folder: Path) -> None:
    routes.bfloat16_gain.cache_clear()
    gain = routes.bfloat16_gain((((64, 64), 2),), (1, 4))
    assert 0.001 < gain < 1000
    routes.bfloat16_gain.cache_clear()
    assert routes.bfloat16_gain((((64, 64), 2),), (1, 4)) == gain
    routes.bfloat16_gain.cache_clear()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert not any(map(any, routes.table.__wrapped__(1)))
    assert "set XDG_CACHE_HOME" in caplog.text
