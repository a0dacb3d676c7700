"""The choice of what runs next: admission, pages, preemption, and read-outs. No torch."""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field

from open_mythos.engine.block_manager import BlockManager
from open_mythos.engine.config import EngineConfig
from open_mythos.engine.readout_policy import ReadoutPolicy, StepCosts
from open_mythos.engine.sequence import GRID, Phase, Sequence

Refill = Callable[[int, int], bool]
"""A read-out policy: (tokens in the loop, tokens that have exited) -> True to read out now."""
BlockPages = list[tuple[int, ...]]
"""The pages of each block of a sequence, in order."""


class QueueFull(RuntimeError):
    """`max_queue` requests wait already."""


@dataclass
class ScheduleOutput:
    """The work of a step before its loop, in this order: swap out, swap in, start."""

    swap_out: list[tuple[Sequence, BlockPages]] = field(default_factory=list)
    """Sequences that lose their pages, and these pages; a later entry may be given the same ones."""
    swap_in: list[tuple[Sequence, BlockPages]] = field(default_factory=list)
    """Sequences that get pages back, and the new pages of the blocks that were swapped out."""
    start: list[Sequence] = field(default_factory=list)
    """Sequences of which a chunk of `n_running` tokens starts."""


class Scheduler:
    """Decides what runs, in plain Python, in time proportional to the rows.

    A step of the engine calls, in this order: `read_out`, `after_read_out` for each sequence read out, `schedule`, and
    `after_loop`. Between them a sequence goes from READY to LOOPING, EXITED and back, one chunk at a time.

    Admission is start-time fair queueing over requests: the waiting request with the smallest tag is next. A tag is the
    number of loop-tokens executed per row when the request came, plus the request's own cost. So, once
    `max_rows * cost` loop-tokens have been executed since a request came, no later one passes it, and fewer than
    `max_queue` are before it.

    Pages go to admitted sequences in the order of arrival. A sequence that lacks pages takes them from the youngest;
    the oldest gets enough in the end, because every sequence fits alone.
    """

    def __init__(self, config: EngineConfig, n_pages: int, costs: StepCosts, refill: Refill | None = None) -> None:
        self._config, self._refill = config, refill
        self._policy = ReadoutPolicy(costs)
        self.block_manager = BlockManager(n_pages, config.page_tokens)
        self._waiting: list[tuple[float, int, Sequence]] = []  # in the order of their tags
        admitted = (Phase.READY, Phase.LOOPING, Phase.EXITED, Phase.SWAPPED)
        self._in: dict[Phase, dict[Sequence, None]] = {phase: {} for phase in admitted}
        self._n_looping = 0  # tokens
        self._n_prefill = 0  # tokens in the loop that belong to chunks of prompts
        self._executed = 0  # loop-tokens

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_admitted(self) -> int:
        return sum(map(len, self._in.values()))

    @property
    def looping(self) -> list[Sequence]:
        return list(self._in[Phase.LOOPING])

    @property
    def counts(self) -> dict[str, int]:
        """Sequences that wait and that are admitted, and pages by their use, for a live view."""
        blocks = self.block_manager
        pages = {"pages_used": blocks.n_used, "pages_free": blocks.n_free, "pages_reusable": blocks.n_reusable}
        return {"waiting": self.n_waiting, "admitted": self.n_admitted, **pages}

    def add(self, seq: Sequence) -> None:
        """Queue a sequence.

        Raises:
            QueueFull: `max_queue` sequences wait already.
            ValueError: the sequence would not fit into the pages even alone.
        """
        # The last new token is never computed, so it needs no page.
        n_tokens = seq.n_prompt + seq.max_tokens - 1
        n_blocks = self.block_manager.n_pages // seq.pages_per_block
        if seq.whole_prompt and seq.n_prompt > self._config.max_prefill_tokens:
            raise ValueError(
                f"the prompt has {seq.n_prompt} tokens, which leave the loop together, and at most "
                f"max_prefill_tokens={self._config.max_prefill_tokens} run at once; give the engine more of them"
            )
        if self._n_blocks(n_tokens) > n_blocks:
            raise ValueError(
                f"max_tokens={seq.max_tokens} behind a prompt of {seq.n_prompt} tokens needs room for {n_tokens} at "
                f"{seq.n_loops} loops, and there is room for {n_blocks * self._config.page_tokens}; ask for fewer "
                "tokens or loops, or give the engine more kv_tokens"
            )
        if len(self._waiting) >= self._config.max_queue:
            raise QueueFull(f"max_queue={self._config.max_queue} requests wait already; try again later")
        seq.tag = self._executed / self._config.max_rows + seq.cost
        insort(self._waiting, (seq.tag, seq.id, seq))

    def finish(self, seq: Sequence) -> None:
        """End a sequence in any phase; its row and its pages are free. A finished one stays so."""
        if seq.phase is Phase.FINISHED:
            return
        if seq.phase is Phase.WAITING:
            del self._waiting[bisect_left(self._waiting, (seq.tag, seq.id))]
        else:
            if seq.phase is Phase.LOOPING:
                self._leave_loop(seq)
            del self._in[seq.phase][seq]
        self.block_manager.free(seq)
        seq.phase = Phase.FINISHED

    def read_out(self) -> list[Sequence]:
        """Return the sequences to read out in this step: all that have exited, or none."""
        looping, exited = self._in[Phase.LOOPING], self._in[Phase.EXITED]
        if exited and looping:
            if self._refill:
                now = self._refill(self._n_looping, sum(seq.n_running for seq in exited))
            else:
                now = self._policy.should_read_out(looping, exited)
            if not now:
                return []
        return list(exited)

    def after_read_out(self, seq: Sequence) -> None:
        """Note that a sequence's chunk has been read out: its keys and values are complete."""
        first = seq.n_computed // self._config.page_tokens
        seq.n_computed += seq.n_running
        seq.n_running = 0
        end = seq.n_computed // self._config.page_tokens
        if self._config.prefix_reuse and first < end and not seq.whole_prompt:
            self.block_manager.cache_blocks(seq, first, end)
        self._move(seq, Phase.READY)

    def schedule(self) -> ScheduleOutput:
        """Start what can start: admitted sequences first, in the order of arrival, then waiting ones."""
        output = ScheduleOutput()
        self._resume(output)
        # While an admitted sequence has to wait for pages or for room in the loop, no new one is admitted.
        if not self._in[Phase.READY] and not self._in[Phase.SWAPPED]:
            self._admit(output)
        return output

    def after_loop(self, exited: list[tuple[Sequence, int]]) -> None:
        """Note that all looping sequences have done a loop.

        Args:
            exited: the sequences of which tokens have left the loop, and how many of their tokens are still in it.
        """
        self._executed += self._n_looping
        for seq in self._in[Phase.LOOPING]:
            seq.loop += 1
        for seq, n_looping in exited:
            # A chunk is read out as a whole: its exited tokens wait for the last one.
            if n_looping:
                self._n_looping -= seq.n_looping - n_looping
                seq.n_looping = n_looping
            else:
                self._leave_loop(seq)
                self._move(seq, Phase.EXITED)
                self._policy.record_exit(seq)

    def _move(self, seq: Sequence, phase: Phase) -> None:
        del self._in[seq.phase][seq]
        seq.phase = phase
        self._in[phase][seq] = None

    def _leave_loop(self, seq: Sequence) -> None:
        self._n_looping -= seq.n_looping
        seq.n_looping = 0
        if seq.in_prompt:
            self._n_prefill -= seq.n_running

    def _resume(self, output: ScheduleOutput) -> None:
        """Start the next chunk of admitted sequences, in the order of arrival."""
        ready, swapped = self._in[Phase.READY], self._in[Phase.SWAPPED]
        for seq in sorted([*ready, *swapped], key=lambda seq: seq.id):
            # 1. Cut the chunk; without room for prompt tokens this sequence waits, and others may pass.
            n = self._chunk_size(seq)
            if not n:
                continue
            # 2. Find pages. If there are none, all later sequences wait too: the next pages belong to this one.
            if any(seq is out for out, _ in output.swap_out) or not self._make_room(seq, n, output):
                return
            # 3. A swapped sequence first gets pages for what it has computed.
            if seq in swapped:
                self.block_manager.allocate(seq, self._n_blocks(seq.n_computed))
                output.swap_in.append((seq, [block.pages for block in seq.blocks]))
            del self._in[seq.phase][seq]
            self._start(seq, n, output)

    def _make_room(self, seq: Sequence, n: int, output: ScheduleOutput) -> bool:
        """Make pages available for the next n tokens by swapping out younger sequences, the youngest first."""
        while self.block_manager.n_available < self._missing_blocks(seq, n) * seq.pages_per_block:
            younger = [other for other in self._in[Phase.READY] if other.id > seq.id]
            if not younger:
                return False
            out = max(younger, key=lambda other: other.id)
            output.swap_out.append((out, [block.pages for block in out.blocks]))
            self.block_manager.free(out)
            self._move(out, Phase.SWAPPED)
        return True

    def _admit(self, output: ScheduleOutput) -> None:
        """Start waiting sequences in the order of their tags, while there are rows, pages and room for prompts."""
        while self._waiting and self.n_admitted < self._config.max_rows:
            # 1. The next request waits for room for a whole chunk, or for its whole prompt if that is shorter.
            seq = self._waiting[0][2]
            if self._room < (seq.n_prompt if seq.whole_prompt else min(GRID, seq.n_prompt)):
                return
            # 2. Blocks of an equal prefix are reused, except where the log-probabilities of the prompt are asked for:
            # they need every token to be computed.
            if self._config.prefix_reuse and seq.params.prompt_logprobs is None and not seq.whole_prompt:
                seq.n_computed = seq.n_cached = self.block_manager.match_prefix(seq)
            # 3. Without pages for the first chunk the request goes on waiting, and no later one passes it.
            n = self._chunk_size(seq)
            if self.block_manager.n_available < self._missing_blocks(seq, n) * seq.pages_per_block:
                self.block_manager.free(seq)
                seq.n_computed = seq.n_cached = 0
                return
            del self._waiting[0]
            self._start(seq, n, output)

    def _start(self, seq: Sequence, n: int, output: ScheduleOutput) -> None:
        """Put the next n tokens of a sequence into the loop; there are pages for them."""
        self.block_manager.allocate(seq, self._missing_blocks(seq, n))
        seq.n_running = seq.n_looping = n
        seq.loop = 0
        seq.phase = Phase.LOOPING
        self._in[Phase.LOOPING][seq] = None
        self._n_looping += n
        if seq.in_prompt:
            self._n_prefill += n
        output.start.append(seq)

    @property
    def _room(self) -> int:
        """Prompt tokens that may still join the loop."""
        return self._config.max_prefill_tokens - self._n_prefill

    def _chunk_size(self, seq: Sequence) -> int:
        """Return the number of tokens of the next chunk; 0: the sequence has to wait for room.

        A chunk takes all remaining tokens, or ends at a multiple of GRID. A single token needs no room.
        """
        rest = seq.n_tokens - seq.n_computed
        # The last token of a prompt costs no more than a token of an answer, and so is never held up.
        if rest == 1 or rest <= self._room:
            return rest
        return max(0, (seq.n_computed + self._room) // GRID * GRID - seq.n_computed)

    def _n_blocks(self, tokens: int) -> int:
        return -(-tokens // self._config.page_tokens)

    def _missing_blocks(self, seq: Sequence, n: int) -> int:
        """Return the blocks that the next n tokens of a sequence need and that it does not have."""
        return self._n_blocks(seq.n_computed + n) - len(seq.blocks)
