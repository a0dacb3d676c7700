"""What a configuration costs: parameters, FLOPs and bytes, from formulas alone. Nothing is built.

tests/test_accounting.py holds every formula against the built model of every variant.
"""

from dataclasses import dataclass

from open_mythos.config import MythosConfig


@dataclass(frozen=True)
class Parameters:
    """Parameter counts by part. The head is the embedding and counts once."""

    embedding: int
    prelude: int
    coda: int
    routed_experts: int
    """All routed experts of the recurrent blocks."""
    chosen_experts: int
    """Those of them that one token goes through in one loop."""
    core: int
    """The rest of the recurrent block: attention, norms, router, shared experts or dense feed-forward."""
    loop: int
    """Injection, depth LoRA with the scale of one loop, halting: what the loop adds around its blocks."""
    prepared: int
    """Those of `loop` that meet a token once: what the injection makes of the prelude's output."""
    other_loops: int
    """The depth LoRA's scales of all loops but one."""
    norms: int
    """The final norm, and the prelude's."""

    @property
    def total(self) -> int:
        """Every parameter."""
        once = self.embedding + self.prelude + self.coda + self.norms
        return once + self.routed_experts + self.core + self.loop + self.other_loops

    @property
    def once(self) -> int:
        """Applied to a token once, whatever the loops; without the embedding."""
        return self.prelude + self.coda + self.norms + self.prepared

    @property
    def per_loop(self) -> int:
        """Applied to a token in every loop."""
        return self.core + self.chosen_experts + self.loop - self.prepared

    @property
    def active(self) -> int:
        """Distinct parameters that one token touches in one loop and outside the loop; without the embedding."""
        return self.once + self.per_loop

    @property
    def active_share(self) -> float:
        """`active` over `total`."""
        return self.active / self.total

    def unrolled(self, n_loops: int) -> int:
        """Parameters applied to one token at `n_loops`, the shared ones counted each time; without the embedding."""
        return self.once + n_loops * self.per_loop


def count_parameters(cfg: MythosConfig) -> Parameters:
    """The parameters of a model built from `cfg`."""
    D = cfg.dim
    block = _attention(cfg) + (4 if cfg.block_norm == "sandwich" else 2) * D
    plain = block + _swiglu(D, D * 4 // 3)
    routed = chosen = 0
    if cfg.n_experts:
        routed = cfg.recurrent_layers * cfg.n_experts * _swiglu(D, cfg.expert_dim)
        chosen = cfg.recurrent_layers * cfg.n_experts_per_tok * _swiglu(D, cfg.expert_dim)
        shared = _swiglu(D, cfg.n_shared_experts * cfg.n_experts_per_tok * cfg.expert_dim)
        core = cfg.recurrent_layers * (block + cfg.n_experts * D + shared)
    else:
        core = cfg.recurrent_layers * (block + _swiglu(D, cfg.expert_dim))
    loop = prepared = other_loops = 0
    if cfg.recurrent_layers:
        injection = {"lti": 3 * D + 1, "diagonal": D * D + 2 * D, "concat": 2 * D * D + D, "add": 0}[cfg.injection]
        prepared = D * D if cfg.injection in ("diagonal", "concat") else 0
        other_loops = (cfg.max_loop_iters - 1) * cfg.lora_rank
        loop = injection + (2 * D + 1) * cfg.lora_rank + (D + 1 if cfg.halting == "act" else 0)
    return Parameters(
        embedding=cfg.vocab_size * D,
        prelude=cfg.prelude_layers * plain,
        coda=cfg.coda_layers * plain,
        routed_experts=routed,
        chosen_experts=chosen,
        core=core,
        loop=loop,
        prepared=prepared,
        other_loops=other_loops,
        norms=D + (D if cfg.prelude_norm else 0),
    )


def flops_per_token(cfg: MythosConfig, n_loops: int, context_tokens: int = 0) -> int:
    """FLOPs of one token's forward pass: a multiplication and an addition for each weight it meets, head included.

    Attention adds the products with `context_tokens` keys and values per layer and loop. `mla` is counted as it runs in
    prefill and training, with each latent expanded once. A training step costs about three times as much. Elementwise
    work (norms, gates, halting sums) is left out: under 1 % from a width of 512 on.
    """
    matrices = count_parameters(cfg).unrolled(n_loops) + cfg.vocab_size * cfg.dim
    if cfg.attn_type == "mla":
        widths = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim)
    else:
        widths = 2 * cfg.dim
    return 2 * (matrices + n_layers(cfg, n_loops) * context_tokens * widths)


def kv_bytes_per_token(cfg: MythosConfig, n_loops: int, bytes_per_value: int = 2) -> int:
    """Bytes that a cache of `n_loops` levels holds for one token; 2 bytes per value is bf16."""
    if cfg.attn_type == "mla":
        values = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    else:
        values = 2 * cfg.n_kv_heads * cfg.head_dim
    return n_layers(cfg, n_loops) * values * bytes_per_value


def n_layers(cfg: MythosConfig, n_loops: int) -> int:
    """Blocks that a token goes through at `n_loops`, which is also the number of cached levels."""
    return cfg.prelude_layers + n_loops * cfg.recurrent_layers + cfg.coda_layers


def _attention(cfg: MythosConfig) -> int:
    D, H = cfg.dim, cfg.n_heads
    if cfg.attn_type == "gqa":
        return 2 * D * D + 2 * D * cfg.n_kv_heads * cfg.head_dim + (2 * cfg.head_dim if cfg.qk_norm else 0)
    queries = D * cfg.q_lora_rank + cfg.q_lora_rank * (1 + H * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim))
    latents = D * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    values = cfg.kv_lora_rank * (1 + H * (cfg.qk_nope_head_dim + cfg.v_head_dim)) + H * cfg.v_head_dim * D
    return queries + latents + values


def _swiglu(dim: int, hidden: int) -> int:
    return 3 * dim * hidden
