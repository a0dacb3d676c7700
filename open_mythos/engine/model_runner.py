"""Carries out on the model what the scheduler decides.

Shapes: N tokens, D width, V vocabulary. Every token is a row of its own: (N, 1, D).
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from open_mythos.engine.loop_batch import ExitedTokens, LoopBatch
from open_mythos.engine.paged_kv_cache import Layout, PagedKVCache, Tokens, padded
from open_mythos.engine.sequence import Sequence
from open_mythos.model import OpenMythos
from open_mythos.nn.halting import HaltingRule
from open_mythos.nn.initial_state import initial_state
from open_mythos.ops.batch_invariant import Invariance, batch_invariant, size_of


@dataclass(frozen=True)
class ReadOut:
    """Results of coda and head for chunks that have left the loop."""

    logits: Tensor
    """(n, V): of the last token of each sequence that yields a token, in their order."""
    loops: list[int]
    """Loops of these tokens."""
    is_nan: list[bool]
    """For every sequence, True if something in its chunk is NaN."""
    states: dict[Sequence, Tensor]
    """(n, 1, D): what the head takes for every token of the chunk, in order, of sequences that score their prompt."""


class ModelRunner:
    """The model, its page table, and the tokens between prelude and coda."""

    def __init__(self, model: OpenMythos, kv: PagedKVCache, max_rows: int, invariant: bool) -> None:
        self.model, self.kv = model, kv
        self.invariance = Invariance() if invariant and kv.device.type == "cpu" else None
        """Row counts that products have proved invariant at; None: kernels are chosen by speed."""
        self.least_rows = 1
        """Rows that a batch-invariant call is padded to at least, which changes its time and not its results."""
        self.max_rows = max_rows
        block = model.recurrent
        with self._computing():
            self.constants = None if block is None else block.constants(model._last_norm.weight[None, None])
        self.clear()

    def clear(self) -> None:
        """Forget all sequences, in whatever phase they are."""
        self.batches: list[LoopBatch] = []
        """Tokens in the loop, by their halting rule."""
        self.exited: list[ExitedTokens] = []
        """Tokens that have left the loop and not been through the coda."""
        self.layout: Layout | None = None
        """Layout of the tokens in the loop; None: it has to be made again, since tokens have joined or left."""
        self.n_looping = np.zeros(self.max_rows, dtype=np.int64)
        """Tokens in the loop, by row of the page table."""
        self.changed: set[int] = set()
        """Rows of which tokens have left the loop since its last round."""
        self.running: dict[int, Sequence] = {}
        """Sequences whose chunk is not yet out of the loop, by row."""
        self.free_rows = list(range(self.max_rows))[::-1]
        self.kv.clear()

    @contextmanager
    def _computing(self) -> Generator[None]:
        with torch.inference_mode(), batch_invariant(self.invariance):
            yield

    def release(self, seq: Sequence) -> None:
        """Forget a sequence and its tokens, wherever they are."""
        if seq.row < 0:
            return
        # Its tokens may be in the loop, behind it, or both.
        for batch in self.batches:
            gone = batch.tokens.row == seq.row
            if gone.any():
                batch.drop(gone)
                self.layout = None
        self.batches = [batch for batch in self.batches if len(batch)]
        _, self.exited = self._split_exited([seq])
        self.running.pop(seq.row, None)
        self.changed.discard(seq.row)
        self.kv.unmap(seq)
        self.free_rows.append(seq.row)
        seq.row = -1

    def start(self, seqs: list[Sequence]) -> None:
        """Compute embedding and prelude of the sequences' chunks; the tokens then stand before their first loop."""
        if not seqs:
            return
        # Tokens with the same rule stand together.
        seqs = sorted(seqs, key=lambda seq: id(seq.rule))
        for seq in seqs:
            if seq.row < 0:
                seq.row = self.free_rows.pop()
            self.running[seq.row] = seq
            self.n_looping[seq.row] = seq.n_running
        self.kv.map(seqs)
        tokens = Tokens.join([Tokens.of(seq) for seq in seqs])
        n, n_rows = len(tokens), self._n_rows(len(tokens))
        ids = np.fromiter((i for seq in seqs for i in seq.chunk), np.int64, n)
        is_last = tokens.position >= np.repeat([seq.n_prompt - 1 for seq in seqs], [seq.n_running for seq in seqs])
        with self._computing():
            view = Layout(self.kv, tokens, n_rows).view()
            e = self.model.encode(self.kv.index(padded(ids, n_rows))[:, None], view)
            if self.model.recurrent is None:
                self._exit(ExitedTokens(tokens, np.zeros(n, dtype=np.int64), e[:n]))
                return
            # Every token gets its first state and joins the batch of its rule.
            h = initial_state(self.model.cfg.initial_state, e, view, std=self.model.cfg.state_std)
            e = self.model.recurrent.injection.prepare(e)
            end = 0
            for rule, group in groupby(seqs, key=lambda seq: seq.rule):
                assert rule is not None
                part = slice(end, end := end + sum(seq.n_running for seq in group))
                self._batch_of(rule).join(tokens.take(part), is_last[part], h[part], e[part])
        self.layout = None

    def _batch_of(self, rule: HaltingRule) -> LoopBatch:
        for batch in self.batches:
            if batch.rule is rule:
                return batch
        self.batches.append(LoopBatch(rule))
        return self.batches[-1]

    def loop(self) -> list[tuple[Sequence, int]]:
        """Do one loop for every token in it; return the sequences of which tokens left, and how many did not."""
        if self.batches:
            with self._computing():
                self._loop()
        changed = [(self.running[row], int(self.n_looping[row])) for row in self.changed]
        self.changed.clear()
        for seq, n in changed:
            if not n:
                del self.running[seq.row]
        return changed

    def _loop(self) -> None:
        block, batches = self.model.recurrent, self.batches
        assert block is not None
        sizes = [len(batch) for batch in batches]
        n, n_rows = sum(sizes), self._n_rows(sum(sizes))
        if self.layout is None:
            self.layout = Layout(self.kv, Tokens.join([batch.tokens for batch in batches]), n_rows)
        # One call of the block for the tokens of all rules, each at a loop of its own.
        loop = batches[0].loop if len(batches) == 1 else np.concatenate([batch.loop for batch in batches])
        index = self.kv.index(padded(loop, n_rows))
        view = self.layout.view(loop, self.constants, index)
        h, e = (_rows([batch.rows[name] for batch in batches], n_rows) for name in ("h", "e"))
        h_new = block.loop(h, e, index, view)[:n].split(sizes)
        # Each rule then decides which of its tokens exit.
        for batch, h_batch, at in zip(batches, h_new, index[:n].split(sizes), strict=True):
            exited = batch.advance(h_batch, at, self._probe)
            if exited is not None:
                self.kv.fill_forward(exited.tokens, exited.loops - 1)
                self._exit(exited)
                self.layout = None
        self.batches = [batch for batch in batches if len(batch)]

    def _exit(self, exited: ExitedTokens) -> None:
        rows, counts = np.unique(exited.tokens.row, return_counts=True)
        self.n_looping[rows] -= counts
        self.changed.update(rows.tolist())
        self.exited.append(exited)

    def _probe(self, h: Tensor) -> Tensor:
        """Return logits of states inside the loop, without the coda."""
        return self.model.head(self.model.norm(h))

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (n, V) of states of a `ReadOut`."""
        with self._computing():
            return self.model.head(states)[:, 0]

    def read_out(self, seqs: list[Sequence]) -> ReadOut:
        """Compute the coda of chunks that have left the loop, and logits where a new token follows."""
        parts, self.exited = self._split_exited(seqs)
        exited = ExitedTokens.join(parts)
        tokens = exited.tokens
        with self._computing():
            n_rows = self._n_rows(len(tokens))
            x = self.model.decode(_rows([exited.out], n_rows), Layout(self.kv, tokens, n_rows).view())
            # Tokens left the loop in any order: `order` sorts them by sequence, then by position.
            order = np.lexsort((tokens.position, tokens.row))
            by_row = tokens.row[order]
            # The last token of a sequence is where the next row of the sorted list has another sequence.
            last = order[np.flatnonzero(np.diff(by_row, append=-1))]
            last_of = dict(zip(tokens.row[last].tolist(), last.tolist(), strict=True))
            index = np.array([last_of[seq.row] for seq in seqs if seq.yields_token], dtype=np.int64)
            logits = self.model.head(x[self.kv.index(index)])[:, 0]
            is_nan = x[: len(tokens), 0].isnan().any(-1).cpu().numpy()
            broken = set(tokens.row[is_nan].tolist())
            states = {seq: x[self.kv.index(order[by_row == seq.row])] for seq in seqs if seq.scores_prompt}
            return ReadOut(logits, exited.loops[index].tolist(), [seq.row in broken for seq in seqs], states)

    def _split_exited(self, seqs: list[Sequence]) -> tuple[list[ExitedTokens], list[ExitedTokens]]:
        """Split the exited tokens into those of these sequences and the others."""
        rows = [seq.row for seq in seqs]
        parts: tuple[list[ExitedTokens], list[ExitedTokens]] = [], []
        for exited in self.exited:
            is_theirs = np.isin(exited.tokens.row, rows)
            for part, mask in zip(parts, (is_theirs, ~is_theirs), strict=True):
                if mask.any():
                    part.append(exited if mask.all() else exited.take(np.flatnonzero(mask)))
        return parts

    def _n_rows(self, n: int) -> int:
        """Return the rows of a call on n tokens."""
        # With row counts from this list, most products need no padding of their own.
        return n if self.invariance is None else size_of(max(n, self.least_rows))


def _rows(parts: list[Tensor], n_rows: int) -> Tensor:
    """Return one tensor, with copies of the first row behind it up to `n_rows`."""
    n = sum(len(part) for part in parts)
    if n < n_rows:
        parts = [*parts, parts[0][:1].expand(n_rows - n, *parts[0].shape[1:])]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
