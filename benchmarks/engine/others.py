"""The engine beside what else would answer the same requests."""

import time
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.client import Client
from benchmarks.engine.laws import DEEPEST, LAWS
from benchmarks.engine.load import NEW_TOKENS, Load
from benchmarks.engine.run import Run
from benchmarks.engine.subjects import N_PROMPT, SUBJECTS, model_of
from benchmarks.job import Job
from benchmarks.models import LOOP_HEAVY, PLAIN
from benchmarks.stats import Spread, ratios
from open_mythos import OpenMythos
from open_mythos.accounting import flops_per_token

DECODED = 16
"""New tokens of a peer's timed call; the first is the prompt's and left out. Shorter contexts than the engine's."""
PEERS = {
    "open-mythos 0.5.0 `generate`": Job("open_mythos_0_5", "generate", LOOP_HEAVY, n_loops=DEEPEST),
    "transformers `generate`, plain Llama": Job("hf", "generate", PLAIN),
}


@dataclass(frozen=True)
class Others:
    """The loop-heavy model's engine at so many rows, against one request after another, 0.5.0 and a plain model."""

    rows: int

    @property
    def name(self) -> str:
        return f"others, {self.rows}"

    def run(self, run: Run) -> dict[str, Any]:
        subject = SUBJECTS["heavy"]
        model, costs = model_of(subject, run.trained), run.costs(subject, self.rows)
        loads = {
            law: Load(
                model,
                subject.prompts(),
                self.rows,
                {"n_loops": DEEPEST, **subject.rule(law)},
                costs=costs,
            )
            for law in LAWS
        }
        rates: dict[str, list[float]] = {}
        info: dict[str, Any] = {"heavy": {"flops_per_token": flops_per_token(model.cfg, DEEPEST)}}
        clients: dict[str, Client] = {}
        try:
            for name, job in PEERS.items():
                clients[name] = Client(job.side, 1)
                job = replace(job, rows=self.rows, tokens=N_PROMPT)
                for tokens in (1, 1 + DECODED):
                    info[name] = clients[name].prepare(str(tokens), replace(job, new_tokens=tokens))
                    clients[name].ask("call", id=str(tokens))
            for law, load in loads.items():
                run.tell(f"warm-up, {law}", 0, 1)
                load.window(run.seconds)
            for i in range(run.rounds):
                found: dict[str, float] = {}
                for law, load in loads.items():
                    run.tell(f"ours, {law}", i, run.rounds)
                    found[f"engine, {law}"] = load.window(run.seconds).rate
                    run.tell(f"`generate`, {law}", i, run.rounds)
                    found[f"`generate`, {law}"] = _one_by_one(model, law, i)
                for name, client in clients.items():
                    run.tell(name, i, run.rounds)
                    short, long = (client.ask("call", id=str(n))["cpu"] for n in (1, 1 + DECODED))
                    found[name] = self.rows * DECODED / (long - short)
                for name, rate in found.items():
                    rates.setdefault(name, []).append(rate)
        finally:
            for client in clients.values():
                client.__exit__()
        return {
            "rows": self.rows,
            "rates": {name: Spread.of(values) for name, values in rates.items()},
            "over": {
                law: {name: ratios(rates[f"engine, {law}"], rates[name]) for name in (f"`generate`, {law}", *PEERS)}
                for law in LAWS
            },
            "flops": {name: found["flops_per_token"] for name, found in info.items() if "flops_per_token" in found},
        }


def _one_by_one(model: OpenMythos, law: str, seed: int) -> float:
    """Tokens per second of `generate` on one request, its prompt left out."""
    subject, spent = SUBJECTS["heavy"], []
    prompts = subject.prompts()
    for tokens in (1, NEW_TOKENS):
        started = time.process_time()
        model.generate(prompts[seed % len(prompts)], tokens, DEEPEST, 1.0, None, seed=seed, **subject.rule(law))
        spent.append(time.process_time() - started)
    return (NEW_TOKENS - 1) / (spent[1] - spent[0])
