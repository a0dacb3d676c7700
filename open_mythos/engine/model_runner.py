"""What the scheduler decides, carried out on the model.

Shapes: N tokens, D width, V vocabulary. Every token is a row of its own: (N, 1, D).
"""

from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from open_mythos.engine.loop_batch import Cohort, Left
from open_mythos.engine.paged_kv_cache import Layout, PagedKV, Tokens, padded
from open_mythos.engine.sequence import Block
from open_mythos.model import OpenMythos
from open_mythos.nn.halting import HaltingRule
from open_mythos.nn.initial_state import initial_state
from open_mythos.ops.batch_invariant import Invariance, batch_invariant, size_of


@dataclass(eq=False)
class Row:
    """What the runner knows of one admitted sequence."""

    number: int
    """Its row in the table of pages."""
    rule: HaltingRule
    n_loops: int
    n_blocks: int = 0
    """Blocks that the table has of it."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a sequence that enter the model together."""

    row: Row
    first: int
    """Position of the first."""
    ids: Sequence[int]
    blocks: Sequence[Block]
    """All of the sequence, so that there is one for every token."""


@dataclass(frozen=True)
class ReadOut:
    """What the coda and the head make of chunks that have left the loop."""

    logits: Tensor
    """(n, V), of the last token of each row that is wanted, in their order."""
    loops: list[int]
    """Of those tokens."""
    is_nan: list[bool]
    """For every row, whether something in its chunk is NaN."""
    states: dict[Row, Tensor]
    """(n, 1, D), what the head reads for every token of the chunk, in order, of the rows where that was asked for."""


class Runner:
    """The model, the pages, and the tokens in between."""

    def __init__(self, model: OpenMythos, kv: PagedKV, max_rows: int, invariant: bool) -> None:
        self.model, self.kv = model, kv
        self.invariance = Invariance() if invariant and kv.device.type == "cpu" else None
        """What products have shown so far; None: kernels are chosen by speed."""
        self.least_rows = 1
        """Rows that a batch-invariant call is padded to at least, which changes its time and not its results."""
        self.cohorts: list[Cohort] = []
        self.left: list[Left] = []
        """Tokens that have left the loop and not been through the coda."""
        self.in_loop = np.zeros(max_rows, dtype=np.int64)
        """Tokens in the loop, of each row."""
        self.changed: set[int] = set()
        """Rows of which tokens have left the loop since the last one."""
        self.running: dict[int, Row] = {}
        """The rows whose chunk has not yet left the loop, by number."""
        self.layout: Layout | None = None
        """Of the tokens in the loop; None if they are others than in the last one."""
        self.free_rows = list(range(max_rows))[::-1]
        block = model.recurrent
        with self._computing():
            self.constants = None if block is None else block.constants(model.embed.weight[:1, None])

    @contextmanager
    def _computing(self) -> Generator[None]:
        with torch.no_grad(), batch_invariant(self.invariance):
            yield

    def admit(self, rule: HaltingRule, n_loops: int) -> Row:
        """A row for a new sequence."""
        return Row(self.free_rows.pop(), rule, n_loops)

    def release(self, row: Row) -> None:
        """Forget a sequence, wherever its tokens are."""
        for cohort in self.cohorts:
            gone = cohort.tokens.row == row.number
            if gone.any():
                cohort.drop(gone)
                self.layout = None
        self.cohorts = [cohort for cohort in self.cohorts if len(cohort)]
        kept = [(part, part.tokens.row != row.number) for part in self.left]
        self.left = [part if keep.all() else part.take(np.flatnonzero(keep)) for part, keep in kept if keep.any()]
        self.running.pop(row.number, None)
        self.changed.discard(row.number)
        self.unmap(row)
        self.free_rows.append(row.number)

    def clear(self) -> None:
        """Forget all sequences, whatever state they are in."""
        self.cohorts, self.left, self.layout = [], [], None
        self.changed, self.running = set(), {}
        self.free_rows = list(range(len(self.in_loop)))[::-1]
        self.kv.table.fill(self.kv.null)

    def unmap(self, row: Row) -> None:
        """Take a sequence's pages away."""
        self.kv.drop(row.number)
        row.n_blocks = 0

    def start(self, chunks: Sequence[Chunk]) -> None:
        """Embedding and prelude; the tokens then stand before their first loop."""
        if not chunks:
            return
        # Tokens of one rule stand together.
        chunks = sorted(chunks, key=lambda chunk: id(chunk.row.rule))
        self._map(chunks)
        tokens = Tokens.join([_tokens(chunk) for chunk in chunks])
        n, n_rows = len(tokens), self._n_rows(len(tokens))
        ids = np.fromiter((i for chunk in chunks for i in chunk.ids), np.int64, n)
        for chunk in chunks:
            self.running[chunk.row.number] = chunk.row
            self.in_loop[chunk.row.number] = len(chunk.ids)
        with self._computing():
            view = Layout(self.kv, tokens, n_rows).view()
            e = self.model.encode(self.kv.index(padded(ids, n_rows))[:, None], view)
            if self.model.recurrent is None:
                self._leave(Left(tokens, np.zeros(n, dtype=np.int64), e[:n]))
                return
            h = initial_state(self.model.cfg.initial_state, e, view)
            e = self.model.recurrent.injection.prepare(e)
            end = 0
            for rule, group in groupby(chunks, key=lambda chunk: chunk.row.rule):
                part = slice(end, end := end + sum(len(chunk.ids) for chunk in group))
                self._cohort(rule).join(tokens.take(part), h[part], e[part])
        self.layout = None

    def _map(self, chunks: Sequence[Chunk]) -> None:
        """Tell the table of pages that are new, and zero those that nothing has been written to."""
        fresh: dict[int, list[tuple[int, ...]]] = {}
        for chunk in chunks:
            row, n_blocks = chunk.row, len(chunk.blocks)
            if row.n_blocks < n_blocks:
                pages = [block.pages for block in chunk.blocks[row.n_blocks :]]
                self.kv.hold(row.number, row.n_blocks, pages)
                n_written = max(row.n_blocks, -(-chunk.first // self.kv.page_tokens))
                fresh.setdefault(len(pages[0]), []).extend(pages[n_written - row.n_blocks :])
                row.n_blocks = n_blocks
        for pages in fresh.values():
            if pages:
                self.kv.zero(pages)

    def _cohort(self, rule: HaltingRule) -> Cohort:
        for cohort in self.cohorts:
            if cohort.rule is rule:
                return cohort
        self.cohorts.append(Cohort(rule))
        return self.cohorts[-1]

    def loop(self) -> list[tuple[Row, int]]:
        """One loop for every token that is in it; for each row of which tokens have left, how many are still in it."""
        if self.cohorts:
            with self._computing():
                self._loop()
        changed = [(self.running[number], int(self.in_loop[number])) for number in self.changed]
        self.changed.clear()
        for row, n in changed:
            if not n:
                del self.running[row.number]
        return changed

    def _loop(self) -> None:
        block, cohorts = self.model.recurrent, self.cohorts
        assert block is not None
        sizes = [len(cohort) for cohort in cohorts]
        n, n_rows = sum(sizes), self._n_rows(sum(sizes))
        if self.layout is None:
            self.layout = Layout(self.kv, Tokens.join([cohort.tokens for cohort in cohorts]), n_rows)
        loop = cohorts[0].loop if len(cohorts) == 1 else np.concatenate([cohort.loop for cohort in cohorts])
        index = self.kv.index(padded(loop, n_rows))
        view = self.layout.view(loop, self.constants, index)
        h, e = (_rows([cohort.rows[name] for cohort in cohorts], n_rows) for name in ("h", "e"))
        h_new = block.loop(h, e, index, view)[:n].split(sizes)
        for cohort, mine, at in zip(cohorts, h_new, index[:n].split(sizes), strict=True):
            left = cohort.advance(mine, at, self._probe)
            if left is not None:
                self.kv.fill_forward(left.tokens, left.loops - 1)
                self._leave(left)
                self.layout = None
        self.cohorts = [cohort for cohort in cohorts if len(cohort)]

    def _leave(self, left: Left) -> None:
        numbers, counts = np.unique(left.tokens.row, return_counts=True)
        self.in_loop[numbers] -= counts
        self.changed.update(numbers.tolist())
        self.left.append(left)

    def _probe(self, h: Tensor) -> Tensor:
        """Logits read off states, without the coda."""
        return self.model.head(self.model.norm(h))

    def logits(self, states: Tensor) -> Tensor:
        """(n, V), from states of a `ReadOut`."""
        with self._computing():
            return self.model.head(states)[:, 0]

    def read_out(self, rows: Sequence[Row], wanted: Sequence[bool], every: Collection[Row] = ()) -> ReadOut:
        """Coda for chunks that have left the loop, and logits where the next token is `wanted`.

        Args:
            every: rows of which the states of all tokens are returned too.
        """
        everything = Left.join(self.left)
        mine = np.isin(everything.tokens.row, [row.number for row in rows])
        left = everything if mine.all() else everything.take(np.flatnonzero(mine))
        self.left = [] if mine.all() else [everything.take(np.flatnonzero(~mine))]
        with self._computing():
            n_rows = self._n_rows(len(left.tokens))
            x = self.model.decode(_rows([left.out], n_rows), Layout(self.kv, left.tokens, n_rows).view())
            order = np.lexsort((left.tokens.position, left.tokens.row))
            last = order[np.flatnonzero(np.diff(left.tokens.row[order], append=-1))]
            place = dict(zip(left.tokens.row[last].tolist(), last.tolist(), strict=True))
            index = np.array(
                [place[row.number] for row, want in zip(rows, wanted, strict=True) if want], dtype=np.int64
            )
            is_nan = x[: len(left.tokens), 0].isnan().any(-1).cpu().numpy()
            broken = set(left.tokens.row[is_nan].tolist())
            logits = self.model.head(x[self.kv.index(index)])[:, 0]
            in_order = left.tokens.row[order]
            states = {row: x[self.kv.index(order[in_order == row.number])] for row in every}
            return ReadOut(logits, left.loops[index].tolist(), [row.number in broken for row in rows], states)

    def _n_rows(self, n: int) -> int:
        """Return the rows of a call on n tokens."""
        # Most products then need no padding of their own.
        return n if self.invariance is None else size_of(max(n, self.least_rows))


def _tokens(chunk: Chunk) -> Tokens:
    n = len(chunk.ids)
    row, n_loops = np.full(n, chunk.row.number), np.full(n, chunk.row.n_loops)
    return Tokens(row, np.arange(chunk.first, chunk.first + n), n_loops)


def _rows(parts: Sequence[Tensor], n_rows: int) -> Tensor:
    """One tensor, with copies of the first row behind it up to `n_rows`."""
    n = sum(len(part) for part in parts)
    if n < n_rows:
        parts = [*parts, parts[0][:1].expand(n_rows - n, *parts[0].shape[1:])]
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
