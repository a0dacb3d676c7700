"""Are several next steps held at once? Candidates in the read-out, and the way through a table of pointers.

Shapes: B rows, T tokens, L loops, H hops, V vocabulary, N chosen tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.analysis.lens import Lens
from open_mythos.analysis.unroll import log_probs, unroll
from open_mythos.model import OpenMythos
from open_mythos.nn.eval_mode import evaluating

CANDIDATE = 0.1
"""A token of the vocabulary is a candidate where its probability is above this."""
HELD = 0.5
"""A node has the read-out for itself if more than this is on it."""


@dataclass(frozen=True)
class Breadth:
    """Candidates in the read-out before the first loop, then after each."""

    entropy: Tensor
    """(L + 1,), nats, mean over tokens"""
    candidates: Tensor
    """(L + 1,), mean number per token"""
    several: Tensor
    """(L + 1,), share of tokens with two or more"""
    alternatives: float
    """candidates per token, at any loop, that are not its last answer"""
    rose_and_fell: float
    """share of these that were none before the first loop, then were one, and are none after the last"""
    overtaken: float
    """share of these that were the first choice after some loop"""


def breadth(lens: Lens) -> Breadth:
    """Count candidates; `lens` needs n_top of at least 1 / `CANDIDATE`, or the whole vocabulary."""
    is_candidate = lens.top_p > CANDIDATE
    N = lens.top.shape[1]
    n_alternatives = n_rose = n_first = 0
    for i in range(N):
        tokens, places = lens.top[:, i], is_candidate[:, i]
        for token in set(tokens[places].tolist()) - {int(lens.target[i])}:
            held = (places & (tokens == token)).any(-1)
            n_alternatives += 1
            n_rose += bool(~held[0] & ~held[-1])
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
    """Where the read-out's probability lies on the way from the question to the root, H hops away at most.

    A functional graph has one node per hop: mass on the nodes of several hops after one loop is a frontier, all mass
    on one node that moves is a pointer.
    """

    mass: Tensor
    """(L + 1, H + 1), mean probability of the node that many hops away, over the prompts H hops from their root"""
    off_path: Tensor
    """(L + 1,), mean probability of all nodes that are not on the way"""
    one: Tensor
    """(L + 1,), share of prompts with more than `HELD` on one node of the way"""
    several: Tensor
    """(L + 1,), share of prompts with two or more candidates on the way"""
    in_step: Tensor
    """(L + 1,), share of prompts with more than `HELD` on the node min(loops, distance) hops away"""


def path_mass(model: OpenMythos, input_ids: Tensor, n_loops: int | None = None) -> Path:
    """Read the last place of prompts of pointer chasing (B, T): token i is where i points, the last is the question.

    Raises:
        ValueError: the ids are no such prompts.
    """
    n = input_ids.shape[1] - 1
    if n < 1 or not 0 <= int(input_ids.min()) <= int(input_ids.max()) < n:
        raise ValueError(f"input_ids are no tables of pointers: with {n + 1} tokens each must be below {n}")
    nodes, distance = way(input_ids)
    if int(distance.max()) > n:
        raise ValueError("input_ids holds a question whose pointers never end; every way has to end in a root")
    H = int(distance.max())
    states = unroll(model, input_ids, n_loops)
    last = torch.zeros_like(input_ids, dtype=torch.bool)
    last[:, -1] = True
    with evaluating(model):
        p = torch.stack([log_probs(model, h, states.call.view, last).double().exp() for h in states.hidden])
    hops = torch.arange(H + 1, device=input_ids.device)
    on_way = hops <= distance[:, None]
    of_node = p.gather(-1, nodes[:, : H + 1].expand(len(p), -1, -1)) * on_way
    loops = torch.arange(len(p), device=input_ids.device)
    reached = torch.minimum(loops[:, None], distance)
    return Path(
        mass=of_node[:, distance == H].mean(1),
        off_path=1 - of_node.sum(-1).mean(-1),
        one=(of_node.amax(-1) > HELD).double().mean(-1),
        several=((of_node > CANDIDATE).sum(-1) >= 2).double().mean(-1),
        in_step=(of_node.gather(-1, reached[..., None])[..., 0] > HELD).double().mean(-1),
    )


def way(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) nodes from the question on, and (B,) hops to the first that points to itself, T where none does."""
    nodes = [input_ids[:, -1:]]
    for _ in range(input_ids.shape[1] - 1):
        nodes.append(input_ids.gather(1, nodes[-1]))
    way = torch.cat(nodes, dim=1)
    arrived = way[:, 1:] == way[:, :-1]
    return way, torch.where(arrived.any(1), arrived.int().argmax(1), input_ids.shape[1])
