"""Random loads for the engine: prompts that share beginnings, depths, rules, arrivals, cancellations, little memory."""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from open_mythos import OpenMythos
from open_mythos.accounting import n_layers
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.engine.readout_policy import Curve, StepCosts
from open_mythos.engine.sequence import Sequence
from open_mythos.generation.sampling_params import SamplingParams
from tests.models import RULES, THRESHOLDS

COSTS = StepCosts(Curve({1: 2e-3, 8: 3e-3, 64: 9e-3}), Curve({1: 3e-3, 64: 8e-3}))


@dataclass
class Load:
    """The requests to one engine, and their cancellations."""

    config: EngineConfig
    requests: list[tuple[int, list[int], SamplingParams]]
    """(step of arrival, prompt, params)"""
    cancelled: dict[int, int]
    """Steps after its arrival at which a request is cancelled, by its place in the list."""


@dataclass
class Outcome:
    """The results of a load."""

    requests: list[Sequence] = field(default_factory=list)
    logits: dict[int, list[Tensor]] = field(default_factory=dict)
    """Logits of every token, by the request's id."""
    n_preempted: int = 0
    n_most: int = 0
    """The most sequences admitted at once."""


def random_load(rng: random.Random, model: OpenMythos, n_requests: int = 7) -> Load:
    cfg = model.cfg
    page_tokens = rng.choice([8, 8, 16, 32])
    shared = [[rng.randrange(cfg.vocab_size) for _ in range(90)] for _ in range(2)]
    requests, cancelled = [], {}
    for i in range(n_requests):
        n_shared = rng.choice([0, 0, 0, 3, 20, 33, 90])
        prompt = rng.choice(shared)[:n_shared] + [rng.randrange(cfg.vocab_size) for _ in range(rng.randrange(1, 12))]
        exit, more = rng.choice(RULES), random.Random(repr(prompt))
        options: dict[str, Any] = {"exit": exit, "exit_threshold": THRESHOLDS.get(exit or "")}
        n_loops = rng.choice([None, 1, 2, 3, cfg.max_loop_iters + 3])
        if cfg.min_loops > (n_loops or cfg.max_loop_iters):
            n_loops = None
        params = SamplingParams(
            max_tokens=rng.choice([1, 2, 5, 9, 17]),
            temperature=rng.choice([0.0, 1.3]),
            top_k=rng.choice([None, 5]),
            top_p=rng.choice([1.0, 0.8]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            frequency_penalty=more.choice([0.0, 0.0, 0.6]),
            presence_penalty=more.choice([0.0, 0.0, -0.8]),
            logit_bias=more.choice([{}, {}, {1: 3.0, 2: -100.0}]),
            seed=rng.randrange(100),
            stop_token_ids=[rng.randrange(cfg.vocab_size) for _ in range(rng.choice([0, 4]))],
            n_loops=n_loops,
            **options,
        )
        requests.append((rng.choice([0, 0, rng.randrange(30)]), prompt, params))
        if rng.random() < 0.2:
            cancelled[i] = rng.randrange(25)
    # From what the largest needs alone to plenty.
    largest = max(
        -(-(len(prompt) + params.max_tokens - 1) // page_tokens) * n_layers(cfg, params.n_loops or cfg.max_loop_iters)
        for _, prompt, params in requests
    )
    blocks = -(-largest // n_layers(cfg, cfg.max_loop_iters))
    config = EngineConfig(
        max_rows=rng.choice([1, 2, 3, 5, 5, 8]),
        kv_tokens=page_tokens * (blocks + rng.choice([0, 0, 1, 1, 2, 3, 40])),
        page_tokens=page_tokens,
        max_prefill_tokens=rng.choice([64, 100, 512]),
        prefix_reuse=rng.random() < 0.8,
        batch_invariant=rng.random() < 0.7,
    )
    return Load(config, sorted(requests, key=lambda request: request[0]), cancelled)


def carry_out(model: OpenMythos, load: Load) -> Outcome:
    """Run a load to its end, and see that nothing is left in the engine."""
    engine = Engine(model, config=load.config, costs=COSTS)
    outcome = Outcome()
    record(engine, outcome)
    todo, step, ends = list(load.requests), 0, {}
    while todo or engine.busy:
        while todo and todo[0][0] <= step:
            _, prompt, params = todo.pop(0)
            place = len(outcome.requests)
            outcome.requests.append(engine.add(prompt, params))
            if place in load.cancelled:
                ends[place] = step + load.cancelled[place]
        for place in [place for place, end in ends.items() if end <= step]:
            engine.cancel(outcome.requests[place])
            del ends[place]
        engine.step()
        outcome.n_most = max(outcome.n_most, engine.scheduler.n_admitted)
        step += 1
        assert step < 5000, "no end"
    empty(engine)
    assert outcome.n_most <= load.config.max_rows
    return outcome


def record(engine: Engine, outcome: Outcome) -> None:
    """Keep every token's logits, and count who loses its pages."""
    read_out, read = engine.runner.read_out, engine.kv.read

    def keep(seqs: list[Sequence]) -> Any:
        out = read_out(seqs)
        for seq, row in zip([seq for seq in seqs if seq.yields_token], out.logits, strict=True):
            outcome.logits.setdefault(seq.id, []).append(row.clone())
        return out

    def count(pages: Any) -> Tensor:
        outcome.n_preempted += 1
        return read(pages)

    engine.runner.read_out, engine.kv.read = keep, count


def empty(engine: Engine) -> None:
    """Nothing is held by anyone."""
    scheduler, runner = engine.scheduler, engine.runner
    blocks = scheduler.block_manager
    assert (scheduler.n_waiting, scheduler.n_admitted, blocks.n_used) == (0, 0, 0)
    assert blocks.n_free + blocks.n_reusable == engine.n_pages
    assert not (engine.sequences or runner.batches or runner.exited or runner.running)
    assert sorted(runner.free_rows) == list(range(engine.config.max_rows))
    assert (engine.kv.table == engine.kv.null).all() and not engine.kv.pages[engine.kv.null].any()


def alone(model: OpenMythos, prompt: list[int], params: SamplingParams) -> tuple[list[int], list[int]]:
    """New tokens and their loops from `generate`."""
    names = ("top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias")
    names += ("exit", "exit_threshold", "seed")
    with torch.no_grad():
        ids, loops = model.generate(
            prompt,
            params.max_tokens,
            params.n_loops,
            params.temperature,
            params.top_k,
            stop=params.stop_token_ids,
            return_loops=True,
            **{name: getattr(params, name) for name in names},
        )
    return ids[len(prompt) :], loops
