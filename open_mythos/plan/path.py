"""Which of the code's ways of computing a training step runs: that decides what is multiplied and what is kept."""

from dataclasses import dataclass
from typing import Literal

import torch

from open_mythos.nn.causal import BLOCK, takes_blocks
from open_mythos.train.config import TrainConfig


@dataclass(frozen=True)
class Path:
    """Device and dtypes of a step."""

    device: Literal["cpu", "cuda"]
    autocast: bool
    """Products in bfloat16 over float32 weights."""
    value_bytes: int
    """Of what products take and give."""
    state_bytes: int
    """Of weights, moments and the residual stream."""

    @classmethod
    def of(cls, cfg: TrainConfig, device: Literal["cpu", "cuda"] = "cuda") -> "Path":
        state_bytes = 8 if cfg.dtype == "float64" else 4
        autocast = cfg.dtype == "bfloat16"
        return cls(device, autocast, 2 if autocast else state_bytes, state_bytes)

    def attends_in_blocks(self, T: int) -> bool:
        """Whether attention with gradient is nn/causal.py, on this machine if the device is a CPU."""
        if self.device != "cpu" or self.autocast or self.state_bytes != 4:
            return False
        with torch.enable_grad():
            return takes_blocks(torch.empty(1, T, 1, 1))

    def keys_of_kernel(self, T: int) -> float:
        """Keys per query in torch's kernel: about half on a GPU, which skips what lies above the diagonal in blocks."""
        if self.device == "cpu":
            return T  # its kernel for CPUs takes 512 keys at a time, and the counter of FLOPs counts them all
        return (T + min(T, BLOCK)) / 2
