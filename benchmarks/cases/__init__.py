"""The table of cases. A new comparison with 0.5.0 of a task that `benchmarks.tasks` knows is one line more."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks import models
from benchmarks.case import Case, Reach
from benchmarks.cases import alone, engine, exits
from benchmarks.cases.pairs import building, cache_bytes, depths, long_rope, pair, training_memory, transformer
from benchmarks.harness import Budget
from benchmarks.job import Job
from open_mythos.train.depth_sampling import LoopsConfig

SMALL = {"gqa": models.SMALL_GQA, "mla": models.SMALL_MLA}
MID = Job("train", models.MID, rows=4, tokens=512, n_loops=8)
THIRTY_M = Job("train", models.THIRTY_M, rows=4, tokens=512, n_loops=4)
ONE_B = Job("decode", models.ONE_B, tokens=128, n_loops=16)
POISSON = tuple(LoopsConfig("poisson", 8, max_loops=16).depths(seed=0, step=0, rows=8).tolist())
SLOW = Budget(60.0, 3, 9)


def _at_least(value: float, **others: Reach) -> dict[str, Reach]:
    """Bound the case's own row from below, and others by their suffix."""
    return {"": Reach(value), **{f".{suffix}": reach for suffix, reach in others.items()}}


def _at_most(value: float, *suffixes: str) -> dict[str, Reach]:
    """Bound rows from above."""
    return {suffix: Reach(value, at_most=True) for suffix in suffixes or ("",)}


def _also_compiled(name: str, title: str, job: Job, reach: Mapping[str, Reach], **fields: Any) -> list[Case]:
    """List a comparison with 0.5.0, and once more with ours compiled."""
    case = Case(name, title, pair, job, reach, **fields)
    compiled = replace(case, ours={"compiled": True}, memory=False)
    return [case, replace(compiled, name=f"{name}_compiled", title=f"{title}, ours compiled")]


def _small(kind: str, compiled: bool) -> Case:
    job = Job("train", SMALL[kind], rows=2, tokens=16, n_loops=4)
    title = f"training step, small model (b) {kind}, {'ours compiled' if compiled else 'eager'}"
    name = f"train_small_{kind}{'_compiled' * compiled}"
    ours = {"compiled": True} if compiled else {}
    return Case(name, title, pair, job, _at_least(2.2 if compiled else 1.6), ours, memory=not compiled)


def _transformer(name: str, reach: float) -> Case:
    model = models.TRANSFORMERS[name]
    title, job = f"(c) against transformers {model['class']}", replace(MID, arguments={"transformer": model})
    batches = ("_b1", "_b1_compiled", "_b4", "_b4_compiled")
    return Case(f"decode_{name}", title, transformer, job, dict.fromkeys(batches, Reach(reach)))


_CASES = [
    Case(
        "train_addition",
        "training step, addition model (a)",
        pair,
        Job("train", models.ADDITION, rows=128, tokens=20, n_loops=4),
        _at_least(1.1, share=Reach(0.8)),
    ),
    *(_small(kind, compiled) for compiled in (False, True) for kind in SMALL),
    Case(
        "train_3m",
        "training step, mythos_3m's shape",
        pair,
        Job("train", models.THREE_M, rows=8, tokens=256, n_loops=4),
    ),
    Case("train_30m", "training step, mythos_30m's shape", pair, THIRTY_M, budget=SLOW),
    Case(
        "train_30m_poisson",
        "training step, mythos_30m's shape, Poisson(8) depths against all rows at the deepest",
        depths,
        replace(THIRTY_M, rows=8, tokens=256, depths=POISSON),
    ),
    Case(
        "muon_30m",
        "Muon's share of a step of the trainer, mythos_30m",
        alone.muon_share,
        Job("steps", tokens=512, n_loops=8, arguments={"variant": "30m", "batches": [4, 8]}),
        _at_most(0.15, ".4", ".8"),
        side="trainer",
    ),
    Case(
        "overhead_3m",
        "metrics and checkpoints, share of a run of mythos_3m",
        alone.overhead,
        Job("run", rows=4, tokens=128, n_loops=4, arguments={"variant": "3m", "steps": 101, "checkpoint_every": 50}),
        _at_most(0.05),
        side="trainer",
    ),
    Case("forward_mid", "forward pass, mid model (c)", pair, replace(MID, task="forward"), _at_least(1.4)),
    Case("train_mid", "training step, mid model (c)", pair, MID, _at_least(1.4), budget=SLOW),
    Case(
        "train_mid_poisson",
        "training step, (c), Poisson(8) depths against all rows at the deepest",
        depths,
        replace(MID, rows=8, tokens=256, depths=POISSON),
        _at_least(1.3, allowed=Reach(0.9)),
    ),
    *(
        case
        for rows, reach in ((1, 2.2), (4, 2.0))
        for case in _also_compiled(
            f"generate_mid_b{rows}",
            f"generate, mid model (c), batch {rows}",
            replace(MID, task="generate", rows=rows, tokens=64, new_tokens=16),
            _at_least(reach),
        )
    ),
    *exits.cases(),
    *(
        case
        for context, reach in ((128, 3.0), (512, 3.0), (960, 3.5))
        for case in _also_compiled(
            f"decode_{context}",
            f"decode one token, (c), context {context}",
            replace(MID, task="decode", rows=1, tokens=context),
            _at_least(reach),
        )
    ),
    Case(
        "prefill_1b",
        "mythos_1b, prefill of 128 tokens, 16 loops",
        pair,
        replace(ONE_B, task="prefill"),
        _at_least(1.8),
        budget=SLOW,
        second_worker=False,
    ),
    *_also_compiled(
        "decode_1b",
        "mythos_1b, decode one token, 16 loops, context 128",
        ONE_B,
        _at_least(1.3),
        second_worker=False,
        memory=False,
    ),
    Case(
        "kv_cache_bytes",
        "mythos_1b, cache, 16 loops",
        cache_bytes,
        replace(ONE_B, task="cache_bytes", model={**models.ONE_B, "n_experts": 4, "expert_dim": 16}, new_tokens=4),
        _at_least(8 / 3),
    ),
    Case("build_1b", "mythos_1b, construct on the CPU", building, Job("build", models.ONE_B), _at_least(2.0)),
    Case(
        "build_1t_meta",
        "mythos_1t, construct on the meta device",
        building,
        Job("build_meta", models.ONE_T),
        _at_most(50, ".ms"),
    ),
    Case(
        "rope_1m",
        "rotary angles for 1,000,000 positions (mythos_100b)",
        long_rope,
        Job("rope", models.HUNDRED_B),
        {**_at_most(0, ".bytes"), **_at_most(1e-6, ".error")},
    ),
    _transformer("deepseek_v3", 1.5),
    _transformer("qwen3_moe", 1.3),
    _transformer("llama", 0.8),
    Case(
        "memory_train_mid",
        "peak memory, training step, (c)",
        training_memory,
        MID,
        {**_at_most(0.8), **_at_most(0.5, ".checkpointed"), **_at_most(1.35, ".time")},
    ),
    Case(
        "scaling",
        "cost as work grows, (c)",
        alone.scaling,
        replace(MID, task="forward", model={**models.MID, "max_seq_len": 4096}),
        _at_most(0.15, ".tokens", ".loops", ".rows"),
    ),
    *engine.cases(),
]
CASES = {case.name: case for case in _CASES}
PAGES = tuple(dict.fromkeys(case.page for case in _CASES))


def reach_of(id: str) -> Reach | None:
    """Find the bound of a row by its id."""
    for case in CASES.values():
        if id.startswith(case.name) and id[len(case.name) :] in case.reach:
            return case.reach[id[len(case.name) :]]
    return None
