"""When to read out: as soon as more loops cost more than reading out together saves. No torch."""

from collections.abc import Collection, Hashable

from open_mythos.serve.costs import StepCosts
from open_mythos.serve.sequence import Sequence

_MOST = 1024  # chunks counted by depth, before older ones fade
_LASTING = 8  # chunks for which equal fixed depths, once read out together, are taken to stay together


class Depths:
    """How many loops the chunks of a kind take, as far as is known."""

    def __init__(self, seq: Sequence) -> None:
        n = seq.n_loops
        # Before anything is known: as if there had been one chunk, at any depth alike.
        self.more = [1.0] * n + [0.0] if seq.is_fixed else [1 - loop / n for loop in range(n + 1)]
        """[l]: chunks that took more than l loops; 0 for the most that there may be."""
        self.mean = sum(self.more)

    def add(self, loops: int) -> None:
        for loop in range(loops):
            self.more[loop] += 1
        if self.more[0] > _MOST:
            self.more = [count / 2 for count in self.more]
        self.mean = sum(self.more) / self.more[0]

    def exits(self, loops: int, ahead: int) -> float:
        """The share of those that have done so many loops which leave within so many more."""
        return 1 - self.more[min(loops + ahead, len(self.more) - 1)] / self.more[loops]


class Gathering:
    """Decides between one more loop and reading out now.

    Reading out costs much the same for one token and for many, so it pays to wait for others. But meanwhile those that
    wait do not go on, and a loop costs much the same with them and without:

        lost = sum over loops of loop(n) - loop(n + idle) * (progress of the n) / (progress of all)

    with n tokens in the loop and `idle` more that could be; the progress of a token in a loop is 1 / its mean depth.
    `outer` counts without what every token adds to it in any case. It is time to read out when no number of further
    loops is expected to bring in sequences for less than (lost + outer) / sequences, what those cost that are there.
    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._lost = 0.0  # since the last read-out
        self._depths: dict[Hashable, Depths] = {}

    def waited(self, looping: Collection[Sequence], exited: Collection[Sequence]) -> None:
        """A loop has run for the ones while the others waited."""
        n, progress = self._sizes(looping)
        idle, missed = self._sizes(exited)
        self._lost += self._costs.loop(n) - self._costs.loop(n + idle) * progress / (progress + missed)

    def exited(self, seq: Sequence) -> None:
        """The chunk of a sequence has left the loop."""
        if not seq.is_fixed:
            self._of(seq).add(seq.loop)

    def pays(self, looping: Collection[Sequence], exited: Collection[Sequence]) -> bool:
        """Whether to read out now."""
        loop, outer = self._costs.loop, self._costs.outer
        tokens = sum(seq.n_running for seq in exited)
        once = outer(tokens) - outer.slope * tokens
        # Reading out now costs so much per sequence. With equal fixed depths, whoever joins saves it again and again.
        each = (self._lost + once) / len(exited)
        is_alike = len({seq.n_loops if seq.is_fixed else seq for group in (looping, exited) for seq in group}) == 1
        again = _LASTING * once if is_alike else 0.0
        n, progress = self._sizes(looping)
        idle, missed = self._sizes(exited)
        full = loop(n + idle) / (progress + missed)
        cohorts: dict[tuple[Depths, int], tuple[int, int]] = {}
        for seq in looping:
            cohort = self._of(seq), seq.loop
            rows, in_loop = cohorts.get(cohort, (0, 0))
            cohorts[cohort] = rows + 1, in_loop + seq.n_looping
        lost, left, done, ahead = 0.0, float(n), 0, 1
        while left > 0.5 and lost < max(each * len(looping), again):
            lost += (ahead - done) * (loop(round(left)) - progress * full)
            joining, left, progress = 0.0, 0.0, 0.0
            for (depths, loops), (rows, in_loop) in cohorts.items():
                share = depths.exits(loops, ahead)
                joining += rows * share
                left += in_loop * (1 - share)
                progress += in_loop * (1 - share) / depths.mean
            then = tokens + round(n - left)
            if joining and lost + outer(then) - outer.slope * then - once < max(each * joining, again):
                return False
            done, ahead = ahead, ahead + max(1, ahead // 2)
        return True

    def read_out(self) -> None:
        """Those that have exited are read out now."""
        self._lost = 0.0

    def _of(self, seq: Sequence) -> Depths:
        key = (seq.n_loops, "fixed") if seq.is_fixed else (seq.n_loops, seq.depth_key, seq.in_prompt)
        depths = self._depths.get(key)
        if depths is None:
            depths = self._depths[key] = Depths(seq)
        return depths

    def _sizes(self, group: Collection[Sequence]) -> tuple[int, float]:
        """Tokens in the loop, or that would be, had those that have exited been read out; and their progress."""
        n, progress = 0, 0.0
        for seq in group:
            behind = seq.n_tokens - seq.n_computed - seq.n_running
            tokens = seq.n_looping or (seq.n_running if behind else 1)
            n += tokens
            progress += tokens / self._of(seq).mean
        return n, progress
