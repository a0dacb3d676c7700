"""When to read out: once more loops of the rest no longer pay for what those that wait could do. No torch."""

from collections.abc import Hashable, Iterable

from open_mythos.serve.costs import StepCosts
from open_mythos.serve.sequence import Sequence

_MEMORY = 0.97  # what a read-out leaves of the weight of those before it
_MOST = 1024.0  # chunks counted by depth, before older ones fade


class Gathering:
    """Decides between one more loop and reading out now."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._lost = 0.0  # since the last read-out
        self._spent, self._read = 0.0, 0.0  # fading sums over read-outs: seconds lost and outside the loop, sequences
        self._tails: dict[Hashable, list[float]] = {}

    def _tail(self, seq: Sequence) -> list[float]:
        """[l]: how many chunks like this one ran more than l loops; 0 for its most."""
        key = (seq.n_loops, seq.is_fixed) if seq.is_fixed else (seq.depth_key, seq.in_prompt)
        tail = self._tails.get(key)
        if tail is None:
            n = seq.n_loops
            # Before anything is known: one chunk, at any depth alike.
            tail = [1.0] * n + [0.0] if seq.is_fixed else [1 - depth / n for depth in range(n + 1)]
            self._tails[key] = tail
        return tail

    def looped(self, n: int, idle: int, exited: Iterable[Sequence]) -> None:
        """A loop of n tokens has run while places for `idle` more were empty; who has left it then."""
        if idle:
            self._lost += self._costs.loop(n) - n * self._costs.loop(n + idle) / (n + idle)
        for seq in exited:
            if seq.is_fixed:
                continue
            tail = self._tail(seq)
            for loop in range(seq.loop):
                tail[loop] += 1
            if tail[0] > _MOST:
                tail[:] = [count / 2 for count in tail]

    def pays(self, looping: Iterable[Sequence], n: int, k: int, tokens: int, idle: int) -> bool:
        """Whether to read out now: n tokens loop; k sequences with `tokens` tokens and `idle` empty places wait."""
        outer, slope = self._costs.outer, self._costs.outer.slope
        now = self._lost + outer(tokens) - slope * tokens
        worth = (self._spent + now) / (self._read + k)  # seconds that a sequence read out costs on average
        groups: dict[tuple[int, int], list] = {}
        rows = 0
        for seq in looping:
            rows += 1
            tail = self._tail(seq)
            group = groups.get((id(tail), seq.loop))
            if group is None:
                groups[id(tail), seq.loop] = [tail, seq.loop, 1, seq.n_looping]
            else:
                group[2] += 1
                group[3] += seq.n_looping
        full = self._costs.loop(n + idle) / (n + idle)
        lost, left, done, ahead = 0.0, float(n), 0, 1
        while lost < worth * rows:
            lost += (ahead - done) * (self._costs.loop(round(left)) - left * full)
            d = gone = 0.0
            for tail, loop, count, in_loop in groups.values():
                share = 1 - tail[min(loop + ahead, len(tail) - 1)] / tail[loop]
                d += count * share
                gone += in_loop * share
            then = tokens + round(gone)
            if lost + outer(then) - slope * then - (now - self._lost) < worth * d:
                return False
            left = n - gone
            if left < 0.5:
                break
            done, ahead = ahead, 2 * ahead
        return True

    def read_out(self, k: int, tokens: int) -> None:
        """k sequences with so many tokens are read out now."""
        overhead = self._lost + self._costs.outer(tokens) - self._costs.outer.slope * tokens
        self._spent = _MEMORY * self._spent + overhead
        self._read = _MEMORY * self._read + k
        self._lost = 0.0
