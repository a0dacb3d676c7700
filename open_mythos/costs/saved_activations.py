"""What a training step saves for the backward pass: bytes per token, tensor by tensor.

Attention, feed-forward and injection state their own (nn/layer_costs.py); this adds norms, experts and everything
around the blocks. tests/costs/test_saved_activations.py compares the sums with the tensors that autograd saves.

Two routes: under autocast torch's own operators run, which save the results of silu and of its product with `up`; in
float32 those of ops/ run, which recompute them.

Shapes: D width, F hidden width, E experts, C chosen experts of a token.
"""

from dataclasses import dataclass, fields
from typing import Literal

from open_mythos.accounting import kv_values
from open_mythos.config import MythosConfig
from open_mythos.nn.block import attention_costs, feed_forward_costs
from open_mythos.nn.injection import injection_costs
from open_mythos.nn.layer_costs import Execution
from open_mythos.train.config import TrainConfig


def execution_of(cfg: TrainConfig, device: Literal["cpu", "cuda"] = "cuda") -> Execution:
    """Return how the steps of a run are computed on a device."""
    state_bytes = 8 if cfg.dtype == "float64" else 4
    autocast = cfg.dtype == "bfloat16"
    return Execution(device, autocast, 2 if autocast else state_bytes, state_bytes)


@dataclass(frozen=True)
class SavedBytes:
    """Bytes per token, by the part that saves them."""

    attention: float = 0
    feed_forward: float = 0
    """Dense and shared feed-forwards."""
    routed: float = 0
    """Router and routed experts."""
    stream: float = 0
    """Inputs of norms, states, and tensors of the injection, the depth LoRA and halting."""

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: "SavedBytes") -> "SavedBytes":
        return SavedBytes(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: float) -> "SavedBytes":
        return SavedBytes(*(getattr(self, field.name) * times for field in fields(self)))


def outer_block(cfg: MythosConfig, execution: Execution, T: int) -> SavedBytes:
    """Return the bytes of one layer of the prelude or the coda."""
    attention = attention_costs(cfg).saved(execution, T)
    ffn = feed_forward_costs(cfg, recurrent=False).saved(execution, T)
    return SavedBytes(attention, ffn, 0, _norms(cfg, execution.state_bytes))


def one_loop(cfg: MythosConfig, execution: Execution, T: int, expert_ranks: int = 1) -> SavedBytes:
    """Return the bytes of one loop with gradient."""
    D, w, s = cfg.dim, execution.value_bytes, execution.state_bytes
    injection = injection_costs(cfg)
    stream_bytes = injection.stream_bytes(execution)
    dense, routed = feed_forward_costs(cfg, recurrent=True).saved(execution, T), 0.0
    if cfg.n_experts:
        routed = _routed(cfg, execution, expert_ranks)
        # In one dtype router, routed and shared experts save one input; under autocast each casts a float32 stream.
        if dense and (not execution.autocast or (stream_bytes == w and execution.device == "cpu")):
            dense -= w * D
    attention = attention_costs(cfg).saved(execution, T)
    per_block = SavedBytes(attention, dense, routed, _norms(cfg, stream_bytes))

    stream = injection.saved(execution)
    if cfg.halting == "act":
        # The state, unless the injection saves it already; its copy in float32, which the halting layer takes; the
        # probability, the sum, whether it was cut off, and the weight.
        stream = max(stream, stream_bytes * D) + (s * D if stream_bytes < s else 0) + 3 * s + 1
    if cfg.lora_rank:
        stream += w * D + 2 * w * cfg.lora_rank
    return per_block * cfg.recurrent_layers + SavedBytes(stream=stream)


def around_loop(cfg: MythosConfig, execution: Execution) -> float:
    """Return the bytes between prelude and loop: the norm, and e as the injection takes it."""
    if not cfg.recurrent_layers:
        return 0
    norm = _norm(cfg.dim, execution.state_bytes, execution) if cfg.prelude_norm else 0
    return norm + injection_costs(cfg).saved_once(execution)


def before_head(cfg: MythosConfig, execution: Execution) -> float:
    """Return the bytes of the last norm and of the head's input."""
    stream_bytes = injection_costs(cfg).stream_bytes(execution) if cfg.recurrent_layers else execution.state_bytes
    return _norm(cfg.dim, stream_bytes, execution) + execution.value_bytes * cfg.dim


def keys_and_values(cfg: MythosConfig, execution: Execution) -> float:
    """Return the bytes of one loop's keys and values, which the next loop needs only where tokens may have exited."""
    if cfg.halting != "act":
        return 0
    return cfg.recurrent_layers * kv_values(cfg) * execution.value_bytes


def _routed(cfg: MythosConfig, execution: Execution, expert_ranks: int) -> float:
    D, E, C, F = cfg.dim, cfg.n_experts, cfg.n_experts_per_tok, cfg.expert_dim
    w, s, cpu = execution.value_bytes, execution.state_bytes, execution.device == "cpu"
    router = s * D + s * E + 8 * C + s * C + s  # tokens, logits, the choice, gates, log-sum-exp
    saved = router + (w * C if execution.autocast else 0)
    if cpu:
        saved += (w * D if execution.autocast else 0) + w * C * 2 * F
    else:
        # by_group: rows in the order of experts, gate and up, silu, the product, the result back in the order of
        # tokens; two index vectors.
        saved += w * C * (D + 2 * F + F + F + D) + 2 * 8 * C
    if expert_ranks > 1:
        # Each pair's result in the tokens' order again, and indices; on a CPU also its expert's input, as a token of
        # its own. There the tokens in autocast's dtype are sent and not saved.
        saved += C * ((2 if cpu else 1) * w * D + 3 * 8)
        saved -= w * D if cpu and execution.autocast else 0
    return saved


def _norm(width: int, value_bytes: int, execution: Execution) -> float:
    """Return the bytes of an RMSNorm: its input and one statistic."""
    return value_bytes * width + execution.state_bytes


def _norms(cfg: MythosConfig, stream_bytes: int) -> float:
    """Return the bytes of a block's norms."""
    n = 4 if cfg.block_norm in ("sandwich", "branch") else 2
    return n * (stream_bytes * cfg.dim + max(4, stream_bytes))
