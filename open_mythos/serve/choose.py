"""The next token of sequences that each ask for something else.

Shapes: N sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.nn.numerics import wide
from open_mythos.sampling import Sampling, sample


@dataclass(eq=False)
class Draw:
    """How a sequence's tokens are drawn."""

    how: Sampling
    generator: torch.Generator
    logprobs: int | None
    """How many of the best tokens to tell with their log-probabilities; None: not even the chosen one's."""


@dataclass(frozen=True)
class Chosen:
    """A new token."""

    token: int
    logprob: float | None = None
    """Of the model's own distribution, whatever the temperature and the filters."""
    top_logprobs: dict[int, float] | None = None


def choose(logits: Tensor, draws: Sequence[Draw], token_ids: Sequence[Sequence[int]]) -> list[Chosen | None]:
    """One token for each of N sequences, (N, V); None where the logits are NaN.

    Args:
        token_ids: prompt and answer of each so far, for the repetition penalty.
    """
    tokens = torch.zeros(len(draws), dtype=torch.int64, device=logits.device)
    for how, group in _alike(draws).items():
        index = torch.tensor(group, device=logits.device)
        seen = None
        if how.repetition_penalty != 1:
            longest = max(len(token_ids[i]) for i in group)
            seen = torch.tensor([[*token_ids[i], *[-1] * (longest - len(token_ids[i]))] for i in group])
            seen = seen.to(logits.device)
        whole = len(group) == len(draws)
        chosen = sample(logits if whole else logits[index], how, [draws[i].generator for i in group], seen)
        tokens = chosen if whole else tokens.index_copy(0, index, chosen)
    values, bad = tokens.tolist(), logits.isnan().any(-1).tolist()
    answers: list[Chosen | None] = [None if nan else Chosen(token) for token, nan in zip(values, bad, strict=True)]
    for i, draw in enumerate(draws):
        if draw.logprobs is not None and not bad[i]:
            log_p = wide(logits[i]).log_softmax(-1)
            best = log_p.topk(min(draw.logprobs, len(log_p)))
            top = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            answers[i] = Chosen(values[i], log_p[values[i]].item(), top)
    return answers


def _alike(draws: Sequence[Draw]) -> dict[Sampling, list[int]]:
    """The draws that are made in the same way."""
    groups: dict[Sampling, list[int]] = {}
    for i, draw in enumerate(draws):
        groups.setdefault(draw.how, []).append(i)
    return groups
