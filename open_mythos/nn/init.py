"""Initial values, all in one place.

| parameters                                            | value                                                    |
|-------------------------------------------------------|----------------------------------------------------------|
| embedding (the head is tied to it), every other matrix | N(0, 0.02)                                              |
| output projections: attention wo, feed-forward down   | N(0, 0.02 / sqrt(2 * unrolled depth at max_loop_iters))  |
| norms                                                 | 1                                                        |
| depth LoRA                                            | down N(0, 0.02), scale 1, B 0                            |
| lti injection                                         | log_A 0, log_dt 0, B 0.1 (so A = exp(-1))                |
| diagonal injection                                    | A = sqrt(1/5), dt to match, B the identity               |
| concat injection                                      | N(0, sqrt(2 / (5 dim)))                                  |
| halting                                               | weight 0, bias logit(1 / max(2, max_loop_iters))         |
| router bias (a buffer), biases of a user's parts      | 0                                                        |
| other parameters of a user's parts                    | from their `reset_parameters`                            |
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from open_mythos.config import MythosConfig
from open_mythos.nn.attention import Attention
from open_mythos.nn.mlp import Expert
from open_mythos.nn.moe import MoEFFN, StackedExperts
from open_mythos.nn.norm import RMSNorm

STD = 0.02


class NoDraws(TorchFunctionMode):
    """Context in which modules are built without the random values that their constructors give a matrix.

    `init_weights` gives others, so drawing these would double the time; and on the meta device, where there is nothing
    to draw, the first call of torch's `normal_` imports a computer algebra system (1.3 s, 70 MiB).
    """

    def __torch_function__(
        self, func: Callable, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


_DRAWS = (nn.init.normal_, nn.init.kaiming_uniform_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_)


def init_weights(model: nn.Module, cfg: MythosConfig) -> None:
    """Set every parameter and buffer of `model`, whatever it holds now (it may be built within `NoDraws`)."""
    depth = cfg.prelude_layers + cfg.recurrent_layers * cfg.max_loop_iters + cfg.coda_layers
    out_std = STD / math.sqrt(2 * depth)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=STD)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                nn.init.zeros_(bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, StackedExperts):
            nn.init.normal_(module.gate_up, std=STD)
            nn.init.normal_(module.down, std=out_std)
        elif isinstance(module, MoEFFN):
            nn.init.zeros_(module.router_bias)
    # After the matrices above, which these modules contain. Parts with values unlike a plain matrix's, and those of a
    # user, have a `reset_parameters` of their own.
    for module in model.modules():
        if isinstance(module, Attention) and isinstance(wo := getattr(module, "wo", None), nn.Linear):
            nn.init.normal_(wo.weight, std=out_std)
        elif isinstance(module, Expert):
            nn.init.normal_(module.down.weight, std=out_std)
        if isinstance(module, nn.Linear | nn.Embedding | RMSNorm | StackedExperts):
            continue
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        elif next(module.parameters(recurse=False), None) is not None:
            name = type(module).__name__
            raise TypeError(f"{name} has parameters of its own that nothing sets; give it a method reset_parameters()")
