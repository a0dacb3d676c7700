"""What a configuration costs: parameters, FLOPs and bytes of a call, from what each layer states of itself.

Nothing is allocated. tests/test_accounting.py holds every formula against the built model of every variant.
"""

import math
from dataclasses import dataclass

from open_mythos.config import MythosConfig
from open_mythos.nn.block import ATTENTIONS, attention_costs, feed_forward_costs
from open_mythos.nn.injection import injection_costs
from open_mythos.nn.layer_costs import InjectionCosts


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by part."""

    embedding: int
    """With the head, which counts once where it is the embedding."""
    prelude: int
    coda: int
    routed_experts: int
    """All routed experts of the recurrent blocks."""
    chosen_experts: int
    """Routed experts that one token goes through in one loop."""
    core: int
    """The rest of the recurrent block: attention, norms, router, shared experts or dense feed-forward."""
    loop: int
    """Parts around the block: injection, depth LoRA with the scale of one loop, halting."""
    prepared: int
    """Parameters of the injection, counted in `loop` too, that meet a token once per call."""
    other_loops: int
    """The depth LoRA's scales of all loops but one."""
    norms: int
    """The final norm, and the prelude's."""

    @property
    def total(self) -> int:
        """All parameters."""
        once = self.embedding + self.prelude + self.coda + self.norms
        return once + self.routed_experts + self.core + self.loop + self.other_loops

    @property
    def once(self) -> int:
        """Parameters that a token meets once, whatever the loops; without the embedding."""
        return self.prelude + self.coda + self.norms + self.prepared

    @property
    def per_loop(self) -> int:
        """Parameters that a token meets in every loop."""
        return self.core + self.chosen_experts + self.loop - self.prepared

    @property
    def active(self) -> int:
        """Distinct parameters that one token meets at one loop; without the embedding."""
        return self.once + self.per_loop

    @property
    def active_share(self) -> float:
        """Quotient of `active` and `total`."""
        return self.active / self.total

    def unrolled(self, n_loops: int) -> int:
        """Return the parameters that a token meets at `n_loops`, counted each time; without the embedding."""
        return self.once + n_loops * self.per_loop


def count_parameters(cfg: MythosConfig) -> Parameters:
    """Count the parameters of a model built from `cfg`."""
    D, n_blocks = cfg.dim, cfg.recurrent_layers
    block = attention_costs(cfg).parameters + (4 if cfg.block_norm in ("sandwich", "branch") else 2) * D
    plain = block + feed_forward_costs(cfg, recurrent=False).parameters
    expert = 3 * D * cfg.expert_dim
    routed = chosen = 0
    core = n_blocks * (block + feed_forward_costs(cfg, recurrent=True).parameters)
    if cfg.n_experts:
        routed, chosen = n_blocks * cfg.n_experts * expert, n_blocks * cfg.n_experts_per_tok * expert
        core += n_blocks * cfg.n_experts * D  # the router
    injection, around, other_loops = InjectionCosts(), 0, 0
    if n_blocks:
        injection = injection_costs(cfg)
        around = (2 * D + 1) * cfg.lora_rank + (D + 1 if cfg.halting != "none" else 0)
        other_loops = (cfg.max_loop_iters - 1) * cfg.lora_rank
    return Parameters(
        embedding=cfg.vocab_size * D * (1 if cfg.tie_embeddings else 2),
        prelude=cfg.prelude_layers * plain,
        coda=cfg.coda_layers * plain,
        routed_experts=routed,
        chosen_experts=chosen,
        core=core,
        loop=injection.parameters + around,
        prepared=injection.prepared,
        other_loops=other_loops,
        norms=D + (D if cfg.prelude_norm else 0),
    )


def flops_per_token(cfg: MythosConfig, n_loops: int, context_tokens: int = 0) -> int:
    """Return the FLOPs of one token's forward pass: two for each weight that it meets, the head's included.

    Attention adds the products with `context_tokens` keys and values per layer and loop. `mla` is counted as it runs in
    prefill and training, with each latent expanded once. A training step costs about three times as much. Elementwise
    work (norms, gates, halting sums) is left out: under 1 % from a width of 512 on.
    """
    matrices = count_parameters(cfg).unrolled(n_loops) + cfg.vocab_size * cfg.dim
    n_heads, key_width, value_width = attention_costs(cfg).heads
    return 2 * (matrices + n_layers(cfg, n_loops) * context_tokens * n_heads * (key_width + value_width))


def kv_bytes_per_token(cfg: MythosConfig, n_loops: int, bytes_per_value: int = 2) -> int:
    """Return the bytes of one token in a cache of `n_loops` levels; 2 bytes per value is bf16."""
    return n_layers(cfg, n_loops) * kv_values(cfg) * bytes_per_value


def kv_values(cfg: MythosConfig) -> int:
    """Return the values that one layer caches for a token at one level."""
    return sum(map(math.prod, ATTENTIONS[cfg.attn_type].cache_shapes(cfg)))


def n_layers(cfg: MythosConfig, n_loops: int) -> int:
    """Return the blocks that a token goes through at `n_loops`, which is also the number of cached levels."""
    return cfg.prelude_layers + n_loops * cfg.recurrent_layers + cfg.coda_layers
