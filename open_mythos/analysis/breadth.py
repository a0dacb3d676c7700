"""Does the model hold several next steps at once? Candidates in the read-out, and the path through pointers.

Shapes: B rows, T tokens, L loops, H hops, V vocabulary, N chosen tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.lens import Lens, read_lens
from open_mythos.analysis.section import Section, Subject, figure, numbers, table
from open_mythos.analysis.unroll import log_probs, unroll
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating
from open_mythos.reports.document import Part

CANDIDATE = 0.1
"""Probability above which a token of the vocabulary is a candidate."""
MAJORITY = 0.5
"""Probability above which a node has the read-out for itself."""


@dataclass(frozen=True)
class Breadth:
    """Candidates in the read-out before the first loop, then after each."""

    entropy: Tensor  # (L + 1,), nats, mean over tokens
    candidates: Tensor  # (L + 1,), mean number per token
    several: Tensor  # (L + 1,), share of tokens with two or more
    alternatives: float  # candidates per token, at any loop, that are not its last answer
    rose_and_fell: float  # share of these that are none before the first loop and none after the last
    overtaken: float  # share of these that are the first choice after some loop


def breadth(lens: Lens) -> Breadth:
    """Count candidates; `lens` needs n_top of at least 1 / `CANDIDATE`, or the whole vocabulary."""
    is_candidate = lens.top_p > CANDIDATE
    N = lens.top.shape[1]
    n_alternatives = n_rose = n_first = 0
    for i in range(N):
        tokens, places = lens.top[:, i], is_candidate[:, i]
        for token in set(tokens[places].tolist()) - {int(lens.target[i])}:
            present = (places & (tokens == token)).any(-1)
            n_alternatives += 1
            n_rose += bool(~present[0] & ~present[-1])
            n_first += bool((tokens[1:, 0] == token).any())
    each = is_candidate.sum(-1).double()
    return Breadth(
        entropy=lens.entropy.mean(-1),
        candidates=each.mean(-1),
        several=(each >= 2).double().mean(-1),
        alternatives=n_alternatives / N,
        rose_and_fell=n_rose / n_alternatives if n_alternatives else 0.0,
        overtaken=n_first / n_alternatives if n_alternatives else 0.0,
    )


@dataclass(frozen=True)
class Path:
    """Where the read-out's probability lies on the path from the question to the root, H hops away at most.

    Each hop has one node: mass on the nodes of several hops after one loop is a frontier, all mass on one node that
    moves is a pointer.
    """

    mass: Tensor  # (L + 1, H + 1), mean probability of the node that many hops away, of prompts H hops from the root
    off_path: Tensor  # (L + 1,), mean probability of all nodes that are not on the path
    one: Tensor  # (L + 1,), share of prompts with more than `MAJORITY` on one node of the path
    several: Tensor  # (L + 1,), share of prompts with two or more candidates on the path
    in_step: Tensor  # (L + 1,), share of prompts with more than `MAJORITY` on the node min(loops, distance) hops away


def path_mass(model: OpenMythos, input_ids: Tensor, n_loops: int | None = None) -> Path:
    """Read the last position of prompts of pointer chasing (B, T): token i is the target of i, the last the question.

    Raises:
        ValueError: the ids are no such prompts.
    """
    n = input_ids.shape[1] - 1
    if n < 1 or not 0 <= int(input_ids.min()) <= int(input_ids.max()) < n:
        raise ValueError(f"input_ids are no tables of pointers: with {n + 1} tokens each must be below {n}")
    nodes, distance = path_of(input_ids)
    if int(distance.max()) > n:
        raise ValueError("input_ids holds a question whose pointers never end; every way has to end in a root")
    H = int(distance.max())
    hidden, _, view = unroll(model, input_ids, n_loops)
    last = torch.zeros_like(input_ids, dtype=torch.bool)
    last[:, -1] = True
    with evaluating(model):
        p = torch.stack([log_probs(model, h, view, last).double().exp() for h in hidden])
    hops = torch.arange(H + 1, device=input_ids.device)
    on_path = hops <= distance[:, None]
    of_node = p.gather(-1, nodes[:, : H + 1].expand(len(p), -1, -1)) * on_path
    loops = torch.arange(len(p), device=input_ids.device)
    reached = torch.minimum(loops[:, None], distance)
    return Path(
        mass=of_node[:, distance == H].mean(1),
        off_path=1 - of_node.sum(-1).mean(-1),
        one=(of_node.amax(-1) > MAJORITY).double().mean(-1),
        several=((of_node > CANDIDATE).sum(-1) >= 2).double().mean(-1),
        in_step=(of_node.gather(-1, reached[..., None])[..., 0] > MAJORITY).double().mean(-1),
    )


def path_of(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Follow the pointers: (B, T) nodes from the question on, and (B,) hops to the root, T where there is none."""
    nodes = [input_ids[:, -1:]]
    for _ in range(input_ids.shape[1] - 1):
        nodes.append(input_ids.gather(1, nodes[-1]))
    path = torch.cat(nodes, dim=1)
    arrived = path[:, 1:] == path[:, :-1]
    return path, torch.where(arrived.any(1), arrived.int().argmax(1), input_ids.shape[1])


def section(subject: Subject) -> Section:
    """Describe how many tokens the read-out considers at once, and on pointers where on the path it is."""
    found = breadth(read_lens(subject.model, subject.input_ids, subject.n_loops, subject.where))
    finding = (
        f"Two or more tokens above {CANDIDATE:g} are in the read-out of {found.several[1:].max():.0%} of the positions "
        f"at most; a position has {found.alternatives:.2f} such alternatives to its last answer in all, of which "
        f"{found.rose_and_fell:.0%} rise and fall."
    )
    loops = range(subject.n_loops + 1)
    columns = {"entropy": found.entropy, "candidates": found.candidates, "positions with several": found.several}
    curves = {"candidates": found.candidates, "exp(entropy)": found.entropy.exp()}
    drawn = figure("candidates", "Number of tokens considered at once in the read-out.", curves, "tokens")
    parts: list[Part] = [table("loops", loops, *((name, x, ".3f") for name, x in columns.items())), drawn]
    record = numbers(found)
    if subject.pointers:
        path = path_mass(subject.model, subject.input_ids, subject.n_loops)
        H = path.mass.shape[1]
        finding += (
            f" On the path through the pointers {path.in_step[1:H].mean():.0%} of the read-outs have more than "
            f"{MAJORITY:g} on the node that is as many hops away as loops were run, and {path.several[1:H].mean():.0%} "
            f"have two nodes or more as candidates."
        )
        hops = {f"hop {j}": path.mass[:, j] for j in range(H)}
        shares = {"elsewhere": path.off_path, "on one": path.one}
        shares |= {"on several": path.several, "in step": path.in_step}
        both = [(name, x, ".3f") for name, x in hops.items()] + [(name, x, ".2f") for name, x in shares.items()]
        drawn = figure("path", "Where on the path the read-out is.", hops, "mean probability")
        parts += ["Probability on the nodes of the path:", table("loops", loops, *both), drawn]
        record |= {"path": numbers(path)}
    return Section("Several next steps at once?", finding, record, parts)
