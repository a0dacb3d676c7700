"""What the parts of `mythos analyze` are given and give back, and how their numbers are written."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_mythos.analysis.lens import Lens, read_lens
from open_mythos.model import OpenMythos
from open_mythos.reports.document import Figure, Part
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and the prompts that it is looked at on."""

    model: OpenMythos
    tokenizer: Tokenizer
    input_ids: Tensor
    """(B, T)"""
    labels: Tensor
    """(B, T), the right tokens; -100 where there is none"""
    where: Tensor
    """(B, T) bool, the places that are looked at"""
    other_ids: Tensor
    """(B, T), prompts whose input is put in the place of the own"""
    n_loops: int
    """as trained"""
    n_beyond: int
    """how far the loops are run to see what happens in the end"""
    pointers: bool
    """whether the prompts are those of pointer chasing"""

    @functools.cached_property
    def lens(self) -> Lens:
        """The read-out of the trained loops through the coda."""
        return read_lens(self.model, self.input_ids, self.n_loops, self.where)


@dataclass(frozen=True)
class Section:
    """What a part has found."""

    title: str
    finding: str
    """A sentence or two, computed from the numbers."""
    numbers: dict[str, Any]
    parts: Sequence[Part]


def numbers(value: Any) -> dict[str, Any]:
    """A dataclass of tensors as plain values for JSON; what is no finite number is None."""
    return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain((torch.view_as_real(value) if value.is_complex() else value).tolist())
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def figure(
    name: str,
    caption: str,
    curves: dict[str, Tensor],
    label: str,
    first: int = 0,
    log_y: bool = False,
    x: str = "loops",
    xs: Sequence[float] | None = None,
) -> Figure:
    """Curves over `xs`, or over loops from `first` on."""
    drawn = [Curve(xs or range(first, first + len(ys)), ys.tolist(), key) for key, ys in curves.items()]
    return Figure(name, caption, lambda path: draw_curves({"": drawn}, path, (x, label), log="y" * log_y))


def some(n: int, *others: int) -> list[int]:
    """About ten of 1 to n: all of the first, then ever fewer, the last, and `others`."""
    return sorted({*range(1, min(n, 4) + 1), *(2**i for i in range(2, n.bit_length())), n, *others})


def text(subject: Subject, token: int) -> str:
    """A token as it is to be read in a table."""
    return repr(subject.tokenizer.decode([token])).replace("|", "\\|")
