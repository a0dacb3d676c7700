"""From logits to the next token.

The filters run in this order, which is that of transformers: repetition penalty, temperature, top-k, top-p, min-p.
Shape letters: B rows, S tokens so far, V vocabulary, K candidates (V, or top_k of it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log

import torch
from torch import Tensor

from open_mythos.checks import check_sampling
from open_mythos.nn.numerics import wide


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults draw from the model's own distribution.

    Raises:
        TypeError: a field is no number (a bool is none).
        ValueError: a field is out of range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 is greedy: the best token, whatever the other filters say."""
    top_k: int | None = None
    """Keep the k best tokens; None, 0 and anything from the vocabulary's size on keep all."""
    top_p: float = 1.0
    """Keep the fewest best tokens whose probabilities sum to top_p at least."""
    min_p: float = 0.0
    """Keep the tokens at least min_p times as probable as the best."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of earlier tokens and multiplies the negative ones (CTRL, section 4.1)."""

    def __post_init__(self) -> None:
        check_sampling(self)


@torch.no_grad()
def sample(
    logits: Tensor,
    params: Sampling,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    previous_ids: Tensor | None = None,
) -> Tensor:
    """Choose one token per row.

    A row takes one random number, drawn on its generator's device: with a CPU generator, the default, a seed gives the
    same draws on every device. With a generator per row, a row's token does not depend on the other rows.

    Args:
        logits: (B, V), any float dtype, finite or -inf; worked on in at least float32. NaN gives some token, no error.
        params: the same for all rows.
        generator: one for the batch, one per row, or None for torch's global CPU generator; unused when greedy.
        previous_ids: (B, S) ids that `repetition_penalty` applies to, padded with -1; prompt and output, in any order.

    Returns:
        (B,) int64.
    """
    scores = wide(logits)
    if params.repetition_penalty != 1 and previous_ids is not None:
        scores = _penalize(scores, previous_ids, params.repetition_penalty)
    if params.temperature == 0:
        return scores.argmax(-1)
    tiny = torch.finfo(scores.dtype).tiny  # parameters below it would become 0
    # The best score becomes 0, so no temperature overflows.
    scores = (scores - scores.amax(-1, keepdim=True)) / max(params.temperature, tiny)

    vocab_size = scores.shape[-1]
    candidates = None  # (B, K) ids in the order of the scores; None while that order is the vocabulary's
    if params.top_k and params.top_k < vocab_size:
        scores, candidates = scores.topk(params.top_k, dim=-1)
    elif params.top_p < 1:
        scores, candidates = scores.sort(dim=-1, descending=True)

    mass = scores.softmax(-1)
    keep = scores >= (log(params.min_p) if params.min_p else -inf)
    if params.top_p < 1:
        # Compares what comes before a token, so the best one always stays.
        keep &= mass.cumsum(-1) - mass < max(params.top_p, tiny)
    choice = _draw(mass * keep, generator)
    return choice if candidates is None else candidates.gather(-1, choice[:, None])[:, 0]


def _penalize(scores: Tensor, previous_ids: Tensor, penalty: float) -> Tensor:
    batch, vocab_size = scores.shape
    # Padding marks one column more than the vocabulary, which is then cut off.
    seen = torch.zeros(batch, vocab_size + 1, dtype=torch.bool, device=scores.device)
    seen = seen.scatter_(1, previous_ids.where(previous_ids >= 0, vocab_size), True)[:, :vocab_size]
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def _draw(mass: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """(B,) columns drawn with probability in proportion to `mass` (B, K), by inverting the cumulative sum."""
    rows = len(mass)
    if generator is None or isinstance(generator, torch.Generator):
        uniform = _uniform(rows, generator)
    elif len(generator) == rows:
        uniform = torch.cat([_uniform(1, one) for one in generator])
    else:
        raise ValueError(f"{len(generator)} generators do not fit logits of {rows} rows; pass one, or one per row")
    cumulative = mass.cumsum(-1)
    # The first column whose sum exceeds the target has mass. A uniform number below 1 times the total rounds below the
    # total, so there is such a column.
    target = uniform.to(mass)[:, None] * cumulative[:, -1:]
    # NaN exceeds nothing: the caller finds a token in the vocabulary, and NaN in its logits.
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=mass.shape[-1] - 1)


def _uniform(rows: int, generator: torch.Generator | None) -> Tensor:
    # Always float32, so that a seed draws the same in every dtype of the model.
    return torch.rand(rows, dtype=torch.float32, generator=generator, device=generator.device if generator else "cpu")
