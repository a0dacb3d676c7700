"""The import path of open-mythos 0.5.0. Nothing is defined here."""

from open_mythos.config import MythosConfig as MythosConfig
from open_mythos.model import OpenMythos as OpenMythos
from open_mythos.nn.attention import GQAttention as GQAttention
from open_mythos.nn.block import TransformerBlock as TransformerBlock
from open_mythos.nn.depth import LoRAAdapter as LoRAAdapter
from open_mythos.nn.depth import loop_index_embedding as loop_index_embedding
from open_mythos.nn.halting import ACTHalting as ACTHalting
from open_mythos.nn.injection import LTIInjection as LTIInjection
from open_mythos.nn.mla import MLAttention as MLAttention
from open_mythos.nn.mlp import Expert as Expert
from open_mythos.nn.moe import MoEFFN as MoEFFN
from open_mythos.nn.norm import RMSNorm as RMSNorm
from open_mythos.nn.recurrent import RecurrentBlock as RecurrentBlock
from open_mythos.nn.rope import apply_rope as apply_rope
