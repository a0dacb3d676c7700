"""From logits to the next token.

The steps run in this order: repetition penalty, frequency and presence penalties, logit bias, temperature, top-k,
top-p, min-p. Shape letters: B rows, S tokens so far, V vocabulary, K candidates (V, or top_k of it).
"""

from collections.abc import Sequence
from hashlib import blake2b
from math import inf, log

import torch
from torch import Tensor

from open_mythos.generation.sampling_params import Sampling
from open_mythos.ops.precision import at_least_float32

DIVERGED = "the logits are NaN: the weights have diverged or overflow; use earlier weights, or float32"


def generator_of(seed: int) -> torch.Generator:
    """Make a generator on the CPU for any int64.

    PyTorch's generator uses only the lowest 32 bits of a seed, so a longer seed is hashed to 32 bits: -1 and 2^32 - 1
    differ.
    """
    if not 0 <= seed < 2**32:
        seed = int.from_bytes(blake2b(seed.to_bytes(8, "little", signed=True), digest_size=4).digest(), "little")
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def sample(
    logits: Tensor,
    params: Sampling,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    previous_ids: Tensor | None = None,
    answer_ids: Tensor | None = None,
) -> Tensor:
    """Choose one token per row.

    A row takes one random number, drawn on its generator's device: with a CPU generator, the default, a seed gives the
    same draws on every device. With a generator per row, a row's token does not depend on the other rows.

    Args:
        logits: (B, V), any float dtype, finite or -inf; worked on in at least float32. NaN gives some token, no error.
        params: the same for all rows.
        generator: one for the batch, one per row, or None for torch's global CPU generator; unused when greedy.
        previous_ids: (B, S) ids that `repetition_penalty` applies to, padded with -1; prompt and answer, in any order.
        answer_ids: (B, S) ids that the frequency and presence penalties apply to, padded with -1; the answer alone.

    Returns:
        (B,) int64.
    """
    scores = _adjusted(logits, params, previous_ids, answer_ids)
    if params.temperature == 0:
        return scores.argmax(-1)
    mass, candidates = _filtered(scores, params)
    choice = draw(mass, generator)
    return choice if candidates is None else candidates.gather(-1, choice[:, None])[:, 0]


def probabilities(
    logits: Tensor, params: Sampling, previous_ids: Tensor | None = None, answer_ids: Tensor | None = None
) -> Tensor:
    """Return the probability (B, V) with which `sample` chooses each token; greedily it is 1 for one of them."""
    scores = _adjusted(logits, params, previous_ids, answer_ids)
    if params.temperature == 0:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1)
    mass, candidates = _filtered(scores, params)
    mass = mass / mass.sum(-1, keepdim=True)
    return mass if candidates is None else torch.zeros_like(scores).scatter_(-1, candidates, mass)


def _adjusted(logits: Tensor, params: Sampling, previous_ids: Tensor | None, answer_ids: Tensor | None) -> Tensor:
    """Apply penalties and bias."""
    scores = at_least_float32(logits)
    if params.repetition_penalty != 1 and previous_ids is not None:
        scores = _penalize(scores, previous_ids, params.repetition_penalty)
    if params.penalizes_answer and answer_ids is not None:
        counts = _counts(answer_ids, scores)
        scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    if params.biases:
        tokens, biases = zip(*params.biases, strict=True)
        columns = torch.tensor(tokens, device=scores.device)
        scores = scores.index_add(1, columns, scores.new_tensor(biases).expand(len(scores), -1))
    return scores


def _filtered(scores: Tensor, params: Sampling) -> tuple[Tensor, Tensor | None]:
    """Apply temperature and filters; return the mass (B, K) to draw from, and its tokens (B, K) if they are sorted."""
    # 1. Temperature. The best score becomes 0, so that no temperature overflows.
    tiny = torch.finfo(scores.dtype).tiny  # parameters below it would become 0
    scores = (scores - scores.amax(-1, keepdim=True)) / max(params.temperature, tiny)

    # 2. Filters: top-k, then top-p and min-p, both on the probabilities that top-k leaves.
    vocab_size = scores.shape[-1]
    candidates = None  # (B, K) ids in the order of the scores; None while that order is the vocabulary's
    if params.top_k and params.top_k < vocab_size:
        scores, candidates = scores.topk(params.top_k, dim=-1)
    elif params.top_p < 1:
        scores, candidates = scores.sort(dim=-1, descending=True)

    mass = scores.softmax(-1)
    keep = scores >= (log(params.min_p) if params.min_p else -inf)
    if params.top_p < 1:
        # The sum before a token is compared, so the best token always stays.
        keep &= mass.cumsum(-1) - mass < max(params.top_p, tiny)
    return mass * keep, candidates


def _penalize(scores: Tensor, previous_ids: Tensor, penalty: float) -> Tensor:
    seen = _counts(previous_ids, scores) > 0
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def _counts(ids: Tensor, scores: Tensor) -> Tensor:
    """Count each token of the vocabulary in the ids of each row, (B, V)."""
    batch, vocab_size = scores.shape
    # Padding counts for one column more than the vocabulary, which is then cut off.
    counts = scores.new_zeros(batch, vocab_size + 1)
    counts.scatter_add_(1, ids.where(ids >= 0, vocab_size), torch.ones_like(ids, dtype=scores.dtype))
    return counts[:, :vocab_size]


def draw(mass: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Draw columns (B,) with probabilities proportional to `mass` (B, K), by inverting the cumulative sum."""
    rows = len(mass)
    if generator is None or isinstance(generator, torch.Generator):
        uniforms = uniform(rows, generator)
    elif len(generator) == rows:
        uniforms = torch.cat([uniform(1, one) for one in generator])
    else:
        raise ValueError(f"{len(generator)} generators do not fit logits of {rows} rows; pass one, or one per row")
    cumulative = mass.cumsum(-1)
    # The first column whose sum exceeds the target has mass. A uniform number below 1 times the total rounds below the
    # total, so there is such a column.
    target = uniforms.to(mass)[:, None] * cumulative[:, -1:]
    # NaN exceeds nothing: the caller finds a token in the vocabulary, and NaN in its logits.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=mass.shape[-1] - 1)


def uniform(rows: int, generator: torch.Generator | None) -> Tensor:
    """Draw numbers (rows,) in [0, 1)."""
    # Always float32, so that a seed draws the same in every dtype of the model.
    return torch.rand(rows, dtype=torch.float32, generator=generator, device=generator.device if generator else "cpu")
