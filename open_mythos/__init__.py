"""Recurrent-depth language models: apply one block again and again, and pay for depth in compute, not in parameters."""

from open_mythos.config import MythosConfig
from open_mythos.convert import convert_open_mythos_0_5
from open_mythos.model import LoopTrace, OpenMythos, TrainOutput
from open_mythos.nn.attention import GQAttention
from open_mythos.nn.block import TransformerBlock
from open_mythos.nn.cache import KVCache
from open_mythos.nn.depth import LoopPlan, LoRAAdapter, loop_index_embedding
from open_mythos.nn.halting import ACT, KL, ACTHalting, Fixed, HaltingRule, LatentDiff, SecondDifference
from open_mythos.nn.injection import AddInjection, ConcatInjection, DiagonalInjection, LTIInjection
from open_mythos.nn.mla import MLAttention
from open_mythos.nn.mlp import Expert
from open_mythos.nn.moe import MoEFFN
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.recurrent import RecurrentBlock
from open_mythos.nn.rope import apply_rope
from open_mythos.tokenizer import MythosTokenizer, load_tokenizer
from open_mythos.variants import (
    VARIANTS,
    mythos_1b,
    mythos_1t,
    mythos_3b,
    mythos_3m,
    mythos_7b,
    mythos_8b_fine,
    mythos_10b,
    mythos_30m,
    mythos_50b,
    mythos_100b,
    mythos_120m,
    mythos_200k,
    mythos_500b,
)

__all__ = [
    "ACT",
    "KL",
    "VARIANTS",
    "ACTHalting",
    "AddInjection",
    "ConcatInjection",
    "DiagonalInjection",
    "Expert",
    "Fixed",
    "GQAttention",
    "HaltingRule",
    "KVCache",
    "LTIInjection",
    "LatentDiff",
    "LoRAAdapter",
    "LoopPlan",
    "LoopTrace",
    "MLAttention",
    "MoEFFN",
    "MythosConfig",
    "MythosTokenizer",
    "OpenMythos",
    "RMSNorm",
    "RecurrentBlock",
    "SecondDifference",
    "TrainOutput",
    "TransformerBlock",
    "apply_rope",
    "convert_open_mythos_0_5",
    "load_tokenizer",
    "loop_index_embedding",
    "mythos_1b",
    "mythos_1t",
    "mythos_3b",
    "mythos_3m",
    "mythos_7b",
    "mythos_8b_fine",
    "mythos_10b",
    "mythos_30m",
    "mythos_50b",
    "mythos_100b",
    "mythos_120m",
    "mythos_200k",
    "mythos_500b",
]
