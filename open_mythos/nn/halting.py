"""When a token leaves the loop.

A rule is pure: its state is tensors that rows and tokens can be taken out of. It sees its own token only, never another
token and never the coda, so it decides the same in prefill, in decode and in any batch. `Exit.apply` does the rest of
what happens after a loop, in the model's own driver and in the engine alike.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from open_mythos.checks import check_number
from open_mythos.config import HALTING_RULES, MythosConfig, check_part
from open_mythos.ops.batch_invariant import invariant
from open_mythos.ops.precision import at_least_float32, float32_linear

Probe = Callable[[Tensor], Tensor]
"""Computes logits (B, T, V) from a state (B, T, D), without the coda."""
Rows = dict[str, Tensor]
"""Tensors of the tokens in the loop by name, (B,) or (B, T, ...)."""
State = dict[str, Tensor]
"""A rule's state: tensors of shape (B,) or (B, T, ...), so that rows and tokens can be taken out by their place."""
Decision = tuple[State, Tensor]
"""The next state, and which tokens are done, (B, T) bool."""


class HaltingRule(ABC):
    """One way to decide when a token is done.

    The rule decides about single tokens; its caller does the rest. No token leaves before `min_loops` loops, and every
    token leaves at the last loop of its row. A token that has left is frozen: later decisions about it are ignored.
    """

    needs_probe = False
    """True if `update` needs the logits of head(norm(h))."""
    weighted = False
    """True if the output is the sum of states by `weigh`; otherwise it is the last state."""
    default_threshold: float = 0.0
    """Threshold of a call that names the rule alone; 0 for a rule without one."""
    max_threshold = math.inf
    """Largest threshold that is accepted."""
    halting: str | None = None
    """`halting` that a model needs for the rule; None: any."""

    def __init__(self, threshold: float, min_loops: int = 1) -> None:
        self.threshold, self.min_loops = threshold, min_loops

    @classmethod
    def make(
        cls, threshold: float | None, min_loops: int, cfg: MythosConfig, act: "ACTHalting | None"
    ) -> "HaltingRule":
        """Make the rule for a call that names it; `act` is the model's learned halting, None if it has none."""
        return cls(cls.default_threshold if threshold is None else threshold, min_loops)

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        """Make the state before the first loop; h (B, T, D), n_loops (B,) int64 the most loops each row may run."""
        return {}

    @abstractmethod
    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        """Decide after a loop that took h_prev to h, both (B, T, D); loop_index (B,) is 0-based, probe (B, T, V)."""

    def weigh(self, before: State, after: State, exit_mask: Tensor) -> Tensor:
        """Return the weight (B, T) of a loop's state in the output; `exit_mask` (B, T): the tokens that exit at it."""
        raise NotImplementedError(f"{type(self).__name__} has weighted=True; define weigh(before, after, exit_mask)")


@dataclass(frozen=True)
class Exit:
    """The end of a loop: tokens exit, states are weighted, and tokens that have exited before stay as they are."""

    rule: HaltingRule
    probe: Probe | None
    everyone_out: bool = False
    """True if every row is at its last loop. A rule is then asked for weights only."""
    n_done: int | None = None
    """Loops that every row has then done; None: rows differ, or the host does not know."""

    def apply(
        self, rows: Rows, state: State, h_new: Tensor, loop_index: Tensor, active: Tensor | None = None
    ) -> tuple[Rows, State, Tensor, Tensor | None]:
        """Return rows and state after a loop that took rows["h"] to `h_new`, the tokens that exit, and the weights.

        Args:
            rows: `h` (B, T, D), `n_loops` (B,), and under a weighted rule `out` (B, T, D), the weighted sum so far. A
                caller that keeps them has `active` and `loops` (B, T) updated too, and a `ponder_cost` beside weights.
            active: (B, T), the tokens that were in the loop; None if all of them were.
        """
        rule, before, weight = self.rule, state, None
        # 1. Exit. Whatever the rule says, a token stays until `min_loops` loops and leaves at the last loop of its row.
        # Where all rows end, a decision would be made for nothing.
        if self.everyone_out and not rule.weighted:
            exit_mask = torch.ones(h_new.shape[:2], dtype=torch.bool, device=h_new.device)
        else:
            seen = self.probe(h_new) if rule.needs_probe and self.probe is not None else None
            state, exit_mask = rule.update(before, rows["h"], h_new, loop_index, seen)
            if self.everyone_out:
                exit_mask = torch.ones_like(exit_mask)
            elif self.n_done is None:
                n_done = (loop_index + 1)[:, None]
                exit_mask = (exit_mask & (n_done >= rule.min_loops)) | (n_done >= rows["n_loops"][:, None])
            elif self.n_done < rule.min_loops:
                exit_mask = torch.zeros_like(exit_mask)
        # 2. Weigh this loop's state.
        if rule.weighted:
            weight = rule.weigh(before, state, exit_mask)
        # 3. Freeze what had exited before.
        h = h_new
        if active is not None:
            exit_mask = exit_mask & active
            h = torch.where(active[..., None], h_new, rows["h"])
            weight = None if weight is None else weight * active
        rows = {**rows, "h": h}
        # 4. Add to the weighted sum. Tokens that had exited have weight 0, so `h_new` does no harm there.
        if weight is not None:
            rows["out"] = rows["out"] + weight[..., None] * h_new
        # 5. Count. `active` still says who ran this loop; afterwards, who runs the next one.
        if "active" in rows:
            rows["loops"] = rows["loops"] + rows["active"]
            rows["active"] = ~exit_mask if active is None else rows["active"] & ~exit_mask
            if weight is not None and "ponder_cost" in rows:
                # At the exit loop the weight is the remainder, so this is loops plus remainder.
                rows["ponder_cost"] = torch.where(exit_mask, rows["loops"] + weight, rows["ponder_cost"])
        return rows, state, exit_mask, weight


class Fixed(HaltingRule):
    """Every token runs every loop."""

    def __init__(self, min_loops: int = 1) -> None:
        super().__init__(0.0, min_loops)

    @classmethod
    def make(cls, threshold: float | None, min_loops: int, cfg: MythosConfig, act: "ACTHalting | None") -> "Fixed":
        return cls(min_loops)

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        return state, torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)


class LastDecides(HaltingRule):
    """Another rule for calls on whole prompts: every token leaves with its row's last one, unless it has left before.

    The last token itself sees the same in the loop as by the other rule, so without a coda the next token is the same.
    The coda, and later tokens that run more loops, find the prompt's tokens as they were when the last one left.
    """

    def __init__(self, rule: HaltingRule) -> None:
        super().__init__(rule.threshold, rule.min_loops)
        self.rule, self.needs_probe, self.weighted = rule, rule.needs_probe, rule.weighted

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        is_last = torch.arange(h.shape[1], device=h.device) == h.shape[1] - 1
        return {**self.rule.init(h, n_loops), "is_last": is_last.expand(h.shape[:2])}

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        after, done = self.rule.update(state, h_prev, h, loop_index, probe)
        leaves = (done & state["is_last"]).any(1)
        # An engine's tokens are rows of their own: `sequence` says which of them belong together.
        if (sequence := state.get("sequence")) is not None:
            leaves = ((sequence[:, None] == sequence) & leaves).any(1)
        fixed = {name: state[name] for name in ("is_last", "sequence") if name in state}
        return {**after, **fixed}, done | leaves[:, None]

    def weigh(self, before: State, after: State, exit_mask: Tensor) -> Tensor:
        return self.rule.weigh(before, after, exit_mask)


class ACTHalting(nn.Module):
    """The learned halting probability of a state: sigmoid(w . h + b), (B, T, D) -> (B, T), in at least float32.

    The weight starts at zero and the bias at logit(1 / max(2, max_loops)), so the depth of a fresh model depends on
    `max_loops` and not on the width.
    """

    def __init__(self, dim: int, max_loops: int = 2) -> None:
        super().__init__()
        self.halt = nn.Linear(dim, 1)
        self.max_loops = max_loops
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, -math.log(max(2, self.max_loops) - 1))

    def forward(self, h: Tensor) -> Tensor:
        if invariant():
            # A product with one column has a kernel for every number of rows, and sigmoid another one for the last few.
            logit = (at_least_float32(h) * at_least_float32(self.halt.weight)).sum(-1) + at_least_float32(
                self.halt.bias
            )
            return 1 / (1 + (-logit).exp())
        return float32_linear(h, self.halt.weight, self.halt.bias).squeeze(-1).sigmoid()


class ACT(HaltingRule):
    """Adaptive computation time: exit when the halting probabilities add up to the threshold.

    The weight of a loop is min(p, 1 - sum so far), and the exit loop takes the remainder, so that a token's weights sum
    to one at any number of loops. Source: Graves 2016, arXiv 1603.08983.
    """

    weighted = True
    default_threshold = 0.99
    max_threshold = 1.0
    halting = "act"

    def __init__(self, act: ACTHalting, threshold: float, min_loops: int = 1) -> None:
        super().__init__(threshold, min_loops)
        self.act = act

    @classmethod
    def make(cls, threshold: float | None, min_loops: int, cfg: MythosConfig, act: ACTHalting | None) -> "ACT":
        if act is None or cfg.halting != "act":
            raise ValueError("exit='act' needs a model with halting='act'; use exit='kl', which needs no training")
        return cls(act, cfg.act_threshold if threshold is None else threshold, min_loops)

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        return {"sum": at_least_float32(h).new_zeros(h.shape[:2])}

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        total = state["sum"] + self.act(h)
        if self.min_loops > 1:
            # The sum of a token that stays for `min_loops` may reach 1 early; its weights are 0 from then on.
            total = total.clamp(max=1)
        return {"sum": total}, total >= self.threshold

    def weigh(self, before: State, after: State, exit_mask: Tensor) -> Tensor:
        # The difference of two sums, not p itself: the next weight then makes up for the rounding of this addition.
        return after["sum"].masked_fill(exit_mask, 1) - before["sum"]


class Ouro(HaltingRule):
    """Exit at the first loop by which the token has exited with at least the probability `threshold`.

    The learned probability is one of exiting at this loop, having come so far. At threshold 1 no token exits early, in
    any dtype. Source: Zhu et al. 2025, arXiv 2510.25741.
    """

    default_threshold = max_threshold = 1.0
    halting = "ouro"

    def __init__(self, gate: ACTHalting, threshold: float, min_loops: int = 1) -> None:
        super().__init__(threshold, min_loops)
        self.gate = gate

    @classmethod
    def make(cls, threshold: float | None, min_loops: int, cfg: MythosConfig, act: ACTHalting | None) -> "Ouro | Fixed":
        if act is None or cfg.halting != "ouro":
            raise ValueError("exit='ouro' needs a model with halting='ouro'; use exit='kl', which needs no training")
        threshold = cfg.act_threshold if threshold is None else threshold
        # Rounded probabilities can add up to 1 early.
        return Fixed(min_loops) if threshold == 1 else cls(act, threshold, min_loops)

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        return {"stays": at_least_float32(h).new_ones(h.shape[:2])}

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        stays = state["stays"] * (1 - self.gate(h))
        return {"stays": stays}, 1 - stays >= self.threshold


class LatentDiff(HaltingRule):
    """Exit when the loop's step is small against the state: |h - h_prev| / |h| < threshold."""

    default_threshold = 0.03

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        return state, _norm(h - h_prev) < self.threshold * _norm(h)


class SecondDifference(HaltingRule):
    """Exit when two consecutive steps changed little: |step - previous step| / |h| < threshold, twice in a row.

    Source: after Pappone et al. 2025, arXiv 2509.23314; the division by |h| makes the threshold independent of width.
    """

    default_threshold = 0.03

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        # No step before the first: an infinite one is never near the next.
        near = torch.zeros(h.shape[:2], dtype=torch.bool, device=h.device)
        return {"step": torch.full_like(h, torch.inf), "near": near}

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        step = h - h_prev
        # Near twice in a row: one small second difference also happens by chance, when a step turns.
        near = _norm(step - state["step"]) < self.threshold * _norm(h)
        return {"step": step, "near": near}, near & state["near"]


class KL(HaltingRule):
    """Exit when one more loop hardly moves the prediction made from the state: KL(p_t || p_t-1) < threshold, in nats.

    Source: Geiping et al. 2025, arXiv 2502.05171, section on zero-shot adaptive compute.
    """

    needs_probe = True
    default_threshold = 5e-4

    def __init__(self, threshold: float, min_loops: int, vocab_size: int) -> None:
        super().__init__(threshold, min_loops)
        self.vocab_size = vocab_size

    @classmethod
    def make(cls, threshold: float | None, min_loops: int, cfg: MythosConfig, act: ACTHalting | None) -> "KL":
        return cls(cls.default_threshold if threshold is None else threshold, min_loops, cfg.vocab_size)

    def init(self, h: Tensor, n_loops: Tensor) -> State:
        return {"log_p": at_least_float32(h).new_zeros(*h.shape[:2], self.vocab_size)}

    def update(
        self, state: State, h_prev: Tensor, h: Tensor, loop_index: Tensor, probe: Tensor | None = None
    ) -> Decision:
        if probe is None:
            raise ValueError("probe=None, but the rule 'kl' compares predictions; pass probe=head(norm(h))")
        log_p = at_least_float32(probe).log_softmax(-1)
        # KL(p_t || p_t-1), this loop's prediction against the previous one.
        divergence = (log_p.exp() * (log_p - state["log_p"])).sum(-1)
        # The first loop has no prediction to compare with.
        done = (divergence < self.threshold) & (loop_index > 0)[:, None]
        return {"log_p": log_p}, done


def _norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each token's vector, (B, T, D) -> (B, T), in at least float32."""
    return torch.linalg.vector_norm(at_least_float32(x), dim=-1)


HALTING_RULES.update(fixed=Fixed, act=ACT, ouro=Ouro, latent_diff=LatentDiff, second_difference=SecondDifference, kl=KL)


def make_rule(
    name: str, threshold: float | None, min_loops: int, cfg: MythosConfig, act: ACTHalting | None
) -> HaltingRule:
    """Return the rule called `name`, one of HALTING_RULES. A `threshold` of None takes the rule's default.

    Raises:
        TypeError, ValueError: the name or the threshold is unusable, or the model has no learned halting to use.
    """
    check_part("exit", name, HALTING_RULES, "HALTING_RULES")
    if threshold is not None:
        check_threshold(name, threshold)
    return HALTING_RULES[name].make(threshold, min_loops, cfg, act)


def rule_of_call(
    exit: str | HaltingRule | None, threshold: float | None, cfg: MythosConfig, act: Callable[[], ACTHalting | None]
) -> HaltingRule | None:
    """Return the rule for `exit` and `exit_threshold` of a call; None: the model's own halting, which `act` returns."""
    if exit is None:
        if threshold is not None:
            raise ValueError(
                f"exit_threshold={threshold} needs a rule to belong to; pass exit='kl' or another rule too"
            )
        return None
    learned = act()
    if isinstance(exit, HaltingRule):
        if threshold is not None:
            raise ValueError(f"exit_threshold={threshold} is for a rule given by name; set the rule's own threshold")
        return exit
    if not isinstance(exit, str):
        raise TypeError(
            f"exit={exit!r} must be the name of a rule or a HaltingRule, not {type(exit).__name__}; use exit='kl'"
        )
    return make_rule(exit, threshold, cfg.min_loops, cfg, learned)


def check_threshold(name: str, threshold: object) -> None:
    """Refuse an `exit_threshold` that is no positive finite number, or that the rule called `name` does not use."""
    rule = HALTING_RULES[name]
    if not rule.default_threshold:
        raise ValueError(f"exit_threshold={threshold!r} means nothing to exit={name!r}; leave it out")
    remedy = f"use exit_threshold={rule.default_threshold}"
    check_number("exit_threshold", threshold, 0, rule.max_threshold, above=True, remedy=remedy)
