"""Muon for 2-D weights and for stacks of them, batched by shape.

Each update is the momentum with its singular values pushed towards 1 by five Newton-Schulz iterations
(Jordan et al. 2024, kellerjordan.github.io/posts/muon). `torch.optim.Muon` takes 2-D parameters only, one at a
time, and iterates in bfloat16 everywhere, which is about 100 times slower than float32 on a CPU without bf16 units.
Shape letters: N matrices of one shape, R rows, C columns.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from open_mythos.checks import check_choice, check_number
from open_mythos.ops.linear import linear, uses_onednn
from open_mythos.train.config import AdjustLR

# Quintic coefficients of Jordan et al.: the steepest slope at 0 that keeps singular values within about 0.7 .. 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
STRIP = 192
"""Rows of a symmetric product that are computed at a time: fewer save more of its half, and are slower each."""


def orthogonalize(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Push the singular values of every matrix towards 1: U S V^T -> about U V^T.

    Args:
        x: (N, R, C).
        dtype: dtype of the iteration, bfloat16 or float32; in the latter case float64 matrices keep their own.
    """
    if dtype is torch.float32:
        dtype = torch.promote_types(x.dtype, dtype)
    tall = x.size(-2) > x.size(-1)
    y = x.to(dtype)
    if tall:
        y = y.mT
    # A matrix without gradient (an expert that saw no token) stays 0 instead of becoming NaN.
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    if uses_onednn(y, y.size(-2), y[:1].numel()):
        y = torch.stack([_iterate_alone(one) for one in y])
    else:
        y = _iterate(y)
    if tall:
        y = y.mT
    return y.to(x.dtype)


def _iterate(y: Tensor) -> Tensor:
    """Iterate y <- (a + b G + c G^2) y with G = y y^T on (N, R, C) at once."""
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y


def _iterate_alone(y: Tensor) -> Tensor:
    """Iterate on one large matrix (R, C) on a CPU, whose batched products take twice as long.

    With z = c^(1/4) y the polynomial is (z z^T + s)^2 + a - s^2, s = b / (2 sqrt(c)): squares of symmetric matrices and
    shifts of diagonals, and nothing to scale or add.
    """
    a, b, c = COEFFICIENTS
    shift, z = b / (2 * math.sqrt(c)), y * c**0.25
    for _ in range(ITERATIONS):
        gram = _square(z)
        gram.diagonal().add_(shift)
        step = _square(gram)
        step.diagonal().add_(a - shift**2)
        z = linear(step, z.mT)
    return z / c**0.25


def _square(x: Tensor) -> Tensor:
    """Return x x^T, of which little more than the upper half is computed: (R, C) -> (R, R)."""
    whole = x.new_empty(len(x), len(x))
    for start in range(0, len(x), STRIP):
        strip, below = slice(start, start + STRIP), slice(start + STRIP, None)
        whole[strip, start:] = linear(x[strip], x[start:])
        whole[below, strip] = whole[strip, below].T
    return whole


def lr_factor(rows: int, columns: int, adjust_lr: AdjustLR) -> float:
    """Return the factor on the learning rate of an (R, C) matrix.

    "match_rms_adamw" gives every shape the update size that AdamW would have, so both can share a rate
    (Liu et al. 2025, arXiv 2502.16982); "original" is sqrt(max(1, R / C)).
    """
    if adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


class MatrixOwners:
    """An assignment of matrices to the processes of a group, about equally many values each.

    Each process has rows of every matrix: of R rows process r has those from r * ceil(R / size) on, as torch.chunk
    gives them. `gather` brings every matrix whole to its owner, `scatter` brings the rows back.
    """

    def __init__(self, shapes: list[tuple[int, int]], group: dist.ProcessGroup) -> None:
        self.shapes, self.group = shapes, group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        load = [0] * self.size
        self.owner = [0] * len(shapes)
        for i in sorted(range(len(shapes)), key=lambda i: -math.prod(shapes[i])):
            self.owner[i] = load.index(min(load))
            load[self.owner[i]] += math.prod(shapes[i])
        self._owned = [[i for i, owner in enumerate(self.owner) if owner == rank] for rank in range(self.size)]
        self.mine = self._owned[self.rank]
        """Numbers of the matrices that this process owns."""

    def _n_rows(self, i: int, rank: int) -> int:
        R = self.shapes[i][0]
        each = math.ceil(R / self.size)
        return min(R, (rank + 1) * each) - min(R, rank * each)

    def gather(self, local: list[Tensor]) -> list[Tensor]:
        """Exchange this process's rows of every matrix for the whole of each matrix in `mine`."""
        numels = [[self._n_rows(i, rank) * self.shapes[i][1] for i in self.mine] for rank in range(self.size)]
        got = self._exchange([[local[i] for i in owned] for owned in self._owned], numels, local[0])
        return [torch.cat(parts).view(self.shapes[i]) for i, *parts in zip(self.mine, *got, strict=True)]

    def scatter(self, whole: list[Tensor], local: list[Tensor]) -> list[Tensor]:
        """Exchange whole matrices for this process's rows of every matrix, shaped like `local`."""
        ranks = range(self.size)
        parts = [x.split([self._n_rows(i, rank) for rank in ranks]) for i, x in zip(self.mine, whole, strict=True)]
        numels = [[local[i].numel() for i in owned] for owned in self._owned]
        got = self._exchange([[part[rank] for part in parts] for rank in ranks], numels, local[0])
        back = {i: x for owned, found in zip(self._owned, got, strict=True) for i, x in zip(owned, found, strict=True)}
        return [back[i].view_as(x) for i, x in enumerate(local)]

    def _exchange(self, sent: list[list[Tensor]], numels: list[list[int]], like: Tensor) -> list[tuple[Tensor, ...]]:
        """Send each process its list of tensors, and return those of `numels` values that each has sent, flat."""
        flat = torch.cat([like.new_empty(0), *(x.flatten() for parts in sent for x in parts)])
        out, into = [sum(each) for each in numels], [sum(x.numel() for x in parts) for parts in sent]
        got = flat.new_empty(sum(out))
        dist.all_to_all_single(got, flat, out, into, group=self.group)
        return [part.split(each) for part, each in zip(got.split(out), numels, strict=True)]


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    A parameter of shape (..., R, C) is a stack of matrices, each orthogonalised on its own, so no expert's update
    depends on another's. `widths` names the rows of each map in a parameter that holds several (`Linear.widths`); each
    is orthogonalised on its own too. Gate and up of a stacked expert (2F x D) count as one matrix, and so do all heads
    and parts of q_up and of kv_up. Parameters with fewer than two dimensions are refused.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        adjust_lr: AdjustLR = "match_rms_adamw",
        widths: dict[Tensor, tuple[int, ...]] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.widths, self.dtype = widths or {}, dtype
        check_number("lr", lr, 0)
        check_number("momentum", momentum, 0, 1, below=True)
        check_number("weight_decay", weight_decay, 0)
        check_choice("adjust_lr", adjust_lr, ("match_rms_adamw", "original"))
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "adjust_lr": adjust_lr})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"parameter of shape {tuple(p.shape)} is no matrix; give it to AdamW")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # ty: ignore[incompatible-method-override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            named = [p for p in group["params"] if p.grad is not None]
            if not named:
                continue
            params, grads = [_local(p) for p in named], [_local(p.grad) for p in named]
            for p, local in zip(named, params, strict=True):
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(local)
            buffers = [self.state[p]["momentum"] for p in named]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            updates = self._updates(named, list(nesterov), group["adjust_lr"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _updates(self, params: list[Tensor], nesterov: list[Tensor], adjust_lr: AdjustLR) -> list[Tensor]:
        """Return the updates of this process's shards of the parameters, from its shards of their momenta."""
        # Matrices whose rows are on several processes are orthogonalised whole, each by its owner. Stacks of matrices
        # are sharded by matrix.
        meshes = {i: p.device_mesh for i, p in enumerate(params) if isinstance(p, DTensor) and p.ndim == 2}
        split = [i for i, mesh in meshes.items() if mesh.size() > 1]
        rest = [i for i in range(len(params)) if i not in split]
        updates = dict(
            zip(rest, self._orthogonal([params[i] for i in rest], [nesterov[i] for i in rest], adjust_lr), strict=True)
        )
        if split:
            shapes = [(params[i].shape[0], params[i].shape[1]) for i in split]
            owners = MatrixOwners(shapes, meshes[split[0]].get_group())
            local = [nesterov[i] for i in split]
            whole = self._orthogonal([params[split[k]] for k in owners.mine], owners.gather(local), adjust_lr)
            updates |= dict(zip(split, owners.scatter(whole, local), strict=True))
        return [updates[i] for i in range(len(params))]

    def _orthogonal(self, params: list[Tensor], nesterov: list[Tensor], adjust_lr: AdjustLR) -> list[Tensor]:
        """Orthogonalise whole momenta, each map of a parameter by itself, and scale them as their shapes ask for."""
        by_shape: dict[tuple, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        updates = [torch.empty_like(u) for u in nesterov]
        for p, u, out in zip(params, nesterov, updates, strict=True):
            widths = self.widths.get(p, u.shape[-2:-1])
            for part, into in zip(u.split(widths, dim=-2), out.split(widths, dim=-2), strict=True):
                by_shape[(*part.shape[-2:], u.dtype, u.device)].append((part, into))
        for (rows, columns, *_), pairs in by_shape.items():
            whole = orthogonalize(torch.cat([part.reshape(-1, rows, columns) for part, _ in pairs]), self.dtype)
            whole *= lr_factor(rows, columns, adjust_lr)
            counts = [part.numel() // (rows * columns) for part, _ in pairs]
            for (_, into), update in zip(pairs, whole.split(counts), strict=True):
                into.copy_(update.view_as(into))
        return updates


def _local(x: Tensor) -> Tensor:
    """Return this process's shard of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x
