"""The answer after each loop, and how the final answer gets to the top: does it climb or jump?

Shapes: B rows, T tokens, L loops, V vocabulary, N chosen tokens, K listed tokens of the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.section import Section, Subject, figure, numbers
from open_mythos.analysis.unroll import chosen, unroll
from open_mythos.checks import check_int
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating
from open_mythos.reports.document import Table

MOVED_RANK = 4
"""Rank before the first loop from which on an answer counts as moved, if it ends at rank 1."""
JUMP_SHARE = 0.5
"""Share of the way above which the work of one loop is a jump."""


@dataclass(frozen=True)
class Lens:
    """The read-out of the state before the first loop, then of that after each."""

    target: Tensor  # (N,) int64, the token that is followed: the first choice after the last loop
    rank: Tensor  # (L + 1, N) int64, 1 + how many tokens are more probable than the target
    log_p: Tensor  # (L + 1, N), of the target
    entropy: Tensor  # (L + 1, N), nats
    top: Tensor  # (L + 1, N, K) int64, the most probable tokens, best first
    top_p: Tensor  # (L + 1, N, K), their probabilities


def read_lens(
    model: OpenMythos,
    input_ids: Tensor,
    n_loops: int | None = None,
    where: Tensor | None = None,
    coda: bool = True,
    n_top: int = 10,
) -> Lens:
    """Read every state out.

    Args:
        where: (B, T) bool, the positions to read; None: all.
        coda: through the coda, which gives the model's answer if it stopped there; else through the last norm and the
            head alone, which see nothing of the other tokens.
        n_top: K, at most V.
    """
    check_int("n_top", n_top, 1)
    hidden, _, view = unroll(model, input_ids, n_loops)

    def read(h: Tensor) -> Tensor:
        return chosen(model.readout(h, view) if coda else model.head(model.norm(h)), where)

    with evaluating(model):
        target = read(hidden[-1]).argmax(-1)
        rows = []
        for h in hidden:
            log_p = read(h).double().log_softmax(-1)
            p, of_target = log_p.exp(), log_p.gather(-1, target[:, None])
            best = p.topk(min(n_top, p.shape[-1]), dim=-1)
            rank = 1 + (log_p > of_target).sum(-1)
            rows.append((rank, of_target[:, 0], -(p * log_p).sum(-1), best.indices, best.values))
    return Lens(target, *map(torch.stack, zip(*rows, strict=True)))


@dataclass(frozen=True)
class Climb:
    """How the ranks of `Lens.rank` fell, over the tokens that moved; NaN where none did.

    The control is the same ranks with the loops in between in random order, first and last unchanged: the numbers that
    an order without meaning gives. Mean, 2.5 % and 97.5 % points over the orders.
    """

    n_tokens: int
    n_moved: int  # tokens whose rank was `MOVED_RANK` or worse before the first loop and 1 after the last
    climb: float  # share of the moved tokens whose rank never rises and falls by at most `JUMP_SHARE` in any loop
    jump: float  # share of which one loop does more than `JUMP_SHARE` of the fall in log-rank
    wander: float  # the rest: no jump, but the rank also rises
    monotone: float  # share whose rank never rises
    largest_drop: float  # largest fall of one loop as a share of the whole fall in log-rank, median; may exceed 1
    retraced: float  # all rises in log-rank as a share of the whole fall, median over tokens
    even_drop: float  # 1 / L: the largest drop of a climb of equal steps
    monotone_control: tuple[float, float, float]
    largest_drop_control: tuple[float, float, float]


def climb_or_jump(rank: Tensor, n_orders: int = 200) -> Climb:
    """Judge rank trajectories (L + 1, N), 1 the best."""
    N, L = rank.shape[1], len(rank) - 1
    log = rank[:, (rank[0] >= MOVED_RANK) & (rank[-1] == 1)].double().log()
    whole = log[0] - log[-1]

    def judge(log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        drop = -log.diff(dim=0)
        return (drop >= 0).all(0), drop.amax(0) / whole, (-drop).clamp(min=0).sum(0) / whole

    monotone, largest, rise = judge(log)
    jumps = largest > JUMP_SHARE
    generator = torch.Generator().manual_seed(0)
    controls = []
    for _ in range(n_orders):
        order = torch.cat([torch.tensor([0]), 1 + torch.randperm(L - 1, generator=generator), torch.tensor([L])])
        never_rises, drop, _ = judge(log[order.to(log.device)])
        controls.append((_mean(never_rises), _median(drop)))
    monotone_control, largest_control = (_spread(values) for values in zip(*controls, strict=True))
    return Climb(
        n_tokens=N,
        n_moved=log.shape[1],
        climb=_mean(monotone & ~jumps),
        jump=_mean(jumps),
        wander=_mean(~monotone & ~jumps),
        monotone=_mean(monotone),
        largest_drop=_median(largest),
        retraced=_median(rise),
        even_drop=1 / L,
        monotone_control=monotone_control,
        largest_drop_control=largest_control,
    )


def _mean(x: Tensor) -> float:
    return x.double().mean().item()


def _median(x: Tensor) -> float:
    return x.quantile(0.5).item() if x.numel() else math.nan


def _spread(values: tuple[float, ...]) -> tuple[float, float, float]:
    x = torch.tensor(values, dtype=torch.float64)
    return x.mean().item(), x.quantile(0.025).item(), x.quantile(0.975).item()


def section(subject: Subject) -> Section:
    """Describe how the last answer gets to the top, and list the first choices at the last position loop by loop."""
    found, bare = (
        read_lens(subject.model, subject.input_ids, subject.n_loops, subject.where, c) for c in (True, False)
    )
    climb, direct = climb_or_jump(found.rank), climb_or_jump(bare.rank)
    finding = f"No answer started at rank {MOVED_RANK} or below, so there is no way to the top to follow."
    if climb.n_moved:
        finding = (
            f"Of {climb.n_moved} answers that started at rank {MOVED_RANK} or below, {climb.climb:.0%} climb, "
            f"{climb.jump:.0%} jump (more than {JUMP_SHARE:.0%} of the way in one loop) and {climb.wander:.0%} wander."
        )
    rows = []
    for name, c in (("the coda", climb), ("norm and head alone", direct)):
        chance = [f"{x:.2f} [{low:.2f}, {high:.2f}]" for x, low, high in (c.monotone_control, c.largest_drop_control)]
        shares = [f"{x:.2f}" for x in (c.climb, c.jump, c.wander, c.monotone)]
        drops = [f"{c.largest_drop:.2f}", chance[1], f"{c.even_drop:.2f}", f"{c.retraced:.2f}"]
        rows.append([name, str(c.n_tokens), str(c.n_moved), *shares, chance[0], *drops])
    head = (
        "read through, answers, moved, climb, jump, wander, never rises, by chance, largest drop, by chance, even steps"
    )
    by_loop = []
    for n in range(subject.n_loops + 1):
        best = [f"{subject.text(int(found.top[n, -1, k]))} {found.top_p[n, -1, k]:.2f}" for k in range(3)]
        by_loop.append([str(n), str(int(found.rank[n, -1])), f"{found.entropy[n, -1]:.2f}", *best])
    quantiles = {"median": 0.5, "75 %": 0.75, "95 %": 0.95}
    curves = {name: found.rank.double().quantile(q, dim=1) for name, q in quantiles.items()}
    caption = "Rank of the last answer by loops, over tokens; 1 is the first choice."
    return Section(
        "Read-out lens: do answers climb or jump?",
        finding,
        numbers({"coda": climb, "head": direct, "read": found}),
        [
            Table([*head.split(", "), "retraced"], rows),
            "The last position, loop by loop:",
            Table(["loops", "rank of the last answer", "entropy", "1st", "2nd", "3rd"], by_loop),
            figure("ranks", caption, curves, "rank", log="y"),
        ],
    )
