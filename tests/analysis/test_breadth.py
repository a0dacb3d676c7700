"""Candidates and ways counted by hand."""

import numpy as np
import pytest
import torch

from open_mythos.analysis.breadth import breadth, path_mass, path_of
from open_mythos.analysis.lens import Lens
from open_mythos.tasks import KHop
from tests.models import scaled, tiny


def lens_of(p: list[list[float]]) -> Lens:
    """One token whose probabilities (L + 1, V) these are."""
    x = torch.tensor(p, dtype=torch.float64)
    best = x.topk(x.shape[1], dim=-1)
    target = x[-1].argmax()[None]
    rank = 1 + (x > x[:, target]).sum(-1, keepdim=True)
    return Lens(
        target,
        rank,
        x[:, target].log(),
        -torch.special.xlogy(x, x).sum(-1)[:, None],
        best.indices[:, None],
        best.values[:, None],
    )


def test_alternatives_that_rise_and_fall() -> None:
    found = breadth(
        lens_of(
            [
                [0.90, 0.04, 0.03, 0.03],
                [0.30, 0.60, 0.05, 0.05],  # the second rises to the top
                [0.15, 0.20, 0.20, 0.45],
                [0.05, 0.05, 0.30, 0.60],  # and is gone; the third is still there
            ]
        )
    )
    assert found.candidates.tolist() == [1, 2, 4, 2]
    assert found.several.tolist() == [0, 1, 1, 1]
    assert found.alternatives == 3
    assert found.rose_and_fell == pytest.approx(1 / 3) and found.overtaken == pytest.approx(1 / 3)


def test_no_alternative() -> None:
    found = breadth(lens_of([[0.95, 0.05], [0.95, 0.05]]))
    assert (found.alternatives, found.rose_and_fell, found.overtaken) == (0, 0, 0)


def test_the_way_follows_the_pointers() -> None:
    # 0 > 0, 1 > 0, 2 > 1, 3 > 3; asked for 2, 3 and 1.
    table = [0, 0, 1, 3]
    nodes, distance = path_of(torch.tensor([[*table, 2], [*table, 3], [*table, 1]]))
    assert distance.tolist() == [2, 0, 1]
    assert nodes[0].tolist() == [2, 1, 0, 0, 0]
    assert path_of(torch.tensor([[1, 0, 0]]))[1].tolist() == [3]


def test_mass_is_that_of_each_node_at_each_depth() -> None:
    task = KHop(n_symbols=9, long_chain=6, short_chain=2, max_distance=3)
    cfg = tiny(vocab_size=9)
    model, ids = scaled(cfg), task.batch(np.random.default_rng(0), 20).input_ids
    found = path_mass(model, ids, 3)
    nodes, distance = path_of(ids)
    for n in range(1, 4):
        with torch.no_grad():
            p = model(ids, n, exit="fixed")[:, -1].double().softmax(-1)
        on_way = [[p[b, nodes[b, j]].item() for j in range(int(distance[b]) + 1)] for b in range(20)]
        farthest = [row for row in on_way if len(row) == 4]
        assert farthest and found.mass[n].tolist() == pytest.approx(np.mean(farthest, 0).tolist(), rel=1e-4)
        assert found.off_path[n].item() == pytest.approx(1 - np.mean([sum(row) for row in on_way]), rel=1e-4)
        assert found.one[n].item() == np.mean([max(row) > 0.5 for row in on_way])
        assert found.several[n].item() == np.mean([sum(x > 0.1 for x in row) >= 2 for row in on_way])
        assert found.in_step[n].item() == np.mean([row[min(n, len(row) - 1)] > 0.5 for row in on_way])


def test_what_is_no_table_of_pointers_is_refused() -> None:
    model = scaled(tiny())
    with pytest.raises(ValueError, match="each must be below 3"):
        path_mass(model, torch.tensor([[0, 1, 2, 3]]))
    with pytest.raises(ValueError, match="never end"):
        path_mass(model, torch.tensor([[1, 0, 0]]))
