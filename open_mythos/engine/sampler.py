"""The next token of sequences that each have their own sampling options.

Shapes: N sequences, V vocabulary.
"""

from collections import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.engine.sequence import Sequence
from open_mythos.engine.structured_outputs import Matcher
from open_mythos.generation.sampling import generator_of, sample
from open_mythos.generation.sampling_params import Sampling, SamplingParams
from open_mythos.ops.precision import at_least_float32


@dataclass(eq=False)
class SamplerState:
    """The sampler's state of one sequence."""

    sampling: Sampling
    generator: torch.Generator
    matcher: Matcher | None
    """The grammar that the answer has to match."""

    @staticmethod
    def of(params: SamplingParams, matcher: Matcher | None) -> "SamplerState":
        """Make the state before the first token."""
        seed = int(torch.randint(2**62, ())) if params.seed is None else params.seed
        return SamplerState(params.sampling, generator_of(seed), matcher)


@dataclass(frozen=True)
class SampledToken:
    """A token, of an answer or of a prompt, with its log-probability if the request asks for it."""

    token: int
    logprob: float | None = None
    """Log-probability under the model itself, before temperature, penalties and filters."""
    top_logprobs: dict[int, float] | None = None


def sample_batch(logits: Tensor, seqs: list[Sequence]) -> list[SampledToken | None]:
    """Draw one token for each of N sequences, (N, V); None where the logits are NaN."""
    states = [state for seq in seqs if (state := seq.sampler) is not None]
    # 1. Exclude the tokens that a grammar does not allow.
    scores = _within_grammars(logits, states)
    # 2. Draw for all sequences with equal options in one call.
    groups: dict[Sampling, list[int]] = {}
    for i, state in enumerate(states):
        groups.setdefault(state.sampling, []).append(i)
    tokens = torch.zeros(len(seqs), dtype=torch.int64, device=logits.device)
    for sampling, group in groups.items():
        index = torch.tensor(group, device=logits.device)
        seen = answered = None
        if sampling.repetition_penalty != 1:
            seen = _padded([seqs[i].prompt_ids + seqs[i].token_ids for i in group], logits.device)
        if sampling.penalizes_answer:
            answered = _padded([seqs[i].token_ids for i in group], logits.device)
        is_all = len(group) == len(seqs)
        generators = [states[i].generator for i in group]
        drawn = sample(scores if is_all else scores[index], sampling, generators, seen, answered)
        tokens = drawn if is_all else tokens.index_copy(0, index, drawn)
    # 3. Add the log-probabilities where a request asks for them.
    sampled: list[SampledToken | None] = []
    for i, (token, is_nan) in enumerate(zip(tokens.tolist(), logits.isnan().any(-1).tolist(), strict=True)):
        n_best = seqs[i].params.logprobs
        if is_nan:
            sampled.append(None)
        elif n_best is None:
            sampled.append(SampledToken(token))
        else:
            sampled += log_probabilities(logits[i : i + 1], [token], n_best)
    return sampled


def log_probabilities(logits: Tensor, tokens: abc.Sequence[int], n_best: int) -> list[SampledToken]:
    """Give the tokens that follow N positions their log-probabilities and the best ones, from logits (N, V)."""
    log_p = at_least_float32(logits).log_softmax(-1)
    own = log_p.gather(1, torch.tensor(tokens, device=log_p.device)[:, None])[:, 0].tolist()
    best = log_p.topk(min(n_best, log_p.shape[1]))
    tops = [dict(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [SampledToken(*each) for each in zip(tokens, own, tops, strict=True)]


def _within_grammars(logits: Tensor, states: abc.Sequence[SamplerState]) -> Tensor:
    """Return the logits with -inf for tokens that a grammar does not allow."""
    matched = [(i, state.matcher) for i, state in enumerate(states) if state.matcher is not None]
    if not matched:
        return logits
    scores = logits.clone()
    for i, matcher in matched:
        scores[i].masked_fill_(~matcher.allowed().to(logits.device), -torch.inf)
    return scores


def _padded(rows: abc.Sequence[abc.Sequence[int]], device: torch.device) -> Tensor:
    """Return ids of different lengths as one tensor (N, S), with -1 behind the shorter ones."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], dtype=torch.int64, device=device)
