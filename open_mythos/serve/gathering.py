"""When to read out: as soon as more loops cost more than reading out together saves. No torch."""

from collections.abc import Collection, Hashable

from open_mythos.serve.costs import StepCosts
from open_mythos.serve.sequence import Sequence

_MOST = 1024  # chunks counted by depth, before older ones fade
_LASTING = 8  # chunks for which equal fixed depths, once read out together, are taken to stay together


class Gathering:
    """Decides between one more loop and reading out now.

    Reading out costs much the same for one token and for many, so it pays to wait for others; but meanwhile places in
    the loop are empty, and a token's share of a loop grows. Per sequence that is read out, this overhead is

        (lost + outer(k)) / sequences      lost = sum over loops of loop(n) - n * loop(n + idle) / (n + idle)

    with n tokens in the loop, `idle` more that could be, and `outer` without what every token adds to it in any case.
    It is time to read out when no number of further loops is expected to bring in sequences for less than that.
    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._lost = 0.0  # since the last read-out
        self._tails: dict[Hashable, list[float]] = {}

    def looped(self, n: int, idle: int, exited: Collection[Sequence]) -> None:
        """A loop of n tokens has run with places for `idle` more; who has left it then."""
        if idle:
            self._lost += self._costs.loop(n) - n * self._costs.loop(n + idle) / (n + idle)
        for seq in exited:
            if not seq.is_fixed:
                tail = self._tail(seq)
                for loop in range(seq.loop):
                    tail[loop] += 1
                if tail[0] > _MOST:
                    tail[:] = [count / 2 for count in tail]

    def pays(self, looping: Collection[Sequence], exited: Collection[Sequence], n: int, tokens: int, idle: int) -> bool:
        """Whether to read out now: n tokens loop; those that have exited have `tokens` and leave `idle` places."""
        loop, outer = self._costs.loop, self._costs.outer
        once = outer(tokens) - outer.slope * tokens
        # Reading out now costs so much per sequence. With equal fixed depths, whoever joins saves it again and again.
        each = (self._lost + once) / len(exited)
        is_alike = len({seq.n_loops if seq.is_fixed else seq for group in (looping, exited) for seq in group}) == 1
        again = _LASTING * once if is_alike else 0.0
        full = loop(n + idle) / (n + idle)
        cohorts = self._cohorts(looping)
        lost, left, done, ahead = 0.0, float(n), 0, 1
        while left > 0.5 and lost < max(each * len(looping), again):
            lost += (ahead - done) * (loop(round(left)) - left * full)
            joining = joining_tokens = 0.0
            for tail, loops, n_sequences, n_tokens in cohorts:
                share = 1 - tail[min(loops + ahead, len(tail) - 1)] / tail[loops]
                joining += n_sequences * share
                joining_tokens += n_tokens * share
            then = tokens + round(joining_tokens)
            if joining and lost + outer(then) - outer.slope * then - once < max(each * joining, again):
                return False
            left = n - joining_tokens
            done, ahead = ahead, ahead + max(1, ahead // 2)
        return True

    def read_out(self) -> None:
        """Those that have exited are read out now."""
        self._lost = 0.0

    def _tail(self, seq: Sequence) -> list[float]:
        """[l]: how many chunks like this one ran more than l loops; 0 for its most."""
        key = (seq.n_loops, "fixed") if seq.is_fixed else (seq.n_loops, seq.depth_key, seq.in_prompt)
        tail = self._tails.get(key)
        if tail is None:
            n = seq.n_loops
            # Before anything is known: as if there had been one chunk, at any depth alike.
            tail = self._tails[key] = [1.0] * n + [0.0] if seq.is_fixed else [1 - loop / n for loop in range(n + 1)]
        return tail

    def _cohorts(self, looping: Collection[Sequence]) -> list[tuple[list[float], int, int, int]]:
        """Those that will exit alike: tail, loops done, sequences, tokens."""
        cohorts: dict[tuple[int, int], tuple[list[float], int, int, int]] = {}
        for seq in looping:
            tail = self._tail(seq)
            _, _, sequences, tokens = cohorts.get((id(tail), seq.loop), (tail, 0, 0, 0))
            cohorts[id(tail), seq.loop] = (tail, seq.loop, sequences + 1, tokens + seq.n_looping)
        return list(cohorts.values())
