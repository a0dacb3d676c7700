"""The model's configuration: one flat dataclass, validated when it is made and again when a model is built from it.

The first 23 fields keep the names, defaults and meanings of open-mythos 0.5.0; everything after `dropout` is new here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from open_mythos.checks import Range, Share, check_choice, check_field, check_int, check_section

MAX_LOOPS = 4096
"""Loops that one call may ask for at most: its time and its cache grow in proportion."""

# Upper bounds of the sizes are far above every existing model.
Length = Annotated[int, Range(1, 2**30)]
Width = Annotated[int, Range(1, 2**20)]
HeadWidth = Annotated[int, Range(1, 2**16)]
Heads = Annotated[int, Range(1, 2**12)]
Layers = Annotated[int, Range(0, 2**12)]
Experts = Annotated[int, Range(0, 2**16)]


@dataclass(frozen=True)
class NotImported:
    """Placeholder of one of this package's classes in a table of parts, until the class is imported, and torch with it.

    So the names and the checks of a configuration are there before torch is.
    """

    check: "Callable[[MythosConfig], None] | None" = None


def check_grouped_heads(cfg: "MythosConfig") -> None:
    """Refuse heads that do not divide the width, or that the key and value heads do not divide."""
    if cfg.dim % cfg.n_heads:
        raise ValueError(
            f"n_heads={cfg.n_heads} must divide dim={cfg.dim}; use n_heads={_divisor(cfg.dim, cfg.n_heads)}"
        )
    if cfg.head_dim % 2:
        raise ValueError(
            f"dim={cfg.dim} / n_heads={cfg.n_heads} gives an odd head width {cfg.head_dim}, which cannot "
            f"be rotated; use dim={2 * cfg.dim} or fewer heads"
        )
    if cfg.n_heads % cfg.n_kv_heads:
        raise ValueError(
            f"n_kv_heads={cfg.n_kv_heads} must divide n_heads={cfg.n_heads}; "
            f"use n_kv_heads={_divisor(cfg.n_heads, cfg.n_kv_heads)}"
        )


def check_latent_heads(cfg: "MythosConfig") -> None:
    """Refuse an odd rotary width, and norms of queries and keys beside those of the latents."""
    if cfg.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim={cfg.qk_rope_head_dim} must be even; use {cfg.qk_rope_head_dim + 1}")
    if cfg.qk_norm:
        raise ValueError("qk_norm=True needs attn_type='gqa': mla already normalises its latents; use qk_norm=False")
    if cfg.qk_bias:
        raise ValueError("qk_bias=True needs attn_type='gqa'; use qk_bias=False")


def _divisor(whole: int, near: int) -> int:
    """Return the divisor of `whole` nearest to `near`, in at most `near` steps: 1 divides everything."""
    candidates = (near + sign * distance for distance in range(near) for sign in (-1, 1))
    return next(d for d in candidates if whole % d == 0)


# The tables of parts, which `open_mythos.nn` fills with its classes and a user's file with classes of its own
# (docs/extending.md). Import them from nn/block.py, nn/injection.py and nn/halting.py.
ATTENTIONS: dict[str, Any] = {"mla": NotImported(check_latent_heads), "gqa": NotImported(check_grouped_heads)}
FEED_FORWARDS: dict[str, Any] = {"swiglu": NotImported()}
INJECTIONS: dict[str, Any] = dict.fromkeys(("lti", "diagonal", "concat", "add", "linear", "none"), NotImported())
HALTING_RULES: dict[str, Any] = dict.fromkeys(
    ("fixed", "act", "ouro", "latent_diff", "second_difference", "kl"), NotImported()
)


def check_part(name: str, value: object, table: Mapping[str, Any], table_name: str) -> None:
    """Refuse a name that is not in a table of parts; the remedy tells how a user's own part gets into it."""
    try:
        check_choice(name, value, tuple(table))
    except ValueError as error:
        raise ValueError(
            f"{error}. A part of your own has to be registered first: {table_name}[...] = its class, in a file that "
            "you import or give to mythos --plugin"
        ) from None


@dataclass
class MythosConfig:
    """The shape and the mathematics of a model.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of range, or two fields do not fit; the message names both and a value that works.
    """

    vocab_size: Length = 32000
    dim: Width = 2048
    n_heads: Heads = 16
    n_kv_heads: Heads = 4
    """Number of key and value heads of `gqa`, a divisor of `n_heads`. `mla` has none and ignores it."""
    max_seq_len: Length = 4096
    max_loop_iters: Annotated[int, Range(1, MAX_LOOPS)] = 16
    """Loops of a call that names none, and rows of the depth LoRA. A call may ask for more, up to 4096."""
    prelude_layers: Layers = 2
    coda_layers: Layers = 2
    attn_type: str = "mla"
    kv_lora_rank: Width = 512
    q_lora_rank: Width = 1536
    qk_rope_head_dim: HeadWidth = 64
    qk_nope_head_dim: HeadWidth = 128
    v_head_dim: HeadWidth = 128
    n_experts: Experts = 64
    """Number of routed experts of the recurrent block; with 0 its feed-forward is a dense one of width `expert_dim`."""
    n_shared_experts: Experts = 2
    """Number of shared experts, each `expert_dim * n_experts_per_tok` wide as in 0.5.0; stored as one wide SwiGLU."""
    n_experts_per_tok: Annotated[int, Range(1, 2**16)] = 4
    expert_dim: Annotated[int, Range(1, 2**22)] = 512
    act_threshold: Annotated[float, Range(0, 1, above=True)] = 0.99
    rope_theta: Annotated[float, Range(1, above=True)] = 500000.0
    lora_rank: Annotated[int, Range(0, 2**20)] = 16
    """Rank of the depth LoRA; with 0 there is none."""
    max_output_tokens: Length = 4096
    """Limit of new tokens of one `generate` call."""
    dropout: Share = 0.0

    injection: str = "lti"
    """Way of the prelude's output e into every loop: lti, diagonal, concat, add, linear, none (see nn/injection.py)."""
    initial_state: Literal["e", "zero", "normal", "truncated"] = "e"
    """State before the first loop: e, zero, or noise that depends on the row's seed and the position (normal clamped,
    or truncated, at three standard deviations)."""
    loop_embedding: bool = True
    halting: Literal["act", "ouro", "none"] = "act"
    """Halting of the model itself. act: learned, the output is the weighted sum of states. ouro: learned, the state at
    which a token exits. none: the last state."""
    min_loops: int = 1
    """Number of loops before which no token exits, whatever the rule."""
    recurrent_layers: Layers = 1
    """Number of blocks inside the loop; with 0 the model is a plain transformer, which takes no `n_loops`."""
    prelude_norm: bool = False
    """RMSNorm on the prelude's output before it is injected."""
    block_norm: Literal["pre", "sandwich", "branch", "post"] = "pre"
    """Places of a block's norms: pre, on the input of each branch; sandwich, also on the stream behind it; branch, on
    input and output of each branch; post, on the output alone."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys before the rotation (`gqa` only; `mla` normalises its latents)."""
    feed_forward: str = "swiglu"
    """Dense feed-forward of prelude and coda and, with n_experts=0, of the recurrent block."""
    weights: Literal["float", "int8"] = "float"
    """How the large matrices are stored. int8: for inference only, made by `open_mythos.quantize`."""

    # What published looped models need beside the above; see docs/families.md.
    norm_eps: Annotated[float, Range(0, 1, above=True)] = 1e-6
    tie_embeddings: bool = True
    """Use of the embedding as the head; with False the head has a matrix of its own."""
    embed_scale: Annotated[float, Range(0, above=True)] = 1.0
    """Factor of the embedding."""
    dense_dim: Annotated[int, Range(0, 2**22)] = 0
    """Hidden width of the dense feed-forward of prelude and coda; 0: dim * 4 // 3."""
    qk_bias: bool = False
    """Bias of each head's queries and keys before the rotation (`gqa` only)."""
    state_norm: Literal["none", "loop", "coda"] = "none"
    """Further place of the final norm. loop: on every loop's state instead, where the next loop and the head take it.
    coda: also on the last state before the coda."""
    state_std: Annotated[float, Range(0, above=True)] = 0.4**0.5
    """Standard deviation of the noise of `initial_state` before it is cut."""
    trained_loops: Annotated[int, Range(0, MAX_LOOPS)] = 0
    """Loops that the weights were trained for, beyond which a call warns; 0: not known."""

    def __post_init__(self) -> None:
        self.validate()

    @property
    def head_dim(self) -> int:
        """Width of one `gqa` head."""
        return self.dim // self.n_heads

    def to_dict(self) -> dict[str, Any]:
        """Return every field, but those of published models only where they differ from their defaults.

        So what the other models write stays as it was before there were these fields.
        """
        fields = dataclasses.fields(self)
        new = [f for f in fields[[f.name for f in fields].index("norm_eps") :] if getattr(self, f.name) == f.default]
        return {name: x for name, x in dataclasses.asdict(self).items() if name not in {f.name for f in new}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MythosConfig":
        """Build from plain values; an unknown field is an error that suggests the nearest known one."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            check_field(name, names)
        return cls(**values)

    def validate(self) -> None:
        """Check every field, and the fields that have to fit each other."""
        check_section(self)
        check_int("min_loops", self.min_loops, 1, self.max_loop_iters)
        for name in ("act_threshold", "rope_theta", "dropout", "norm_eps", "embed_scale", "state_std"):
            setattr(self, name, float(getattr(self, name)))
        for name, table_name, table in (
            ("attn_type", "ATTENTIONS", ATTENTIONS),
            ("feed_forward", "FEED_FORWARDS", FEED_FORWARDS),
            ("injection", "INJECTIONS", INJECTIONS),
        ):
            part = getattr(self, name)
            check_part(name, part, table, table_name)
            # A part may have a check of the fields that it uses.
            if (check := getattr(table[part], "check", None)) is not None:
                check(self)
        if self.n_experts and self.n_experts_per_tok > self.n_experts:
            raise ValueError(
                f"n_experts_per_tok={self.n_experts_per_tok} must be at most n_experts={self.n_experts}; "
                f"use n_experts_per_tok={self.n_experts}"
            )
        if self.recurrent_layers == 0 and self.prelude_layers + self.coda_layers == 0:
            raise ValueError(
                "recurrent_layers=0, prelude_layers=0 and coda_layers=0 leave no layer; use prelude_layers=1"
            )
        if self.state_norm == "loop" and (self.coda_layers or not self.recurrent_layers):
            raise ValueError(
                f"state_norm='loop' needs a loop whose state the head takes, not "
                f"recurrent_layers={self.recurrent_layers} and coda_layers={self.coda_layers}; use coda_layers=0 or "
                "state_norm='coda'"
            )
        if self.loop_embedding and self.dim < 8:
            raise ValueError(
                f"dim={self.dim} is too narrow for loop_embedding=True, which uses dim//8 channels; "
                "use dim=8 or loop_embedding=False"
            )
