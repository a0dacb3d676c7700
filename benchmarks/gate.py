"""The gate: both sides compute the same, or no figure is given."""

from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_LIMIT = 1e-5
GRADIENT_LIMIT = 1e-4
GRADIENT = "gradient."
"""Prefix of the names of gradients among a task's outputs."""
LOOPS = "loops"


class Different(Exception):
    """The two sides do not compute the same."""


@dataclass(frozen=True)
class Agreement:
    """How close the two sides are, relative to the largest value of the tensor."""

    forward: float | None
    """Worst output; None for tokens, which are equal."""
    gradients: float | None
    """Worst parameter; None where nothing is trained."""
    loops: int | None
    """Loops that both ran; None where they are not counted."""


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Agreement:
    """Compare our outputs with the reference's.

    Raises:
        Different: a tensor is missing or of another shape, an error is above its limit, tokens or loops differ, or a
            value is not finite.
    """
    if ours.keys() != theirs.keys():
        raise Different(f"only one side has {sorted(ours.keys() ^ theirs.keys())[:3]}")
    worst: dict[str, float | None] = {"forward": None, "gradients": None}
    for name, reference in theirs.items():
        value = ours[name]
        if value.shape != reference.shape:
            raise Different(f"{name} has shape {tuple(value.shape)}, the reference {tuple(reference.shape)}")
        if not reference.is_floating_point():
            if not torch.equal(value, reference):
                firsts = " and ".join(str(x.flatten()[:6].tolist()) for x in (value, reference))
                raise Different(f"{name} differ: {firsts}")
            continue
        error = relative_error(value, reference)
        kind, limit = ("gradients", GRADIENT_LIMIT) if name.startswith(GRADIENT) else ("forward", FORWARD_LIMIT)
        if not error <= limit:
            raise Different(f"{name} differs by {error:.1e} of its largest value; the limit is {limit:.0e}")
        worst[kind] = max(error, worst[kind] or 0.0)
    return Agreement(**worst, loops=int(theirs[LOOPS]) if LOOPS in theirs else None)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Return the largest difference over the reference's largest value; inf if a value is not finite."""
    if not (torch.isfinite(value).all() and torch.isfinite(reference).all()):
        return float("inf")
    scale = reference.abs().max().clamp(min=torch.finfo(reference.dtype).tiny)
    return ((value - reference).abs().max() / scale).item()
