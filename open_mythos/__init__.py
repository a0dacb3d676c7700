"""Recurrent-depth language models: apply one block again and again, and pay for depth in compute, not in parameters.

A name is imported when it is first used, so that `mythos --help` does not wait for torch.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The public names, each on a line of its own. Type checkers read them here, and so does `_MODULE_OF`.
if TYPE_CHECKING:
    from open_mythos.config import MythosConfig as MythosConfig
    from open_mythos.convert.open_mythos_0_5 import convert_open_mythos_0_5 as convert_open_mythos_0_5
    from open_mythos.engine.engine import Engine as Engine
    from open_mythos.engine.engine import EngineConfig as EngineConfig
    from open_mythos.engine.llm import LLM as LLM
    from open_mythos.experiments.study import Study as Study
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
    from open_mythos.nn.quantized import quantize as quantize
    from open_mythos.nn.recurrent import RecurrentBlock as RecurrentBlock
    from open_mythos.nn.rope import apply_rope as apply_rope
    from open_mythos.recipes import load_recipe as load_recipe
    from open_mythos.tokenization.tokenizer import MythosTokenizer as MythosTokenizer
    from open_mythos.tokenization.tokenizer import load_tokenizer as load_tokenizer
    from open_mythos.train.config import TrainConfig as TrainConfig
    from open_mythos.train.trainer import Trainer as Trainer
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

_MODULE_OF = {
    name: module
    for module, name in re.findall(
        r"^    from ([\w.]+) import (\w+) as", Path(__file__).read_text("utf-8"), re.MULTILINE
    )
}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "main":
        return import_module("open_mythos.main")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'open_mythos' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
