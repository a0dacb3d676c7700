"""The parts of `mythos analyze`: each takes the prompts and returns numbers, tables and figures.

A part is an entry of `PARTS`; a new analysis is one more.
"""

from collections.abc import Callable

import torch

from open_mythos.analysis.breadth import CANDIDATE, HELD, breadth, path_mass
from open_mythos.analysis.fixed_point import KINDS, follow
from open_mythos.analysis.injection import attenuate, swap
from open_mythos.analysis.jacobian import spectrum
from open_mythos.analysis.lens import JUMP_SHARE, MOVED_RANK, Lens, climb_or_jump, read_lens
from open_mythos.analysis.loop_roles import loop_roles
from open_mythos.analysis.loop_roles_report import draw_effects, draw_split, effect_table, split_table, verdict
from open_mythos.analysis.routing import routing
from open_mythos.analysis.section import Section, Subject, figure, numbers, some, text
from open_mythos.analysis.sweep import depth_sweep
from open_mythos.reports.document import Figure, Part, Table

NEAR = 0.001
"""Nats: a loss this near to the lowest is as good."""


def sweep(subject: Subject) -> Section:
    found = depth_sweep(subject.model, subject.input_ids, subject.labels, subject.n_beyond)
    near = 1 + int((found.loss <= found.loss.min() + NEAR).int().argmax())
    at = found.reference - 1
    finding = (
        f"The loss is {found.loss[0]:.3f} nats per token at 1 loop, {found.loss[at]:.3f} at the trained {at + 1} and "
        f"{found.loss[-1]:.3f} at {subject.n_beyond}; {near} loops come within {NEAR:g} of the lowest."
    )
    shown = some(subject.n_beyond, near, found.reference)
    table = Table(
        ("loops", "loss", "accuracy", f"KL to {at + 1} loops", f"same choice as at {at + 1}"),
        [
            (
                str(n),
                *(f"{x[n - 1]:.3f}" for x in (found.loss, found.accuracy, found.kl_to_reference, found.same_choice)),
            )
            for n in shown
        ],
    )
    return Section(
        "Depth sweep",
        finding,
        numbers(found),
        [
            table,
            figure("sweep", "Loss by loops.", {"loss": found.loss}, "nats per token", first=1),
        ],
    )


def lens(subject: Subject) -> Section:
    found = subject.lens
    climb = climb_or_jump(found.rank)
    direct = climb_or_jump(read_lens(subject.model, subject.input_ids, subject.n_loops, subject.where, coda=False).rank)
    if climb.n_moved:
        finding = (
            f"Of {climb.n_moved} answers that started at rank {MOVED_RANK} or below, {climb.climb:.0%} climb, "
            f"{climb.jump:.0%} jump (more than {JUMP_SHARE:.0%} of the way in one loop) and {climb.wander:.0%} wander."
        )
    else:
        finding = f"No answer started at rank {MOVED_RANK} or below, so there is no way to the top to follow."
    head = (
        "read through",
        "answers",
        "moved",
        "climb",
        "jump",
        "wander",
        "never rises",
        "by chance",
        "largest drop",
        "by chance",
        "even steps",
        "retraced",
    )
    rows = []
    for name, c in (("the coda", climb), ("norm and head alone", direct)):
        by_chance = [
            f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in (c.monotone_control, c.largest_drop_control)
        ]
        shares = [f"{x:.2f}" for x in (c.climb, c.jump, c.wander, c.monotone)]
        drops = [f"{c.largest_drop:.2f}", by_chance[1], f"{c.even_drop:.2f}", f"{c.retraced:.2f}"]
        rows.append((name, str(c.n_tokens), str(c.n_moved), *shares, by_chance[0], *drops))
    last = found.top.shape[1] - 1
    by_loop = Table(
        ("loops", "rank of the last answer", "entropy", "1st", "2nd", "3rd"),
        [
            (str(n), str(int(found.rank[n, last])), f"{found.entropy[n, last]:.2f}", *_tokens(subject, found, n, last))
            for n in range(subject.n_loops + 1)
        ],
    )
    quantiles = found.rank.double().quantile(torch.tensor([0.5, 0.75, 0.95], dtype=torch.float64), dim=1)
    curves = {"median": quantiles[0], "75 %": quantiles[1], "95 %": quantiles[2]}
    caption = "Rank of the last answer by loops, over tokens; 1 is the first choice."
    record = {"coda": numbers(climb), "head": numbers(direct), "read": numbers(found)}
    return Section(
        "Read-out lens: do answers climb or jump?",
        finding,
        record,
        [
            Table(head, rows),
            "The last place looked at, loop by loop:",
            by_loop,
            figure("ranks", caption, curves, "rank", log_y=True),
        ],
    )


def fixed_point(subject: Subject) -> Section:
    found = follow(subject.model, subject.input_ids, subject.n_beyond, subject.where)
    shares = found.shares
    finding = (
        f"After {subject.n_beyond} loops "
        + ", ".join(f"{shares[kind]:.0%} of the tokens are '{kind}'" for kind in KINDS if shares[kind])
        + f"; the median step of the last loop is {found.step[-1].median():.1e} of the state."
    )
    periods = sorted(set(found.period[found.period > 0].tolist()))
    if periods:
        finding += f" Periods seen: {', '.join(map(str, periods))}."
    table = Table(
        ("loops", "step / state", "5 %", "95 %", "cosine to the state before", "turn of the step", "norm"),
        [
            (
                str(n),
                *(f"{found.step[n - 1].quantile(q):.2e}" for q in (0.5, 0.05, 0.95)),
                f"{found.cosine[n - 1].median():.4f}",
                f"{found.turn[n - 2].median():.2f}" if n > 1 else "",
                f"{found.norm[n].median():.2f}",
            )
            for n in some(subject.n_beyond)
        ],
    )
    floor = found.step.clamp(min=1e-12)
    curves = {"median": floor.median(dim=1).values}
    curves |= {f"{q:.0%}": floor.quantile(q, dim=1) for q in (0.05, 0.95)}
    caption = "Length of each loop's step as a share of the state, over tokens."
    record = {"shares": shares} | numbers(found)
    return Section(
        "Fixed point, orbit or drift?",
        finding,
        record,
        [
            table,
            figure("steps", caption, curves, "|step| / |state|", first=1, log_y=True),
        ],
    )


def jacobian(subject: Subject) -> Section:
    ids = subject.input_ids[:1]
    places = subject.where[0].nonzero()[:, 0].tolist()
    tokens = sorted({places[round(i * (len(places) - 1) / 3)] for i in range(4)})
    asked = [(n, token) for n in sorted({subject.n_loops, subject.n_beyond}) for token in (None, *tokens)]
    found = [(n, token, spectrum(subject.model, ids, n, token)) for n, token in asked]
    whole = {n: s.radius for n, token, s in found if token is None}
    finding = "The spectral radius of the next loop's Jacobian over the whole first prompt is " + " and ".join(
        f"{radius:.3f} after {n} loops" for n, radius in whole.items()
    )
    table = Table(
        ("loops before", "state that changes", "radius", "largest eigenvalue", "residual", "products"),
        [
            (
                str(n),
                "all tokens" if token is None else f"token {token}, {text(subject, int(ids[0, token]))}",
                f"{s.radius:.4f}",
                f"{complex(s.eigenvalues[0]):.3f}",
                f"{s.residual:.0e}",
                str(s.n_products),
            )
            for n, token, s in found
        ],
    )
    record = [{"loops": n, "token": token} | numbers(s) for n, token, s in found]
    return Section("Spectral radius of the loop", finding + ".", {"spectra": record}, [table])


def injection(subject: Subject) -> Section:
    weaker = attenuate(subject.model, subject.input_ids, subject.n_loops, subject.where)
    swapped = swap(subject.model, subject.input_ids, subject.other_ids, subject.n_loops, subject.where)
    half = weaker.factors.index(0.5)
    finding = (
        f"With half the input in every loop {weaker.same_choice[half]:.0%} of the first choices stay (KL "
        f"{weaker.every_loop[half]:.3f} nats). "
    )
    if swapped.n_tokens:
        turned = (swapped.new_after > 0.5).nonzero()[:, 0].tolist()
        finding += (
            f"With another prompt's input after {subject.n_loops} loops, most answers are the other prompt's "
            + (
                f"after {turned[0]} more loops."
                if turned
                else f"at no time in {len(swapped.new_after) - 1} more loops."
            )
        )
    else:
        finding += "The two prompts' answers nowhere differ, so a swap tells nothing: give --swap."
    by_loop = Table(
        ("input times", "KL, every loop", "same choice", *(f"KL, loop {t + 1}" for t in range(subject.n_loops))),
        [
            (
                f"{f:g}",
                f"{weaker.every_loop[i]:.3f}",
                f"{weaker.same_choice[i]:.2f}",
                *(f"{x:.3f}" for x in weaker.one_loop[i]),
            )
            for i, f in enumerate(weaker.factors)
        ],
    )
    parts: list[Part] = [
        by_loop,
        figure(
            "attenuation",
            "What a weaker or stronger input in every loop does to the answer.",
            {"all loops": weaker.every_loop},
            "KL at the output, nats",
            x="input times",
            xs=weaker.factors,
        ),
    ]
    if swapped.n_tokens:
        head = (
            "loops",
            "swapped at this loop: new",
            "old",
            "nearer new",
            "so many loops after: new",
            "old",
            "nearer new",
        )
        columns = (
            swapped.new_at,
            swapped.old_at,
            swapped.nearer_at,
            swapped.new_after,
            swapped.old_after,
            swapped.nearer_after,
        )
        table = Table(head, [(str(n), *(f"{x[n]:.2f}" for x in columns)) for n in range(subject.n_loops + 1)])
        curves = {"the other prompt's answer": swapped.new_after, "the own answer": swapped.old_after}
        caption = f"Whose answer it is after the input was swapped, {swapped.n_tokens} tokens."
        parts += [
            f"Another prompt's input, at {swapped.n_tokens} places where the two answers differ:",
            table,
            figure("swap", caption, curves, "share of tokens", x="loops since the swap"),
        ]
    record = {"attenuation": numbers(weaker), "swap": numbers(swapped)}
    return Section("The input in every loop", finding, record, parts)


def experts(subject: Subject) -> Section:
    found = routing(subject.model, subject.input_ids, subject.n_loops, subject.where)
    title = "Experts by loop"
    if found is None:
        return Section(title, "The model has no experts.", {}, [])
    if subject.n_loops < 2:
        return Section(title, "One loop has no next loop to compare with.", numbers(found), [])
    kept, chance, changed = (x.mean(1) for x in (found.kept, found.kept_by_chance, found.changed))
    finding = (
        f"From one loop to the next {changed.mean():.0%} of the tokens change their set of experts; of its experts a "
        f"token keeps {kept.mean():.0%} (by the load alone it would be {chance.mean():.0%})."
    )
    table = Table(
        ("loop", "set changes in the next", "experts kept", "by chance", "load entropy", "largest load times even"),
        [
            (
                str(t + 1),
                *(f"{x[t]:.2f}" if t < len(kept) else "" for x in (changed, kept, chance)),
                f"{found.load_entropy[t].mean():.3f}",
                f"{found.load[t].max() * found.load.shape[-1]:.1f}",
            )
            for t in range(subject.n_loops)
        ],
    )
    curves = {"kept": kept, "kept by chance": chance, "set changes": changed}
    return Section(
        title,
        finding,
        numbers(found),
        [
            table,
            figure("experts", "Experts from each loop to the next.", curves, "share", first=1),
        ],
    )


def roles(subject: Subject) -> Section:
    title = "Does each loop do something of its own?"
    if subject.n_loops < 2:
        return Section(title, "One loop has no next loop to compare with.", {}, [])
    found = [loop_roles(subject.model, subject.input_ids, subject.n_loops, subject.where)]
    shown = {"this model": found}
    head, rows = split_table(found)
    short = [
        head.index(name) for name in ("loops", "change", "from the function", "from the state", "function's share")
    ]
    parts: list[Part] = [
        Table([head[i] for i in short], [[row[i] for i in short] for row in rows]),
        Figure("split", "How much of a change is due to the loop index.", lambda path: draw_split(shown, path)),
        Table(*effect_table(found)),
        Figure("effects", "What disturbing the loops does to the answer.", lambda path: draw_effects(shown, path)),
    ]
    return Section(title, verdict(found), found[0].to_dict(), parts)


def candidates(subject: Subject) -> Section:
    found = breadth(subject.lens)
    finding = (
        f"Two or more tokens above {CANDIDATE:g} are in the read-out of {found.several[1:].max():.0%} of the places at "
        f"most; a place has {found.alternatives:.2f} such alternatives to its last answer in all, of which "
        f"{found.rose_and_fell:.0%} rise and fall."
    )
    columns = (found.entropy, found.candidates, found.several)
    parts: list[Part] = [
        Table(
            ("loops", "entropy", "candidates", "places with several"),
            [(str(n), *(f"{x[n]:.3f}" for x in columns)) for n in range(subject.n_loops + 1)],
        )
    ]
    curves = {"candidates": found.candidates, "exp(entropy)": found.entropy.exp()}
    parts.append(figure("candidates", "Tokens held at once in the read-out.", curves, "tokens"))
    record = numbers(found)
    if subject.pointers:
        path = path_mass(subject.model, subject.input_ids, subject.n_loops)
        H = path.mass.shape[1]
        trained = slice(1, H)
        finding += (
            f" On the way through the pointers {path.in_step[trained].mean():.0%} of the read-outs have more than "
            f"{HELD:g} on the node that is as many hops away as loops were run, and {path.several[trained].mean():.0%} "
            f"hold two nodes or more."
        )
        rows = [
            (
                str(n),
                *(f"{x:.3f}" for x in path.mass[n]),
                *(f"{x[n]:.2f}" for x in (path.off_path, path.one, path.several, path.in_step)),
            )
            for n in range(subject.n_loops + 1)
        ]
        head = ("loops", *(f"hop {j}" for j in range(H)), "elsewhere", "on one", "on several", "in step")
        hops = {f"hop {j}": path.mass[:, j] for j in range(H)}
        parts += [
            "Probability on the nodes of the way:",
            Table(head, rows),
            figure("path", "Where on the way the read-out is.", hops, "mean probability"),
        ]
        record |= {"path": numbers(path)}
    return Section("Several next steps at once?", finding, record, parts)


PARTS: dict[str, Callable[[Subject], Section]] = {
    "sweep": sweep,
    "lens": lens,
    "fixed_point": fixed_point,
    "jacobian": jacobian,
    "injection": injection,
    "routing": experts,
    "loop_roles": roles,
    "breadth": candidates,
}
"""What is looked at, in the order of the report; the name is that in analysis.json."""


def _tokens(subject: Subject, lens: Lens, n: int, place: int) -> list[str]:
    best = zip(lens.top[n, place, :3].tolist(), lens.top_p[n, place, :3].tolist(), strict=True)
    return [f"{text(subject, token)} {p:.2f}" for token, p in best]
