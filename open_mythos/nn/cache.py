"""Stores of keys and values: `Scratch` for one call, and `KVCache` for the calls that continue the same rows.

Shapes: B rows, T new tokens, S key slots (earlier tokens, then the new ones), L levels (one per loop).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from open_mythos.nn.view import KeyValues, LoopConstants, View


@dataclass
class Scratch:
    """Keys and values of a call without a cache: differentiable, one buffer per layer, replaced loop by loop."""

    attends = False
    previous: dict[int, KeyValues] = field(default_factory=dict)
    """Keys and values by layer that the loop before wrote, for the rows of the view."""
    current: dict[int, KeyValues] = field(default_factory=dict)
    """Keys and values by layer that this loop has written so far."""

    def write(self, layer: int, new: KeyValues, view: View) -> KeyValues:
        if view.active is not None and layer in self.previous:
            # Exited tokens write nothing: what they wrote last is carried on from loop to loop.
            new = tuple(_overwrite(old, n, view) for n, old in zip(new, self.previous[layer], strict=True))
        if view.loop_index is not None:  # outside the loop they are not needed again
            self.current[layer] = new
        return new

    def take_rows(self, rows: Tensor) -> "Scratch":
        """Return the scratch that the next loop starts from when only `rows` remain."""
        return Scratch(current={i: tuple(x.index_select(0, rows) for x in kv) for i, kv in self.current.items()})

    def add_rows(self, n: int) -> "Scratch":
        """Return the scratch that the next loop starts from when `n` rows join, which write before they attend."""

        def longer(x: Tensor) -> Tensor:
            return torch.cat((x, x.new_zeros(n, *x.shape[1:])))

        return Scratch(current={i: tuple(longer(x) for x in kv) for i, kv in self.current.items()})


def _overwrite(old: Tensor, new: Tensor, view: View) -> Tensor:
    """Return `old` (B, T, ...) with the new values of the view's active tokens."""
    active, slots = view.active, None if view.selection is None else view.selection.slots
    assert active is not None
    if slots is None:
        return torch.where(like(active, new), new, old)
    # After a compaction `new` has only some tokens of each row: they are merged at their slots, and the others stay.
    index = (torch.arange(len(old), device=old.device)[:, None], slots)
    return old.index_put(index, torch.where(like(active, new), new, old[index]))


def like(mask: Tensor, x: Tensor) -> Tensor:
    """Return the mask with as many dimensions as x."""
    return mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))


def _values(store: Tensor, level: int | Tensor, rows: slice | Tensor, slots: slice) -> Tensor:
    """Return the cached values of one level, or of one level per row, for the selected rows and slots.

    Args:
        store: (L, B, S, ...): levels (one per layer and loop), rows of the batch, slots (one per token).
        level: an index, or (R,) indices paired with `rows`, which is then a tensor.
        rows: a slice, or (R,) indices.

    Returns:
        (rows, slots, ...): a view if `level` is an int and `rows` a slice, otherwise a copy.
    """
    if isinstance(level, int) and isinstance(rows, Tensor):
        # Three times as fast on a CPU as indexing with both.
        return store[level, :, slots].index_select(0, rows)
    return store[level, rows, slots]


class KVCache:
    """Preallocated keys and values of a batch, with one level per loop for the recurrent layers. For inference only.

    Made by `OpenMythos.make_cache`. `length` counts slots in use, padding included; `n_loops` is the number of levels.
    """

    attends = False
    is_static = False

    def __init__(
        self,
        layers: list[tuple[int, list[tuple[int, ...]]]],
        batch_size: int,
        max_len: int,
        n_loops: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args: layers: for each layer its number of levels and the shape per token of each tensor that it stores."""
        self.batch_size, self.max_len, self.n_loops = batch_size, max_len, n_loops
        self.dtype, self.device = dtype, device
        self.length = 0
        self.padded = False
        self.valid = torch.zeros(batch_size, max_len, dtype=torch.bool, device=device)
        self.n_valid = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.row_seed: Tensor | None = None
        self.constants: LoopConstants | None = None
        """Tensors that the loops of all calls share; the weights stay the same as long as the cache is used."""
        self._levels: dict[int, list[KeyValues]] = {}
        # Zeros, not empty: attention multiplies masked values by zero, and zero times a stray NaN is NaN.
        self.layers = [
            tuple(torch.zeros(levels, batch_size, max_len, *shape, dtype=dtype, device=device) for shape in shapes)
            for levels, shapes in layers
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(x.nbytes for stored in self.layers for x in stored)

    def write(self, layer: int, new: KeyValues, view: View) -> KeyValues:
        # 1. The place: the loop's level, or level 0 in prelude and coda, and the rows that are still computed.
        at, level, below = view.selection, view.lockstep or 0, (view.lockstep or 0) - 1
        if at is None and view.active is None and (view.loop_index is None or view.lockstep is not None):
            # All rows and tokens write at one level: the usual case, in a third of the operations.
            end, stored = self.length + new[0].shape[1], self.levels(level)[layer]
            for store, x in zip(stored, new, strict=True):
                store[:, self.length : end].copy_(x)
            return tuple(store[:, :end] for store in stored)
        rows = slice(None) if at is None else at.rows
        if view.loop_index is not None and view.lockstep is None:
            # Each row is at a loop of its own, so every level is paired with the row that it belongs to.
            level, below = view.loop_index, (view.loop_index - 1).clamp(min=0)
            rows = torch.arange(self.batch_size, device=self.device)
        # New tokens go after the stored ones. `length` moves at the call's end, so every loop writes the same slots.
        fresh = slice(self.length, self.length + (new[0].shape[1] if at is None else at.n_new))
        for store, x in zip(self.layers[layer], new, strict=True):
            # 2. A token that has exited writes what the level below has of it: fill-forward, level by level. At loop 0
            # there is no level below, and nothing has exited.
            if view.active is not None and view.lockstep != 0:
                x = _overwrite(_values(store, below, rows, fresh), x, view)
            store[level, rows, fresh] = x.to(store.dtype)
        # 3. Attention gets the level's slots so far, earlier tokens and new ones.
        return tuple(_values(store, level, rows, slice(0, fresh.stop)) for store in self.layers[layer])

    def levels(self, level: int) -> list[KeyValues]:
        """Return the tensors (B, S, ...) of a level for each layer, the same objects in every call."""
        # Prelude and coda have one level only, whatever the loop.
        if level not in self._levels:
            self._levels[level] = [tuple(x[min(level, len(x) - 1)] for x in stored) for stored in self.layers]
        return self._levels[level]

    def fill_forward(self, n_done: int, n_tokens: int, rows: Tensor | slice = slice(None)) -> None:
        """Copy the new tokens' last written level, `n_done - 1`, to every deeper one, in all rows or some."""
        new = slice(self.length, self.length + n_tokens)
        for store in (x for stored in self.layers for x in stored):
            # Prelude and coda have one level and need no filling.
            if store.shape[0] > n_done:
                store[n_done:, rows, new] = store[n_done - 1, rows, new]

    def visible(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """Return which slots hold tokens once `new` (B, T) are stored, (B, S) bool, and the new tokens' slots (T,)."""
        end = self.length + new.shape[1]
        earlier = self.valid[:, : self.length]
        return torch.cat((earlier, new), dim=1), torch.arange(self.length, end, device=self.device)

    def keep_rows(self, rows: Tensor | Sequence[int]) -> None:
        """Drop every row but `rows`, (n,) int64 or a list, in that order; a list saves a wait for the device.

        Only rows that change their place are copied, so the memory of the others goes with the cache, not before.
        """
        keep = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        moved = [i for i, row in enumerate(keep) if row != i]
        if moved:
            to, source = (torch.tensor(x, device=self.device) for x in (moved, [keep[i] for i in moved]))
            for store in (x for stored in self.layers for x in stored):
                # `index_select` copies before anything is overwritten, so rows may change places.
                used = store[:, :, : self.length]
                used.index_copy_(1, to, used.index_select(1, source))
        self.batch_size = len(keep)
        index = torch.tensor(keep, device=self.device)
        self.valid, self.n_valid = self.valid[index], self.n_valid[index]
        self.row_seed = None if self.row_seed is None else self.row_seed[index]
        self.layers = [tuple(store[:, : len(keep)] for store in stored) for stored in self.layers]
        self._levels = {}

    def advance(self, n_tokens: int, valid: Tensor | None) -> None:
        """Count the new tokens as stored. This ends a call, so a call that fails before leaves the cache as it was."""
        new = slice(self.length, self.length + n_tokens)
        self.valid[:, new] = True if valid is None else valid
        self.n_valid = self.n_valid + (n_tokens if valid is None else valid.sum(1))
        self.padded = self.padded or valid is not None
        self.length += n_tokens

    def rewind(self, length: int) -> None:
        """Forget every slot from `length` on; nothing waits."""
        if not 0 <= length <= self.max_len:
            raise ValueError(f"length={length} must be 0 to max_len={self.max_len}; use cache.length for all there is")
        self.valid[:, length:] = False
        self.n_valid.copy_(self.valid.sum(1))
        self.length = length
