"""The hidden matrices of a model by shape, as Muon takes them."""

from collections import Counter

from open_mythos.config import MythosConfig


def hidden_matrices(cfg: MythosConfig) -> Counter[tuple[int, int]]:
    """(rows, columns) -> how many. Maps of one input that are stored as one parameter are told apart."""
    D = cfg.dim
    if cfg.attn_type == "gqa":
        kv = cfg.n_kv_heads * cfg.head_dim
        attention = [(D, D), (D, D), (kv, D), (kv, D)]
    else:
        key, value = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.v_head_dim
        attention = [(rank, D) for rank in (cfg.q_lora_rank, cfg.kv_lora_rank, cfg.qk_rope_head_dim)]
        attention += [
            (cfg.n_heads * key, cfg.q_lora_rank),
            (cfg.n_heads * (cfg.qk_nope_head_dim + value), cfg.kv_lora_rank),
            (D, cfg.n_heads * value),
        ]

    def swiglu(hidden: int) -> list[tuple[int, int]]:
        return [(hidden, D), (hidden, D), (D, hidden)] if hidden else []

    outer, inner = Counter(attention + swiglu(D * 4 // 3)), Counter(attention)
    if cfg.n_experts:
        inner.update(swiglu(cfg.n_shared_experts * cfg.n_experts_per_tok * cfg.expert_dim))
        # Gate and up of an expert are one matrix.
        inner[2 * cfg.expert_dim, D] += cfg.n_experts
        inner[D, cfg.expert_dim] += cfg.n_experts
    else:
        inner.update(swiglu(cfg.expert_dim))
    counts: Counter[tuple[int, int]] = Counter()
    for layers, shapes in ((cfg.prelude_layers + cfg.coda_layers, outer), (cfg.recurrent_layers, inner)):
        for shape, n in shapes.items():
            counts[shape] += layers * n
    return +counts
