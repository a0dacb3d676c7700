"""Small models with weights large enough that attention, experts and halting matter: a fresh model hides cache bugs."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos import MythosConfig, OpenMythos, RMSNorm

ATTENTIONS = ("gqa", "mla")
RULES = (None, "fixed", "latent_diff", "second_difference", "kl")
"""What `exit` may be; None is the model's own halting."""
THRESHOLDS = {"latent_diff": 0.3, "second_difference": 0.5, "kl": 0.03}
"""Where the weights of `scaled` make tokens of one row exit at different loops."""

PARTS: dict[str, dict[str, Any]] = {
    "default": {},
    "diagonal": {"injection": "diagonal"},
    "concat": {"injection": "concat"},
    "add": {"injection": "add"},
    "zero-state": {"initial_state": "zero"},
    "prelude-norm": {"prelude_norm": True},
    "sandwich": {"block_norm": "sandwich"},
    "qk-norm": {"qk_norm": True},
    "two-layers": {"recurrent_layers": 2},
    "no-experts": {"n_experts": 0},
    "odd-experts": {"n_experts": 3, "n_experts_per_tok": 3, "expert_dim": 7, "n_shared_experts": 0},
    "min-loops": {"min_loops": 3},
    "bare-loop": {"loop_embedding": False, "lora_rank": 0},
    "odd-embedding": {"dim": 40},
    "no-prelude": {"prelude_layers": 0},
    "no-coda": {"coda_layers": 0, "prelude_layers": 2},
    "no-halting": {"halting": "none"},
}
"""Every part in turn, as changes to `tiny`."""
CASES = [(attn_type, part) for attn_type in ATTENTIONS for part in PARTS if (attn_type, part) != ("mla", "qk-norm")]


def tiny(**changes: Any) -> MythosConfig:
    """A configuration of about 20,000 parameters, 4 loops and every part switched on."""
    values: dict[str, Any] = {
        "vocab_size": 53,
        "dim": 32,
        "n_heads": 4,
        "n_kv_heads": 2,
        "max_seq_len": 64,
        "max_loop_iters": 4,
        "prelude_layers": 1,
        "coda_layers": 1,
        "attn_type": "gqa",
        "kv_lora_rank": 12,
        "q_lora_rank": 20,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 6,
        "v_head_dim": 10,
        "n_experts": 4,
        "n_shared_experts": 1,
        "n_experts_per_tok": 2,
        "expert_dim": 12,
        "lora_rank": 4,
    }
    return MythosConfig(**{**values, **changes})


@torch.no_grad()
def scaled(cfg: MythosConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> OpenMythos:
    """A model in eval mode whose every parameter is drawn anew: matrices N(0, 1 / fan-in), 5 to 15 times fresh ones.

    The draw is made in float32, so that models of one seed hold the same numbers in every dtype.
    """
    model = OpenMythos(cfg)
    generator = torch.Generator().manual_seed(seed)

    def draw(x: Tensor, std: float, mean: float = 0.0) -> None:
        x.copy_(torch.randn(x.shape, generator=generator) * std + mean)

    for module in model.modules():
        for _name, x in module.named_parameters(recurse=False):
            if isinstance(module, RMSNorm):
                draw(x, 0.2, 1.0)
            elif isinstance(module, nn.Embedding):
                draw(x, 1.0)
            else:
                draw(x, x.shape[-1] ** -0.5 if x.ndim > 1 else 0.4)
    if model.recurrent is not None:
        # What exits leaves at once: the most demanding policy, and one that reads no clock.
        model.recurrent.compaction = "always"
        if model.recurrent.act is not None:
            model.recurrent.act.halt.bias.sub_(0.8)
        for block in model.recurrent.blocks:
            if cfg.n_experts:
                draw(block.ffn.router_bias, 0.3)
    return model.to(dtype).eval()


def random_ids(cfg: MythosConfig, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(cfg.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def worst(a: Tensor, b: Tensor) -> float:
    """The largest difference of a from b, in units of b's largest magnitude (at least 1e-30)."""
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


def worst_of(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """`worst` over a list, in units of the largest magnitude in all of it: some gradients are zero in exact terms."""
    scale = max(b.abs().max().item() for b in expected)
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(got, expected, strict=True)) / scale


@contextlib.contextmanager
def restored_tables() -> Iterator[None]:
    """Take out of the tables of parts what is added to them meanwhile."""
    from open_mythos import config, recipes, tasks
    from open_mythos.analysis import SECTIONS
    from open_mythos.experiments import EXPERIMENTS
    from open_mythos.train.trackers import TRACKERS

    of_config = [config.ATTENTIONS, config.FEED_FORWARDS, config.INJECTIONS, config.HALTING_RULES]
    tables: list[dict] = [*of_config, tasks.TASKS, recipes.RECIPES, TRACKERS, EXPERIMENTS, SECTIONS]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
