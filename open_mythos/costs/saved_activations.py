"""What a training step keeps for the backward pass: bytes per token, tensor by tensor.

Each line stands for a tensor that some operator saves. tests/costs/test_saved_activations.py compares the sums
with what autograd holds. On the paths (`Path`): under autocast torch's own operators
run, which save the results of silu and of its product with `up`; in float32 those of nn/mlp.py and nn/experts.py, which
recompute them.

Shapes: D width, H query heads, F hidden width, E experts, C chosen of them.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from open_mythos.config import MythosConfig
from open_mythos.ops.causal_attention import BLOCK, takes_blocks
from open_mythos.train.config import TrainConfig


@dataclass(frozen=True)
class Path:
    """Device and dtypes of a step: they decide which of the code's ways of computing it runs."""

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
        """Whether attention with gradient is ops/causal_attention.py, on this machine if the device is a CPU."""
        if self.device != "cpu" or self.autocast or self.state_bytes != 4:
            return False
        with torch.enable_grad():
            return takes_blocks(torch.empty(1, T, 1, 1))

    def keys_of_kernel(self, T: int) -> float:
        """Keys per query in torch's kernel: about half on a GPU, which skips what lies above the diagonal in blocks."""
        if self.device == "cpu":
            return T  # its kernel for CPUs takes 512 keys at a time, and the counter of FLOPs counts them all
        return (T + min(T, BLOCK)) / 2


@dataclass(frozen=True)
class Kept:
    """Bytes per token, by what they belong to."""

    attention: float = 0
    feed_forward: float = 0
    """Dense and shared feed-forwards."""
    routed: float = 0
    """Router and routed experts."""
    stream: float = 0
    """Norms' inputs, states, what the injection, the depth LoRA and halting read."""

    @property
    def total(self) -> float:
        return self.attention + self.feed_forward + self.routed + self.stream

    def __add__(self, other: "Kept") -> "Kept":
        return Kept(
            self.attention + other.attention,
            self.feed_forward + other.feed_forward,
            self.routed + other.routed,
            self.stream + other.stream,
        )

    def __mul__(self, times: float) -> "Kept":
        return Kept(self.attention * times, self.feed_forward * times, self.routed * times, self.stream * times)


def outer_block(cfg: MythosConfig, path: Path, T: int) -> Kept:
    """One layer of the prelude or the coda."""
    ffn = _dense(cfg.dim, cfg.dim * 4 // 3, path)
    return Kept(attention(cfg, path, T), ffn, 0, _norms(cfg, path.state_bytes))


def one_loop(cfg: MythosConfig, path: Path, T: int, expert_ranks: int = 1) -> Kept:
    """One loop with gradient."""
    D, w, s = cfg.dim, path.value_bytes, path.state_bytes
    # The adapter of `concat` gives its product's dtype to everything inside the loop.
    stream_bytes = w if cfg.injection == "concat" else s
    dense = routed = 0.0
    if cfg.n_experts:
        shared = cfg.n_shared_experts * cfg.n_experts_per_tok * cfg.expert_dim
        routed = _routed(cfg, path)
        if expert_ranks > 1:
            # Each pair's result in the tokens' order again, and indices; on a CPU also what its expert reads, as a
            # token of its own. There the tokens in autocast's dtype are sent and not kept.
            cpu = path.device == "cpu"
            routed += cfg.n_experts_per_tok * ((2 if cpu else 1) * w * D + 3 * 8)
            routed -= w * D if cpu and path.autocast else 0
        # In one dtype all read one tensor; under autocast each makes its own of a float32 stream.
        apart = path.autocast and (stream_bytes != w or path.device != "cpu")
        dense = _dense(D, shared, path) - (0 if apart else w * D) if shared else 0
    else:
        dense = _dense(D, cfg.expert_dim, path)
    per_block = Kept(attention(cfg, path, T), dense, routed, _norms(cfg, stream_bytes))

    act = cfg.halting == "act"
    stream = {
        "lti": s * D + _norm(D, s, path),  # the state, and what the block's norm reads
        "diagonal": s * D,
        "concat": w * D + _norm(D, w, path),  # the state, and what the norm behind the block reads
        "add": s * D if act else 0,
    }[cfg.injection]
    if cfg.lora_rank:
        stream += w * D + 2 * w * cfg.lora_rank
    if act:
        # The probability, the sum, whether it was cut, and the weight.
        stream += 3 * s + 1
        # The halting layer reads the state in float32.
        stream += s * D if stream_bytes < s else 0
    return per_block * cfg.recurrent_layers + Kept(stream=stream)


def around_loop(cfg: MythosConfig, path: Path) -> Kept:
    """Between prelude and loop: the norm, and e as the injection takes it."""
    if not cfg.recurrent_layers:
        return Kept()
    D, w, s = cfg.dim, path.value_bytes, path.state_bytes
    norm = _norm(D, s, path) if cfg.prelude_norm else 0
    injected = {"lti": s * D, "diagonal": 2 * w * D, "concat": w * D, "add": 0}[cfg.injection]
    return Kept(stream=norm + injected)


def before_head(cfg: MythosConfig, path: Path) -> Kept:
    """The last norm, and what the head reads."""
    s = path.value_bytes if cfg.injection == "concat" and cfg.recurrent_layers else path.state_bytes
    return Kept(stream=_norm(cfg.dim, s, path) + path.value_bytes * cfg.dim)


def keys_and_values(cfg: MythosConfig, path: Path) -> float:
    """Of one loop, as the next one reads them where tokens have exited; without halting nothing reads them."""
    if cfg.halting != "act":
        return 0
    if cfg.attn_type == "mla":
        values = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    else:
        values = 2 * cfg.n_kv_heads * cfg.head_dim
    return cfg.recurrent_layers * values * path.value_bytes


def attention(cfg: MythosConfig, path: Path, T: int) -> float:
    w, H, stat = path.value_bytes, cfg.n_heads, path.state_bytes
    blocks = path.attends_in_blocks(T)
    read = w * cfg.dim
    log_sums = stat * H
    if cfg.attn_type == "gqa":
        q, kv = w * H * cfg.head_dim, w * cfg.n_kv_heads * cfg.head_dim
        projected = q + 2 * kv
        # Torch's kernel takes v as a view, which keeps all that was projected; blocks take a copy.
        v = kv if blocks else projected
        normed = 0
        if cfg.qk_norm:
            normed = (projected if blocks else 0) + stat * (H + cfg.n_kv_heads)
        return read + q + kv + v + q + log_sums + normed
    key, value = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.v_head_dim
    lows = w * (cfg.q_lora_rank + cfg.kv_lora_rank + cfg.qk_rope_head_dim) + 2 * stat  # both norms read views of it
    ups = w * (cfg.q_lora_rank + cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    if blocks:
        v = out = w * H * value
    elif value < key:
        # v is padded to the keys' width; of the result the padding is cut off, which is a copy.
        v, out = w * H * key, w * H * (key + value)
    else:
        v, out = w * H * (cfg.qk_nope_head_dim + value), w * H * value
    return read + lows + ups + 2 * w * H * key + v + out + log_sums


def _dense(D: int, F: int, path: Path) -> float:
    """A SwiGLU: what it reads, gate and up; under autocast also silu(gate) and its product with up."""
    return path.value_bytes * (D + (4 if path.autocast else 2) * F)


def _routed(cfg: MythosConfig, path: Path) -> float:
    D, E, C, F = cfg.dim, cfg.n_experts, cfg.n_experts_per_tok, cfg.expert_dim
    w, s = path.value_bytes, path.state_bytes
    router = s * D + s * E + 8 * C + s * C + s  # tokens, logits, the choice, gates, log-sum-exp
    gates = w * C if path.autocast else 0
    if path.device == "cpu":
        return router + gates + (w * D if path.autocast else 0) + w * C * 2 * F
    # by_group: rows in the order of experts, gate and up, silu, the product, the result back in the order of tokens;
    # two index vectors.
    return router + gates + w * C * (D + 2 * F + F + F + D) + 2 * 8 * C


def _norm(width: int, value_bytes: int, path: Path) -> float:
    """An RMSNorm keeps what it reads and one statistic."""
    return value_bytes * width + path.state_bytes


def _norms(cfg: MythosConfig, stream_bytes: int) -> float:
    """Of a block."""
    n = 4 if cfg.block_norm == "sandwich" else 2
    return n * (stream_bytes * cfg.dim + max(4, stream_bytes))
