"""Memory and speed of GPUs, from their maker's data sheets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One kind of GPU. Rates are peaks that no program reaches."""

    memory_gb: float
    """Memory in units of 10^9 bytes."""
    bf16_tflops: float
    """Rate of dense products with float32 sums, without sparsity."""
    float32_tflops: float
    """Rate outside of the tensor cores."""
    link_gb_s: float
    """Bandwidth to another GPU of the same node, in one direction."""


CARDS = {
    "h100": Card(80, 989.4, 66.9, 450),
    "h200": Card(141, 989.4, 66.9, 450),
    "a100-80": Card(80, 312, 19.5, 300),
    "a100-40": Card(40, 312, 19.5, 300),
    "l40s": Card(48, 362.05, 91.6, 32),
    "rtx-4090": Card(24, 165.2, 82.6, 32),
}
"""SXM modules with NVLink (half of the 900 and 600 GB/s that data sheets give for both directions); the last two have
PCIe 4.0 with 16 lanes. Source: NVIDIA's data sheets of H100, H200, A100 and L40S and its white paper on Ada."""

NODE_GPUS = 8
NETWORK_GB_S = 50
"""Bandwidth between nodes, per GPU and direction: one 400 Gb/s adapter for each, as in a DGX H100."""
RESERVED_SHARE = 0.1
"""Share of the memory for the CUDA context, the libraries' workspaces and the allocator's gaps."""


def link_gb_s(card: Card, gpus: int) -> float:
    """Return the bandwidth of the slowest link in an exchange between so many GPUs."""
    return card.link_gb_s if gpus <= NODE_GPUS else min(card.link_gb_s, NETWORK_GB_S)
