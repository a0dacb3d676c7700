"""The next token of sequences that each ask for something else.

Shapes: N sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.engine.structured_outputs import Matcher
from open_mythos.generation.sampling import Sampling, sample
from open_mythos.ops.precision import at_least_float32


@dataclass(eq=False)
class Draw:
    """How a sequence's tokens are drawn."""

    how: Sampling
    generator: torch.Generator
    logprobs: int | None
    """How many of the best tokens to tell with their log-probabilities; None: not even the chosen one's."""
    matcher: Matcher | None = None
    """The grammar that the answer has to match."""


@dataclass(frozen=True)
class Chosen:
    """A new token, or one of the prompt that was given."""

    token: int
    logprob: float | None = None
    """The log-probability under the model itself, whatever temperature, penalties and filters say."""
    top_logprobs: dict[int, float] | None = None


def choose(
    logits: Tensor, draws: Sequence[Draw], token_ids: Sequence[Sequence[int]], answer_ids: Sequence[Sequence[int]]
) -> list[Chosen | None]:
    """One token for each of N sequences, (N, V); None where the logits are NaN.

    Args:
        token_ids: prompt and answer of each so far, for the repetition penalty.
        answer_ids: the answer alone, for the frequency and presence penalties.
    """
    tokens = torch.zeros(len(draws), dtype=torch.int64, device=logits.device)
    scores = _within_grammars(logits, draws)
    for how, group in _alike(draws).items():
        index = torch.tensor(group, device=logits.device)
        seen = _padded([token_ids[i] for i in group], logits.device) if how.repetition_penalty != 1 else None
        answered = _padded([answer_ids[i] for i in group], logits.device) if how.penalizes_answer else None
        whole = len(group) == len(draws)
        generators = [draws[i].generator for i in group]
        chosen = sample(scores if whole else scores[index], how, generators, seen, answered)
        tokens = chosen if whole else tokens.index_copy(0, index, chosen)
    values, bad = tokens.tolist(), logits.isnan().any(-1).tolist()
    answers: list[Chosen | None] = [None if nan else Chosen(token) for token, nan in zip(values, bad, strict=True)]
    for i, draw in enumerate(draws):
        if draw.logprobs is not None and not bad[i]:
            answers[i] = log_probabilities(logits[i : i + 1], [values[i]], draw.logprobs)[0]
    return answers


def _within_grammars(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The logits without those of tokens that a grammar does not allow."""
    matched = [(i, draw.matcher) for i, draw in enumerate(draws) if draw.matcher is not None]
    if not matched:
        return logits
    scores = logits.clone()
    for i, matcher in matched:
        scores[i].masked_fill_(~matcher.allowed().to(logits.device), -torch.inf)
    return scores


def log_probabilities(logits: Tensor, tokens: Sequence[int], n_best: int) -> list[Chosen]:
    """The tokens that follow N positions, with their log-probabilities and those of the best, from logits (N, V)."""
    log_p = at_least_float32(logits).log_softmax(-1)
    own = log_p.gather(1, torch.tensor(tokens, device=log_p.device)[:, None])[:, 0].tolist()
    best = log_p.topk(min(n_best, log_p.shape[1]))
    tops = [dict(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [Chosen(*each) for each in zip(tokens, own, tops, strict=True)]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Ids of different lengths, (N, S), with -1 behind the shorter ones."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], dtype=torch.int64, device=device)


def _alike(draws: Sequence[Draw]) -> dict[Sampling, list[int]]:
    """The draws that are made in the same way."""
    groups: dict[Sampling, list[int]] = {}
    for i, draw in enumerate(draws):
        groups.setdefault(draw.how, []).append(i)
    return groups
