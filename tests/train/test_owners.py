"""Rows on several processes to whole matrices and back, also where rows do not divide and some process has none."""

import torch
import torch.distributed as dist

from open_mythos.train.muon import MatrixOwners
from tests.train.ranks import run_ranks

SHAPES = [(7, 5), (2, 9), (6, 4), (1, 3), (40, 2), (3, 3)]


def rows_of(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What torch.chunk gives a process; nothing to those behind the last piece."""
    pieces = x.chunk(size)
    return pieces[rank] if rank < len(pieces) else x[:0]


def there_and_back() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator) for shape in SHAPES]
    owners = MatrixOwners(SHAPES, dist.group.WORLD)
    local = [rows_of(x, rank, size) for x in whole]
    gathered = owners.gather(local)
    assert len(gathered) == len(owners.mine)
    assert all(torch.equal(x, whole[i]) for i, x in zip(owners.mine, gathered, strict=True))
    back = owners.scatter([2 * x for x in gathered], local)
    assert all(torch.equal(x, 2 * y) for x, y in zip(back, local, strict=True))
    # Each is somebody's, and nobody's work is more than the largest matrix above another's.
    loads = [sum(r * c for (r, c), owner in zip(SHAPES, owners.owner, strict=True) if owner == i) for i in range(size)]
    assert max(loads) - min(loads) <= 80


def test_there_and_back() -> None:
    for size in (2, 3):
        run_ranks(size, there_and_back)
