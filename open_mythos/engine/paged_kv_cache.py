"""Keys and values in pages, and what one call of the engine sees of them.

A page holds some consecutive tokens of one sequence for one *place*: a layer outside the loop, or a layer of the loop
at one of its loops. Every place keeps the same values per token, so all pages are alike. The places of a sequence that
runs up to L loops, in order: the prelude's layers, then for each loop the core's, then the coda's.

The keys that a token reads are padded to the multiple of GRID behind its position. So the shape of its attention, and
with it the order of every sum, depends on its position alone, not on the other tokens of the call: a prompt gives the
same bits in chunks of any size, beside any neighbours and from reused pages.

Shapes: N tokens of a call, H query heads, G key/value heads, K key width, P places, S key slots, V values per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.engine.sequence import GRID
from open_mythos.nn.block import ATTENTIONS
from open_mythos.nn.rope import rotary_table
from open_mythos.nn.view import KeyValues, LoopConstants, View
from open_mythos.ops.batch_invariant import cancelling, invariant, row_blocks

Pages = Sequence[tuple[int, ...]]
"""For each block of tokens, in order, its page at each place."""


@dataclass(frozen=True)
class Tokens:
    """Which tokens a call is about: the sequence's row in the table, its position, and how many loops it may run."""

    row: np.ndarray
    position: np.ndarray
    n_loops: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def take(self, index: np.ndarray | slice) -> "Tokens":
        return Tokens(self.row[index], self.position[index], self.n_loops[index])

    @staticmethod
    def join(parts: Sequence["Tokens"]) -> "Tokens":
        if len(parts) == 1:
            return parts[0]
        rows, positions, n_loops = zip(*((t.row, t.position, t.n_loops) for t in parts), strict=True)
        return Tokens(np.concatenate(rows), np.concatenate(positions), np.concatenate(n_loops))

    @staticmethod
    def none() -> "Tokens":
        return Tokens(*(np.empty(0, dtype=np.int64) for _ in range(3)))


class PagedKV:
    """The pages of all sequences, and a table that says which are whose."""

    def __init__(
        self,
        cfg: MythosConfig,
        n_pages: int,
        page_tokens: int,
        max_rows: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.cfg, self.page_tokens, self.dtype, self.device = cfg, page_tokens, dtype, device
        self.shapes = ATTENTIONS[cfg.attn_type].cache_shapes(cfg)
        self.null = n_pages
        """A page of zeros behind the others, where a table has no page yet."""
        width = sum(int(np.prod(shape)) for shape in self.shapes)
        self.pages = torch.zeros(n_pages + 1, page_tokens, width, dtype=dtype, device=device)
        self.table = np.full((max_rows, 1, 1), self.null, dtype=np.int64)
        self.rope: tuple[Tensor, Tensor] | None = None
        """Of the positions from 0 on, for as many as have been asked for."""
        later = torch.ones(GRID, GRID, dtype=torch.bool, device=device).triu(1)
        self.tail = torch.zeros(GRID, GRID, dtype=dtype, device=device).masked_fill_(later, -torch.inf)
        """What is added to the scores of the last GRID keys, for each place of a query among them."""

    def rotations(self, positions: np.ndarray, n_rows: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of these positions, with copies of the first behind them up to `n_rows`, (n_rows, 1, ...)."""
        end = int(positions.max()) + 1
        if self.rope is None or end > len(self.rope[0]):
            every = torch.arange(max(2 * end, 4 * GRID), device=self.device)
            self.rope = rotary_table(
                every, ATTENTIONS[self.cfg.attn_type].rope_dim(self.cfg), self.cfg.rope_theta, self.dtype
            )
        index = self.index(padded(positions, n_rows))
        cos, sin = (x.index_select(0, index)[:, None] for x in self.rope)
        return cos, sin

    @property
    def page_nbytes(self) -> int:
        return self.pages[0].nbytes

    def places(self, layer: int, n_loops: np.ndarray, loop: np.ndarray | None) -> np.ndarray:
        """The place of each token at a model's layer; `loop` is the one it is at, None outside the loop."""
        before, core = self.cfg.prelude_layers, self.cfg.recurrent_layers
        if loop is not None:
            return loop * core + layer
        return np.full_like(n_loops, layer) if layer < before else layer + (n_loops - 1) * core

    def hold(self, row: int, first: int, pages: Pages) -> None:
        """Give the sequence of `row` these pages for its blocks from `first` on."""
        rows, places, blocks = self.table.shape
        per_grid = GRID // self.page_tokens
        n_places, n_blocks = len(pages[0]), -(-(first + len(pages)) // per_grid) * per_grid
        if n_places > places or n_blocks > blocks:
            # Twice as long at least, so that a long sequence does not copy the table once a block.
            shape = (rows, max(n_places, places), blocks if n_blocks <= blocks else max(n_blocks, 2 * blocks))
            table = np.full(shape, self.null, dtype=np.int64)
            table[:, :places, :blocks] = self.table
            self.table = table
        self.table[row, :n_places, first : first + len(pages)] = np.asarray(pages, dtype=np.int64).T

    def drop(self, row: int) -> None:
        """Let `row` hold nothing."""
        self.table[row] = self.null

    def zero(self, pages: Pages) -> None:
        """Zero pages before their first use: what is masked still meets a factor of zero, and 0 * NaN is NaN."""
        self.pages.index_fill_(0, self.index(np.asarray(pages, dtype=np.int64).ravel()), 0)

    def read(self, pages: Pages) -> Tensor:
        """A copy of these pages, (blocks, P, page_tokens, V), on the host."""
        return self.pages[self.index(np.asarray(pages, dtype=np.int64))].cpu()

    def write(self, pages: Pages, kept: Tensor) -> None:
        """Put back what `read` gave, in other pages."""
        self.pages[self.index(np.asarray(pages, dtype=np.int64))] = kept.to(self.device)

    def slots(self, tokens: Tokens, places: np.ndarray) -> np.ndarray:
        """Where each token's values are: a row of the pages laid out as (pages * page_tokens, V)."""
        pages = self.table[tokens.row, places, tokens.position // self.page_tokens]
        return pages * self.page_tokens + tokens.position % self.page_tokens

    def fill_forward(self, tokens: Tokens, loop: np.ndarray) -> None:
        """Let what each token wrote at `loop`, the one it has left at, stand for its deeper loops."""
        missing = tokens.n_loops - 1 - loop
        which = np.repeat(np.arange(len(tokens)), missing)
        if not len(which):
            return
        deeper = loop[which] + 1 + np.arange(len(which)) - np.repeat(missing.cumsum() - missing, missing)
        flat, many = self.pages.flatten(0, 1), tokens.take(which)
        for layer in range(self.cfg.prelude_layers, self.cfg.prelude_layers + self.cfg.recurrent_layers):
            source = self.slots(tokens, self.places(layer, tokens.n_loops, loop))[which]
            target = self.slots(many, self.places(layer, many.n_loops, deeper))
            values = flat.index_select(0, self.index(source))
            flat.index_copy_(0, self.index(target), values)

    def index(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(self.device)


@dataclass(frozen=True)
class Group:
    """Tokens whose attention is one product: equally many of each sequence, and equally many keys.

    `row`, `n_loops` and `first`, the place of its first token in the call, of each of R sequences. `mask`
    (R, 1, 1 or T H / G, S) is added to the scores.
    """

    row: np.ndarray
    n_loops: np.ndarray
    first: np.ndarray
    n_queries: int
    n_slots: int
    mask: Tensor


class Layout:
    """What the calls on the same tokens share: positions, masks, and which of them attend together.

    `n_rows` is how many rows the calls have: the tokens, and copies of the first one behind them.
    """

    def __init__(self, kv: PagedKV, tokens: Tokens, n_rows: int) -> None:
        self.kv, self.tokens = kv, tokens
        self.positions = kv.index(padded(tokens.position, n_rows))[:, None]
        self.rope = kv.rotations(tokens.position, n_rows)
        self.n_shared = kv.cfg.n_heads // (1 if len(kv.shapes) == 1 else kv.cfg.n_kv_heads)
        """Query heads that read the same keys: H / G."""
        indices = _groups(tokens)
        self.groups = [self._group(index) for index in indices]
        order = np.concatenate([index.ravel() for index in indices])
        self.order = self.inverse = None
        if (order[1:] <= order[:-1]).any():
            self.order, self.inverse = kv.index(order), kv.index(padded(order.argsort(), n_rows))
        elif n_rows > len(tokens):
            self.inverse = kv.index(padded(order, n_rows))

    def _group(self, index: np.ndarray) -> Group:
        tokens, T, kv = self.tokens, index.shape[1], self.kv
        position = tokens.position[index]
        before = int(position.flat[0]) // GRID * GRID
        mask = F.pad(kv.tail[kv.index(position % GRID)][:, None], (before, 0))
        if T > 1:
            mask = mask.repeat_interleave(self.n_shared, dim=2)
        first = index[:, 0]
        return Group(tokens.row[first], tokens.n_loops[first], first, T, before + GRID, mask)

    def view(
        self,
        loop: np.ndarray | None = None,
        constants: LoopConstants | None = None,
        loop_index: Tensor | None = None,
    ) -> View:
        """The view of a call on these tokens outside the loop, or with each at its `loop`, (N,).

        Args:
            loop_index: the same with the copies, (n_rows,) int64.
        """
        call = Call(self, loop)
        return View(call, self.positions, self.rope, constants=constants, loop_index=loop_index)


def _groups(tokens: Tokens) -> list[np.ndarray]:
    """For each group its tokens' places in the call, (R, T): each sequence's in the order of their positions."""
    end = tokens.position // GRID
    if np.bincount(tokens.row).max() == 1:
        # One token of each sequence: decoding.
        return [np.flatnonzero(end == each)[:, None] for each in sorted(set(end.tolist()))]
    order = np.lexsort((tokens.position, tokens.row, end))
    row, end = tokens.row[order], end[order]
    starts = np.flatnonzero(np.concatenate(([True], (row[1:] != row[:-1]) | (end[1:] != end[:-1]))))
    counts = np.diff(starts, append=len(order))
    kinds = end[starts] * (len(order) + 1) + counts
    groups = []
    for kind in np.unique(kinds):
        at = starts[kinds == kind]
        groups.append(order[at[:, None] + np.arange(kind % (len(order) + 1))])
    return groups


def padded(x: np.ndarray, n: int) -> np.ndarray:
    """x with copies of its first entry behind it, n in all."""
    return x if len(x) == n else np.concatenate((x, np.repeat(x[:1], n - len(x))))


class Call:
    """The pages as one call sees them: a `TokenStore`."""

    attends = True

    def __init__(self, layout: Layout, loop: np.ndarray | None) -> None:
        self.layout, self.loop = layout, loop

    def write(self, layer: int, new: KeyValues, view: View) -> KeyValues:
        raise TypeError("the rows of an engine's call have pasts of their own; `attend` reads them")

    def attend(self, layer: int, q: Tensor, new: KeyValues, scale: float) -> Tensor:
        layout, kv = self.layout, self.layout.kv
        tokens, (n_rows, _, H, K) = layout.tokens, q.shape
        values = torch.cat([x.flatten(1) for x in new], dim=-1) if len(new) > 1 else new[0].flatten(1)
        slots = kv.slots(tokens, kv.places(layer, tokens.n_loops, self.loop))
        kv.pages.flatten(0, 1).index_copy_(0, kv.index(slots), values[: len(tokens)])
        q = q.view(n_rows, -1, layout.n_shared, K)
        q = q[: len(tokens)] if layout.order is None else q.index_select(0, layout.order)
        sizes = [len(group.row) * group.n_queries for group in layout.groups]
        parts = zip(layout.groups, q.split(sizes), strict=True)
        outs = [self._attend(layer, group, part.unflatten(0, (-1, group.n_queries)), scale) for group, part in parts]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        out = out if layout.inverse is None else out.index_select(0, layout.inverse)
        # In one layout, whatever the groups: products of bf16 go by it.
        return out.reshape(n_rows, 1, H, -1).contiguous()

    def _attend(self, layer: int, group: Group, q: Tensor, scale: float) -> Tensor:
        """q (R, T, G, H / G, K) -> (R T, G, H / G, W)."""
        kv, (R, T, G, M, K) = self.layout.kv, q.shape
        places = kv.places(layer, group.n_loops, None if self.loop is None else self.loop[group.first])
        pages = kv.table[group.row, places, : group.n_slots // kv.page_tokens]
        past = kv.pages.index_select(0, kv.index(pages.ravel())).view(R, group.n_slots, -1)
        if len(kv.shapes) == 1:
            k = v = past[:, None]
        else:
            k, v = (x.unflatten(-1, (G, -1)).transpose(1, 2) for x in past.chunk(2, dim=-1))
        # Heads that read the same keys are so many more queries: nothing is repeated, and there are more rows.
        q = q.transpose(1, 2).reshape(R, G, T * M, K)
        attend = _attend_by_rows if invariant() else F.scaled_dot_product_attention
        out = attend(q, k, v, attn_mask=group.mask, scale=scale)
        return out.unflatten(2, (T, M)).transpose(1, 2).reshape(R * T, G, M, -1)


def _attend_by_rows(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
    """Attend with numbers of queries that give every query the same bits: q (R, G, Q, K), attn_mask (R, 1, 1 or Q, S).

    The number of keys S goes by the position of a query, so only the number of queries Q differs between calls.
    """
    S, K = k.shape[2:]

    def probe(size: int) -> Tensor:
        # Scores are rounding errors, large enough to choose between the keys; so are the sums over values.
        large = 2**-14 / torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps
        one_q, all_k = large * cancelling(q.new_empty(1, 1, 1, K), 1), cancelling(q.new_empty(1, 1, S, K), -1, 1)
        all_v = cancelling(q.new_empty(1, 1, K, S), -1, 2).mT.contiguous()
        mask = q.new_zeros(1, 1, size, S)
        outs = [
            F.scaled_dot_product_attention(rows.expand(1, 1, size, K).contiguous(), all_k, all_v, mask, scale=scale)
            for rows in (one_q, torch.zeros_like(one_q))
        ]
        return torch.cat(outs, dim=-1)[0, 0]

    outs, start = [], 0
    for n, size in row_blocks(("attention", S, K, q.dtype), q.shape[2], probe):
        rows, mask = q[:, :, start : start + n], attn_mask
        if attn_mask.shape[2] > 1:
            mask = F.pad(attn_mask[:, :, start : start + n], (0, 0, 0, size - n))
        rows = F.pad(rows, (0, 0, 0, size - n))
        outs.append(F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)[:, :, :n])
        start += n
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
