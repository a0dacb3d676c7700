"""A section of the report of `mythos analyze`: its input, its result, and how numbers become tables and figures."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_mythos.model import OpenMythos
from open_mythos.reports.document import Figure, Part, Table
from open_mythos.reports.figures import Curve, draw_curves
from open_mythos.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and the prompts that it is analysed on."""

    model: OpenMythos
    tokenizer: Tokenizer
    input_ids: Tensor  # (B, T)
    labels: Tensor  # (B, T), the right tokens; -100 where there is none
    where: Tensor  # (B, T) bool, the positions that count
    other_ids: Tensor  # (B, T), prompts whose input replaces that of `input_ids`
    n_loops: int  # as in training
    n_beyond: int  # loops after which the final behaviour is judged
    pointers: bool  # whether the prompts are tables of pointers

    def text(self, token: int) -> str:
        """Write a token for a table."""
        return repr(self.tokenizer.decode([token]))


@dataclass(frozen=True)
class Section:
    """The result of one analysis."""

    title: str
    finding: str
    """A sentence or two, computed from the numbers."""
    numbers: dict[str, Any]
    parts: Sequence[Part] = ()


def numbers(value: Any, digits: int = 17) -> Any:
    """Turn tensors, and dataclasses and containers of them, into plain values for JSON; NaN becomes None."""
    if isinstance(value, Tensor):
        value = (torch.view_as_real(value) if value.is_complex() else value).tolist()
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: numbers(item, digits) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [numbers(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def table(
    label: str, places: Iterable[int], *columns: tuple[str, Sequence[Any] | Tensor, str], first: int = 0
) -> Table:
    """Make a table with a row for each of `places`.

    Args:
        columns: heads, values by place from `first` on, and their format; a place without a value stays empty.
    """
    rows = [
        [
            str(n),
            *(f"{values[n - first]:{form}}" if 0 <= n - first < len(values) else "" for _, values, form in columns),
        ]
        for n in places
    ]
    return Table([label, *(head for head, *_ in columns)], rows)


def figure(
    name: str,
    caption: str,
    ys: Mapping[str, Tensor],
    label: str,
    x: str = "loops",
    xs: Sequence[float] | None = None,
    first: int = 0,
    log: str = "",
) -> Figure:
    """Make a figure of curves over `xs`, or over loops from `first` on."""
    curves = [Curve(xs or range(first, first + len(values)), values.tolist(), key) for key, values in ys.items()]
    return Figure(name, caption, lambda path: draw_curves({"": curves}, path, (x, label), log=log))


def some(n: int, *others: int) -> list[int]:
    """Choose about ten of 1 to n: the first four, then powers of two, the last, and `others`."""
    return sorted({*range(1, min(n, 4) + 1), *(2**i for i in range(2, n.bit_length())), n, *others})
