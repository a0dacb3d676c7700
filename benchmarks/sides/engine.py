"""Engines that are kept busy: the timed tasks of `cases.engine`. A window's time is CPU seconds per token.

Shapes: B rows, T tokens, D width.
"""

import copy
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.sides import first_of
from benchmarks.sides.exits import held_out_text, trained
from benchmarks.tasks import Task
from open_mythos import HaltingRule, MythosConfig, OpenMythos, SamplingParams

Engine = first_of("open_mythos.engine.engine:Engine", "open_mythos.serve.engine:Engine")
EngineConfig = first_of("open_mythos.engine.engine:EngineConfig", "open_mythos.serve.engine:EngineConfig")
measure_costs = first_of("open_mythos.engine.calibration:measure_costs", "open_mythos.serve.startup:measure_costs")
Curve = first_of("open_mythos.engine.readout_policy:Curve", "open_mythos.serve.costs:Curve")
StepCosts = first_of("open_mythos.engine.readout_policy:StepCosts", "open_mythos.serve.costs:StepCosts")

UNKNOWN = StepCosts(Curve({1: 1.0}), Curve({1: 1.0}))
"""Costs of an engine that nothing is timed on."""
Answer = tuple[list[int], list[int]]
"""Tokens of a request, and the loops of each."""
WEIGHT = () if hasattr(HaltingRule, "weigh") else (None,)
"""The third part of a decision, which rules of older checkouts have."""
DEEPEST, MEAN = 16, 4.0
"""Most loops of a law of depths, and the mean of the geometric one."""
N_PROMPT, N_PROMPTS = 17, 4
"""Tokens of a prompt: a page, which requests share, and one more, which they compute; and prompts of a load."""
VOCABULARY = 1024
NEW_TOKENS = 64
"""New tokens of a request: contexts are spread evenly over 17 to 81 tokens, whatever the policy."""
ONE_ROW = 32
"""Tokens for each second of a window of one row."""
FIXED, TOGETHER, DROPPED, AT_ONCE = "fixed depth", "until all are done", "done rows dropped", "read out at once"
REFILL = {DROPPED: lambda n_looping, n_exited: n_looping == 0, AT_ONCE: lambda n_looping, n_exited: True}
"""When exited rows are read out, for the policies that decide it without costs."""


def mean_depth(law: list[float]) -> float:
    """Return the loops per token of a law: the probabilities of 1, 2, ... loops."""
    return sum(n * p for n, p in enumerate(law, 1))


P_LAST = 0.2473488151905831
"""Probability of each loop to be the last in the geometric law, whose deepest takes the rest: its mean is then MEAN."""
_RISING = [P_LAST * (1 - P_LAST) ** n for n in range(DEEPEST - 1)]
LAWS = {"uniform": [1 / DEEPEST] * DEEPEST, "geometric": [*_RISING, 1 - sum(_RISING)]}


@cache
def _signs(width: int) -> Tensor:
    """Draw the fixed projection, (D,)."""
    return (torch.rand(width, generator=torch.Generator().manual_seed(0)) > 0.5).double() * 2 - 1


class PrescribedDepths(HaltingRule):
    """A rule that hashes a token's state before the first loop to its depth: the same alone, in a batch, in `generate`.

    The hash is the fraction of SCALE times a fixed projection of the normalised state: it is uniform, and rounding
    moves it to another depth once in 10^5 tokens (SCALE * 16 bounds * 1e-7 each).
    """

    SCALE = 20.0

    def __init__(self, law: list[float]) -> None:
        super().__init__(0.0)
        self.bounds = torch.tensor(law, dtype=torch.float64).cumsum(0)[:-1]

    def init(self, h: Tensor, n_loops: Tensor) -> dict[str, Tensor]:
        # In float64 the sum does not depend on how many rows are summed beside it.
        h = h.double()
        place = (h * _signs(h.shape[-1])).sum(-1) / torch.linalg.vector_norm(h, dim=-1) * self.SCALE
        depth = torch.bucketize(place - place.floor(), self.bounds, right=True) + 1
        return {"n_loops": n_loops, "depth": torch.minimum(depth, n_loops[:, None])}

    def update(
        self, state: dict[str, Tensor], h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Any:
        return (state, (loop_index + 1)[:, None] >= state["depth"], *WEIGHT)


class UntilAllAreDone(HaltingRule):
    """A rule that lets a token go on until another rule has let out all tokens of the call: nobody exits early."""

    def __init__(self, rule: HaltingRule) -> None:
        super().__init__(rule.threshold, rule.min_loops)
        self.rule, self.needs_probe = rule, rule.needs_probe

    def init(self, h: Tensor, n_loops: Tensor) -> dict[str, Tensor]:
        return {**self.rule.init(h, n_loops), "done": torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)}

    def update(
        self, state: dict[str, Tensor], h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Any:
        inner = {name: x for name, x in state.items() if name != "done"}
        inner, done = self.rule.update(inner, h_prev, h, loop_index, probe)
        done = state["done"] | (done & (loop_index + 1 >= self.min_loops)[:, None])
        return {**inner, "done": done}, done.all().expand_as(done)


@cache
def _model(config: str, folder: str) -> OpenMythos:
    """Build the model of a configuration in JSON, or load that of a folder."""
    if folder:
        return trained(folder, "cpu")
    torch.manual_seed(0)
    return OpenMythos(MythosConfig(**json.loads(config))).eval()


def engine_config(model: OpenMythos, rows: int, batch_invariant: bool = True) -> Any:
    """Configure an engine of so many rows, with memory for all of them and for prompts to be found again."""
    each = N_PROMPT + NEW_TOKENS + 16
    deeper = max(1.0, DEEPEST / model.cfg.max_loop_iters)
    return EngineConfig(rows, 4 * rows + 16, math.ceil((rows + 8) * each * deeper), batch_invariant=batch_invariant)


class EngineTask(Task):
    """A task on an engine of `rows` rows.

    `arguments` may have: `folder` of a trained model; `rule`, its fields of SamplingParams, or `law`; `policy`;
    `batch_invariant`; `costs` as `info` returns them; `seed` of the first request; `seconds` of a window.
    """

    whole = True

    def setup(self) -> None:
        job, given = self.job, self.job.arguments
        self.model = _model(json.dumps(job.model), given.get("folder", ""))
        self.config = engine_config(self.model, job.rows, given.get("batch_invariant", True))
        self.seconds, self.seed = given.get("seconds", 1.0), given.get("seed", 0)
        if given.get("folder"):
            self.prompts = held_out_text(0, 0, N_PROMPTS)[:, :N_PROMPT].tolist()
        else:
            generator = torch.Generator().manual_seed(0)
            self.prompts = torch.randint(VOCABULARY, (N_PROMPTS, N_PROMPT), generator=generator).tolist()
        rule: dict[str, Any] = given["rule"] if "rule" in given else {"exit": PrescribedDepths(LAWS[given["law"]])}
        if given.get("policy") == TOGETHER:
            inner = self.model.exit_rule(rule["exit"], rule.get("exit_threshold"))
            assert inner is not None
            rule = {"exit": UntilAllAreDone(inner)}
        self.rule = {"exit": "fixed"} if given.get("policy") == FIXED else rule
        points = given.get("costs") or self._measure_costs()
        loop, outer = ({n: seconds[i] for n, seconds in points["seconds"].items()} for i in (0, 1))
        self.points, self.costs = points, StepCosts(Curve(loop), Curve(outer), points["least_rows"])

    def _measure_costs(self) -> dict[str, Any]:
        """Measure as an engine does at its start -> [loop, outer] seconds by the powers of two up to its rows."""
        costs = measure_costs(Engine(self.model, config=self.config, costs=UNKNOWN).runner)
        sizes = [2**n for n in range(self.job.rows.bit_length())]
        return {"seconds": {n: [costs.loop(n), costs.outer(n)] for n in sizes}, "least_rows": costs.least_rows}

    def info(self) -> dict[str, Any]:
        return {"costs": self.points}

    def engine(self) -> Any:
        """Start the engine of the policy."""
        refill = REFILL.get(self.job.arguments.get("policy", ""))
        return Engine(self.model, config=self.config, costs=self.costs, refill=refill)

    def params(self, max_tokens: int, number: int) -> SamplingParams:
        """Ask for so many tokens; `number` is the seed."""
        loops = self.job.n_loops
        return SamplingParams(max_tokens=max_tokens, seed=number, ignore_eos=True, n_loops=loops, **self.rule)

    def answer(self, engine: Any, max_tokens: int, numbers: Iterable[int]) -> Iterator[Answer]:
        """Let an engine answer the requests of these numbers."""
        requests = [engine.add(self.prompts[n % N_PROMPTS], self.params(max_tokens, n)) for n in numbers]
        while engine.busy:
            engine.step()
        return ((request.token_ids, request.loops) for request in requests)

    def run(self, fresh: Any) -> dict[str, Tensor]:
        """Answer one short request for each row, for the gate."""
        answers = self.answer(self.engine(), 8, range(self.seed, self.seed + self.job.rows))
        return dict(zip(("tokens", "depths"), map(torch.tensor, zip(*answers, strict=True)), strict=True))


class Load(EngineTask):
    """An engine with all its rows busy: as many requests wait as there are rows, and one that ends is replaced.

    Prompts share all but their last token with an earlier one, which is found in reused pages: no step of a window
    computes a prompt. The first requests are of all lengths up to the last, so that later ones end evenly.
    """

    def setup(self) -> None:
        super().setup()
        job, self.busy = self.job, self.engine()
        self.number = 0
        self.numbers: dict[int, int] = {}
        """Number of a request in this load, by the engine's id."""
        self.finished: dict[int, Answer] = {}
        """The finished requests, by number."""
        for _ in self.prompts:
            self._add(1)
        while self.busy.busy:
            self._finish(self.busy.step())
        for i in range(2 * job.rows):
            self._add(1 + i * NEW_TOKENS // job.rows if i < job.rows else NEW_TOKENS)

    def time(self) -> dict[str, float]:
        """Run from a read-out to the first one after so many CPU seconds: the end depends on time, not on tokens.

        One row alone goes on for so many times ONE_ROW tokens, so that policies are timed on the same tokens: there a
        count favours nobody.
        """
        while not self.step():
            pass
        rows, n_tokens, depths = self.job.rows, 0, Counter[int]()
        seconds: dict[bool, list[float]] = {False: [], True: []}
        started, wall = time.process_time(), time.perf_counter()
        before = started
        while True:
            events = self.step()
            now = time.process_time()
            seconds[bool(events)].append(now - before)
            before = now
            n_tokens += len(events)
            depths.update(event.loops for event in events)
            if events and (n_tokens >= self.seconds * ONE_ROW if rows == 1 else now - started >= self.seconds):
                break
        # Seconds of the steps that only looped, and of those that also read tokens out and began new ones.
        self.measured = {"tokens": n_tokens, "depths": depths, "looping_s": seconds[False], "reading_s": seconds[True]}
        return {"cpu": (now - started) / n_tokens, "wall": (time.perf_counter() - wall) / n_tokens}

    def step(self) -> list[Any]:
        """Run one step of the engine, and replace the requests that end."""
        events = self.busy.step()
        for _ in range(self._finish(events)):
            self._add(NEW_TOKENS)
        if self.busy.scheduler.n_admitted != self.job.rows:
            raise AssertionError(f"{self.busy.scheduler.n_admitted} of {self.job.rows} rows are busy")
        return events

    def _add(self, max_tokens: int) -> None:
        params = self.params(max_tokens, self.seed + self.number)
        self.numbers[self.busy.add(self.prompts[self.number % N_PROMPTS], params).id] = self.number
        self.number += 1

    def _finish(self, events: list[Any]) -> int:
        ended = [event.request for event in events if event.finish_reason]
        for request in ended:
            self.finished[self.numbers.pop(request.id)] = (request.token_ids, request.loops)
        return len(ended)

    def answers(self) -> dict[int, Answer]:
        """Return the finished requests, by number."""
        return self.finished

    def check_alone(self) -> str:
        """Compare the longest answer with an engine of its own, and that in float64 with `generate` -> the difference.

        In float64, because in float32 a draw from a fresh model's 8,192 nearly equal tokens falls between two of them,
        nearer than rounding, once in a thousand tokens or so.
        """
        number = max(self.finished, key=lambda n: (len(self.finished[n][0]), -n))
        prompt, n_tokens = self.prompts[number % N_PROMPTS], len(self.finished[number][0])
        if self._alone(self.model, number, n_tokens) != self.finished[number]:
            return f"request {number} has other tokens or loops alone than beside others"
        exact = copy.deepcopy(self.model).double()
        options: dict[str, Any] = {"temperature": 1.0, "top_k": None, "return_loops": True, **self.rule}
        ids, loops = exact.generate(prompt, n_tokens, self.job.n_loops, seed=number, **options)
        if self._alone(exact, number, n_tokens) != (ids[len(prompt) :], loops):
            return f"request {number} has other tokens or loops in the engine than from generate"
        return ""

    def _alone(self, model: OpenMythos, number: int, max_tokens: int) -> Answer:
        """Return the answer of one request in an engine of its own."""
        engine = Engine(model, config=engine_config(model, 1), costs=UNKNOWN)
        return next(self.answer(engine, max_tokens, [number]))


class OneByOne(EngineTask):
    """`generate` on one request after another, by the same rule; prompts are left out of the time."""

    new_tokens = 0

    def time(self) -> dict[str, float]:
        self.new_tokens = 1
        short = super().time()
        self.new_tokens = NEW_TOKENS
        whole = super().time()
        self.seed += 1
        return {clock: (whole[clock] - short[clock]) / (NEW_TOKENS - 1) for clock in whole}

    def run(self, fresh: Any) -> Any:
        prompt, depth = self.prompts[self.seed % N_PROMPTS], self.job.n_loops
        self.model.generate(prompt, self.new_tokens, depth, 1.0, None, seed=self.seed, **self.rule)


TASKS: dict[str, type[Task]] = {"load": Load, "one_by_one": OneByOne}
