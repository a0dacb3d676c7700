"""The table of cases.

A new comparison with 0.5.0 of a task that `benchmarks.tasks` knows is one `Pair` more. Anything else is a frozen
dataclass with what `Case` asks for, in a file of its own; what its rows are to reach stands in `benchmarks.reach`.
"""

from dataclasses import replace
from typing import Protocol

from benchmarks import models
from benchmarks.bench import Bench, Budget
from benchmarks.cases.depths import Depths
from benchmarks.cases.elsewhere import Elsewhere
from benchmarks.cases.exits import EXITS
from benchmarks.cases.memory import TrainingMemory
from benchmarks.cases.pair import Pair
from benchmarks.cases.scaling import Scaling
from benchmarks.cases.start import Building, CacheBytes, LongRope
from benchmarks.cases.trainer import MuonShare, Overhead
from benchmarks.job import Job
from benchmarks.results import Outcome
from open_mythos.train.depth_sampling import LoopsConfig


class Case(Protocol):
    """Anything with a name, a line for the report, how it is measured, and a way to run."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def protocol(self) -> str: ...
    def run(self, bench: Bench) -> Outcome: ...


SMALL = {"gqa": models.SMALL_GQA, "mla": models.SMALL_MLA}
MID = Job("ours", "train", models.MID, rows=4, tokens=512, n_loops=8)
THIRTY_M = Job("ours", "train", models.THIRTY_M, rows=4, tokens=512, n_loops=4)
POISSON = LoopsConfig("poisson", 8, max_loops=16).depths(seed=0, step=0, rows=8)
SLOW = Budget(60.0, 3, 9)


def _also_compiled(pair: Pair) -> list[Case]:
    """The case, and once more with ours compiled."""
    name, title = f"{pair.name}_compiled", f"{pair.title}, ours compiled"
    return [pair, replace(pair, name=name, title=title, ours={"compiled": True}, memory=False)]


_CASES: list[Case] = [
    Pair(
        "train_addition",
        "training step, addition model (a)",
        Job("ours", "train", models.ADDITION, rows=128, tokens=20, n_loops=4),
    ),
    *(
        Pair(
            f"train_small_{kind}",
            f"training step, small model (b) {kind}, eager",
            Job("ours", "train", model, rows=2, tokens=16, n_loops=4),
        )
        for kind, model in SMALL.items()
    ),
    *(
        Pair(
            f"train_small_{kind}_compiled",
            f"training step, small model (b) {kind}, ours compiled",
            Job("ours", "train", model, rows=2, tokens=16, n_loops=4),
            ours={"compiled": True},
            memory=False,
        )
        for kind, model in SMALL.items()
    ),
    Pair(
        "train_3m",
        "training step, mythos_3m's shape",
        Job("ours", "train", models.THREE_M, rows=8, tokens=256, n_loops=4),
    ),
    Pair("train_30m", "training step, mythos_30m's shape", THIRTY_M, budget=SLOW),
    Depths(
        "train_30m_poisson",
        "training step, mythos_30m's shape, Poisson(8) depths against all rows at the deepest",
        replace(THIRTY_M, rows=8, tokens=256, depths=tuple(POISSON.tolist())),
    ),
    MuonShare(
        "muon_30m",
        "Muon's share of a step of the trainer, mythos_30m",
        Job("trainer", "steps", tokens=512, n_loops=8, arguments={"variant": "30m"}),
        (4, 8),
    ),
    Overhead(
        "overhead_3m",
        "metrics and checkpoints, share of a run of mythos_3m",
        Job(
            "trainer",
            "run",
            rows=4,
            tokens=128,
            n_loops=4,
            arguments={"variant": "3m", "steps": 101, "checkpoint_every": 50},
        ),
    ),
    Pair("forward_mid", "forward pass, mid model (c)", replace(MID, task="forward")),
    Pair("train_mid", "training step, mid model (c)", MID, budget=SLOW),
    Depths(
        "train_mid_poisson",
        "training step, (c), Poisson(8) depths against all rows at the deepest",
        replace(MID, rows=8, tokens=256, depths=tuple(POISSON.tolist())),
    ),
    *(
        case
        for rows in (1, 4)
        for case in _also_compiled(
            Pair(
                f"generate_mid_b{rows}",
                f"generate, mid model (c), batch {rows}",
                replace(MID, task="generate", rows=rows, tokens=64, new_tokens=16),
            )
        )
    ),
    *EXITS,
    *(
        case
        for context in (128, 512, 960)
        for case in _also_compiled(
            Pair(
                f"decode_{context}",
                f"decode one token, (c), context {context}",
                replace(MID, task="decode", rows=1, tokens=context),
            )
        )
    ),
    Pair(
        "prefill_1b",
        "mythos_1b, prefill of 128 tokens, 16 loops",
        Job("ours", "prefill", models.ONE_B, tokens=128, n_loops=16),
        budget=SLOW,
        second_worker=False,
    ),
    *_also_compiled(
        Pair(
            "decode_1b",
            "mythos_1b, decode one token, 16 loops, context 128",
            Job("ours", "decode", models.ONE_B, tokens=128, n_loops=16),
            second_worker=False,
            memory=False,
        )
    ),
    CacheBytes(
        "kv_cache_bytes",
        "mythos_1b, cache, 16 loops",
        Job(
            "ours",
            "cache_bytes",
            {**models.ONE_B, "n_experts": 4, "expert_dim": 16},
            tokens=128,
            new_tokens=4,
            n_loops=16,
        ),
    ),
    Building("build_1b", "mythos_1b, construct on the CPU", models.ONE_B, meta=False),
    Building("build_1t_meta", "mythos_1t, construct on the meta device", models.ONE_T, meta=True),
    LongRope("rope_1m", "rotary angles for 1,000,000 positions (mythos_100b)", models.HUNDRED_B),
    *(
        Elsewhere(f"decode_{name}", f"(c) against transformers {model['class']}", model, MID)
        for name, model in models.TRANSFORMERS.items()
    ),
    TrainingMemory("memory_train_mid", "peak memory, training step, (c)", MID),
    Scaling(
        "scaling",
        "cost as work grows, (c)",
        replace(MID, task="forward", model={**models.MID, "max_seq_len": 4096}),
    ),
]

CASES: dict[str, Case] = {case.name: case for case in _CASES}
