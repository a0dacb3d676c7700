"""What each row is to reach."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reach:
    """A bound of a row's value."""

    value: float
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.value if self.at_most else value >= self.value

    def text(self, unit: str) -> str:
        number = f"{self.value:.0%}" if unit == "share" else f"{self.value:.3g}{'' if unit == 'x' else ' ' + unit}"
        return f"{'<=' if self.at_most else '>='} {number}"


REACH: dict[str, Reach] = {
    "train_addition": Reach(1.1),
    "train_addition.share": Reach(0.8),
    "train_small_gqa": Reach(1.6),
    "train_small_mla": Reach(1.6),
    "train_small_gqa_compiled": Reach(2.2),
    "train_small_mla_compiled": Reach(2.2),
    "muon_30m.4": Reach(0.15, at_most=True),
    "muon_30m.8": Reach(0.15, at_most=True),
    "overhead_3m": Reach(0.05, at_most=True),
    "forward_mid": Reach(1.4),
    "train_mid": Reach(1.4),
    "train_mid_poisson": Reach(1.3),
    "train_mid_poisson.allowed": Reach(0.9),
    "generate_mid_b1": Reach(2.2),
    "generate_mid_b1_compiled": Reach(2.2),
    "generate_mid_b4": Reach(2.0),
    "generate_mid_b4_compiled": Reach(2.0),
    "decode_128": Reach(3.0),
    "decode_128_compiled": Reach(3.0),
    "decode_512": Reach(3.0),
    "decode_512_compiled": Reach(3.0),
    "decode_960": Reach(3.5),
    "decode_960_compiled": Reach(3.5),
    "prefill_1b": Reach(1.8),
    "decode_1b": Reach(1.3),
    "decode_1b_compiled": Reach(1.3),
    "kv_cache_bytes": Reach(8 / 3),
    "build_1b": Reach(2.0),
    "build_1t_meta.ms": Reach(50, at_most=True),
    "rope_1m.bytes": Reach(0, at_most=True),
    "rope_1m.error": Reach(1e-6, at_most=True),
    "decode_deepseek_v3_b1": Reach(1.5),
    "decode_deepseek_v3_b1_compiled": Reach(1.5),
    "decode_deepseek_v3_b4": Reach(1.5),
    "decode_deepseek_v3_b4_compiled": Reach(1.5),
    "decode_qwen3_moe_b1": Reach(1.3),
    "decode_qwen3_moe_b1_compiled": Reach(1.3),
    "decode_qwen3_moe_b4": Reach(1.3),
    "decode_qwen3_moe_b4_compiled": Reach(1.3),
    "decode_llama_b1": Reach(0.8),
    "decode_llama_b1_compiled": Reach(0.8),
    "decode_llama_b4": Reach(0.8),
    "decode_llama_b4_compiled": Reach(0.8),
    "memory_train_mid": Reach(0.8, at_most=True),
    "memory_train_mid.checkpointed": Reach(0.5, at_most=True),
    "memory_train_mid.time": Reach(1.35, at_most=True),
    **{f"exits_generate_b{rows}.allowed": Reach(0.9) for rows in (1, 4, 16)},
    **{f"exits_prefill_b{rows}.allowed": Reach(0.9) for rows in (1, 4)},
    "scaling.tokens": Reach(0.15, at_most=True),
    "scaling.loops": Reach(0.15, at_most=True),
    "scaling.rows": Reach(0.15, at_most=True),
}
