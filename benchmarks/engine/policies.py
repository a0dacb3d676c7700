"""Ways to run tokens of different depths in one batch, on the same engine."""

import copy
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from benchmarks.engine.bounds import allowed, best_threshold
from benchmarks.engine.laws import UntilAllAreDone
from benchmarks.engine.load import Load, Window, mean, pool
from benchmarks.engine.run import Different, Run
from benchmarks.engine.subjects import Subject, model_of
from benchmarks.stats import Spread, ratios
from open_mythos import OpenMythos
from open_mythos.engine.engine import Engine
from open_mythos.engine.scheduler import Refill
from open_mythos.engine.step_costs import Curve, StepCosts
from open_mythos.generation.sampling_params import SamplingParams

OURS, AGAIN = "ours", "ours again"
FIXED, TOGETHER, DROPPED, AT_ONCE = "fixed depth", "until all are done", "done rows dropped", "read out at once"
SIMPLE = (FIXED, TOGETHER, DROPPED)
SAME = (OURS, DROPPED, AT_ONCE)
"""Policies that compute the same tokens."""
REFILL: dict[str, Refill] = {
    DROPPED: lambda n_looping, n_exited: n_looping == 0,
    AT_ONCE: lambda n_looping, n_exited: True,
}
POLICIES = (OURS, FIXED, TOGETHER, DROPPED, AT_ONCE, AGAIN)


@dataclass(frozen=True)
class Policies:
    """All policies on one model, law and number of rows."""

    subject: Subject
    law: str
    rows: int

    @property
    def name(self) -> str:
        return f"{self.subject.name}, {self.law}, {self.rows}"

    def run(self, run: Run) -> dict[str, Any]:
        model, costs = model_of(self.subject, run.trained), run.costs(self.subject, self.rows)
        loads: dict[str, Load] = {}
        for i, policy in enumerate(POLICIES):
            run.tell(f"filling: {policy}", i, len(POLICIES))
            loads[policy] = self._load(policy, model, costs)
        windows = run.interleave(loads)
        self._check(loads, model)
        return self._read(windows, costs)

    def _load(self, policy: str, model: OpenMythos, costs: StepCosts) -> Load:
        rule = self.subject.rule(self.law)
        if policy == FIXED:
            rule = {"exit": "fixed"}
        elif policy == TOGETHER:
            rule = {"exit": UntilAllAreDone(self.subject.rule_object(self.law, model))}
        params = {"n_loops": self.subject.n_loops, **rule}
        # Other draws, so that the noise holds the luck of the depths as well.
        seed = 10**6 if policy == AGAIN else 0
        return Load(model, self.subject.prompts(), self.rows, params, refill=REFILL.get(policy), costs=costs, seed=seed)

    def _check(self, loads: dict[str, Load], model: OpenMythos) -> None:
        """Hold every finished answer of the policies that agree against each other, and one against `generate`.

        That in float64: in float32 a draw from a fresh model's 8,192 nearly equal tokens falls between two of them,
        nearer than rounding, once in a thousand tokens or so.
        """
        ours = loads[OURS].answers
        for policy in SAME:
            answers = loads[policy].answers
            wrong = [n for n in ours.keys() & answers.keys() if ours[n] != answers[n]]
            if wrong:
                raise Different(f"request {wrong[0]} has other tokens or loops when {policy!r} than {OURS!r}")
        number = max(ours, key=lambda n: (len(ours[n][0]), -n))
        prompts = self.subject.prompts()
        prompt, n_tokens = prompts[number % len(prompts)], len(ours[number][0])
        rule = self.subject.rule(self.law)
        if self._alone(model, prompt, n_tokens, rule, number) != ours[number]:
            raise Different(f"request {number} has other tokens or loops alone than beside others")
        twin = copy.deepcopy(model).double()
        options: dict[str, Any] = {"temperature": 1.0, "top_k": None, "return_loops": True, **rule}
        ids, loops = twin.generate(prompt, n_tokens, self.subject.n_loops, seed=number, **options)
        if self._alone(twin, prompt, n_tokens, rule, number) != (ids[len(prompt) :], loops):
            raise Different(f"request {number} has other tokens or loops in the engine than from generate")

    def _alone(
        self, model: OpenMythos, prompt: list[int], max_tokens: int, rule: dict[str, Any], seed: int
    ) -> tuple[list[int], list[int]]:
        """Tokens and loops of one request in an engine of its own."""
        engine = Engine(model, config=pool(model, 1, True), costs=StepCosts(Curve({1: 1.0}), Curve({1: 1.0})))
        options: dict[str, Any] = {"n_loops": self.subject.n_loops, "ignore_eos": True, **rule}
        request = engine.add(prompt, SamplingParams(max_tokens=max_tokens, seed=seed, **options))
        while engine.busy:
            engine.step()
        return request.token_ids, request.loops

    def _read(self, windows: dict[str, list[Window]], costs: StepCosts) -> dict[str, Any]:
        rates = {policy: [window.rate for window in found] for policy, found in windows.items()}
        fixed = windows[FIXED]
        loop_s = statistics.median(s for window in fixed for s in window.plain)
        outer_s = statistics.median(s for window in fixed for s in window.reading) - loop_s
        depths = {policy: _depths(found) for policy, found in windows.items()}
        limit = allowed(self.subject.n_loops, mean(depths[OURS]), loop_s, outer_s)
        threshold, at = best_threshold(costs, depths[OURS], self.subject.n_loops, self.rows)
        over = ratios(rates[OURS], rates[FIXED])
        best = max(SIMPLE, key=lambda policy: statistics.median(rates[policy]))
        return {
            "subject": self.subject.name,
            "law": self.law,
            "rows": self.rows,
            "rates": {policy: Spread.of(found) for policy, found in rates.items()},
            "wall_rates": {p: Spread.of([w.tokens / w.wall for w in found]) for p, found in windows.items()},
            "depths": {policy: mean(found) for policy, found in depths.items()},
            "exits": [depths[OURS][depth] for depth in range(1, self.subject.n_loops + 1)],
            "tokens": {policy: sum(window.tokens for window in found) for policy, found in windows.items()},
            "costs": {n: [costs.loop(n), costs.outer(n)] for n in _sizes(self.rows)},
            "loop_s": loop_s,
            "outer_s": outer_s,
            "limit": limit,
            "threshold": threshold,
            "threshold_rows": at,
            "over_fixed": over,
            "share": over.median / limit,
            "best": best,
            "over_best": ratios(rates[OURS], rates[best]),
            "over_at_once": ratios(rates[OURS], rates[AT_ONCE]),
            "noise": ratios(rates[AGAIN], rates[OURS]),
        }


def _depths(windows: list[Window]) -> Counter[int]:
    return sum((window.depths for window in windows), Counter())


def _sizes(rows: int) -> list[int]:
    """Powers of two up to `rows`."""
    return [2**n for n in range(rows.bit_length())]
