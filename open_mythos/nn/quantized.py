"""A model with weights of one byte, for inference: half the memory of bfloat16, and decoding that reads half as much.

The maps of the package's attentions and feed-forwards, the experts, embedding and head are rounded. Norms, routers,
halting, injection, depth LoRA and latent attention's `kv_up`, which is used in parts, stay as they are.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.nn.attention import GQAttention
from open_mythos.nn.mla import MLAttention
from open_mythos.nn.mlp import Expert
from open_mythos.nn.moe import MoEFFN, StackedExperts
from open_mythos.ops.experts import StoredExperts
from open_mythos.ops.int8 import Int8Weight, quantize_tensor
from open_mythos.ops.linear import linear

MAPS: dict[type[nn.Module], tuple[str, ...]] = {
    GQAttention: ("wqkv", "wo"),
    MLAttention: ("down", "q_up", "wo"),
    Expert: ("gate_up", "down"),
}
"""The maps that are rounded, by their owner. A part of a user's own stays: it may use its weights in any way."""


class Int8Linear(nn.Module):
    """A `Linear`, or an embedding, whose weight is stored as int8."""

    values: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, widths: tuple[int, ...] = ()) -> None:
        super().__init__()
        _store(self, "", weight)
        self.widths = widths

    @property
    def weight(self) -> Int8Weight:
        return Int8Weight(self.values, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute each of the maps of x, as views of one tensor."""
        return self(x).split(self.widths, dim=-1)


class Int8Embedding(Int8Linear):
    """The embedding of token ids."""

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.values).to(self.scales.dtype) * self.scales[x][..., None]


class Int8Head(nn.Module):
    """The head of tied embeddings: a product with the embedding's weight."""

    def __init__(self, embed: Int8Embedding) -> None:
        super().__init__()
        self._embed = (embed,)  # in a tuple, so that its tensors have one name in the model's state

    @property
    def weight(self) -> Int8Weight:
        return self._embed[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Int8Experts(StackedExperts):
    """Routed experts whose stacked weights are stored as int8."""

    gate_up_values: Tensor
    gate_up_scales: Tensor
    down_values: Tensor
    down_scales: Tensor

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        nn.Module.__init__(self)
        _store(self, "gate_up_", gate_up)
        _store(self, "down_", down)
        self.group = None

    def weights(self, x: Tensor) -> StoredExperts:
        return (
            Int8Weight(self.gate_up_values, self.gate_up_scales),
            Int8Weight(self.down_values, self.down_scales),
        )


def _store(module: nn.Module, prefix: str, weight: Tensor) -> None:
    """Register a weight's values and scales; those of a weight on the meta device are empty too."""
    if weight.is_meta:
        found = Int8Weight(torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight[..., 0]))
    else:
        found = quantize_tensor(weight)
    module.register_buffer(f"{prefix}values", found.values)
    module.register_buffer(f"{prefix}scales", found.scales)


def quantize(model: Any) -> Any:
    """Round an `OpenMythos`'s large matrices to int8, in place, and return it in eval mode, without gradients.

    Raises:
        ValueError: the model is quantized already, or a weight is not finite; nothing has changed.
    """
    if model.cfg.weights == "int8":
        raise ValueError("weights='int8': the model is quantized already; give the one that it was made from")
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise ValueError(f"{name} has a value that is NaN or infinite, which int8 cannot hold; use earlier weights")
    use_int8(model)
    model.cfg = replace(model.cfg, weights="int8")
    return model.eval()


def use_int8(model: Any) -> None:
    """Replace the modules that hold the large matrices by those with int8 weights, empty on the meta device."""
    for owner in list(model.modules()):
        for name in MAPS.get(type(owner), ()):
            old = getattr(owner, name)
            setattr(owner, name, Int8Linear(old.weight, old.widths))
        if isinstance(owner, MoEFFN):
            owner.experts = Int8Experts(owner.experts.gate_up, owner.experts.down)
    embed = Int8Embedding(model.embed.weight)
    head = Int8Head(embed) if model.cfg.tie_embeddings else Int8Linear(model.head.weight)
    model.embed, model.head = embed, head
    model.requires_grad_(False)
