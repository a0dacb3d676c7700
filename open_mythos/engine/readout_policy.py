"""The time to read out: when one more loop costs more than reading out more tokens together saves. No torch."""

from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from open_mythos.engine.sequence import Sequence

_TABLE_SIZE = 4096  # values of a curve that are computed in advance; beyond them the last slope goes on
_MAX_KINDS = 256  # kinds of chunks whose depths are counted
_MAX_COUNT = 1024  # chunks counted for a kind before all its counts are halved, so that new ones weigh more
_LASTING = 8  # read-outs for which chunks of one fixed depth, once read out together, are expected to stay together
_REFRESH = 8  # decisions for which the seconds per token are reused
_PERIODS = 16  # even distances of read-outs that are tried, besides the most loops of each kind
_PATIENCE = 1.01  # waiting wins a tie: sequences that are read out together are likelier to exit together again


class Curve:
    """Seconds by number of tokens: straight lines between measured points.

    Before the first point its value holds; behind the last one the last slope goes on, unless it falls.

    Raises:
        ValueError: there is no point, or an impossible one.
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        if not points:
            raise ValueError("points={} must hold at least one measurement, tokens to seconds; measure {1: seconds}")
        for tokens, seconds in points.items():
            if tokens < 1 or not 0 <= seconds < float("inf"):
                raise ValueError(f"points={{{tokens}: {seconds}}} must be of at least 1 token and 0 s; measure again")
        # The lines between the points are tabulated for every number of tokens: the policy asks for many values.
        known = sorted(points.items())
        self._values = [0.0] + [known[0][1]] * known[0][0]
        self.slope = 0.0
        """Seconds of each token behind the last point."""
        for (x0, y0), (x1, y1) in pairwise(known):
            self.slope = max(0.0, (y1 - y0) / (x1 - x0))
            self._values += [y0 + (y1 - y0) * (x - x0) / (x1 - x0) for x in range(x0 + 1, x1 + 1)]
        self._values += [known[-1][1] + self.slope * x for x in range(1, _TABLE_SIZE - len(self._values) + 1)]

    def __call__(self, tokens: float) -> float:
        """Return the seconds for a number of tokens; 0 for none."""
        below = int(tokens)
        if below + 1 < len(self._values):
            value = self._values[below]
            return value + (tokens - below) * (self._values[below + 1] - value)
        return self._values[-1] + self.slope * (tokens - len(self._values) + 1)


@dataclass(frozen=True)
class StepCosts:
    """The times of the parts of a step, by number of tokens."""

    loop: Curve
    """Seconds of one loop."""
    outer: Curve
    """Seconds of the work outside the loop: coda, head and sampling, then embedding and prelude of the new tokens."""
    least_rows: int = 1
    """Rows that a batch-invariant call is padded to at least, where that made these times shortest."""


class DepthCounts:
    """The numbers of loops that chunks of one kind have taken so far."""

    def __init__(self, seq: Sequence) -> None:
        n = seq.n_loops
        # Before anything is known: as if there had been one chunk, with all depths equally likely.
        self.more = [1.0] * n + [0.0] if seq.is_fixed else [1 - loop / n for loop in range(n + 1)]
        """[l]: chunks that took more than l loops; 0 for the most that are possible."""
        self.mean = sum(self.more)

    def add(self, loops: int) -> None:
        """Count one more chunk."""
        for loop in range(loops):
            self.more[loop] += 1
        if self.more[0] > _MAX_COUNT:
            self.more = [count / 2 for count in self.more]
        self.mean = sum(self.more) / self.more[0]

    def stay(self, loops: int, ahead: int) -> float:
        """Return the share of the chunks that have done `loops` loops and are still in the loop `ahead` loops later."""
        return self.more[min(loops + ahead, len(self.more) - 1)] / self.more[loops]


TokenCounts = Counter[tuple[DepthCounts, int]]
"""Tokens by the kind of their chunk and the loops it has done."""


class ReadoutPolicy:
    """Decides between one more loop and reading out now.

    A read-out takes much the same time for one token as for many, so it pays to wait for more to exit. But tokens that
    wait make no progress, and a loop takes much the same time with them as without them. So every loop has a price:

        loop(tokens in it) - seconds_per_token * (their progress)

    where the progress of a token in a loop is 1 / its mean depth, and `seconds_per_token` is the time of a token in the
    long run if read-outs come at the best even distance for the depths of all. Of the time of a read-out, `outer`, only
    the part that does not grow with every token counts. It is time to read out when that part, and the cheapest way to
    the read-out after it, cost no more than the cheapest way to a later read-out. This is one step of policy
    improvement for average cost (Howard 1960).
    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._depths: dict[Hashable, DepthCounts] = {}
        # The last result of `_seconds_per_token`, the tokens it is for, and the number of times it was used.
        self._kinds: Counter[DepthCounts] = Counter()
        self._known_s, self._n_used = 0.0, 0

    def record_exit(self, seq: Sequence) -> None:
        """Count the depth of a chunk, all of whose tokens have left the loop."""
        if not seq.is_fixed:
            self._depths_of(seq).add(seq.loop)

    def should_read_out(self, looping: Collection[Sequence], exited: Collection[Sequence]) -> bool:
        """Return True if reading out now costs no more than waiting."""
        if_waiting = self._count(looping)
        if_read_out = if_waiting + self._count(exited)
        n_exited = sum(seq.n_running for seq in exited)
        price = _PATIENCE * self._seconds_per_token(if_read_out)
        # With one fixed depth, every sequence that joins a read-out saves another one again and again.
        is_alike = len({seq.n_loops if seq.is_fixed else seq for group in (looping, exited) for seq in group}) == 1
        n_saved = _LASTING if is_alike else 1
        now = n_saved * self._readout_s(n_exited) + self._cheapest_wait(if_read_out, 0, price, n_saved)
        return now <= self._cheapest_wait(if_waiting, n_exited, price, n_saved)

    def _cheapest_wait(self, counts: TokenCounts, n_exited: int, price: float, n_saved: int) -> float:
        """Return the cost of the cheapest way to the next read-out, and of that read-out.

        Args:
            counts: tokens in the loop.
            n_exited: tokens that have exited already.
            price: seconds that a token's whole progress is worth.
        """
        n = left = float(counts.total())
        progress = sum(tokens / depths.mean for (depths, _), tokens in counts.items())
        full_loop = self._costs.loop(n) - price * progress
        # `none`: the probability that no token has exited yet; `until_first`: the cost up to the first exit.
        none, until_first = 1.0, 0.0
        cost, best, done, ahead = 0.0, float("inf"), 0, 1
        while left > 0.5 and cost < best:
            # 1. The loops from `done` to `ahead`, with the tokens that were left after `done`.
            cost += (ahead - done) * (self._costs.loop(left) - price * progress)
            until_first += (ahead - done) * none * full_loop
            # 2. The tokens that are expected to be left after `ahead` loops.
            left, progress, none = 0.0, 0.0, 1.0
            for (depths, loops), tokens in counts.items():
                share = depths.stay(loops, ahead)
                left += tokens * share
                progress += tokens * share / depths.mean
                none *= share**tokens
            # 3. A read-out after these loops.
            waiting = n_exited + n - left
            if waiting > 0.5:
                best = min(best, cost + n_saved * self._readout_s(waiting))
            # 4. Further ahead the steps grow, by an eighth of the distance.
            done, ahead = ahead, ahead + 1 + ahead // 8
        # If none has exited yet, the next read-out may also come at the first exit, whenever that is.
        return best if n_exited else min(best, until_first + n_saved * self._readout_s(1))

    def _readout_s(self, tokens: float) -> float:
        """Return the seconds of a read-out, less those that every token adds in any case."""
        return self._costs.outer(max(1, tokens)) - self._costs.outer.slope * tokens

    def _seconds_per_token(self, counts: TokenCounts) -> float:
        """Return the seconds per token at the best even distance of read-outs, less those of `_readout_s`.

        Computed again when there are other tokens, and every few calls: what is known of depths changes slowly.
        """
        kinds: Counter[DepthCounts] = Counter()
        for (depths, _), tokens in counts.items():
            kinds[depths] += tokens
        if kinds != self._kinds or self._n_used % _REFRESH == 0:
            self._kinds, self._known_s, self._n_used = kinds, self._at_best_period(kinds), 0
        self._n_used += 1
        return self._known_s

    def _at_best_period(self, kinds: Counter[DepthCounts]) -> float:
        best = float("inf")
        for period in {*range(1, _PERIODS + 1), *(len(depths.more) - 1 for depths in kinds)}:
            # In the steady state: tokens in each loop of a period, and tokens read out at its end.
            looping, n_out = [0.0] * period, 0.0
            for depths, tokens in kinds.items():
                each = tokens / sum(depths.more[::period])
                n_out += each * depths.more[0]
                looping = [n + each * sum(depths.more[phase::period]) for phase, n in enumerate(looping)]
            best = min(best, (sum(map(self._costs.loop, looping)) + self._readout_s(n_out)) / n_out)
        return best

    def _depths_of(self, seq: Sequence) -> DepthCounts:
        key = (seq.n_loops, "fixed") if seq.is_fixed else (seq.n_loops, seq.depth_key, seq.in_prompt)
        depths = self._depths.get(key)
        if depths is None:
            if len(self._depths) == _MAX_KINDS:
                # There is no end of thresholds: the kind that was met first is forgotten.
                del self._depths[next(iter(self._depths))]
            depths = self._depths[key] = DepthCounts(seq)
        return depths

    def _count(self, group: Collection[Sequence]) -> TokenCounts:
        """Count tokens in the loop, and tokens that will be in it once those that have exited are read out."""
        counts: TokenCounts = Counter()
        for seq in group:
            # Behind the end of the known tokens there follows one new token, whatever the chunk.
            tokens = seq.n_looping or (1 if seq.yields_token else seq.n_running)
            counts[self._depths_of(seq), seq.loop if seq.n_looping else 0] += tokens
        return counts
