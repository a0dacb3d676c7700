"""Self-speculative decoding: a looped model drafts tokens with its first loops, and all loops verify them together.

At fixed depth the first d loops of a token do not depend on how many follow. Verification therefore continues from the
drafts' states after loop d, and keeps the keys and values that they have written at the levels below d.

Sources: Leviathan et al. 2022, arXiv 2211.17192 (accept and resample); Zhang et al. 2023, arXiv 2309.08168 (one model).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from open_mythos.checks import check_int
from open_mythos.generation.sampling import DIVERGED, draw, probabilities, uniform
from open_mythos.generation.sampling_params import Sampling
from open_mythos.nn.cache import KVCache
from open_mythos.nn.halting import Fixed, HaltingRule
from open_mythos.nn.initial_state import first_state
from open_mythos.nn.view import View


@dataclass
class Speculation:
    """One row decoded at fixed depth: `n_drafts` tokens are drafted with `draft_loops` loops, then verified."""

    model: Any
    draft_loops: int
    n_drafts: int
    n_loops: int
    rule: HaltingRule | None
    params: Sampling
    generator: torch.Generator | None
    n_prompt: int
    """Tokens of the prompt, padding included."""

    def decode(
        self, ids: Tensor, mask: Tensor | None, max_new_tokens: int, hit: Callable[[int, int], bool], on_token: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Continue the prompt (1, T) until `hit`; return the row's new tokens, and the loops of each."""
        # The last token is never fed back.
        cache = self.model.make_cache(1, self.n_prompt + max_new_tokens - 1, self.n_loops)
        view = self.model.make_view((1, self.n_prompt), mask, cache)
        logits, _ = self.model.run(ids, view, self.n_loops, self.rule, cache, last_only=True)
        seen, new = ids if mask is None else ids.where(mask, -1), []
        tokens = [self._choose(self._probabilities(logits, seen))]
        while True:
            for token in tokens:
                new.append(token)
                if on_token is not None:
                    on_token(0, token, self.n_loops)
                if hit(0, token) or len(new) == max_new_tokens:
                    return [new], [[self.n_loops] * len(new)]
            seen = torch.cat((seen, seen.new_tensor([tokens])), dim=1)
            # Verification adds a token of its own.
            tokens = self._round(seen, cache, min(self.n_drafts, max_new_tokens - len(new) - 1))

    def _round(self, seen: Tensor, cache: KVCache, n_drafts: int) -> list[int]:
        """Draft after the tokens `seen` (1, S) and verify; return the accepted drafts and one token more.

        The last token, of those seen as of those returned, is not in the cache yet.
        """
        start = cache.length
        drafts: list[int] = []
        q: list[Tensor] = []
        states: list[tuple[Tensor, Tensor]] = []
        # 1. Draft. The last draft's own first loops run too, so that all tokens go into verification alike.
        for i in range(n_drafts + 1):
            view = self._view(1, cache)
            states.append(self._start(seen[:, -1:], view, cache))
            if i < n_drafts:
                q.append(self._probabilities(self.model.readout(states[-1][0], view), seen))
                drafts.append(self._choose(q[-1]))
                seen = torch.cat((seen, seen.new_tensor([drafts[-1:]])), dim=1)
            cache.advance(1, None)
        # 2. Verify: the other loops for all tokens at once. The drafts' keys and values in the coda are replaced.
        cache.rewind(start)
        view = self._view(n_drafts + 1, cache)
        h, e = (torch.cat(x, dim=1) for x in zip(*states, strict=True))
        logits = self.model.readout(self._loops(h, e, view, range(self.draft_loops, self.n_loops)), view)
        p = self._probabilities(logits, _prefixes(seen, n_drafts))
        # 3. Accept a draft with probability min(1, p / q), so that it and what replaces it are distributed as p.
        n_accepted = 0
        while n_accepted < n_drafts and self._accepts(p[n_accepted], q[n_accepted][0], drafts[n_accepted]):
            n_accepted += 1
        rest = p[n_accepted] if n_accepted == n_drafts else _residual(p[n_accepted], q[n_accepted][0])
        cache.advance(n_drafts + 1, None)
        cache.rewind(start + n_accepted + 1)
        return [*drafts[:n_accepted], self._choose(rest[None])]

    def _view(self, n_tokens: int, cache: KVCache) -> View:
        return dataclasses.replace(self.model.make_view((1, n_tokens), None, cache), constants=cache.constants)

    def _start(self, ids: Tensor, view: View, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Return the state after the drafts' loops, and what the injection has prepared for the others."""
        e = self.model.encode(ids, view)
        h = first_state(self.model.cfg, e, view, cache, None, False)
        e = self.model.recurrent.injection.prepare(e)
        return self._loops(h, e, view, range(self.draft_loops)), e

    def _loops(self, h: Tensor, e: Tensor, view: View, loops: range) -> Tensor:
        for i in loops:
            index = view.positions.new_full((1,), i)
            h = self.model.recurrent.loop(h, e, index, view.at_loop(index, i))
        return h

    def _probabilities(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Return what is sampled from, (T, V), given logits (1, T, V) and the tokens before each position (T, S)."""
        if logits.isnan().any():
            raise FloatingPointError(DIVERGED)
        return probabilities(logits[0], self.params, seen, seen[:, self.n_prompt :])

    def _choose(self, mass: Tensor) -> int:
        """Return a token from the mass (1, V)."""
        return int(mass.argmax(-1) if self.params.temperature == 0 else draw(mass, self.generator))

    def _accepts(self, p: Tensor, q: Tensor, token: int) -> bool:
        target, drafted = float(p[token]), float(q[token])
        # A greedy choice is certain and takes no random number.
        return target >= drafted or (target > 0 and float(uniform(1, self.generator)) * drafted < target)


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """Return the mass (V,) that replaces a refused draft: with what acceptance gives, it sums to p."""
    residual = (p - q).clamp(min=0)
    # Rounding can leave nothing where p and q are the same.
    return residual if residual.any() else p


def _prefixes(ids: Tensor, n: int) -> Tensor:
    """Return ids (1, S) without their last n, n - 1, ... 0 tokens, (n + 1, S), padded with -1."""
    length = ids.shape[1]
    ends = torch.arange(length - n, length + 1, device=ids.device)[:, None]
    return ids.where(torch.arange(length, device=ids.device) < ends, -1)


def speculate(
    model: Any, draft_loops: int, n_drafts: int, n_loops: int, rule: HaltingRule | None, params: Sampling,
    generators: torch.Generator | list[torch.Generator] | None, compiled: bool | None, ids: Tensor, *rest: Any,
) -> tuple[list[list[int]], list[list[int]]]:  # fmt: skip
    """Check the arguments of a call, and return what `Speculation.decode(ids, *rest)` does."""
    plain = "leave draft_loops out"
    check_int("num_speculative_tokens", n_drafts, 1)
    if model.recurrent is None:
        raise ValueError(f"draft_loops={draft_loops} needs a looped model, but recurrent_layers=0; {plain}")
    check_int("draft_loops", draft_loops, 1)
    if draft_loops >= n_loops:
        raise ValueError(
            f"draft_loops={draft_loops} must be below n_loops={n_loops}: drafts save loops; use fewer, or {plain}"
        )
    if len(ids) > 1:
        raise ValueError(f"draft_loops decodes one row, but {len(ids)} are given; call it for each prompt, or {plain}")
    used = rule or model.recurrent.rule
    if not isinstance(used, Fixed):
        raise ValueError(
            f"draft_loops needs a fixed depth, but tokens leave by {type(used).__name__}; pass exit='fixed', or {plain}"
        )
    if compiled:
        raise ValueError(f"draft_loops does not go with compiled=True; leave compiled out, or {plain}")
    generator = generators[0] if isinstance(generators, list) else generators
    decoder = Speculation(model, draft_loops, n_drafts, n_loops, rule, params, generator, ids.shape[1])
    return decoder.decode(ids.long(), *rest)
