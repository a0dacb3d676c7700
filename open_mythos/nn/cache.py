"""What one forward pass can see (`View`) and where its keys and values are kept (`Scratch`, `KVCache`).

The rule for both stores: a token that has exited the loop stops writing, and what it wrote last stands for every deeper
loop (fill-forward). So a cached call, a chunked one and a full one read the same keys and values.

Shapes: B rows, T new tokens, S key slots (earlier tokens, then the new ones), L levels (one per loop), K rotary width.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from open_mythos.nn.rope import rotary_table

KeyValues = tuple[Tensor, ...]
"""What an attention keeps per token, each (B, S, ...): `gqa` keys and values, `mla` a latent and a rotary key."""


class KVStore(Protocol):
    """Keys and values of one call. An engine with paged memory implements this too."""

    def write(self, layer: int, new: KeyValues, view: "View") -> KeyValues:
        """Keep the new tokens' keys and values at the loop that `view` stands at; return those of every slot."""
        ...


@dataclass(frozen=True)
class View:
    """What the layers of one call need to know about it. Immutable: each loop gets a copy made by `at_loop`."""

    store: KVStore
    positions: Tensor
    """(B, T) int64, position of each new token in its row, padding not counted."""
    rope: tuple[Tensor, Tensor]
    """cosine and sine, each (B or 1, T, K // 2)."""
    mask: Tensor | None
    """(B or 1, 1, T, S) bool, true where a query may read a key. None: see `is_causal`."""
    is_causal: bool
    """With `mask` None: a causal square when true, every slot visible to the one new token when false."""
    valid: Tensor | None = None
    """(B, T) bool, false for padding; None when there is none."""
    active: Tensor | None = None
    """(B, T) bool, tokens still in the loop; None: all of them."""
    loop_index: Tensor | None = None
    """(B,) int64, the loop each row is at; None in prelude and coda."""
    lockstep: int | None = None
    """The loop that every row is at, when the caller knows: spares the cache a gather."""
    router_log: list[tuple[Tensor, Tensor]] | None = None
    """In training each MoE appends (sum of squared log-sum-exp, tokens per expert) of the tokens in the loop."""

    def at_loop(
        self,
        loop_index: Tensor,
        lockstep: int | None = None,
        active: Tensor | None = None,
        store: KVStore | None = None,
        router_log: list[tuple[Tensor, Tensor]] | None = None,
    ) -> "View":
        """This view as one loop sees it."""
        return dataclasses.replace(
            self,
            loop_index=loop_index,
            lockstep=lockstep,
            active=active,
            store=store or self.store,
            router_log=router_log,
        )

    def take_rows(self, rows: Tensor | slice) -> "View":
        """This view for some rows of the batch, in the order given."""

        def take(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 < self.positions.shape[0] else x[rows]

        cos, sin = self.rope
        return dataclasses.replace(
            self,
            positions=self.positions[rows],
            rope=(take(cos), take(sin)),
            mask=take(self.mask),
            valid=take(self.valid),
            active=take(self.active),
            loop_index=take(self.loop_index),
        )


def make_view(
    shape: tuple[int, int],
    rope_dim: int,
    rope_theta: float,
    dtype: torch.dtype,
    device: torch.device,
    attention_mask: Tensor | None = None,
    cache: "KVCache | None" = None,
) -> View:
    """The view of a call that brings `shape` = (B, T) new tokens.

    Args:
        attention_mask: (B, T), nonzero for tokens and zero for padding, which may stand anywhere; None: no padding.
        cache: holds the earlier tokens of the same rows.
    """
    B, T = shape
    past = cache.length if cache is not None else 0
    valid = None if attention_mask is None else attention_mask.bool()
    if valid is None and (cache is None or not cache.padded):
        # Every row stands at the same position, so one row of angles serves all.
        positions = torch.arange(past, past + T, device=device)[None].expand(B, T)
        rope = rotary_table(positions[:1], rope_dim, rope_theta, dtype)
        is_causal = past == 0 and T > 1
        mask = None
        if past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)[None, None]
        return View(cache or Scratch(), positions, rope, mask, is_causal)
    new = torch.ones(B, T, dtype=torch.bool, device=device) if valid is None else valid
    n_earlier = cache.n_valid if cache is not None else torch.zeros(B, dtype=torch.int64, device=device)
    positions = (n_earlier[:, None] + new.cumsum(1) - 1).clamp(min=0)
    earlier = cache.valid[:, :past] if cache is not None else new[:, :0]
    slots = torch.arange(past + T, device=device)
    query = slots[past:, None]
    # A padding query would see nothing and its softmax would be 0/0, so every query sees itself.
    mask = (torch.cat((earlier, new), dim=1)[:, None] & (slots <= query)) | (slots == query)
    rope = rotary_table(positions, rope_dim, rope_theta, dtype)
    return View(cache or Scratch(), positions, rope, mask[:, None], False, valid)


@dataclass
class Scratch:
    """Keys and values of a call without a cache: differentiable, one buffer per layer, replaced loop by loop.

    `previous` is what the loop before left. Rows may be added at the end from one loop to the next.
    """

    previous: dict[int, KeyValues] = field(default_factory=dict)
    current: dict[int, KeyValues] = field(default_factory=dict)

    def write(self, layer: int, new: KeyValues, view: View) -> KeyValues:
        if view.active is None:
            return new
        if layer in self.previous:
            new = tuple(_keep_exited(view.active, n, old) for n, old in zip(new, self.previous[layer], strict=True))
        self.current[layer] = new
        return new


def _keep_exited(active: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where a token is active, `old` where it is not; rows beyond those of `old` have just joined."""
    rows = old.shape[0]
    kept = torch.where(_like(active[:rows], new), new[:rows], old)
    return kept if rows == new.shape[0] else torch.cat((kept, new[rows:]))


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))


class KVCache:
    """Preallocated keys and values of a batch, with one level per loop for the recurrent layers. For inference only.

    Made by `OpenMythos.make_cache`. `length` counts slots in use, padding included; `n_loops` is the number of levels.
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
        """Args: layers: for each layer its number of levels and the shape per token of each tensor it keeps."""
        self.batch_size, self.max_len, self.n_loops = batch_size, max_len, n_loops
        self.dtype, self.device = dtype, device
        self.length = 0
        self.padded = False
        self.valid = torch.zeros(batch_size, max_len, dtype=torch.bool, device=device)
        self.n_valid = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.row_seed: Tensor | None = None
        # Zeros, not empty: attention multiplies masked values by zero, and zero times a stray NaN is NaN.
        self.layers = [
            tuple(torch.zeros(levels, batch_size, max_len, *shape, dtype=dtype, device=device) for shape in shapes)
            for levels, shapes in layers
        ]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for kept in self.layers for x in kept)

    def write(self, layer: int, new: KeyValues, view: View) -> KeyValues:
        kept = self.layers[layer]
        end = self.length + new[0].shape[1]
        if view.loop_index is None or view.lockstep is not None:
            level = view.lockstep or 0
            for store, x in zip(kept, new, strict=True):
                if view.active is not None and level:
                    x = torch.where(_like(view.active, x), x, store[level - 1, :, self.length : end])
                store[level, :, self.length : end] = x
            return tuple(store[level, :, :end] for store in kept)
        rows = torch.arange(self.batch_size, device=new[0].device)
        for store, x in zip(kept, new, strict=True):
            if view.active is not None:
                before = store[(view.loop_index - 1).clamp(min=0), rows, self.length : end]
                x = torch.where(_like(view.active, x), x, before)
            store[view.loop_index, rows, self.length : end] = x.to(store.dtype)
        return tuple(store[view.loop_index, rows, :end] for store in kept)

    def fill_forward(self, n_done: int, n_tokens: int) -> None:
        """Let the new tokens' last written level, `n_done - 1`, stand for every deeper one."""
        new = slice(self.length, self.length + n_tokens)
        for kept in self.layers:
            for store in kept:
                if store.shape[0] > n_done:
                    store[n_done:, :, new] = store[n_done - 1, :, new]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop every row but those given, (n,) int64, in their order."""
        self.batch_size = rows.shape[0]
        self.valid, self.n_valid = self.valid[rows], self.n_valid[rows]
        self.row_seed = None if self.row_seed is None else self.row_seed[rows]
        self.layers = [tuple(store[:, rows] for store in kept) for kept in self.layers]

    def advance(self, n_tokens: int, valid: Tensor | None) -> None:
        """Count the new tokens as stored. The last act of a call, so that one that fails leaves the cache as it was."""
        new = slice(self.length, self.length + n_tokens)
        self.valid[:, new] = True if valid is None else valid
        self.n_valid = self.n_valid + (n_tokens if valid is None else valid.sum(1))
        self.padded = self.padded or valid is not None
        self.length += n_tokens
