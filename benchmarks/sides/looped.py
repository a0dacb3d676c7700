"""Parts that both packages called open_mythos have under the same names."""

import math
from typing import Any

import torch
from torch import nn

from benchmarks.tasks import Side


class Looped(Side):
    """A model with `recurrent.block` and `recurrent.act.halt`."""

    def __init__(self, model: Any, vocab_size: int) -> None:
        self.model, self.vocab_size = model, vocab_size

    def halt_at(self, n: int) -> None:
        """Give every token the halting probability 1/n, so that it reaches the threshold in loop n and not before."""
        halt = self.model.get_submodule("recurrent.act.halt")
        with torch.no_grad():
            halt.get_parameter("weight").zero_()
            # sigmoid(20) is 1 in float32.
            halt.get_parameter("bias").fill_(-math.log(n - 1) if n > 1 else 20.0)

    def loop_module(self) -> nn.Module | None:
        return self.model.get_submodule("recurrent.block")
