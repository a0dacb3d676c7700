"""The view of a call: positions, masks and the store of keys and values, for layers that see their input alone.

Shapes: B rows, T new tokens, S key slots (earlier tokens, then the new ones), D width, K rotary width.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from open_mythos.nn.rope import Rotation
from open_mythos.ops.experts import StoredExperts

KeyValues = tuple[Tensor, ...]
"""Tensors that an attention stores, each (B, S, ...): `gqa` keys and values, `mla` a latent with its rotary key."""
RouterLog = list[tuple[Tensor, Tensor]]
"""One entry for each mixture of experts: the sum of squared log-sum-exp, and the tokens per expert."""


class KVStore(Protocol):
    """Keys and values of one call.

    Every store follows one rule: a token that has exited the loop stops writing, and what it wrote last stands for
    every deeper loop (fill-forward). So a cached call, a chunked one and a full one attend to the same keys and values.
    """

    @property
    def attends(self) -> bool:
        """True if the store computes the attention itself, as an engine's `TokenStore` does."""
        ...

    def write(self, layer: int, new: KeyValues, view: "View") -> KeyValues:
        """Store the new tokens' keys and values at the loop of `view`; return those of every slot."""
        ...


class TokenStore(KVStore, Protocol):
    """Keys and values of a call whose rows are single tokens of sequences with pasts of their own: an engine's."""

    def attend(self, layer: int, q: Tensor, new: KeyValues, scale: float) -> Tensor:
        """Store the new tokens' keys and values, and attend to those that each token may see.

        Args:
            q: (B, 1, H, K).
            new: keys (B, 1, G, K) and values (B, 1, G, W); or one (B, 1, K) that is the key of all heads and its value.

        Returns:
            (B, 1, H, W).
        """
        ...


@dataclass(frozen=True)
class LoopConstants:
    """Tensors that the loops of a call share, made once for all of them."""

    loop_embeddings: Tensor | None
    """(max_loop_iters, D)"""
    decay: Any
    """(D,), the result of the injection's `get_A`; None for one without a decay."""
    experts: dict[int, StoredExperts]
    """Under autocast the routed experts in its dtype, by layer, so that not every loop makes a copy of its own."""


@dataclass(frozen=True)
class Selection:
    """The rows of a call, and the new tokens of each, that a narrowed view contains."""

    rows: Tensor | slice
    """(B',) int64; a slice for neighbouring rows, which are then taken without a copy."""
    slots: Tensor | None
    """(B', T') int64, distinct in each row, 0-based among the call's new tokens; None: all of them."""
    n_rows: int
    """B of the call."""
    n_new: int
    """T of the call."""

    def row_index(self, device: torch.device) -> Tensor:
        """Return the rows as (B',) int64."""
        return torch.arange(self.n_rows, device=device)[self.rows] if isinstance(self.rows, slice) else self.rows

    def pick(self, x: Tensor) -> Tensor:
        """Take the selection out of x: (B, T, ...) -> (B', T', ...), and (B,) -> (B',)."""
        if self.slots is None or x.ndim == 1:
            # index_select is three times as fast on a CPU as x[rows].
            return x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)
        return x[self.row_index(x.device)[:, None], self.slots]

    def put(self, x: Tensor, new: Tensor) -> Tensor:
        """Return x (B, T, ...) with `new` (B', T', ...) in the places of the selection; differentiable in both."""
        rows = self.row_index(x.device)
        return x.index_put((rows,) if self.slots is None or x.ndim == 1 else (rows[:, None], self.slots), new)


@dataclass(frozen=True)
class View:
    """Positions, masks and the store of one call, for its layers. Immutable: `at_loop` makes a copy for each loop."""

    store: KVStore
    positions: Tensor
    """(B, T) int64, position of each new token in its row, padding not counted."""
    rope: Rotation
    mask: Tensor | None = None
    """(B or 1, 1, T, S) bool, true where a query may see a key. None: a causal square, or one query that sees all."""
    valid: Tensor | None = None
    """(B, T) bool, false for padding; None without padding."""
    starts: Tensor | None = None
    """(B, T) int64, the slot at which each query's document begins, where rows hold several documents and the queries
    are every token of them. `mask` says the same; this lets a kernel skip the keys of earlier documents."""
    active: Tensor | None = None
    """(B, T) bool, tokens in the loop; None: all of them."""
    loop_index: Tensor | None = None
    """(B,) int64, the loop that each row is at; None in prelude and coda."""
    lockstep: int | None = None
    """The loop that every row is at, where the host knows it: the cache then needs no gather."""
    selection: Selection | None = None
    """Rows and tokens of the call that are still computed, once some have left; B and T above then count these."""
    constants: LoopConstants | None = None
    """Tensors that all loops of the call share; None: not made yet."""
    router_log: RouterLog | None = None
    """List to which each mixture of experts appends its statistics over the tokens in the loop, in training."""

    @property
    def is_causal(self) -> bool:
        """True if several queries attend in a causal square; a single one without a mask sees every slot."""
        return self.mask is None and self.positions.shape[1] > 1

    @property
    def is_square(self) -> bool:
        """True if the queries are all of a row's tokens, and only causality and documents hide keys."""
        return self.is_causal or self.starts is not None

    @property
    def tokens(self) -> TokenStore | None:
        """Store of an engine's call, whose rows are single tokens of sequences with pasts of their own; else None."""
        return cast(TokenStore, self.store) if self.store.attends else None

    def at_loop(
        self,
        loop_index: Tensor,
        lockstep: int | None = None,
        active: Tensor | None = None,
        store: KVStore | None = None,
        router_log: RouterLog | None = None,
    ) -> "View":
        """Return this view as one loop sees it."""
        store = store or self.store
        return dataclasses.replace(
            self, loop_index=loop_index, lockstep=lockstep, active=active, store=store, router_log=router_log
        )

    def take_rows(self, rows: Tensor | slice) -> "View":
        """Return this view for some rows of the batch, in the order given, as if the call had no others."""
        B, T = self.positions.shape
        return dataclasses.replace(self.narrow(Selection(rows, None, B, T)), selection=None)

    def narrow(self, selection: Selection) -> "View":
        """Return this view for the rows and tokens of `selection`; every query still sees the keys it saw before."""
        B, T = self.positions.shape
        mask = self.mask
        if self.is_causal and selection.slots is not None:
            # The square is no longer one: each query takes its own row of it along.
            mask = torch.ones(T, T, dtype=torch.bool, device=self.positions.device).tril()[None, None]

        def pick(x: Tensor | None) -> Tensor | None:
            if x is None or (selection.slots is None and x.shape[0] == 1 < B):
                return x
            return selection.pick(x.expand(B, *x.shape[1:]))

        # A mask is (B, 1, T, S): with queries first it is picked like any other tensor of tokens.
        by_query = None if mask is None else pick(mask.transpose(1, 2))
        cos, sin, turn = self.rope
        return dataclasses.replace(
            self,
            positions=selection.pick(self.positions),
            rope=(pick(cos), pick(sin), pick(turn)),
            mask=None if by_query is None else by_query.transpose(1, 2),
            starts=pick(self.starts) if selection.slots is None else None,
            valid=pick(self.valid),
            selection=selection,
        )
