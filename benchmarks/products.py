"""The matrix products and the bytes that a model's mathematics needs, computed from its configuration.

Shapes of a product: (m, k, n) is x (m, k) times the transpose of w (n, k).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.job import Job
from open_mythos.accounting import count_parameters, flops_per_token, kv_bytes_per_token, n_layers
from open_mythos.config import MythosConfig
from open_mythos.nn.block import attention_costs, dense_width

Shape = tuple[int, int, int]
Products = Counter[Shape]
"""How often each shape is computed."""


def flops(products: Products) -> int:
    """Count a multiplication and an addition for each term."""
    return sum(2 * m * k * n * count for (m, k, n), count in products.items())


def forward_products(cfg: MythosConfig, rows: int, tokens: int, n_loops: int, last_only: bool = False) -> Products:
    """List the products of one forward pass, with projections of one input fused and the experts evenly loaded."""
    D, N = cfg.dim, rows * tokens
    products: Products = Counter()
    layers, attention = n_layers(cfg, n_loops), attention_costs(cfg)
    for inputs, *outputs in attention.maps:
        products[N, inputs, sum(outputs)] += layers
    H, keys, values = attention.heads
    if tokens > 1:
        # Causal: half of each square is needed.
        products[-(-tokens // 2), keys, tokens] += layers * rows * H
        products[-(-tokens // 2), tokens, values] += layers * rows * H
    swiglu(products, N, D, D * 4 // 3, cfg.prelude_layers + cfg.coda_layers)
    loops = n_loops * cfg.recurrent_layers
    if cfg.n_experts:
        products[N, D, cfg.n_experts] += loops
        busy = min(cfg.n_experts, N * cfg.n_experts_per_tok)
        swiglu(products, -(-N * cfg.n_experts_per_tok // busy), D, cfg.expert_dim, loops * busy)
        if cfg.n_shared_experts:
            swiglu(products, N, D, dense_width(cfg, recurrent=True), loops)
    else:
        swiglu(products, N, D, cfg.expert_dim, loops)
    if cfg.lora_rank:
        products[N, D, cfg.lora_rank] += n_loops
        products[N, cfg.lora_rank, D] += n_loops
    products[rows if last_only else N, D, cfg.vocab_size] += 1
    return products


def swiglu(products: Products, m: int, dim: int, hidden: int, count: int) -> None:
    """Add `count` feed-forwards."""
    products[m, dim, 2 * hidden] += count
    products[m, hidden, dim] += count


def training_products(forward: Products) -> Products:
    """List the products of a training step: each forward one, and those for the gradients of its input and weight."""
    step: Products = Counter()
    for (m, k, n), count in forward.items():
        for shape in ((m, k, n), (m, n, k), (n, m, k)):
            step[shape] += count
    return step


def decode_bytes(cfg: MythosConfig, rows: int, context: int, n_loops: int, bytes_per_value: int = 4) -> int:
    """Count the bytes of weights and cached keys and values that one token of each row touches, each loop anew.

    A token's experts are counted as if every row chose at random: E * (1 - (1 - C/E)^rows) distinct ones.
    """
    counts = count_parameters(cfg)
    distinct = 1 - (1 - cfg.n_experts_per_tok / cfg.n_experts) ** rows if cfg.n_experts else 0
    experts = counts.routed_experts * distinct
    weights = counts.once + n_loops * (counts.per_loop - counts.chosen_experts + experts) + counts.embedding
    cached = rows * context * kv_bytes_per_token(cfg, n_loops, bytes_per_value)
    return round(weights * bytes_per_value) + cached


def decode_flops(cfg: MythosConfig, rows: int, context: int, n_loops: int) -> int:
    """Count the FLOPs of one token of each row, attending in the latent where there is one."""
    weights = count_parameters(cfg).unrolled(n_loops) + cfg.vocab_size * cfg.dim
    attention = attention_costs(cfg)
    n_heads, keys, values = attention.decode_heads or attention.heads
    return 2 * rows * (weights + n_layers(cfg, n_loops) * context * n_heads * (keys + values))


@dataclass(frozen=True)
class Workload:
    """The least work of a task: FLOPs, in the shapes of `products`, and bytes to stream.

    Without `products` the bytes are the limit, and `flops` is for the record.
    """

    flops: float = 0.0
    products: Products = field(default_factory=Counter)
    bytes: float = 0.0

    @property
    def shapes(self) -> list[Shape]:
        """The shapes of the products, in order."""
        return sorted(self.products)

    def seconds(self, rates: Sequence[float], bytes_per_s: float) -> float:
        """Return the time at the machine's limits: products at the FLOP/s of each of `shapes`, then the bytes."""
        ideal = sum(2 * m * k * n * self.products[m, k, n] / r for (m, k, n), r in zip(self.shapes, rates, strict=True))
        # The shapes decide the mix of rates; the amount of work is the accounting's.
        products = self.flops / flops(self.products) * ideal if self.products else 0.0
        return products + (self.bytes / bytes_per_s if self.bytes else 0.0)


def workload_of(job: Job) -> Workload:
    """Count the work of a task on a looped model."""
    cfg = MythosConfig(**job.model)
    B, T, L = job.rows, job.tokens, job.n_loops
    if job.task == "decode":
        return Workload(decode_flops(cfg, B, T, L), bytes=decode_bytes(cfg, B, T, L))
    forward = forward_products(cfg, B, T, L, last_only=job.task in ("prefill", "generate"))
    # A causal query sees (T + 1) / 2 keys in the mean.
    total = B * T * flops_per_token(cfg, L, context_tokens=(T + 1) // 2)
    if job.task in ("prefill", "generate"):
        total -= 2 * B * (T - 1) * cfg.vocab_size * cfg.dim
    if job.task == "train":
        return Workload(3 * total, training_products(forward))
    new_tokens = job.new_tokens - 1 if job.task == "generate" else 0
    decoded = sum(decode_bytes(cfg, B, T + i, L) for i in range(new_tokens))
    return Workload(total, forward, decoded)
