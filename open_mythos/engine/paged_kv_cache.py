"""Keys and values in pages, and one call's view of them.

A page has some consecutive tokens of one sequence for one *place*: a layer outside the loop, or a layer of the loop at
one of its loops. Every place stores the same number of values per token, so all pages are alike. The places of a
sequence that runs up to L loops, in order: the prelude's layers, then for each loop the core's, then the coda's.

The keys that a token attends to are padded to the multiple of GRID behind its position. So the shape of its attention,
and with it the order of every sum, depends on its position alone, not on the other tokens of the call: a prompt gives
the same bits in chunks of any size, beside any other sequences and from reused pages.

Shapes: N tokens of a call, H query heads, G key/value heads, K key width, P places, S key slots, V values per token.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.engine.sequence import GRID, Sequence
from open_mythos.nn.block import ATTENTIONS
from open_mythos.nn.rope import Rotation, rotary_table
from open_mythos.nn.view import KeyValues, LoopConstants, View
from open_mythos.ops.batch_invariant import cancelling, invariant, row_blocks


@dataclass(frozen=True)
class Tokens:
    """Tokens of a call: each one's row in the page table, its position, and the loops that it may run."""

    row: np.ndarray
    position: np.ndarray
    n_loops: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def take(self, index: np.ndarray | slice) -> "Tokens":
        return Tokens(self.row[index], self.position[index], self.n_loops[index])

    @staticmethod
    def of(seq: Sequence) -> "Tokens":
        """Return the tokens of a sequence's chunk."""
        n, first = seq.n_running, seq.n_computed
        return Tokens(np.full(n, seq.row), np.arange(first, first + n), np.full(n, seq.n_loops))

    @staticmethod
    def join(parts: list["Tokens"]) -> "Tokens":
        if len(parts) == 1:
            return parts[0]
        rows, positions, n_loops = zip(*((t.row, t.position, t.n_loops) for t in parts), strict=True)
        return Tokens(np.concatenate(rows), np.concatenate(positions), np.concatenate(n_loops))

    @staticmethod
    def none() -> "Tokens":
        return Tokens(*(np.empty(0, dtype=np.int64) for _ in range(3)))


class PagedKVCache:
    """The pages of all sequences, and a table of the pages of each."""

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
        """A page of zeros behind the others, which stands in the table where a sequence has no page."""
        width = sum(int(np.prod(shape)) for shape in self.shapes)
        self.pages = torch.zeros(n_pages + 1, page_tokens, width, dtype=dtype, device=device)
        self.table = np.full((max_rows, 1, 1), self.null, dtype=np.int64)
        self.rope: Rotation | None = None
        """Rotations of the positions from 0 on, for as many as calls have needed."""
        later = torch.ones(GRID, GRID, dtype=torch.bool, device=device).triu(1)
        self.tail = torch.zeros(GRID, GRID, dtype=dtype, device=device).masked_fill_(later, -torch.inf)
        """Row i is added to the scores of the last GRID keys where the query is the i-th of them."""

    def rotations(self, positions: np.ndarray, n_rows: int) -> Rotation:
        """Return the rotation of these positions and of copies of the first one behind them, (n_rows, 1, ...)."""
        end = int(positions.max()) + 1
        if self.rope is None or end > len(self.rope[0]):
            every = torch.arange(max(2 * end, 4 * GRID), device=self.device)
            self.rope = rotary_table(
                every, ATTENTIONS[self.cfg.attn_type].rope_dim(self.cfg), self.cfg.rope_theta, self.dtype
            )
        index = self.index(padded(positions, n_rows))
        cos, sin, turn = (None if x is None else x.index_select(0, index)[:, None] for x in self.rope)
        assert cos is not None and sin is not None
        return cos, sin, turn

    def places(self, layer: int, n_loops: np.ndarray, loop: np.ndarray | None) -> np.ndarray:
        """Return the place of each token at a model's layer; `loop` is the token's loop, None outside the loop."""
        # In the loop: layer + loop * core. The prelude's layers come before, the coda's behind the last loop.
        before, core = self.cfg.prelude_layers, self.cfg.recurrent_layers
        if loop is not None:
            return loop * core + layer
        return np.full_like(n_loops, layer) if layer < before else layer + (n_loops - 1) * core

    def map(self, seqs: list[Sequence]) -> None:
        """Enter the sequences' new blocks into the table, and zero the pages that nothing was written to.

        They are zeroed because a masked key still meets a factor of zero, and 0 * NaN is NaN.
        """
        fresh: list[int] = []
        for seq in seqs:
            new = seq.blocks[seq.n_mapped :]
            if not new:
                continue
            n_places = len(new[0].pages)
            self._grow(n_places, len(seq.blocks))
            pages = np.array([block.pages for block in new], dtype=np.int64)
            self.table[seq.row, :n_places, seq.n_mapped : len(seq.blocks)] = pages.T
            # Blocks of computed tokens were written before: they come from the prefix cache or from a swap.
            n_written = -(-seq.n_computed // self.page_tokens)
            fresh += pages[max(0, n_written - seq.n_mapped) :].ravel().tolist()
            seq.n_mapped = len(seq.blocks)
        if fresh:
            self.pages.index_fill_(0, self.index(np.array(fresh)), 0)

    def _grow(self, n_places: int, n_blocks: int) -> None:
        """Make the table large enough for a sequence of these numbers of places and blocks."""
        rows, places, blocks = self.table.shape
        per_grid = GRID // self.page_tokens
        n_blocks = -(-n_blocks // per_grid) * per_grid
        if n_places > places or n_blocks > blocks:
            # The table becomes at least twice as long, so that a long sequence does not copy it at every block.
            shape = (rows, max(n_places, places), blocks if n_blocks <= blocks else max(n_blocks, 2 * blocks))
            table = np.full(shape, self.null, dtype=np.int64)
            table[:, :places, :blocks] = self.table
            self.table = table

    def unmap(self, seq: Sequence) -> None:
        """Take a sequence's pages out of the table."""
        self.table[seq.row] = self.null
        seq.n_mapped = 0

    def clear(self) -> None:
        """Take the pages of all sequences out of the table."""
        self.table.fill(self.null)

    def read(self, pages: list[tuple[int, ...]]) -> Tensor:
        """Return a copy of these pages, given block by block, (blocks, P, page_tokens, V), on the host."""
        return self.pages[self.index(np.array(pages, dtype=np.int64))].cpu()

    def write(self, pages: list[tuple[int, ...]], values: Tensor) -> None:
        """Write the values that `read` returned into other pages."""
        self.pages[self.index(np.array(pages, dtype=np.int64))] = values.to(self.device)

    def slots(self, tokens: Tokens, places: np.ndarray) -> np.ndarray:
        """Return where each token's values are: a row of the pages laid out as (pages * page_tokens, V)."""
        pages = self.table[tokens.row, places, tokens.position // self.page_tokens]
        return pages * self.page_tokens + tokens.position % self.page_tokens

    def fill_forward(self, tokens: Tokens, loop: np.ndarray) -> None:
        """Copy what each token wrote at `loop`, its last one, to the places of its deeper loops."""
        missing = tokens.n_loops - 1 - loop
        # One entry for each token and deeper loop: `which` is the token's, `deeper` the loop.
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
    """Tokens whose attention is one product: T of each of R sequences, with the same number of keys."""

    row: np.ndarray
    n_loops: np.ndarray
    first_token: np.ndarray
    """Index in the call of each sequence's first token, (R,)."""
    n_queries: int
    n_slots: int
    mask: Tensor
    """(R, 1, 1 or T H / G, S), added to the scores."""


class Layout:
    """Positions, masks and groups of tokens that attend together, shared by all calls on the same tokens.

    Args:
        n_rows: rows of the calls: the tokens, and copies of the first one behind them.
    """

    def __init__(self, kv: PagedKVCache, tokens: Tokens, n_rows: int) -> None:
        self.kv, self.tokens = kv, tokens
        self.positions = kv.index(padded(tokens.position, n_rows))[:, None]
        self.rope = kv.rotations(tokens.position, n_rows)
        self.n_shared = kv.cfg.n_heads // (1 if len(kv.shapes) == 1 else kv.cfg.n_kv_heads)
        """Query heads that share keys: H / G."""
        # The tokens are gathered group by group for attention, and its results scattered back; None: not needed.
        indices = _groups(tokens)
        self.groups = [self._group(index) for index in indices]
        order = np.concatenate([index.ravel() for index in indices])
        self.gather_index = self.scatter_index = None
        if (order[1:] <= order[:-1]).any():
            self.gather_index, self.scatter_index = kv.index(order), kv.index(padded(order.argsort(), n_rows))
        elif n_rows > len(tokens):
            self.scatter_index = kv.index(padded(order, n_rows))

    def _group(self, index: np.ndarray) -> Group:
        tokens, T, kv = self.tokens, index.shape[1], self.kv
        # All keys before the last GRID are visible to every query of the group; among the last, only earlier ones.
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
        """Return the view of a call on these tokens outside the loop, or with each token at its `loop`, (N,).

        Args:
            loop_index: the loops of all rows, copies included, (n_rows,) int64.
        """
        call = PagedCall(self, loop)
        return View(call, self.positions, self.rope, constants=constants, loop_index=loop_index)


def _groups(tokens: Tokens) -> list[np.ndarray]:
    """Return for each group the indices of its tokens in the call, (R, T), in the order of their positions.

    A group's tokens end at the same multiple of GRID, and each of its sequences has the same number of them.
    """
    end = tokens.position // GRID
    if np.bincount(tokens.row).max() == 1:
        # Decoding: one token of each sequence.
        return [np.flatnonzero(end == each)[:, None] for each in sorted(set(end.tolist()))]
    # Sort by end, sequence and position; a run of equal end and sequence is one row of a group.
    order = np.lexsort((tokens.position, tokens.row, end))
    row, end = tokens.row[order], end[order]
    starts = np.flatnonzero(np.concatenate(([True], (row[1:] != row[:-1]) | (end[1:] != end[:-1]))))
    counts = np.diff(starts, append=len(order))
    # Runs of equal end and equal length form a group.
    kinds = end[starts] * (len(order) + 1) + counts
    groups = []
    for kind in np.unique(kinds):
        at = starts[kinds == kind]
        groups.append(order[at[:, None] + np.arange(kind % (len(order) + 1))])
    return groups


def padded(x: np.ndarray, n: int) -> np.ndarray:
    """Return x with copies of its first entry behind it, n entries in all."""
    return x if len(x) == n else np.concatenate((x, np.repeat(x[:1], n - len(x))))


class PagedCall:
    """The pages as one call sees them: a `TokenStore`."""

    attends = True

    def __init__(self, layout: Layout, loop: np.ndarray | None) -> None:
        self.layout, self.loop = layout, loop

    def write(self, layer: int, new: KeyValues, view: View) -> KeyValues:
        raise TypeError("each row of an engine's call has its own past; use `attend`")

    def attend(self, layer: int, q: Tensor, new: KeyValues, scale: float) -> Tensor:
        layout, kv = self.layout, self.layout.kv
        tokens, (n_rows, _, H, K) = layout.tokens, q.shape
        # 1. Write the new keys and values first, so that tokens of one chunk find each other.
        values = torch.cat([x.flatten(1) for x in new], dim=-1) if len(new) > 1 else new[0].flatten(1)
        slots = kv.slots(tokens, kv.places(layer, tokens.n_loops, self.loop))
        kv.pages.flatten(0, 1).index_copy_(0, kv.index(slots), values[: len(tokens)])
        # 2. Attend group by group.
        q = q.view(n_rows, -1, layout.n_shared, K)
        q = q[: len(tokens)] if layout.gather_index is None else q.index_select(0, layout.gather_index)
        sizes = [len(group.row) * group.n_queries for group in layout.groups]
        parts = zip(layout.groups, q.split(sizes), strict=True)
        outs = [self._attend(layer, group, part.unflatten(0, (-1, group.n_queries)), scale) for group, part in parts]
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        # 3. Put the results back into the order of the call.
        out = out if layout.scatter_index is None else out.index_select(0, layout.scatter_index)
        # One memory layout whatever the groups, because bf16 products depend on it.
        return out.reshape(n_rows, 1, H, -1).contiguous()

    def _attend(self, layer: int, group: Group, q: Tensor, scale: float) -> Tensor:
        """Attend for one group: q (R, T, G, H / G, K) -> (R T, G, H / G, W)."""
        # Gather the keys and values of the group's pages, page after page.
        kv, (R, T, G, M, K) = self.layout.kv, q.shape
        places = kv.places(layer, group.n_loops, None if self.loop is None else self.loop[group.first_token])
        pages = kv.table[group.row, places, : group.n_slots // kv.page_tokens]
        past = kv.pages.index_select(0, kv.index(pages.ravel())).view(R, group.n_slots, -1)
        if len(kv.shapes) == 1:
            k = v = past[:, None]
        else:
            k, v = (x.unflatten(-1, (G, -1)).transpose(1, 2) for x in past.chunk(2, dim=-1))
        # Heads that share keys become more queries: no key is repeated, and the products have more rows.
        q = q.transpose(1, 2).reshape(R, G, T * M, K)
        attend = _attend_by_rows if invariant() else F.scaled_dot_product_attention
        out = attend(q, k, v, attn_mask=group.mask, scale=scale)
        return out.unflatten(2, (T, M)).transpose(1, 2).reshape(R * T, G, M, -1)


def _attend_by_rows(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
    """Attend with numbers of queries that give every query the same bits: q (R, G, Q, K), attn_mask (R, 1, 1 or Q, S).

    The number of keys S follows from the position of a query, so only the number of queries Q differs between calls.
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
