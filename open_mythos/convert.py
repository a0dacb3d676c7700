"""Weights of open-mythos 0.5.0, brought into this package's layout."""

import torch
from torch import Tensor

from open_mythos.config import MythosConfig

DROPPED = ("freqs_cis", "freqs_cis_mla", "head.weight")


def convert_open_mythos_0_5(state_dict: dict[str, Tensor], cfg: MythosConfig) -> dict[str, Tensor]:
    """Rename and regroup a state dict of open-mythos 0.5.0; every value is kept exactly.

    The rotary tables are dropped (angles are computed here), the head is the embedding, routed experts are stacked,
    shared experts become one wider feed-forward, and the two query projections of `mla` become one. Load the result
    into a model built from the same `cfg`, whose new fields keep their defaults.

    The function is the same as long as all tokens of a prompt halt at the same loop. Where they do not, 0.5.0 lets a
    halted token's state go on changing under the eyes of the others; here it is frozen.

    Raises:
        ValueError: a tensor that the configuration needs is missing, or one is left over.
    """
    left = {name: x for name, x in state_dict.items() if name not in DROPPED}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"{name} is not in the state dict; pass the configuration the weights were made with")
        return left.pop(name)

    out: dict[str, Tensor] = {}
    if cfg.attn_type == "mla":
        layers = (
            [f"prelude.{i}" for i in range(cfg.prelude_layers)]
            + ["recurrent.block"]
            + [f"coda.{i}" for i in range(cfg.coda_layers)]
        )
        for layer in layers:
            nope = take(f"{layer}.attn.q_up_nope.weight").unflatten(0, (cfg.n_heads, -1))
            rope = take(f"{layer}.attn.q_up_rope.weight").unflatten(0, (cfg.n_heads, -1))
            out[f"{layer}.attn.q_up.weight"] = torch.cat((nope, rope), dim=1).flatten(0, 1)
    ffn = "recurrent.block.ffn"
    routed = [
        [take(f"{ffn}.routed_experts.{i}.{part}.weight") for i in range(cfg.n_experts)]
        for part in ("gate", "up", "down")
    ]
    gate, up, down = (torch.stack(matrices) for matrices in routed)
    out[f"{ffn}.experts.gate_up"] = torch.cat((gate, up), dim=1)
    out[f"{ffn}.experts.down"] = down
    for part, dim in (("gate", 0), ("up", 0), ("down", 1)) if cfg.n_shared_experts else ():
        shared = [take(f"{ffn}.shared_experts.{i}.{part}.weight") for i in range(cfg.n_shared_experts)]
        out[f"{ffn}.shared.{part}.weight"] = torch.cat(shared, dim=dim)
    unknown = [name for name in left if "_experts." in name]
    if unknown:
        raise ValueError(
            f"{unknown[0]} is beyond the configuration (n_experts={cfg.n_experts}, n_shared_experts="
            f"{cfg.n_shared_experts}); pass the configuration the weights were made with"
        )
    out.update(left)
    out["head.weight"] = out["embed.weight"]
    return out
