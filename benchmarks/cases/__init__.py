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

ADDITION = Job("train", models.ADDITION, rows=128, tokens=20, n_loops=4)
SMALL = {"gqa": models.SMALL_GQA, "mla": models.SMALL_MLA}
MID = Job("train", models.MID, rows=4, tokens=512, n_loops=8)
LONG = replace(MID, task="forward", model={**models.MID, "max_seq_len": 4096})
THREE_M = Job("train", models.THREE_M, rows=8, tokens=256, n_loops=4)
THIRTY_M = Job("train", models.THIRTY_M, rows=4, tokens=512, n_loops=4)
ONE_B = Job("decode", models.ONE_B, tokens=128, n_loops=16)
CACHE = replace(ONE_B, task="cache_bytes", model={**models.ONE_B, "n_experts": 4, "expert_dim": 16}, new_tokens=4)
STEPS = Job("steps", tokens=512, n_loops=8, arguments={"variant": "30m", "batches": [4, 8]})
RUN = Job("run", rows=4, tokens=128, n_loops=4, arguments={"variant": "3m", "steps": 101, "checkpoint_every": 50})
POISSON = tuple(LoopsConfig("poisson", 8, max_loops=16).depths(seed=0, step=0, rows=8).tolist())
SLOW = Budget(60.0, 3, 9)


def _at_most(**bounds: float) -> dict[str, Reach]:
    """Bound rows from above, by their suffix; `own` is the case's own row."""
    return {"" if name == "own" else f".{name}": Reach(value, at_most=True) for name, value in bounds.items()}


def _pair(name: str, title: str, job: Job, reach: float | Mapping[str, Reach] = 0.0, **fields: Any) -> Case:
    """Compare a task with 0.5.0; `reach` bounds the case's own row, or several."""
    if not isinstance(reach, Mapping):
        reach = {"": Reach(reach)} if reach else {}
    return Case(name, title, pair, job, reach, **fields)


def _both(name: str, title: str, job: Job, reach: float, compiled_reach: float = 0, **fields: Any) -> list[Case]:
    """Compare a task with 0.5.0, and once more with ours compiled, which is to reach the same or its own bound."""
    case = _pair(name, title, job, reach, **fields)
    compiled = replace(case, ours={"compiled": True}, memory=False, reach={"": Reach(compiled_reach or reach)})
    return [case, replace(compiled, name=f"{name}_compiled", title=f"{title}, ours compiled")]


def _small(kind: str, compiled: bool) -> Case:
    job = Job("train", SMALL[kind], rows=2, tokens=16, n_loops=4)
    name, title = f"train_small_{kind}", f"training step, small model (b) {kind}, "
    if not compiled:
        return _pair(name, f"{title}eager", job, 1.6)
    return _pair(f"{name}_compiled", f"{title}ours compiled", job, 2.2, ours={"compiled": True}, memory=False)


def _others() -> list[Case | list[Case]]:
    """Model (d), whose sizes no path was made for: a step, a forward pass, and 24 tokens after 40."""
    found: list[Case | list[Case]] = []
    for kind, model in models.OTHER.items():
        job = Job("train", model, rows=3, tokens=192, n_loops=6)
        found.append(_pair(f"train_other_{kind}", f"training step, model (d) {kind}", job, 1.4))
        found.append(
            _pair(f"forward_other_{kind}", f"forward pass, model (d) {kind}", replace(job, task="forward"), 1.4)
        )
        for rows in (1, 3):
            asked = replace(job, task="generate", rows=rows, tokens=40, new_tokens=24)
            found.append(
                _both(f"generate_other_{kind}_b{rows}", f"generate, model (d) {kind}, batch {rows}", asked, 1.5, 2.5)
            )
    return found


def _depths(name: str, model: str, job: Job, reach: Mapping[str, Reach]) -> Case:
    title = f"training step, {model}, Poisson(8) depths against all rows at the deepest"
    return Case(name, title, depths, replace(job, rows=8, tokens=256, depths=POISSON), reach)


def _transformer(name: str, reach: float) -> Case:
    model = models.TRANSFORMERS[name]
    title, job = f"(c) against transformers {model['class']}", replace(MID, arguments={"transformer": model})
    batches = ("_b1", "_b1_compiled", "_b4", "_b4_compiled")
    return Case(f"decode_{name}", title, transformer, job, dict.fromkeys(batches, Reach(reach)))


def _generate(rows: int, reach: float) -> list[Case]:
    job = replace(MID, task="generate", rows=rows, tokens=64, new_tokens=16)
    return _both(f"generate_mid_b{rows}", f"generate, mid model (c), batch {rows}", job, reach)


def _decode(context: int, reach: float) -> list[Case]:
    job = replace(MID, task="decode", rows=1, tokens=context)
    return _both(f"decode_{context}", f"decode one token, (c), context {context}", job, reach)


_MUON = "Muon's share of a step of the trainer, mythos_30m", alone.muon_share, STEPS
_OVERHEAD = "metrics and checkpoints, share of a run of mythos_3m", alone.overhead, RUN
_MEMORY = _at_most(own=0.8, checkpointed=0.5, time=1.35)
_GROWTH = _at_most(tokens=0.15, loops=0.15, rows=0.15)
_PREFILL, _DECODE = "mythos_1b, prefill of 128 tokens, 16 loops", "mythos_1b, decode one token, 16 loops, context 128"
_ROPE = "rotary angles for 1,000,000 positions (mythos_100b)", long_rope, Job("rope", models.HUNDRED_B)
_META = "mythos_1t, construct on the meta device", building, Job("build", models.ONE_T, device="meta")
_SHARES = {"": Reach(1.1), ".share": Reach(0.8)}
_TABLE: list[Case | list[Case]] = [
    _pair("train_addition", "training step, addition model (a)", ADDITION, _SHARES),
    [_small(kind, compiled) for compiled in (False, True) for kind in SMALL],
    _pair("train_3m", "training step, mythos_3m's shape", THREE_M),
    _pair("train_30m", "training step, mythos_30m's shape", THIRTY_M, budget=SLOW),
    _depths("train_30m_poisson", "mythos_30m's shape", THIRTY_M, {}),
    Case("muon_30m", *_MUON, _at_most(**{"4": 0.15, "8": 0.15}), side="trainer"),
    Case("overhead_3m", *_OVERHEAD, _at_most(own=0.05), side="trainer"),
    _pair("forward_mid", "forward pass, mid model (c)", replace(MID, task="forward"), 1.4),
    _pair("train_mid", "training step, mid model (c)", MID, 1.4, budget=SLOW),
    _depths("train_mid_poisson", "(c)", MID, {"": Reach(1.3), ".allowed": Reach(0.9)}),
    _generate(1, 2.2),
    _generate(4, 2.0),
    *_others(),
    exits.cases(),
    _decode(128, 3.0),
    _decode(512, 3.0),
    _decode(960, 3.5),
    _pair("prefill_1b", _PREFILL, replace(ONE_B, task="prefill"), 1.8, budget=SLOW, second_worker=False),
    _both("decode_1b", _DECODE, ONE_B, 1.3, memory=False, second_worker=False),
    Case("kv_cache_bytes", "mythos_1b, cache, 16 loops", cache_bytes, CACHE, {"": Reach(8 / 3)}),
    Case("build_1b", "mythos_1b, construct on the CPU", building, Job("build", models.ONE_B), {"": Reach(2.0)}),
    Case("build_1t_meta", *_META, _at_most(ms=50)),
    Case("rope_1m", *_ROPE, _at_most(bytes=0, error=1e-6)),
    _transformer("deepseek_v3", 1.5),
    _transformer("qwen3_moe", 1.3),
    _transformer("llama", 0.8),
    Case("memory_train_mid", "peak memory, training step, (c)", training_memory, MID, _MEMORY),
    Case("scaling", "cost as work grows, (c)", alone.scaling, LONG, _GROWTH),
    engine.cases(),
]
CASES = {case.name: case for entry in _TABLE for case in (entry if isinstance(entry, list) else [entry])}
PAGES = tuple(dict.fromkeys(case.page for case in CASES.values()))


def reach_of(id: str) -> Reach | None:
    """Find the bound of a row by its id."""
    return next((r for case in CASES.values() for part, r in case.reach.items() if id == case.name + part), None)
