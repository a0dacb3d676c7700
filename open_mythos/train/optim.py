"""Which optimizer, learning rate and weight decay each parameter of a model gets.

| parameters | kind="muon" | kind="adamw" | weight decay |
|---|---|---|---|
| hidden matrices: attention, feed-forward, stacked experts | Muon, muon_lr | AdamW, lr | yes |
| the rest: embedding (and tied head), norms, injection, router, halting, depth LoRA | AdamW, lr | AdamW, lr | no |

The rest is undecayed because decay pulls it towards values that mean something else than "small": an LTI decay
towards exp(-1), a norm's gain towards 0 (Parcae decays none of these; OLMo 2 dropped decay on embeddings).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from open_mythos.checks import check_choice, check_number
from open_mythos.nn.linear import Linear
from open_mythos.train.muon import AdjustLR, Muon


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and its rates. The schedule scales `lr` and `muon_lr` alike."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["matrices", "all"] = "matrices"
    """What weight decay touches: hidden matrices, or every parameter as a bare torch.optim.AdamW does."""
    muon_lr: float = 3e-4
    """Peak rate of Muon; with adjust_lr="match_rms_adamw" on the scale of AdamW's."""
    momentum: float = 0.95
    adjust_lr: AdjustLR = "match_rms_adamw"
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None does not clip."""

    def __post_init__(self) -> None:
        check_choice("optim.kind", self.kind, ("adamw", "muon"))
        check_number("optim.lr", self.lr, 0, above=True)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ValueError(f"optim.betas={self.betas!r} must be two numbers; use optim.betas=(0.9, 0.95)")
        for i, beta in enumerate(self.betas):
            check_number(f"optim.betas[{i}]", beta, 0, 1, below=True)
        check_number("optim.eps", self.eps, 0, above=True)
        check_number("optim.weight_decay", self.weight_decay, 0)
        check_choice("optim.decay", self.decay, ("matrices", "all"))
        check_number("optim.muon_lr", self.muon_lr, 0, above=True)
        check_number("optim.momentum", self.momentum, 0, 1, below=True)
        check_choice("optim.adjust_lr", self.adjust_lr, get_args(AdjustLR))
        if self.clip_norm is not None:
            check_number("optim.clip_norm", self.clip_norm, 0, above=True)


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    """Whether a parameter is a matrix between hidden states, or a stack of such matrices."""
    in_block = name.startswith(("prelude.", "coda.", "recurrent.block."))
    return in_block and p.ndim >= 2 and ".router." not in name


def build_optimizers(model: nn.Module, cfg: OptimConfig) -> list[torch.optim.Optimizer]:
    """One optimizer, or two with Muon; every trainable parameter is in exactly one group."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if is_hidden_matrix(name, p)]
    rest = [p for name, p in named if not is_hidden_matrix(name, p)]
    groups = [{"params": rest, "weight_decay": cfg.weight_decay if cfg.decay == "all" else 0.0}]
    if cfg.kind == "adamw":
        # One call of the fused update takes tensors of one kind: experts that are spread by hand are no DTensors.
        for kind in dict.fromkeys(type(p) for p in matrices):
            of_kind = [p for p in matrices if type(p) is kind]
            groups.append({"params": of_kind, "weight_decay": cfg.weight_decay})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
    ]
    if cfg.kind == "muon" and matrices:
        widths = {m.weight: m.widths for m in model.modules() if isinstance(m, Linear)}
        optimizers.append(Muon(matrices, cfg.muon_lr, cfg.momentum, cfg.weight_decay, cfg.adjust_lr, widths))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to `factor` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
