"""Who runs next: admission, pages, preemption, and when to read out. No torch."""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field

from open_mythos.checks import check_bool, check_int
from open_mythos.engine.block_manager import Pages
from open_mythos.engine.readout_policy import Gathering
from open_mythos.engine.sequence import GRID, Phase, Sequence
from open_mythos.engine.step_costs import StepCosts

Refill = Callable[[int, int], bool]
"""(tokens that loop, tokens that have exited) -> whether to read out now."""


class QueueFull(RuntimeError):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Limits:
    """What the engine may hold at once."""

    max_rows: int
    """Sequences that are admitted."""
    max_queue: int
    """Sequences that wait for that."""
    n_pages: int
    page_tokens: int = 16
    max_prefill_tokens: int = 512
    """Tokens of prompts in the loop."""
    prefix_reuse: bool = True
    """Whether a prompt may use what another with the same beginning has computed."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_queue", "n_pages", "page_tokens"):
            check_int(name, getattr(self, name), 1)
        check_int("max_prefill_tokens", self.max_prefill_tokens, GRID)
        check_bool("prefix_reuse", self.prefix_reuse)


@dataclass
class Work:
    """What a step does before its loop: swap out, then swap in, then start. Pages that go out may come in again."""

    swap_out: list[tuple[Sequence, list[tuple[int, ...]]]] = field(default_factory=list)
    """The pages of each block, in order; every block holds computed tokens."""
    swap_in: list[tuple[Sequence, list[tuple[int, ...]]]] = field(default_factory=list)
    """The new pages of each block that holds computed tokens, in order."""
    start: list[tuple[Sequence, int]] = field(default_factory=list)
    """Tokens of the chunk behind the computed ones."""


class Scheduler:
    """Decides what runs, in plain Python, in time proportional to the rows.

    Admission is start-time fair queueing over requests: of those that wait, the one with the smallest tag is next, its
    tag being the loop-tokens executed per row when it came plus its own cost. So, once `max_rows * cost` loop-tokens
    have been executed since a request came, no later one passes it, and fewer than `max_queue` are before it.

    Pages go to admitted sequences in order of arrival. Who lacks pages takes them from the youngest; the oldest has
    always enough in the end, because alone it fits.
    """

    def __init__(self, limits: Limits, costs: StepCosts, refill: Refill | None = None) -> None:
        self._limits = limits
        self._refill = refill
        self._gathering = Gathering(costs)
        self._pages = Pages(limits.n_pages, limits.page_tokens)
        self._waiting: list[tuple[float, int, Sequence]] = []  # by tag
        admitted = (Phase.READY, Phase.LOOPING, Phase.EXITED, Phase.SWAPPED)
        self._in: dict[Phase, dict[Sequence, None]] = {phase: {} for phase in admitted}
        self._n_looping = 0  # tokens
        self._n_prefill = 0  # tokens of the prompts' chunks in the loop
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
    def n_pages_free(self) -> int:
        return self._pages.n_free

    @property
    def n_pages_used(self) -> int:
        return self._pages.n_used

    @property
    def n_pages_reusable(self) -> int:
        return self._pages.n_reusable

    def add(self, seq: Sequence) -> None:
        """Let a sequence wait for a row.

        Raises:
            QueueFull: `max_queue` wait already.
            ValueError: it would not fit into the pages even alone.
        """
        # The last new token is never computed.
        n_tokens = seq.n_prompt + seq.max_tokens - 1
        n_blocks = self._limits.n_pages // seq.pages_per_block
        if self._n_blocks(n_tokens) > n_blocks:
            raise ValueError(
                f"max_tokens={seq.max_tokens} behind a prompt of {seq.n_prompt} tokens needs room for {n_tokens} at "
                f"{seq.n_loops} loops, and there is room for {n_blocks * self._limits.page_tokens}; ask for fewer "
                "tokens or loops, or give the engine more kv_tokens"
            )
        if len(self._waiting) >= self._limits.max_queue:
            raise QueueFull(f"max_queue={self._limits.max_queue} requests wait already; try again later")
        seq.tag = self._executed / self._limits.max_rows + seq.cost
        insort(self._waiting, (seq.tag, seq.id, seq))

    def cancel(self, seq: Sequence) -> None:
        """End a sequence in any phase; one that has ended stays so."""
        if seq.phase is Phase.WAITING:
            del self._waiting[bisect_left(self._waiting, (seq.tag, seq.id))]
            seq.phase = Phase.FINISHED
        elif seq.phase is not Phase.FINISHED:
            self.finish(seq)

    def finish(self, seq: Sequence) -> None:
        """An admitted sequence ends: its row and its pages are free."""
        if seq.phase is Phase.LOOPING:
            self._leave_loop(seq)
        del self._in[seq.phase][seq]
        seq.phase = Phase.FINISHED
        self._release(seq)

    def read_out(self) -> list[Sequence]:
        """The sequences to read out in this step: all that have exited, or none."""
        exited = self._in[Phase.EXITED]
        if not exited:
            return []
        looping = self._in[Phase.LOOPING]
        if looping:
            if self._refill:
                now = self._refill(self._n_looping, sum(seq.n_running for seq in exited))
            else:
                now = self._gathering.pays(looping, exited)
            if not now:
                return []
        return list(exited)

    def computed(self, seq: Sequence) -> None:
        """The chunk of a sequence has been read out."""
        first = seq.n_computed // self._limits.page_tokens
        seq.n_computed += seq.n_running
        seq.n_running = 0
        end = seq.n_computed // self._limits.page_tokens
        if self._limits.prefix_reuse and first < end:
            self._pages.know(seq.blocks, seq.depth_key, seq.token_ids, first, end)
        self._move(seq, Phase.READY)

    def schedule(self) -> Work:
        """Start what can start. Admitted sequences come first, the oldest before all; then new ones."""
        work = Work()
        self._serve(work)
        if not self._in[Phase.READY] and not self._in[Phase.SWAPPED]:
            self._admit(work)
        return work

    def looped(self, left: list[tuple[Sequence, int]]) -> None:
        """Every looping sequence has done a loop.

        Args:
            left: those of which tokens have left the loop in it, and how many of their tokens still loop.
        """
        self._executed += self._n_looping
        for seq in self._in[Phase.LOOPING]:
            seq.loop += 1
        for seq, n_looping in left:
            if n_looping:
                self._n_looping -= seq.n_looping - n_looping
                seq.n_looping = n_looping
            else:
                self._leave_loop(seq)
                self._move(seq, Phase.EXITED)
                self._gathering.exited(seq)

    def _move(self, seq: Sequence, phase: Phase) -> None:
        del self._in[seq.phase][seq]
        seq.phase = phase
        self._in[phase][seq] = None

    def _leave_loop(self, seq: Sequence) -> None:
        self._n_looping -= seq.n_looping
        seq.n_looping = 0
        if seq.in_prompt:
            self._n_prefill -= seq.n_running

    def _release(self, seq: Sequence) -> None:
        self._pages.release(seq.blocks)
        seq.blocks = []

    def _n_blocks(self, tokens: int) -> int:
        return -(-tokens // self._limits.page_tokens)

    def _chunk(self, seq: Sequence, room: int) -> int:
        """Tokens of the next chunk, with so much room for tokens of prompts; 0: it has to wait."""
        rest = seq.n_tokens - seq.n_computed
        if rest == 1 or rest <= room:
            return rest
        return max(0, (seq.n_computed + room) // GRID * GRID - seq.n_computed)

    def _serve(self, work: Work) -> None:
        """Start admitted sequences in order of arrival. While one has to wait, no new one is admitted."""
        room = self._limits.max_prefill_tokens - self._n_prefill
        ready, swapped = self._in[Phase.READY], self._in[Phase.SWAPPED]
        for seq in sorted([*ready, *swapped], key=lambda seq: seq.id):
            n = self._chunk(seq, room)
            if not n:
                continue
            if any(seq is out for out, _ in work.swap_out) or not self._make_room(seq, n, work):
                return  # what pages there are belong to this one
            if seq.in_prompt:
                room -= n
            if seq in swapped:
                held = self._n_blocks(seq.n_computed)
                seq.blocks = self._pages.take(held, seq.pages_per_block)
                work.swap_in.append((seq, [block.pages for block in seq.blocks]))
            del self._in[seq.phase][seq]
            self._start(seq, n, work)

    def _make_room(self, seq: Sequence, n: int, work: Work) -> bool:
        """See to it that there are pages for the next n tokens, and swap out the youngest for that."""
        need = self._missing(seq, n)
        while self._pages.n_available < need:
            younger = [other for other in self._in[Phase.READY] if other.id > seq.id]
            if not younger:
                return False
            out = max(younger, key=lambda other: other.id)
            work.swap_out.append((out, [block.pages for block in out.blocks]))
            self._release(out)
            self._move(out, Phase.SWAPPED)
        return True

    def _admit(self, work: Work) -> None:
        """Start those that wait, in the order of their tags, while there are rows, pages and room for their prompts."""
        while self._waiting and self.n_admitted < self._limits.max_rows:
            seq = self._waiting[0][2]
            room = self._limits.max_prefill_tokens - self._n_prefill
            if room < min(GRID, seq.n_prompt):
                return
            if self._limits.prefix_reuse and seq.may_reuse:
                # The last token is computed in any case: what follows it is read from it.
                seq.blocks = self._pages.match(seq.depth_key, seq.token_ids[: seq.n_prompt - 1])
                seq.n_computed = seq.n_cached = len(seq.blocks) * self._limits.page_tokens
            n = self._chunk(seq, room)
            if self._pages.n_available < self._missing(seq, n):
                self._release(seq)
                seq.n_computed = seq.n_cached = 0
                return
            del self._waiting[0]
            self._start(seq, n, work)

    def _missing(self, seq: Sequence, n: int) -> int:
        """Pages that the next n tokens of a sequence need and it does not hold."""
        return (self._n_blocks(seq.n_computed + n) - len(seq.blocks)) * seq.pages_per_block

    def _start(self, seq: Sequence, n: int, work: Work) -> None:
        missing = self._n_blocks(seq.n_computed + n) - len(seq.blocks)
        seq.blocks += self._pages.take(missing, seq.pages_per_block)
        seq.n_running = seq.n_looping = n
        seq.loop = 0
        seq.phase = Phase.LOOPING
        self._in[Phase.LOOPING][seq] = None
        self._n_looping += n
        if seq.in_prompt:
            self._n_prefill += n
        work.start.append((seq, n))
