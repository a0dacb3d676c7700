"""A cache whose calls have the same shapes and the same host code whatever it holds: for CUDA graphs and compilers.

Shapes: B rows, T new tokens, S slots of the cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_mythos.nn.cache import KVCache, like
from open_mythos.nn.view import KeyValues, View


class StaticKVCache(KVCache):
    """A `KVCache` that counts on the device: a tensor has the position at which tokens are written, and attention reads
    every slot under a mask. At fixed depth the host waits for nothing, so a call can be captured and replayed. With a
    rule that exits, tokens that are done stay in the computation until the last one is.

    A replay runs no Python: it moves `cursor` and not `length`, the host's count. Call `rewind` before the next
    ordinary call, and replay no more tokens than `max_len` has room for.
    """

    is_static = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=self.device)
        """Number of slots in use, (1,) int64."""

    @classmethod
    def over(cls, cache: KVCache) -> "StaticKVCache":
        """Return a static cache in the memory of `cache`, which must not be used any more."""
        # Without the constructor, which would allocate the memory anew.
        static = cls.__new__(cls)
        vars(static).update(vars(cache))
        static.cursor, static._levels = torch.full((1,), cache.length, device=cache.device), {}
        return static

    def at(self, level: int, n_exited: int = 0) -> "StaticLevel":
        """Return one loop's level as a store. `n_exited`: new tokens per row if some may have exited, 0 if none has."""
        below: list[KeyValues] = []
        if n_exited:
            # Fill-forward: an exited token writes again what the level below has of it. Level 0 has none below, and
            # reads its own slots, which only padding takes, so that every loop has the same shapes.
            slots = self._new_slots(n_exited)
            below = [tuple(x.index_select(1, slots) for x in stored) for stored in self.levels(max(level - 1, 0))]
        return StaticLevel(self.levels(level), below, self.cursor)

    def write(self, layer: int, new: KeyValues, view: View) -> KeyValues:
        if view.loop_index is not None and view.lockstep is None:
            raise ValueError("rows of a static cache run the same loop; make the cache with static=False")
        n_exited = 0 if view.active is None else new[0].shape[1]
        return self.at(view.lockstep or 0, n_exited).write(layer, new, view)

    def fill_forward(self, n_done: int, n_tokens: int, rows: Tensor | slice = slice(None)) -> None:
        slots = self._new_slots(n_tokens)
        for store in (x for stored in self.layers for x in stored):
            # `cursor` is on the device, so the slots are a tensor and a slice will not do.
            for level in range(n_done, store.shape[0]):
                store[level].index_copy_(1, slots, store[n_done - 1].index_select(1, slots))

    def visible(self, new: Tensor) -> tuple[Tensor, Tensor]:
        slots = self._new_slots(new.shape[1])
        return self.valid.index_copy(1, slots, new), slots

    def advance(self, n_tokens: int, valid: Tensor | None) -> None:
        new = torch.ones_like(self.valid[:, :n_tokens]) if valid is None else valid
        # The device counts for graphs, the host for ordinary calls.
        self.valid.index_copy_(1, self._new_slots(n_tokens), new)
        self.n_valid += new.sum(1)
        self.cursor += n_tokens
        self.length += n_tokens

    def rewind(self, length: int) -> None:
        super().rewind(length)
        self.cursor.fill_(length)

    def _new_slots(self, n: int) -> Tensor:
        """Return the slots that the next `n` tokens are written to, (n,) int64."""
        return self.cursor + torch.arange(n, device=self.device)


@dataclass(frozen=True)
class StaticLevel:
    """One level of a `StaticKVCache`. No number in it differs from loop to loop, so one graph serves them all."""

    attends = False
    stored: list[KeyValues]
    """Keys and values of every slot, (B, S, ...), for each layer."""
    below: list[KeyValues]
    """Keys and values of the new tokens at the level before, (B, T, ...), which exited tokens write again."""
    cursor: Tensor
    """Slot at which the first new token is written, (1,) int64."""

    def write(self, layer: int, new: KeyValues, view: View) -> KeyValues:
        slots = self.cursor + torch.arange(new[0].shape[1], device=self.cursor.device)
        if view.active is not None:
            active = view.active
            new = tuple(torch.where(like(active, x), x, old) for x, old in zip(new, self.below[layer], strict=True))
        # In place: a captured graph writes to the same memory whenever it is replayed.
        for store, x in zip(self.stored[layer], new, strict=True):
            store.index_copy_(1, slots, x)
        return self.stored[layer]
