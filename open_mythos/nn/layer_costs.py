"""What one layer costs: the facts that accounting.py and costs/ add up over layers, loops and tokens.

Each built-in part states its own, in a method `costs`; a user's part that states none is measured, by `measured`.

Shapes: T tokens of a row, D width.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from open_mythos.ops.causal_attention import BLOCK, SHORT, takes_blocks


@dataclass(frozen=True)
class Execution:
    """Device and dtypes of a training step. They decide which of several routes a layer takes."""

    device: Literal["cpu", "cuda"]
    autocast: bool
    """True if products run in bfloat16 over float32 weights."""
    value_bytes: int
    """Bytes of a product's operand."""
    state_bytes: int
    """Bytes of a weight, a moment or a value of the residual stream."""

    def attends_in_blocks(self, T: int) -> bool:
        """Return true where attention with gradient runs in ops/causal_attention.py, which depends on this CPU."""
        if self.device != "cpu" or self.autocast or self.state_bytes != 4:
            return False
        with torch.enable_grad():
            return takes_blocks(torch.empty(1, T, 1, 1))

    def attends_in_float32(self, T: int, head_width: int) -> bool:
        """Return true where attention with gradient takes float32 copies of its bfloat16 inputs."""
        return self.device == "cpu" and self.autocast and T * head_width < SHORT

    def keys_of_kernel(self, T: int) -> float:
        """Return the keys that torch's kernel multiplies with a query; on a GPU it skips blocks above the diagonal."""
        if self.device == "cpu":
            return T  # its kernel for CPUs takes 512 keys at a time, and the counter of FLOPs counts them all
        return (T + min(T, BLOCK)) / 2


def _nothing(execution: Execution, T: int = 0) -> float:
    return 0


@dataclass(frozen=True)
class LayerCosts:
    """Costs of an attention or a feed-forward."""

    maps: tuple[tuple[int, ...], ...]
    """Linear maps that every token goes through, as (inputs, *outputs): several outputs are maps of one input."""
    saved: Callable[[Execution, int], float]
    """Bytes per token that autograd saves, in rows of T tokens."""
    vectors: int = 0
    """Parameters outside the maps: gains and biases."""
    heads: tuple[int, int, int] = (0, 0, 0)
    """Number of heads, and width of a key and of a value of each, in products with many queries."""
    decode_heads: tuple[int, int, int] | None = None
    """Number of heads, and width of a key and of a value, in products with a single query, where these differ."""

    @property
    def matrices(self) -> Counter[tuple[int, int]]:
        """Matrices by (outputs, inputs), as Muon takes them: maps of one input that are one parameter count apart."""
        return Counter((outputs, inputs) for inputs, *several in self.maps for outputs in several)

    @property
    def weights(self) -> int:
        """Values of the maps."""
        return sum(inputs * sum(outputs) for inputs, *outputs in self.maps)

    @property
    def parameters(self) -> int:
        return self.weights + self.vectors


@dataclass(frozen=True)
class InjectionCosts:
    """Costs of an injection."""

    prepared: int = 0
    """Values of matrices that a token meets once per call, in `prepare`."""
    per_loop: int = 0
    """Values of matrices that a token meets in every loop."""
    vectors: int = 0
    """Parameters outside the matrices."""
    saved_once: Callable[[Execution], float] = _nothing
    """Bytes per token that autograd saves of what `prepare` made."""
    saved: Callable[[Execution], float] = _nothing
    """Bytes per token that autograd saves in each loop, the state included."""
    narrows: bool = False
    """True if the loop's state has the dtype of products instead of the residual stream's."""

    @property
    def parameters(self) -> int:
        return self.prepared + self.per_loop + self.vectors

    def stream_bytes(self, execution: Execution) -> int:
        """Return the bytes of a value of the state inside the loop."""
        return execution.value_bytes if self.narrows else execution.state_bytes


def measured(
    build: Callable[[], nn.Module], run: Callable[[nn.Module, Tensor], Tensor], dim: int, heads: tuple[int, int, int]
) -> LayerCosts:
    """Return the costs of any layer, by building it without values and letting autograd say what it saves.

    Args:
        build: makes the layer.
        run: applies the layer to x (1, T, D).
        dim: D.
        heads: number of heads, and width of a key and of a value of each; zeros for a feed-forward.
    """
    with torch.device("meta"):
        layer = build()
    maps: list[tuple[int, ...]] = []
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            maps.append((module.in_features, *getattr(module, "widths", (module.out_features,))))
        else:
            # A parameter of more than two dimensions is a stack of matrices, such as stacked experts.
            matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1]
            maps += [(p.shape[-1], p.shape[-2]) for p in matrices for _ in range(math.prod(p.shape[:-2]))]
    n_parameters = sum(p.numel() for p in layer.parameters())
    vectors = n_parameters - sum(inputs * sum(outputs) for inputs, *outputs in maps)
    return LayerCosts(
        tuple(maps), lambda execution, T: saved_bytes(build, run, (1, T, dim), execution) / T, vectors, heads
    )


def saved_bytes(
    build: Callable[[], nn.Module], run: Callable[[nn.Module, Tensor], Tensor], shape: tuple[int, ...], how: Execution
) -> int:
    """Return the bytes that autograd saves while `run` applies a layer to x of this shape, the parameters apart."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    saved: dict[int, torch.UntypedStorage] = {}
    own: set[int] = set()

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # the reference keeps its address from being used again
        return x

    default = torch.get_default_dtype()
    torch.set_default_dtype({2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[how.value_bytes])
    try:
        # Fake tensors have shapes and devices, but no values: nothing is computed.
        with FakeTensorMode(), torch.enable_grad():
            layer = build()
            own.update(p.untyped_storage()._cdata for p in layer.parameters())
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                run(layer, torch.empty(shape, requires_grad=True))
    finally:
        torch.set_default_dtype(default)
    return sum(storage.nbytes() for storage in saved.values())
