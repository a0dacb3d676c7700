"""Recurrent-depth language models: apply one block again and again, and pay for depth in compute, not in parameters.

Names are imported when they are first used, so that `mythos --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_mythos.config import MythosConfig as MythosConfig
    from open_mythos.convert.open_mythos_0_5 import convert_open_mythos_0_5 as convert_open_mythos_0_5
    from open_mythos.engine.llm import LLM as LLM
    from open_mythos.generation.sampling_params import SamplingParams as SamplingParams
    from open_mythos.model import LoopTrace as LoopTrace
    from open_mythos.model import OpenMythos as OpenMythos
    from open_mythos.model import TrainOutput as TrainOutput
    from open_mythos.nn.attention import GQAttention as GQAttention
    from open_mythos.nn.block import TransformerBlock as TransformerBlock
    from open_mythos.nn.cache import KVCache as KVCache
    from open_mythos.nn.depth import LoopPlan as LoopPlan
    from open_mythos.nn.depth import LoRAAdapter as LoRAAdapter
    from open_mythos.nn.depth import loop_index_embedding as loop_index_embedding
    from open_mythos.nn.halting import ACTHalting as ACTHalting
    from open_mythos.nn.halting import HaltingRule as HaltingRule
    from open_mythos.nn.injection import LTIInjection as LTIInjection
    from open_mythos.nn.mla import MLAttention as MLAttention
    from open_mythos.nn.mlp import Expert as Expert
    from open_mythos.nn.moe import MoEFFN as MoEFFN
    from open_mythos.nn.norm import RMSNorm as RMSNorm
    from open_mythos.nn.recurrent import RecurrentBlock as RecurrentBlock
    from open_mythos.nn.rope import apply_rope as apply_rope
    from open_mythos.tokenization.tokenizer import MythosTokenizer as MythosTokenizer
    from open_mythos.tokenization.tokenizer import load_tokenizer as load_tokenizer
    from open_mythos.variants import VARIANTS as VARIANTS
    from open_mythos.variants import mythos_1b as mythos_1b
    from open_mythos.variants import mythos_1t as mythos_1t
    from open_mythos.variants import mythos_3b as mythos_3b
    from open_mythos.variants import mythos_3m as mythos_3m
    from open_mythos.variants import mythos_7b as mythos_7b
    from open_mythos.variants import mythos_8b_fine as mythos_8b_fine
    from open_mythos.variants import mythos_10b as mythos_10b
    from open_mythos.variants import mythos_30m as mythos_30m
    from open_mythos.variants import mythos_50b as mythos_50b
    from open_mythos.variants import mythos_100b as mythos_100b
    from open_mythos.variants import mythos_120m as mythos_120m
    from open_mythos.variants import mythos_200k as mythos_200k
    from open_mythos.variants import mythos_500b as mythos_500b

_NAMES = {
    "config": ["MythosConfig"],
    "convert.open_mythos_0_5": ["convert_open_mythos_0_5"],
    "model": ["LoopTrace", "OpenMythos", "TrainOutput"],
    "nn.attention": ["GQAttention"],
    "nn.block": ["TransformerBlock"],
    "nn.cache": ["KVCache"],
    "nn.depth": ["LoRAAdapter", "LoopPlan", "loop_index_embedding"],
    "nn.halting": ["ACTHalting", "HaltingRule"],
    "nn.injection": ["LTIInjection"],
    "nn.mla": ["MLAttention"],
    "nn.mlp": ["Expert"],
    "nn.moe": ["MoEFFN"],
    "nn.norm": ["RMSNorm"],
    "nn.recurrent": ["RecurrentBlock"],
    "nn.rope": ["apply_rope"],
    "engine.llm": ["LLM"],
    "generation.sampling_params": ["SamplingParams"],
    "tokenization.tokenizer": ["MythosTokenizer", "load_tokenizer"],
    "variants": [
        "VARIANTS", "mythos_1b", "mythos_1t", "mythos_3b", "mythos_3m", "mythos_7b", "mythos_8b_fine", "mythos_10b",
        "mythos_30m", "mythos_50b", "mythos_100b", "mythos_120m", "mythos_200k", "mythos_500b",
    ],
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "main":
        return import_module("open_mythos.main")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'open_mythos' has no attribute {name!r}")
    value = getattr(import_module(f"open_mythos.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
