"""A cache whose calls have the same shapes and the same host code whatever it holds: for CUDA graphs and compilers.

Shapes: B rows, T new tokens, S slots of the cache.
"""

import torch
from torch import Tensor

from open_mythos.nn.cache import KeyValues, KVCache, View
from open_mythos.nn.rope import rotary_table

ONE_DEPTH = (
    "a static cache takes calls of one depth, in which nothing exits early; pass exit='fixed', or make the cache with "
    "static=False"
)


class StaticKVCache(KVCache):
    """A `KVCache` that counts on the device: tokens are written at a position held in a tensor, and attention reads
    every slot under a mask. At fixed depth a call waits for nothing, and can be captured and replayed.

    A replay runs no Python: it moves `cursor` and not `length`, the host's count. Call `rewind` before the next
    ordinary call, and replay no more tokens than `max_len` has room for.
    """

    def __init__(
        self,
        layers: list[tuple[int, list[tuple[int, ...]]]],
        batch_size: int,
        max_len: int,
        n_loops: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers, batch_size, max_len, n_loops, dtype, device)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        """Slots in use."""

    def write(self, layer: int, new: KeyValues, view: View) -> KeyValues:
        if view.active is not None or (view.loop_index is not None and view.lockstep is None):
            raise ValueError(ONE_DEPTH)
        level = view.lockstep or 0
        slots = self._new_slots(new[0].shape[1])
        for store, x in zip(self.layers[layer], new, strict=True):
            store[level].index_copy_(1, slots, x)
        return tuple(store[level] for store in self.layers[layer])

    def fill_forward(self, n_done: int, n_tokens: int, rows: Tensor | slice = slice(None)) -> None:
        slots = self._new_slots(n_tokens)
        for store in (x for kept in self.layers for x in kept):
            for level in range(n_done, store.shape[0]):
                store[level].index_copy_(1, slots, store[n_done - 1].index_select(1, slots))

    def advance(self, n_tokens: int, valid: Tensor | None) -> None:
        new = torch.ones_like(self.valid[:, :n_tokens]) if valid is None else valid
        self.valid.index_copy_(1, self._new_slots(n_tokens), new)
        self.n_valid += new.sum(1)
        self.cursor += n_tokens
        self.length += n_tokens

    def rewind(self, length: int) -> None:
        """Forget every slot from `length` on, on the device and in the host's count; nothing waits."""
        if not 0 <= length <= self.max_len:
            raise ValueError(f"length={length} must be 0 to max_len={self.max_len}; use cache.length for all there is")
        self.valid[:, length:] = False
        self.n_valid.copy_(self.valid.sum(1))
        self.cursor.fill_(length)
        self.length = length

    def _new_slots(self, n: int) -> Tensor:
        return self.cursor + torch.arange(n, device=self.device)


def make_static_view(
    shape: tuple[int, int], rope_dim: int, rope_theta: float, cache: StaticKVCache, attention_mask: Tensor | None = None
) -> View:
    """What `make_view` makes, (B, T) = `shape`, with a mask over all slots: (B, 1, T, S)."""
    device = cache.device
    valid = None if attention_mask is None else attention_mask.bool()
    new = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    positions = (cache.n_valid[:, None] + new.cumsum(1) - 1).clamp(min=0)
    slots, query = torch.arange(cache.max_len, device=device), cache._new_slots(shape[1])
    readable = cache.valid.index_copy(1, query, new)
    query = query[:, None]
    # A padding query would see nothing and its softmax would be 0/0, so every query sees itself.
    mask = (readable[:, None] & (slots <= query)) | (slots == query)
    rope = rotary_table(positions, rope_dim, rope_theta, cache.dtype)
    return View(cache, positions, rope, mask[:, None], False, valid)
