"""Whole matrices out of rows that are spread over processes: each on the process that works on it, and back again."""

import math

import torch
import torch.distributed as dist
from torch import Tensor


class Owners:
    """Deals matrices to the processes of a group, about equally many values each.

    Each process holds rows of every matrix: of R rows process r has those from r * ceil(R / size) on, as torch.chunk
    would give it.
    """

    def __init__(self, shapes: list[tuple[int, int]], group: dist.ProcessGroup) -> None:
        self.shapes, self.group = shapes, group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        load = [0] * self.size
        self.owner = [0] * len(shapes)
        for i in sorted(range(len(shapes)), key=lambda i: -math.prod(shapes[i])):
            self.owner[i] = load.index(min(load))
            load[self.owner[i]] += math.prod(shapes[i])
        self.mine = [i for i, owner in enumerate(self.owner) if owner == self.rank]
        """Numbers of the matrices that this process works on."""

    def _n_rows(self, i: int, rank: int) -> int:
        R = self.shapes[i][0]
        each = math.ceil(R / self.size)
        return min(R, (rank + 1) * each) - min(R, rank * each)

    def _numel(self, i: int, rank: int) -> int:
        return self._n_rows(i, rank) * self.shapes[i][1]

    def gather(self, local: list[Tensor]) -> list[Tensor]:
        """This process's rows of every matrix -> the whole of each in `mine`."""
        by_owner = [[i for i, owner in enumerate(self.owner) if owner == rank] for rank in range(self.size)]
        sent = torch.cat([local[i].flatten() for owned in by_owner for i in owned])
        out = [sum(self._numel(i, rank) for i in self.mine) for rank in range(self.size)]
        got = sent.new_empty(sum(out))
        into = [sum(local[i].numel() for i in owned) for owned in by_owner]
        dist.all_to_all_single(got, sent, out, into, group=self.group)
        parts = [p.split([self._numel(i, rank) for i in self.mine]) for rank, p in enumerate(got.split(out))]
        return [
            torch.cat([parts[rank][k] for rank in range(self.size)]).view(self.shapes[i])
            for k, i in enumerate(self.mine)
        ]

    def scatter(self, whole: list[Tensor], local: list[Tensor]) -> list[Tensor]:
        """What `gather` gave, worked on -> this process's rows of every matrix, shaped like `local`."""
        pieces = [
            x.split([self._n_rows(i, rank) for rank in range(self.size)]) for i, x in zip(self.mine, whole, strict=True)
        ]
        sent = torch.cat([local[0].new_empty(0), *(p[rank].flatten() for rank in range(self.size) for p in pieces)])
        into = [sum(self._numel(i, rank) for i in self.mine) for rank in range(self.size)]
        by_owner = [[i for i, owner in enumerate(self.owner) if owner == rank] for rank in range(self.size)]
        out = [sum(local[i].numel() for i in owned) for owned in by_owner]
        got = sent.new_empty(sum(out))
        dist.all_to_all_single(got, sent, out, into, group=self.group)
        back = [Tensor()] * len(local)
        for owned, part in zip(by_owner, got.split(out), strict=True):
            for i, x in zip(owned, part.split([local[i].numel() for i in owned]), strict=True):
                back[i] = x.view_as(local[i])
        return back
