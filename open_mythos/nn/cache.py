"""What one forward pass can see (`View`) and where its keys and values are kept (`Scratch`, `KVCache`).

The rule for both stores: a token that has exited the loop stops writing, and what it wrote last stands for every deeper
loop (fill-forward). So a cached call, a chunked one and a full one read the same keys and values.

Shapes: B rows, T new tokens, S key slots (earlier tokens, then the new ones), L levels (one per loop), K rotary width.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from open_mythos.nn.depth import LoopConstants
from open_mythos.nn.rope import rotary_table

KeyValues = tuple[Tensor, ...]
"""What an attention keeps per token, each (B, S, ...): `gqa` keys and values, `mla` a latent and a rotary key."""


class KVStore(Protocol):
    """Keys and values of one call."""

    def write(self, layer: int, new: KeyValues, view: "View") -> KeyValues:
        """Keep the new tokens' keys and values at the loop that `view` stands at; return those of every slot."""
        ...


class TokenStore(KVStore, Protocol):
    """Keys and values of a call whose rows are single tokens of sequences with pasts of their own: an engine's."""

    def attend(self, layer: int, q: Tensor, new: KeyValues, scale: float) -> Tensor:
        """Keep the new tokens' keys and values, and attend to those that each token may see.

        Args:
            q: (B, 1, H, K).
            new: keys (B, 1, G, K) and values (B, 1, G, W); or one (B, 1, K) that is the key of all heads and its value.

        Returns:
            (B, 1, H, W).
        """
        ...


@dataclass(frozen=True)
class Selection:
    """Which rows of a call, and which of its new tokens, a narrowed view holds."""

    rows: Tensor | slice
    """(B',) int64; a slice where the rows stand side by side, so that taking them copies nothing."""
    slots: Tensor | None
    """(B', T') int64, distinct in each row, 0-based among the call's new tokens; None: all of them."""
    n_rows: int
    """B of the call."""
    n_new: int
    """T of the call."""

    def row_index(self, device: torch.device) -> Tensor:
        """The rows as (B',) int64."""
        return torch.arange(self.n_rows, device=device)[self.rows] if isinstance(self.rows, slice) else self.rows

    def pick(self, x: Tensor) -> Tensor:
        """What belongs to the selection: (B, T, ...) -> (B', T', ...), and (B,) -> (B',)."""
        if self.slots is None or x.ndim == 1:
            return x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)
        return x[self.row_index(x.device)[:, None], self.slots]

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """x (B, T, ...) with `new` (B', T', ...) in the places of the selection; differentiable in both."""
        rows = self.row_index(x.device)
        return x.index_put((rows,) if self.slots is None or x.ndim == 1 else (rows[:, None], self.slots), new)


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
    starts: Tensor | None = None
    """(B, T) int64, the slot at which each query's document begins, where rows hold several documents and the queries
    are every token of them. `mask` says the same; this lets a kernel skip the keys of earlier documents."""
    active: Tensor | None = None
    """(B, T) bool, tokens still in the loop; None: all of them."""
    loop_index: Tensor | None = None
    """(B,) int64, the loop each row is at; None in prelude and coda."""
    lockstep: int | None = None
    """The loop that every row is at, when the caller knows: spares the cache a gather."""
    selection: Selection | None = None
    """Set when some of the call's tokens have left the computation: B and T then count those that are still in it."""
    tokens: TokenStore | None = None
    """The store, if rows are single tokens of sequences with pasts of their own; there is no mask then."""
    constants: LoopConstants | None = None
    """Inside the loop, what no loop changes."""
    router_log: list[tuple[Tensor, Tensor]] | None = None
    """In training each MoE appends (sum of squared log-sum-exp, tokens per expert) of the tokens in the loop."""

    @property
    def is_square(self) -> bool:
        """Whether the queries are all of a row's tokens, there is no past, and only causality and documents hide."""
        return self.is_causal or self.starts is not None

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
            starts=take(self.starts),
            valid=take(self.valid),
            active=take(self.active),
            loop_index=take(self.loop_index),
        )

    def narrow(self, selection: Selection) -> "View":
        """This view for the rows and tokens of `selection`; every query still sees the keys its position allows."""
        B, T = self.positions.shape
        mask = self.mask
        if mask is None and self.is_causal and selection.slots is not None:
            # The square is no longer one: each query takes its own row of it along.
            mask = torch.ones(T, T, dtype=torch.bool, device=self.positions.device).tril()[None, None]

        def pick(x: Tensor | None) -> Tensor | None:
            if x is None or (selection.slots is None and x.shape[0] == 1 < B):
                return x
            return selection.pick(x.expand(B, *x.shape[1:]))

        by_query = None if mask is None else pick(mask.transpose(1, 2))
        return dataclasses.replace(
            self,
            positions=selection.pick(self.positions),
            rope=(pick(self.rope[0]), pick(self.rope[1])),
            mask=None if by_query is None else by_query.transpose(1, 2),
            is_causal=self.is_causal and mask is None,
            starts=pick(self.starts) if selection.slots is None else None,
            valid=pick(self.valid),
            selection=selection,
        )


def make_view(
    shape: tuple[int, int],
    rope_dim: int,
    rope_theta: float,
    dtype: torch.dtype,
    device: torch.device,
    attention_mask: Tensor | None = None,
    cache: "KVCache | None" = None,
    documents: Tensor | None = None,
) -> View:
    """The view of a call that brings `shape` = (B, T) new tokens.

    Args:
        attention_mask: (B, T), nonzero for tokens and zero for padding, which may stand anywhere; None: no padding.
        cache: holds the earlier tokens of the same rows.
        documents: (B, T), the number of each token's document in its row; a new one begins wherever the number changes.
            Positions go on counting, for attention depends on their differences alone. Not with a cache.
    """
    B, T = shape
    past = cache.length if cache is not None else 0
    valid = None if attention_mask is None else attention_mask.bool()
    starts = None if documents is None else _starts(documents)
    if valid is None and (cache is None or not cache.padded):
        # Every row stands at the same position, so one row of angles serves all.
        positions = torch.arange(past, past + T, device=device)[None].expand(B, T)
        rope = rotary_table(positions[:1], rope_dim, rope_theta, dtype)
        is_causal = past == 0 and T > 1
        mask = None
        if past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)[None, None]
        if starts is not None:
            mask = torch.ones(T, T, dtype=torch.bool, device=device).tril() & (positions[:1] >= starts[..., None])
            return View(cache or Scratch(), positions, rope, mask[:, None], False, starts=starts)
        return View(cache or Scratch(), positions, rope, mask, is_causal)
    new = torch.ones(B, T, dtype=torch.bool, device=device) if valid is None else valid
    n_earlier = cache.n_valid if cache is not None else torch.zeros(B, dtype=torch.int64, device=device)
    positions = (n_earlier[:, None] + new.cumsum(1) - 1).clamp(min=0)
    earlier = cache.valid[:, :past] if cache is not None else new[:, :0]
    slots = torch.arange(past + T, device=device)
    query = slots[past:, None]
    # A padding query would see nothing and its softmax would be 0/0, so every query sees itself.
    mask = (torch.cat((earlier, new), dim=1)[:, None] & (slots <= query)) | (slots == query)
    if starts is not None:
        mask = mask & (slots >= starts[..., None])
    rope = rotary_table(positions, rope_dim, rope_theta, dtype)
    return View(cache or Scratch(), positions, rope, mask[:, None], False, valid)


def _starts(documents: Tensor) -> Tensor:
    """(B, T) -> (B, T) int64, the slot at which each token's document begins."""
    slots = torch.arange(documents.shape[1], device=documents.device)
    begins = documents != documents.roll(1, dims=1)
    return (slots * begins).cummax(dim=1).values


@dataclass
class Scratch:
    """Keys and values of a call without a cache: differentiable, one buffer per layer, replaced loop by loop.

    `previous` is what the loop before left, for the rows of the view.
    """

    previous: dict[int, KeyValues] = field(default_factory=dict)
    current: dict[int, KeyValues] = field(default_factory=dict)

    def write(self, layer: int, new: KeyValues, view: View) -> KeyValues:
        if view.active is not None and layer in self.previous:
            new = tuple(_over(old, n, view) for n, old in zip(new, self.previous[layer], strict=True))
        if view.loop_index is not None:  # outside the loop nobody reads it again
            self.current[layer] = new
        return new

    def take_rows(self, rows: Tensor) -> "Scratch":
        """The scratch of the next loop when only some rows go on."""
        kept = {layer: tuple(x.index_select(0, rows) for x in kv) for layer, kv in self.current.items()}
        return Scratch(current=kept)

    def add_rows(self, n: int) -> "Scratch":
        """The scratch of the next loop when rows join at the end. They write before they read."""
        more = {
            layer: tuple(torch.cat((x, x.new_zeros(n, *x.shape[1:]))) for x in kv) for layer, kv in self.current.items()
        }
        return Scratch(current=more)


def _over(old: Tensor, new: Tensor, view: View) -> Tensor:
    """`old` (B, T, ...) with what the view's active tokens have just made."""
    active, slots = view.active, None if view.selection is None else view.selection.slots
    assert active is not None
    if slots is None:
        return torch.where(like(active, new), new, old)
    index = (torch.arange(len(old), device=old.device)[:, None], slots)
    return old.index_put(index, torch.where(like(active, new), new, old[index]))


def like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))


def _take(x: Tensor, at: Selection | None) -> Tensor:
    """The selection's rows of x (B, ...): no copy where they stand side by side."""
    if at is None or isinstance(at.rows, slice):
        return x if at is None else x[at.rows]
    # Three times as fast on a CPU as x[rows].
    return x.index_select(0, at.rows)


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

    def slot_nbytes(self, layers: Iterable[int]) -> int:
        """Bytes that one slot of one row takes at one level of `layers`."""
        return sum(x[0, 0, 0].nbytes for layer in layers for x in self.layers[layer])

    def write(self, layer: int, new: KeyValues, view: View) -> KeyValues:
        if view.loop_index is not None and view.lockstep is None:
            return self._write_at(view.loop_index, layer, new, view)
        level, at = view.lockstep or 0, view.selection
        fresh = slice(self.length, self.length + (new[0].shape[1] if at is None else at.n_new))
        for store, x in zip(self.layers[layer], new, strict=True):
            if view.active is not None and level:
                x = _over(_take(store[level - 1, :, fresh], at), x, view)
            store[level, slice(None) if at is None else at.rows, fresh] = x
        return tuple(_take(store[level, :, : fresh.stop], at) for store in self.layers[layer])

    def _write_at(self, level: Tensor, layer: int, new: KeyValues, view: View) -> KeyValues:
        """`write` for rows that are at loops of their own, (B,) int64: an engine's batch, which holds whole rows."""
        rows, end = torch.arange(self.batch_size, device=new[0].device), self.length + new[0].shape[1]
        for store, x in zip(self.layers[layer], new, strict=True):
            if view.active is not None:
                before = store[(level - 1).clamp(min=0), rows, self.length : end]
                x = torch.where(like(view.active, x), x, before)
            store[level, rows, self.length : end] = x.to(store.dtype)
        return tuple(store[level, rows, :end] for store in self.layers[layer])

    def fill_forward(self, n_done: int, n_tokens: int, rows: Tensor | slice = slice(None)) -> None:
        """Let the new tokens' last written level, `n_done - 1`, stand for every deeper one, in all rows or some."""
        new = slice(self.length, self.length + n_tokens)
        for kept in self.layers:
            for store in kept:
                if store.shape[0] > n_done:
                    store[n_done:, rows, new] = store[n_done - 1, rows, new]

    def keep_rows(self, rows: Tensor | Sequence[int]) -> None:
        """Drop every row but those given, (n,) int64, in their order; an index on the host spares a wait.

        Only rows that change their place are copied, so the memory of the others goes with the cache, not before.
        """
        keep = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        moved = [i for i, row in enumerate(keep) if row != i]
        if moved:
            to, source = (torch.tensor(x, device=self.device) for x in (moved, [keep[i] for i in moved]))
            for store in (x for kept in self.layers for x in kept):
                used = store[:, :, : self.length]
                used.index_copy_(1, to, used.index_select(1, source))
        self.batch_size = len(keep)
        index = torch.tensor(keep, device=self.device)
        self.valid, self.n_valid = self.valid[index], self.n_valid[index]
        self.row_seed = None if self.row_seed is None else self.row_seed[index]
        self.layers = [tuple(store[:, : len(keep)] for store in kept) for kept in self.layers]

    def advance(self, n_tokens: int, valid: Tensor | None) -> None:
        """Count the new tokens as stored. The last act of a call, so that one that fails leaves the cache as it was."""
        new = slice(self.length, self.length + n_tokens)
        self.valid[:, new] = True if valid is None else valid
        self.n_valid = self.n_valid + (n_tokens if valid is None else valid.sum(1))
        self.padded = self.padded or valid is not None
        self.length += n_tokens
