"""Weights of open-mythos 0.5.0 in this package's layout."""

import torch
from torch import Tensor

from open_mythos.config import MythosConfig

DROPPED = ("freqs_cis", "freqs_cis_mla", "head.weight")


def convert_open_mythos_0_5(state_dict: dict[str, Tensor], cfg: MythosConfig) -> dict[str, Tensor]:
    """Rename and regroup a state dict of open-mythos 0.5.0; every value stays exactly the same.

    The rotary tables are dropped (angles are computed here), the head is the embedding, routed experts are stacked,
    shared experts become one wider feed-forward, and maps of the same input become one product. Load the result into a
    model built from the same `cfg`, whose new fields keep their defaults.

    The function is the same as long as all tokens of a prompt halt at the same loop. Where they do not, 0.5.0 lets a
    halted token's state go on changing while the others go on seeing it; here it is frozen.

    Raises:
        ValueError: a tensor that the configuration needs is missing, or one is left over.
    """
    left = {name: x for name, x in state_dict.items() if name not in DROPPED}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"{name} is not in the state dict; pass the configuration the weights were made with")
        return left.pop(name)

    def fuse(name: str, parts: list[str]) -> None:
        out[f"{name}.weight"] = torch.cat([take(f"{part}.weight") for part in parts])

    out: dict[str, Tensor] = {}
    outer = [f"prelude.{i}" for i in range(cfg.prelude_layers)] + [f"coda.{i}" for i in range(cfg.coda_layers)]
    for layer in outer:
        fuse(f"{layer}.ffn.gate_up", [f"{layer}.ffn.gate", f"{layer}.ffn.up"])
    for attn in [f"{layer}.attn" for layer in [*outer, "recurrent.block"]]:
        if cfg.attn_type == "gqa":
            fuse(f"{attn}.wqkv", [f"{attn}.wq", f"{attn}.wk", f"{attn}.wv"])
            continue
        fuse(f"{attn}.down", [f"{attn}.q_down", f"{attn}.kv_down"])
        nope = take(f"{attn}.q_up_nope.weight").unflatten(0, (cfg.n_heads, -1))
        rope = take(f"{attn}.q_up_rope.weight").unflatten(0, (cfg.n_heads, -1))
        out[f"{attn}.q_up.weight"] = torch.cat((nope, rope), dim=1).flatten(0, 1)
    ffn = "recurrent.block.ffn"
    routed = [
        [take(f"{ffn}.routed_experts.{i}.{part}.weight") for i in range(cfg.n_experts)]
        for part in ("gate", "up", "down")
    ]
    gate, up, down = (torch.stack(matrices) for matrices in routed)
    out[f"{ffn}.experts.gate_up"] = torch.cat((gate, up), dim=1)
    out[f"{ffn}.experts.down"] = down
    if cfg.n_shared_experts:
        shared = [f"{ffn}.shared_experts.{i}" for i in range(cfg.n_shared_experts)]
        fuse(f"{ffn}.shared.gate_up", [f"{expert}.{part}" for part in ("gate", "up") for expert in shared])
        out[f"{ffn}.shared.down.weight"] = torch.cat([take(f"{expert}.down.weight") for expert in shared], dim=1)
    unknown = [name for name in left if "_experts." in name]
    if unknown:
        raise ValueError(
            f"{unknown[0]} is beyond the configuration (n_experts={cfg.n_experts}, n_shared_experts="
            f"{cfg.n_shared_experts}); pass the configuration the weights were made with"
        )
    out.update(left)
    out["head.weight"] = out["embed.weight"]
    return out
