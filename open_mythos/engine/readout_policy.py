"""When to read out: as soon as more loops cost more than reading out together saves. No torch."""

from collections import Counter
from collections.abc import Collection, Hashable

from open_mythos.engine.sequence import Sequence
from open_mythos.engine.step_costs import StepCosts

_KINDS = 256  # kinds of chunks that are remembered
_MOST = 1024  # chunks counted by depth, before older ones fade
_LASTING = 8  # chunks for which equal fixed depths, once read out together, are taken to stay together
_REFRESH = 8  # times that a worth is used
_PERIODS = 16  # distances of read-outs that are tried, beside the most loops of each kind
_PATIENCE = 1.01  # waiting wins a tie: who is read out together is likelier to exit together again


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


Cohorts = Counter[tuple[Depths, int]]
"""Tokens by kind and by loops done."""


class Gathering:
    """Decides between one more loop and reading out now.

    Reading out costs much the same for one token and for many, so it pays to wait for others. But meanwhile those that
    wait do not go on, and a loop costs much the same with them and without. So every loop has a price:

        loop(tokens in it) - worth * (their progress)

    where the progress of a token in a loop is 1 / its mean depth, and `worth` the time that a token takes in the long
    run, if read-outs come at the best even distance for the depths of all. `outer` counts without what every token adds
    to it in any case. It is time to read out when that, and the cheapest way to the read-out after it, costs no more
    than the cheapest way to a read-out later on. This is one step of policy improvement for average cost (Howard 1960).
    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._depths: dict[Hashable, Depths] = {}
        self._kinds: Counter[Depths] = Counter()
        """Of which `_found` is the worth, asked for `_asked` times."""
        self._found, self._asked = 0.0, 0

    def exited(self, seq: Sequence) -> None:
        """The chunk of a sequence has left the loop."""
        if not seq.is_fixed:
            self._of(seq).add(seq.loop)

    def pays(self, looping: Collection[Sequence], exited: Collection[Sequence]) -> bool:
        """Whether to read out now."""
        stay = self._cohorts(looping)
        go = stay + self._cohorts(exited)
        tokens = sum(seq.n_running for seq in exited)
        worth = _PATIENCE * self._worth(go)
        # With equal fixed depths, whoever joins saves a read-out again and again.
        is_alike = len({seq.n_loops if seq.is_fixed else seq for group in (looping, exited) for seq in group}) == 1
        again = _LASTING if is_alike else 1
        now = again * self._once(tokens) + self._ahead(go, 0, worth, again)
        return now <= self._ahead(stay, tokens, worth, again)

    def _ahead(self, cohorts: Cohorts, waiting: int, worth: float, again: int) -> float:
        """The price of the cheapest way to the next read-out, with it, when so many tokens wait for it already."""
        n = left = float(cohorts.total())
        progress = sum(tokens / depths.mean for (depths, _), tokens in cohorts.items())
        whole = self._costs.loop(n) - worth * progress
        none, first = 1.0, 0.0  # the chance that none has exited, and the price up to where one has
        price, best, done, ahead = 0.0, float("inf"), 0, 1
        while left > 0.5 and price < best:
            price += (ahead - done) * (self._costs.loop(left) - worth * progress)
            first += (ahead - done) * none * whole
            left, progress, none = 0.0, 0.0, 1.0
            for (depths, loops), tokens in cohorts.items():
                share = 1 - depths.exits(loops, ahead)
                left += tokens * share
                progress += tokens * share / depths.mean
                none *= share**tokens
            exited = waiting + n - left
            if exited > 0.5:
                best = min(best, price + again * self._once(exited))
            done, ahead = ahead, ahead + 1 + ahead // 8
        return best if waiting else min(best, first + again * self._once(1))

    def _once(self, tokens: float) -> float:
        return self._costs.outer(max(1, tokens)) - self._costs.outer.slope * tokens

    def _worth(self, cohorts: Cohorts) -> float:
        """Seconds per token at the best even distance of read-outs, less what every token adds to one in any case.

        Found anew when there are other tokens, and now and then: what is known of depths changes slowly.
        """
        kinds: Counter[Depths] = Counter()
        for (depths, _), tokens in cohorts.items():
            kinds[depths] += tokens
        if kinds != self._kinds or self._asked % _REFRESH == 0:
            self._kinds, self._found, self._asked = kinds, self._best_even(kinds), 0
        self._asked += 1
        return self._found

    def _best_even(self, kinds: Counter[Depths]) -> float:
        best = float("inf")
        for period in {*range(1, _PERIODS + 1), *(len(depths.more) - 1 for depths in kinds)}:
            loops, out = [0.0] * period, 0.0  # tokens in each loop, and read out behind the last
            for depths, tokens in kinds.items():
                each = tokens / sum(depths.more[::period])
                out += each * depths.more[0]
                loops = [n + each * sum(depths.more[phase::period]) for phase, n in enumerate(loops)]
            best = min(best, (sum(map(self._costs.loop, loops)) + self._once(out)) / out)
        return best

    def _of(self, seq: Sequence) -> Depths:
        key = (seq.n_loops, "fixed") if seq.is_fixed else (seq.n_loops, seq.depth_key, seq.in_prompt)
        depths = self._depths.get(key)
        if depths is None:
            if len(self._depths) == _KINDS:
                # Thresholds are without number: the kind that was met first is forgotten.
                del self._depths[next(iter(self._depths))]
            depths = self._depths[key] = Depths(seq)
        return depths

    def _cohorts(self, group: Collection[Sequence]) -> Cohorts:
        """Tokens in the loop, or that will be once those that have exited are read out."""
        cohorts: Cohorts = Counter()
        for seq in group:
            behind = seq.n_tokens - seq.n_computed - seq.n_running
            tokens = seq.n_looping or (seq.n_running if behind else 1)
            cohorts[self._of(seq), seq.loop if seq.n_looping else 0] += tokens
        return cohorts
