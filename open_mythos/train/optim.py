"""Which optimizer, learning rate and weight decay each parameter of a model gets.

| parameters | kind="muon" | kind="adamw" | weight decay |
|---|---|---|---|
| hidden matrices: attention, feed-forward, stacked experts | Muon, muon_lr | AdamW, lr | yes |
| the rest: embedding (and tied head), norms, injection, router, halting, depth LoRA | AdamW, lr | AdamW, lr | no |

The rest is undecayed because decay pulls it towards values that mean something else than "small": an LTI decay
towards exp(-1), a norm's gain towards 0 (Parcae decays none of these; OLMo 2 dropped decay on embeddings).
"""

import torch
from torch import Tensor, nn

from open_mythos.ops.linear import Linear
from open_mythos.train.config import OptimConfig
from open_mythos.train.muon import Muon


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    """Return whether a parameter is a matrix between hidden states, or a stack of such matrices."""
    in_block = name.startswith(("prelude.", "coda.", "recurrent.block."))
    return in_block and p.ndim >= 2 and ".router." not in name


def muon_dtype(cfg: OptimConfig, dtype: str) -> torch.dtype:
    """Return the dtype of Muon's iteration in a run of this dtype."""
    name = cfg.muon_dtype or ("bfloat16" if dtype == "bfloat16" else "float32")
    return getattr(torch, name)


def build_optimizers(model: nn.Module, cfg: OptimConfig, dtype: str = "float32") -> list[torch.optim.Optimizer]:
    """Build one optimizer, or two with Muon; every trainable parameter is in exactly one group.

    Args:
        dtype: the run's.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if is_hidden_matrix(name, p)]
    rest = [p for name, p in named if not is_hidden_matrix(name, p)]
    groups = [{"params": rest, "weight_decay": cfg.weight_decay if cfg.decay == "all" else 0.0}]
    if cfg.kind == "adamw":
        # One call of the fused update takes tensors of one kind: experts that are spread by hand are no DTensors.
        for kind in dict.fromkeys(map(type, matrices)):
            groups.append({"params": [p for p in matrices if type(p) is kind], "weight_decay": cfg.weight_decay})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)
    ]
    if cfg.kind == "muon" and matrices:
        widths = {m.weight: m.widths for m in model.modules() if isinstance(m, Linear)}
        rates = (cfg.muon_lr, cfg.momentum, cfg.weight_decay, cfg.adjust_lr)
        optimizers.append(Muon(matrices, *rates, widths, muon_dtype(cfg, dtype)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to `factor` of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_lr"]
