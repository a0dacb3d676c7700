"""The engine against simpler policies, against what else answers the same requests, and against itself."""

import itertools
import random
import statistics
from collections import Counter
from dataclasses import replace
from typing import Any

from benchmarks import models
from benchmarks.case import Case, Outcome, Reach, Row
from benchmarks.cases.exits import FOLDER, RULE
from benchmarks.client import Client
from benchmarks.gate import Different
from benchmarks.harness import Bench, Budget, Samples
from benchmarks.job import Job
from benchmarks.stats import Spread, ratios
from open_mythos.accounting import flops_per_token
from open_mythos.config import MythosConfig
from open_mythos.engine.readout_policy import Curve, StepCosts
from open_mythos.variants import mythos_30m

DEEPEST, N_PROMPT = 16, 17
OURS, AGAIN = "ours", "ours again"
FIXED, TOGETHER, DROPPED, AT_ONCE = "fixed depth", "until all are done", "done rows dropped", "read out at once"
POLICIES = (OURS, FIXED, TOGETHER, DROPPED, AT_ONCE, AGAIN)
SIMPLE = (FIXED, TOGETHER, DROPPED)
SAME = (OURS, DROPPED, AT_ONCE)
"""Policies that compute the same tokens."""
OWN = "its own rule"
HEAVY = Job("load", models.LOOP_HEAVY, n_loops=DEEPEST)
SUBJECTS = {
    "heavy": ("loop-heavy: 1 prelude and 1 coda layer, 16 experts x 512", HEAVY),
    "30m": ("mythos_30m at 16 loops", Job("load", mythos_30m().to_dict(), n_loops=DEEPEST)),
    "trained": ("trained `adaptive-text`", Job("load", n_loops=8, arguments={"folder": str(FOLDER), "rule": RULE})),
}
"""The models that the engine is measured on, each with its title."""
LAWS = ("uniform", "geometric")
WINDOWS = Budget(0.0, 5, 5)
DECODED = 16
"""New tokens of a peer's timed call; the first is the prompt's and left out. Shorter contexts than the engine's."""
PEERS = {
    "open-mythos 0.5.0 `generate`": ("open_mythos_0_5", replace(HEAVY, task="generate")),
    "transformers `generate`, plain Llama": ("hf", Job("generate", models.PLAIN)),
}
TASKS = {"engine": "load", "`generate`": "one_by_one"}
"""How the same requests are answered, and the task that does it."""
CROWD_ROWS, CROWD_TOKENS = 32, 16
CROWD_SECONDS = {"mixed": 8.0, "shallow": 2.0, "again": 2.0}
"""Seconds of a slice, for each second of a window elsewhere: deep answers take seconds."""
SIMULATED_LOOPS = 4000


def policies(case: Case, bench: Bench) -> Outcome:
    """Time windows of {case.title}, in turn for every policy; each round begins with another one. Gate: every answer
    that policies of the same tokens finished is the same, one of them also alone, and in float64 that of `generate`."""
    with bench.workers("engine") as [worker]:
        costs: dict[str, Any] = {}
        for i, policy in enumerate(POLICIES):
            bench.tell(f"filling: {policy}", i, len(POLICIES))
            # Other draws, so that the noise covers the luck of the depths as well.
            job = _load(case.job, bench, costs, policy=policy, seed=10**6 if policy == AGAIN else 0)
            costs = worker.prepare(policy, job)
        samples = bench.interleave({policy: (worker, policy) for policy in POLICIES}, WINDOWS, rotate=True)
        check_answers(worker)
    subject, law = case.job.arguments["subject"], case.job.arguments.get("law", OWN)
    data: dict[str, Any] = {"subject": subject, "law": law, "n_rows": case.job.rows}
    data |= summarize(samples, costs["costs"], case.job.n_loops, case.job.rows)
    rows = [
        Row(f"{case.name}.share", "share of Amdahl's limit over fixed depth", data["share"]),
        Row(f"{case.name}.ideal", "share of the ideal: loops that the tokens need, over rows x loops", data["ideal"]),
    ]
    for suffix, what, figure, peer in (
        ("", f"over fixed depth, {subject}, {law}", "over_fixed", FIXED),
        (".best", "over the best of (a), (b) and (c)", "over_best", data["best"]),
    ):
        theirs, ours = (f"{data['rates'][policy].median:,.0f} tok/s" for policy in (peer, OURS))
        ratio = data[figure]
        rows.append(Row(case.name + suffix, what, ratio.median, "x", theirs, ours, ratio, data["noise"]))
    return Outcome(rows, curves=data)


def check_answers(worker: Client) -> None:
    """Compare the finished answers of the policies that agree, and one with an engine of its own and `generate`.

    Raises:
        Different: tokens or loops differ.
    """
    answers = {policy: worker.ask("method", id=policy, name="answers") for policy in SAME}
    for policy in SAME:
        ours, theirs = answers[OURS], answers[policy]
        if wrong := [n for n in ours.keys() & theirs.keys() if ours[n] != theirs[n]]:
            raise Different(f"request {wrong[0]} has other tokens or loops when {policy!r} than {OURS!r}")
    if difference := worker.ask("method", id=OURS, name="check_alone"):
        raise Different(str(difference))


def summarize(samples: Samples, points: dict[str, Any], n_loops: int, rows: int) -> dict[str, Any]:
    """Compute rates, ratios and limits from the windows of the policies."""
    rates = {policy: [1 / s for s in samples.times(policy)] for policy in POLICIES}
    fixed = samples.readings[FIXED]
    loop_s = statistics.median(s for window in fixed for s in window["looping_s"])
    outer_s = statistics.median(s for window in fixed for s in window["reading_s"]) - loop_s
    depths = {p: sum((window["depths"] for window in samples.readings[p]), Counter()) for p in POLICIES}
    limit = amdahl(n_loops, mean(depths[OURS]), loop_s, outer_s)
    loop, outer = (Curve({n: pair[i] for n, pair in points["seconds"].items()}) for i in (0, 1))
    threshold, at = best_threshold(StepCosts(loop, outer), depths[OURS], n_loops, rows)
    best = max(SIMPLE, key=lambda policy: statistics.median(rates[policy]))
    over = ratios(rates[OURS], rates[FIXED])
    wall = {policy: [1 / s for s in samples.seconds[policy]["wall"]] for policy in POLICIES}
    return {
        "rates": {policy: Spread.of(values) for policy, values in rates.items()},
        "wall_rates": {policy: Spread.of(values) for policy, values in wall.items()},
        "depths": {policy: mean(found) for policy, found in depths.items()},
        "exits": [depths[OURS][depth] for depth in range(1, n_loops + 1)],
        "tokens": {policy: sum(w["tokens"] for w in samples.readings[policy]) for policy in POLICIES},
        "costs": points["seconds"],
        "loop_s": loop_s,
        "outer_s": outer_s,
        "limit": limit,
        "threshold": threshold,
        "threshold_rows": at,
        "over_fixed": over,
        "share": over.median / limit,
        "ideal": ideal_share(samples.readings[OURS], rows),
        "best": best,
        "over_best": ratios(rates[OURS], rates[best]),
        "over_at_once": ratios(rates[OURS], rates[AT_ONCE]),
        "noise": ratios(rates[AGAIN], rates[OURS]),
    }


def others(case: Case, bench: Bench) -> Outcome:
    """Time windows of the loop-heavy model's engine at {job.rows} rows, in turn with `generate` on one request after
    another, with 0.5.0 and with a plain model of transformers on as many rows; of every one decoding alone is timed."""
    rows, costs = case.job.rows, {}
    with bench.workers("engine", *(side for side, _ in PEERS.values())) as [worker, *peers]:
        mine = {f"{what}, {law}": (law, task) for law in LAWS for what, task in TASKS.items()}
        for name, (law, task) in mine.items():
            costs = worker.prepare(name, replace(_load(case.job, bench, costs, law=law), task=task))
        players = {name: (worker, name) for name in mine}
        info = {"heavy": {"flops_per_token": flops_per_token(MythosConfig(**case.job.model), DEEPEST)}}
        for client, (name, (_, job)) in zip(peers, PEERS.items(), strict=True):
            for tokens in (1, 1 + DECODED):
                id = f"{name} {tokens}"
                info[name] = client.prepare(id, replace(job, rows=rows, tokens=N_PROMPT, new_tokens=tokens))
                players[id] = client, id
        samples = bench.interleave(players, WINDOWS)
    rates = {name: [1 / s for s in samples.times(name)] for name in mine}
    for name in PEERS:
        calls = (samples.times(f"{name} {tokens}") for tokens in (1, 1 + DECODED))
        rates[name] = [rows * DECODED / (long - short) for short, long in zip(*calls, strict=True)]
    found = []
    for law in LAWS:
        for peer, key in (("`generate`", f"`generate`, {law}"), *((name, name) for name in PEERS)):
            ratio = ratios(rates[f"engine, {law}"], rates[key])
            theirs, ours = (f"{statistics.median(rates[name]):,.1f} tok/s" for name in (key, f"engine, {law}"))
            id, what = f"{case.name}.{law}.{peer}", f"R = {rows}, {law}, over {peer}"
            found.append(Row(id, what, ratio.median, "x", theirs, ours, spread=ratio))
    flops = {name: side["flops_per_token"] / 1e6 for name, side in info.items() if "flops_per_token" in side}
    note = " and ".join(f"{name} {each:.1f}" for name, each in flops.items())
    return Outcome(found, info, notes=[f"MFLOP per token: {note}."])


def modes(case: Case, bench: Bench) -> Outcome:
    """Time windows of {case.title}, in turn with `batch_invariant` on, off and on again; each with costs of its own."""
    with bench.workers("engine") as [worker]:
        on = worker.prepare("on", _load(case.job, bench, {}))
        worker.prepare("off", _load(case.job, bench, {}, batch_invariant=False))
        worker.prepare("on again", _load(case.job, bench, on))
        players = {name: (worker, name) for name in ("on", "off", "on again")}
        samples = bench.interleave(players, WINDOWS, rotate=True)
    ratio, noise = samples.ratio("off", "on"), samples.ratio("on", "on again")
    off, on = (f"{1 / samples.median(name):,.0f} tok/s" for name in ("off", "on"))
    what = f"batch_invariant on over off, {case.job.arguments['subject']}, R = {case.job.rows}"
    return Outcome([Row(case.name, what, ratio.median, "x", off, on, spread=ratio, noise=noise)])


def fairness(case: Case, bench: Bench) -> Outcome:
    """Time slices of two loads of equally many clients, each of which asks again as soon as its answer is complete.
    Both run as many loop-tokens in each loop as there are rows, but for the loop in which a client asks again and
    nobody waits: in the mixed load half of the clients ask for one loop and half for 16, in the other all ask for one,
    which is each deep answer replaced by 16 shallow ones. The ideal is perfect sharing: every client, waiting or not,
    gets an equal part of the loop-tokens, at most one a tick, a tick being as many loop-tokens as there are rows."""
    half = case.job.arguments["clients"] // 2
    depths = {"mixed": [1, DEEPEST] * half, "shallow": [1] * 2 * half, "again": [1] * 2 * half}
    with bench.workers("clients") as [worker]:
        costs: dict[str, Any] = {}
        for name, each in depths.items():
            job = _load(case.job, bench, costs, depths=each)
            job.arguments["seconds"] *= CROWD_SECONDS[name]
            costs = worker.prepare(name, replace(job, task="crowd", new_tokens=CROWD_TOKENS))
        samples = bench.interleave({name: (worker, name) for name in depths}, WINDOWS)
        waiting = worker.ask("method", id="mixed", name="waiting")
    p95 = {name: [_p95(window[1]["gaps"]) for window in found] for name, found in samples.readings.items()}
    over, noise = ratios(p95["mixed"], p95["shallow"]), ratios(p95["again"], p95["shallow"])
    shallow, mixed = (f"{1e3 * statistics.median(p95[name]):.3g} ms" for name in ("shallow", "mixed"))
    what = "p95 between a shallow request's tokens, half of the load deep over all shallow"
    rows = [Row(case.name, what, over.median, "x", shallow, mixed, spread=over, noise=noise)]
    for kind, depth in (("shallow", 1), ("deep", DEEPEST)):
        ideal = CROWD_TOKENS * depth / min(1.0, CROWD_ROWS / (2 * half))
        # Requests that still wait have waited so long already.
        extra = {"waits": [ticks for asked, ticks in waiting if asked == depth], "turnarounds": []}
        for figure, name in (("turnarounds", "turnaround"), ("waits", "wait")):
            ticks = [x for window in samples.readings["mixed"] for x in window[depth][figure]] + extra[figure]
            if ticks:
                seen = Spread.of([each / ideal for each in ticks])
                title = f"{2 * half} clients, {kind} requests: {name} over the ideal of a whole answer"
                rows.append(Row(f"{case.name}.{kind}.{name}", title, seen.median, "of the ideal", spread=seen))
    return Outcome(rows)


def arrivals(case: Case, bench: Bench) -> Outcome:
    """Answer requests that arrive at random, {case.title}; the full load is what that many rows could answer with no
    row ever waiting. Gate: all policies give the same answers. Normalised latency: the seconds from the arrival of a
    request to its end, by its tokens."""
    n_requests = (2 if bench.settings.quick else 6) * case.job.rows
    policies = {name: name.removesuffix(" again") for name in (OURS, DROPPED, AT_ONCE, AGAIN)}
    with bench.workers("clients") as [worker]:
        costs: dict[str, Any] = {}
        for name, policy in policies.items():
            job = _load(case.job, bench, costs, policy=policy, requests=n_requests)
            costs = worker.prepare(name, replace(job, task="arrivals"))
        samples = bench.interleave({name: (worker, name) for name in policies}, WINDOWS, rotate=True)
    windows = samples.readings
    answers = {name: {n: a for window in windows[name] for n, a in window["answers"].items()} for name in SAME}
    if any(answers[name][n] != answers[OURS][n] for name in SAME for n in answers[name].keys() & answers[OURS].keys()):
        raise Different("policies answer the same requests with other tokens or loops")
    found = []
    for figure, title, of in (
        ("median", "median normalised latency", lambda window: statistics.median(window["latencies"])),
        ("p95", "p95 of the normalised latency", lambda window: _p95(window["latencies"])),
        ("rate", "tokens a second", lambda window: window["rate"]),
    ):
        values = {name: [of(window) for window in found] for name, found in windows.items()}
        noise = ratios(values[AGAIN], values[OURS])
        for peer in (DROPPED, AT_ONCE):
            ratio = ratios(values[OURS], values[peer])
            shown = (f"{statistics.median(values[name]):.3g}" for name in (peer, OURS))
            id, what = f"{case.name}.{figure}.{peer}", f"{case.title}: {title}, over {peer}"
            found.append(Row(id, what, ratio.median, "x", *shown, spread=ratio, noise=noise))
    return Outcome(found)


def _load(job: Job, bench: Bench, costs: dict[str, Any], **arguments: Any) -> Job:
    """Make the job of one load; `costs` is the information on an earlier one, whose costs it shares."""
    given = {"seconds": 0.2 if bench.settings.quick else 1.0, **job.arguments, **arguments}
    return replace(job, arguments=given | ({"costs": costs["costs"]} if costs else {}))


def _p95(gaps: list[float]) -> float:
    return statistics.quantiles(gaps, n=20, method="inclusive")[-1]


def mean(depths: Counter[int]) -> float:
    """Return the loops per token."""
    return sum(depth * n for depth, n in depths.items()) / depths.total()


def amdahl(n_loops: int, depth: float, loop_s: float, outer_s: float) -> float:
    """Return Amdahl's limit over fixed depth: a full loop costs `loop_s`, everything around the loops `outer_s`."""
    return (n_loops * loop_s + outer_s) / (depth * loop_s + outer_s)


def ideal_share(windows: list[dict[str, Any]], rows: int) -> float:
    """Return the loops that tokens needed over those that the rows could have run: every step is a loop of all rows."""
    needed = sum(depth * n for window in windows for depth, n in window["depths"].items())
    return needed / (rows * sum(len(window["looping_s"]) + len(window["reading_s"]) for window in windows))


def best_threshold(costs: StepCosts, depths: Counter[int], n_loops: int, rows: int) -> tuple[float, int]:
    """Simulate all rules that read out whenever so many rows have exited -> the best over fixed depth, and its rows.

    Depths are drawn from `depths`. The best is less than Amdahl's limit: to read out few rows costs nearly as much as
    to read out many, and a loop that some rows wait for nearly as much as a loop of all.
    """
    fixed = rows / (n_loops * costs.loop(rows) + costs.outer(rows))
    thresholds = sorted({max(1, round(rows * share / 16)) for share in range(1, 17)})
    best, at = max((_simulated_rate(costs, depths, rows, threshold), threshold) for threshold in thresholds)
    return best / fixed, at


def _simulated_rate(costs: StepCosts, depths: Counter[int], rows: int, threshold: int) -> float:
    """Return the tokens per second of the rule."""
    rng = random.Random(0)
    values, weights = list(depths), list(depths.values())
    left = Counter(rng.choices(values, weights, k=rows))
    looping, exited, spent, tokens = rows, 0, 0.0, 0
    for _ in range(SIMULATED_LOOPS):
        spent += costs.loop(looping)
        left = Counter({depth - 1: n for depth, n in left.items()})
        gone = left.pop(0, 0)
        looping, exited = looping - gone, exited + gone
        if exited >= threshold or not looping:
            spent, tokens = spent + costs.outer(exited), tokens + exited
            left.update(rng.choices(values, weights, k=exited))
            looping, exited = rows, 0
    return tokens / spent


def cases() -> list[Case]:
    """List the cases of the engine, in the report's order."""
    found = []
    for subject, (_, job) in SUBJECTS.items():
        for law in (OWN,) if subject == "trained" else LAWS:
            chosen = {} if law == OWN else {"law": law}
            reach = {".share": Reach(0.9), ".best": Reach(0.97)}
            reach |= {"": Reach({"uniform": 1.5, "geometric": 3.0}[law])} if subject == "heavy" else {}
            for rows in (1, 8, 16, 32, 64):
                name = "_".join(["engine", *([] if subject == "heavy" else [subject]), *chosen.values(), str(rows)])
                given = replace(job, rows=rows, arguments={**job.arguments, **chosen, "subject": subject})
                about = name, f"{subject}, {law}, R = {rows}", policies
                found.append(Case(*about, given, reach, side="engine", page="engine"))
    heavy = replace(HEAVY, arguments={"subject": "heavy", "law": "geometric"})
    for rows in (1, 8, 32):
        about = f"engine_others_{rows}", f"beside others, R = {rows}", others
        found.append(Case(*about, replace(heavy, rows=rows), page="engine"))
    for subject, (_, job) in list(SUBJECTS.items())[:2]:
        for rows in (1, 8, 32):
            name = f"engine_modes_{rows}" if subject == "heavy" else f"engine_modes_{subject}_{rows}"
            given = replace(job, rows=rows, arguments={"subject": subject, "law": "geometric"})
            found.append(Case(name, f"{subject}, batch_invariant, R = {rows}", modes, given, page="engine"))
    for rows, share in itertools.product((8, 32), (0.5, 0.8)):
        job = replace(heavy, rows=rows, arguments={**heavy.arguments, "share": share})
        about = f"engine_arrivals_{rows}_{share:.0%}".rstrip("%"), f"{share:.0%} of the load, R = {rows}", arrivals
        found.append(Case(*about, job, page="engine"))
    for clients in (CROWD_ROWS, 2 * CROWD_ROWS):
        job = replace(heavy, rows=CROWD_ROWS, arguments={**heavy.arguments, "clients": clients})
        about = f"engine_fairness_{clients}", f"{clients} clients", fairness
        found.append(Case(*about, job, {"": Reach(1.5, at_most=True)}, page="engine"))
    return found
