"""The state before the first loop.

Shapes: B rows, T tokens, D width.
"""

import math

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.nn.cache import KVCache
from open_mythos.nn.view import View

CUT = 3
"""Standard deviations at which noise is cut."""


def initial_state(
    kind: str,
    e: Tensor,
    view: View,
    cache: KVCache | None = None,
    generator: torch.Generator | None = None,
    training: bool = False,
    std: float = 0.4**0.5,
) -> Tensor:
    """Return h_0 (B, T, D): the prelude's output itself, zero, or noise of standard deviation `std`, cut at 3 `std`.

    The noise of a token is a function of its row's seed, its position and the channel, so it does not depend on the
    other rows, on padding, or on how a prompt was cut into chunks. A cache keeps the seeds of its rows.

    Source: Geiping et al. 2025, arXiv 2502.05171, whose noise is truncated; "normal" moves what is beyond to the cut.
    """
    if kind == "e":
        return e
    if kind == "zero":
        return torch.zeros_like(e)
    seeds = None if cache is None else cache.row_seed
    if seeds is None:
        seeds = _draw_seeds(e.shape[0], e.device, generator, training)
        if cache is not None:
            cache.row_seed = seeds
    # A counter-based generator: each number is a hash of its row's seed, its position and its channel.
    channels = torch.arange(2 * e.shape[-1], device=e.device)
    counter = _mix(_mix(_mix(seeds)[:, None] ^ view.positions)[..., None] ^ channels)
    # 24 random bits each, moved off zero for the logarithm.
    uniform = (((counter >> 24) & 0xFFFFFF).float() + 0.5) / 2**24
    if kind == "truncated":
        # The quantile of a uniform number between the probabilities of the two cuts.
        limit = math.erf(CUT / math.sqrt(2))
        noise = math.sqrt(2) * torch.erfinv((2 * uniform[..., : e.shape[-1]] - 1) * limit)
        return (std * noise.clamp(-CUT, CUT)).to(e.dtype)
    # Box-Muller: two uniform numbers make a normal one.
    radius, angle = uniform.chunk(2, dim=-1)
    noise = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
    return (std * noise.clamp(-CUT, CUT)).to(e.dtype)


def _draw_seeds(n: int, device: torch.device, generator: torch.Generator | None, training: bool) -> Tensor:
    """Return a seed for each row, (n,) int64: in evaluation without a generator the same for all, else random."""
    if generator is None and not training:
        return torch.zeros(n, dtype=torch.int64, device=device)
    where = device if generator is None else generator.device
    return torch.randint(2**62, (n,), generator=generator, device=where).to(device)


def _mix(x: Tensor) -> Tensor:
    """Scatter neighbouring values by a bijection of int64 (the finaliser of SplitMix64, wrapping arithmetic)."""
    x = x + -7046029254386353131
    x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & (2**33 - 1))


def first_state(
    cfg: MythosConfig,
    e: Tensor,
    view: View,
    cache: KVCache | None,
    start: torch.Generator | Tensor | None,
    training: bool,
) -> Tensor:
    """Return h_0 (B, T, D): `start` itself if it is a state, else the configuration's with `start` for its noise."""
    if isinstance(start, Tensor):
        return start.to(e.dtype)
    return initial_state(cfg.initial_state, e, view, cache, start, training, cfg.state_std)


def check_start(
    generator: torch.Generator | None, state: Tensor | None, ids: Tensor, dim: int
) -> torch.Generator | Tensor | None:
    """Return the given one of the two.

    Raises:
        TypeError, ValueError: the generator is none of torch's, or the state no (B, T, D) tensor of floats on the
            device of the ids (B, T).
    """
    check_generator(generator)
    if state is None:
        return generator
    if not isinstance(state, Tensor) or not state.is_floating_point():
        kind = state.dtype if isinstance(state, Tensor) else type(state).__name__
        raise TypeError(f"initial_state must be a (B, T, D) tensor of floats, not {kind}; use torch.zeros(B, T, D)")
    if state.shape != (*ids.shape, dim) or state.device != ids.device:
        raise ValueError(
            f"initial_state has shape {tuple(state.shape)} on {state.device}, but the new tokens' states have "
            f"{(*ids.shape, dim)} on {ids.device}; give one state for each new token"
        )
    return state


def check_generator(generator: torch.Generator | None) -> None:
    """Refuse a generator that is none of torch's."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator={generator!r} must be a torch.Generator; use torch.Generator().manual_seed(0)")
