"""Cases that time this package against a peer: open-mythos 0.5.0, a model of transformers, or another checkout."""

import statistics
from dataclasses import replace
from typing import Any

from benchmarks.case import Case, Outcome, Row
from benchmarks.client import Client
from benchmarks.harness import Bench, Budget, Samples
from benchmarks.job import Job
from benchmarks.products import Workload, workload_of
from open_mythos.accounting import flops_per_token
from open_mythos.config import MythosConfig

PEER = "open_mythos_0_5"


def pair(case: Case, bench: Bench) -> Outcome:
    """Time a task on 0.5.0 and on ours, with the same weights: {work} Self-spread: {self_spread}."""
    job = replace(case.job, device=bench.settings.device)
    work = workload_of(job)
    sides = [PEER, "ours", *(["ours"] if case.second_worker else []), "limits"]
    with bench.workers(*sides) as [peer, *ours, limits]:
        info = bench.same_weights(peer, ours, job, **case.ours)
        agreement = bench.gate(peer, ours)
        machine, found = limit_players(limits, work, job.device)
        samples = bench.interleave(trio(peer, ours[0], ours[-1]) | machine, case.budget)
    row, described = ratio_row(case.name, case.title, samples), samples.sides("peer", "ours", **info)
    shares = {name: share(samples, name, work) for name in described}
    row.peer_share, row.ours_share = (f"{x:.0%}" for x in shares.values())
    for name, side, changes in (("peer", PEER, {}), ("ours", "ours", case.ours)):
        seconds, record = samples.median(name), described[name]
        record |= {"seconds": seconds, "share": shares[name], "flops": work.flops, "bytes": work.bytes}
        record |= {"tokens_per_s": job.rows * job.tokens / seconds} if job.task == "train" else {}
        record |= {"peak_bytes": bench.peak_bytes(side, replace(job, **changes))} if case.memory else {}
    outcome = Outcome([row], described, agreement, found)
    if ".share" in case.reach:
        title = f"{case.title}: share of the limit"
        outcome.rows.append(Row(f"{case.name}.share", title, shares["ours"], "share", row.peer_share))
    return outcome


def checkout(case: Case, bench: Bench) -> Outcome:
    """Time a task of another checkout of this package and of this one: {work} Self-spread: a second process of ours."""
    job = replace(case.job, device=bench.settings.device, **case.ours)
    with bench.workers(f"{case.side}@{bench.settings.against}", case.side, case.side) as [peer, *ours]:
        info = {"ours": ours[0].prepare("main", job)}
        if "costs" in info["ours"]:
            # The engines read out by the same costs; measured three times they would differ by chance.
            job = replace(job, arguments={**job.arguments, "costs": info["ours"].pop("costs")})
        ours[1].prepare("main", job)
        info["peer"] = peer.prepare("main", job)
        agreement = bench.gate(peer, ours)
        samples = bench.interleave(trio(peer, ours[0], ours[1]), Budget(15.0, 4, 12), rotate=True)
    info["peer"].pop("costs", None)
    sides = samples.sides("peer", "ours", **info)
    return Outcome([ratio_row(f"{case.name}.checkout", case.title, samples)], sides, agreement)


def depths(case: Case, bench: Bench) -> Outcome:
    """Time a training step of {job.rows} x {job.tokens} tokens at depths {job.depths} against every row at the deepest.
    Gate: every row in a step of its own. What the loop counts allow: a step at depth 1 and one at the deepest give the
    cost of a loop and of the rest; a step whose rows paid for their own loops alone would take rest + mean depth *
    loop. Self-spread: a second process."""
    job = replace(case.job, device=bench.settings.device)
    deepest = max(job.depths)
    level = replace(job, depths=(deepest,) * job.rows)
    with bench.workers("ours", "ours") as [ours, again]:
        info, _ = (client.prepare("depths", job) for client in (ours, again))
        ours.prepare("rows", replace(job, task="train_rows"))
        ours.prepare("deepest", level)
        # The same model, whose tokens halt in the deepest loop or in the last that their row may run.
        ours.prepare("one", replace(level, depths=(1,) * job.rows, halt_at=deepest))
        agreement = bench.gate(ours, [ours], "depths", reference="rows")
        players = {"deepest": (ours, "deepest"), "ours": (ours, "depths"), "again": (again, "depths")}
        samples = bench.interleave(players | {"one": (ours, "one")}, Budget(80.0, 4, 9))
    allowed = []
    for whole, one in zip(samples.times("deepest"), samples.times("one"), strict=True):
        loop = (whole - one) / (deepest - 1)
        allowed.append(whole / (one - loop + loop * sum(job.depths) / job.rows))
    row, possible = ratio_row(case.name, case.title, samples, peer="deepest"), statistics.median(allowed)
    title = f"{case.title}: share of the {possible:.2f} that the loop counts allow"
    share_row = Row(f"{case.name}.allowed", title, row.value / possible, "share")
    sides = samples.sides("deepest", "ours", "one", ours=info)
    return Outcome([row, share_row], sides, agreement, curves={"allowed": allowed})


def transformer(case: Case, bench: Bench) -> Outcome:
    """Time greedy `generate`, 64 prompt tokens and 32 new ones, and a prefill of 4 x 512 tokens into a cache, with the
    last position's logits, on both sides. Weights are random, so there is no gate: ours is compared with 0.5.0 in the
    cases generate_mid. transformers runs with its defaults, which compile nothing. Self-spread: {self_spread}."""
    generate = {f"b{rows}": Job("generate", rows=rows, tokens=64, new_tokens=32) for rows in (1, 4)}
    tasks = {**generate, "prefill": Job("prefill", rows=4, tokens=512)}
    tasks |= {f"{id}_compiled": replace(job, compiled=True) for id, job in generate.items()}
    outcome = Outcome()
    with bench.workers("hf", "ours", "ours") as clients:
        for id, task in tasks.items():
            job = replace(task, n_loops=case.job.n_loops, device=bench.settings.device, model=case.job.model)
            for client in clients:
                theirs = {"model": case.job.arguments["transformer"], "compiled": False} if client.side == "hf" else {}
                outcome.sides.setdefault(client.side, client.prepare(id, replace(job, **theirs)))
            samples = bench.interleave(trio(clients[0], clients[1], clients[2], id))
            what = "prefill 4 x 512" if id == "prefill" else f"tokens/s, batch {task.rows}"
            title = f"{case.title}: {what}{', ours compiled' if task.compiled else ''}"
            row = ratio_row(f"{case.name}_{id}", title, samples)
            if task.task == "generate":
                tokens = task.rows * task.new_tokens
                row.peer, row.ours = (f"{tokens / samples.median(side):.1f} tok/s" for side in ("peer", "ours"))
            outcome.rows.append(row)
    ours = flops_per_token(MythosConfig(**case.job.model), case.job.n_loops)
    theirs = outcome.sides["hf"]["flops_per_token"]
    outcome.sides["ours"]["flops_per_token"] = ours
    outcome.notes.append(f"FLOPs per token: {theirs / 1e6:.1f} M, ours {ours / 1e6:.1f} M.")
    return outcome


def training_memory(case: Case, bench: Bench) -> Outcome:
    """Measure the peak resident memory of a process of its own for each side, above what is resident after the imports:
    model, two steps, gradients. No optimizer. On CUDA the allocator's peak. Time: interleaved with the step without
    checkpoints."""
    job = replace(case.job, device=bench.settings.device)
    checkpointed = replace(job, checkpoint=True)
    peaks = {PEER: bench.peak_bytes(PEER, job), "ours": bench.peak_bytes("ours", job)}
    peaks |= {"again": bench.peak_bytes("ours", job), "checkpointed": bench.peak_bytes("ours", checkpointed)}
    with bench.workers(PEER, "ours") as [peer, ours]:
        bench.same_weights(peer, [ours], job, checkpoint=True)
        agreement = bench.gate(peer, [ours])
        ours.prepare("plain", job)
        samples = bench.interleave(trio(peer, ours, ours) | {"plain": (ours, "plain")}, Budget(60.0, 3, 7))
    title, slower = f"{case.title}: checkpointed, time over without", samples.ratio("ours", "plain")
    time, wall = ratio_row(f"{case.name}.time", title, samples, "plain"), samples.ratio("ours", "plain", "wall").median
    time = replace(time, value=slower.median, spread=slower, peer=f"without: {time.peer}", wall=wall)
    rows = []
    for suffix, title, side in (("", "", "ours"), (".checkpointed", ": checkpointed", "checkpointed")):
        theirs, ours = (f"{peaks[name] / 2**20:.0f} MiB" for name in (PEER, side))
        value = peaks[side] / peaks[PEER]
        rows.append(Row(f"{case.name}{suffix}", f"{case.title}{title}", value, "of the peer's", theirs, ours))
    notes = [
        f"Checkpointed over 0.5.0, time: {samples.ratio('ours', 'peer').median:.2f}.",
        f"Two processes of ours: {peaks['again'] / peaks['ours']:.3f} of each other.",
    ]
    return Outcome([*rows, time], {name: {"peak_bytes": peak} for name, peak in peaks.items()}, agreement, notes=notes)


def building(case: Case, bench: Bench) -> Outcome:
    """Time construction alone, in a process that has built and dropped a model. Self-spread: the same process again."""
    with bench.workers(PEER, "ours") as [peer, ours]:
        for client in (peer, ours):
            client.prepare("main", case.job)
        samples = bench.interleave(trio(peer, ours, ours), Budget(25.0, 3, 9))
    notes = [f"{samples.readings['ours'][-1]['parameters']:,} parameters."]
    outcome = Outcome([ratio_row(case.name, case.title, samples)], notes=notes)
    if ".ms" in case.reach:
        own, slowest = samples.median("ours"), max(samples.times("ours"))
        title = f"{case.title}: ours alone"
        outcome.rows.append(Row(f"{case.name}.ms", title, 1e3 * own, "ms", ours=seconds_text(slowest)))
    return outcome


def cache_bytes(case: Case, bench: Bench) -> Outcome:
    """Add up the storages of the cache after a prompt of {job.tokens} tokens and {job.new_tokens} decoded ones, unused
    room included. The experts are few and small, which the cache does not depend on. Nothing is timed."""
    found = _info(case, bench)
    peer, ours = (found[side]["bytes_per_token"] for side in (PEER, "ours"))
    row = Row(case.name, case.title, peer / ours, peer=f"{peer:,.0f} B/token", ours=f"{ours:,.0f} B/token")
    return Outcome([row], sides=found)


def long_rope(case: Case, bench: Bench) -> Outcome:
    """Measure the bytes of parameters and buffers of the model on the meta device, less those of the same model for 1
    token, and the error of cosine and sine of every position against float64. Nothing is timed."""
    found = _info(case, bench)
    sides = found[PEER], found["ours"]
    theirs, ours = (f"{side['bytes'] / 2**20:.0f} MiB" for side in sides)
    rows = [Row(f"{case.name}.bytes", f"{case.title}: resident", sides[1]["bytes"], "B", theirs, ours)]
    theirs, ours = (f"{side['error']:.1e}" for side in sides)
    rows.append(Row(f"{case.name}.error", f"{case.title}: largest error", sides[1]["error"], "", theirs, ours))
    return Outcome(rows, sides=found)


def _info(case: Case, bench: Bench) -> dict[str, dict[str, Any]]:
    """Prepare the job on both sides -> what each measured of it."""
    with bench.workers(PEER, "ours") as clients:
        return {client.side: client.prepare("main", case.job) for client in clients}


def trio(peer: Client, ours: Client, again: Client, id: str = "main") -> dict[str, tuple[Client, str]]:
    """Return the players of a ratio: both sides, and ours once more for the noise."""
    return {"peer": (peer, id), "ours": (ours, id), "again": (again, id)}


def limit_players(limits: Client, work: Workload, device: str) -> tuple[dict[str, tuple[Client, str]], dict[str, Any]]:
    """Prepare the machine's limits, to be measured in every round -> the players, and the kernels' rates by shape."""
    players, found = [], {}
    if work.products:
        job = Job("products", device=device, arguments={"shapes": work.shapes})
        found = {"shapes": work.shapes, "rates": limits.prepare("products", job)["rates"]}
        players.append("products")
    if work.bytes:
        limits.prepare("stream", Job("stream", device=device))
        players.append("stream")
    return {name: (limits, name) for name in players}, found


def share(samples: Samples, player: str, work: Workload) -> float:
    """Return the time that the machine's limits would leave over the time taken: the median over rounds."""
    times = samples.times(player)
    rates = [reading["rates"] for reading in samples.readings.get("products", ())] or [()] * len(times)
    streams = [reading["read"] for reading in samples.readings.get("stream", ())] or [1.0] * len(times)
    return statistics.median(work.seconds(r, s) / t for r, s, t in zip(rates, streams, times, strict=True))


def ratio_row(id: str, title: str, samples: Samples, peer: str = "peer") -> Row:
    """Make the row of the peer's time over ours."""
    spread, noise = samples.ratio(peer, "ours"), samples.ratio("ours", "again")
    theirs, ours = (seconds_text(samples.median(player)) for player in (peer, "ours"))
    return Row(id, title, spread.median, "x", theirs, ours, spread, noise, samples.ratio(peer, "ours", "wall").median)


def seconds_text(seconds: float) -> str:
    """Write seconds with their unit."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
