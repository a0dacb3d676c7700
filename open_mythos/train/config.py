"""A run's configuration: nested dataclasses, checked when made, that round-trip through YAML exactly."""

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from open_mythos.checks import check_bool, check_choice, check_field, check_int, check_number, check_text, shown
from open_mythos.config import MAX_LOOPS, MythosConfig
from open_mythos.device import Dtype
from open_mythos.files import blamed_on, parse_yaml, read_yaml
from open_mythos.tasks import TASKS, Addition, Brackets, Chat, KHop, Mixed, Parity, Shards, Stream, Text
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.schedule import ScheduleConfig
from open_mythos.train.step_guard import GuardConfig

EXPERT_BIAS_RATE = 1e-3
"""Source: Wang et al. 2024, arXiv 2408.15664."""

MAX_ROWS = 2**24
"""The most rows of one step or one evaluation."""

AdjustLR = Literal["match_rms_adamw", "original"]


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
            raise ValueError(f"optim.betas={shown(self.betas)} must be two numbers; use optim.betas=(0.9, 0.95)")
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


@dataclass(frozen=True)
class LossConfig:
    """Where the cross-entropy is taken, and weights of the auxiliary losses; 0 leaves a part out."""

    per_loop: bool = False
    """Cross-entropy after every loop, averaged, not only after the last (deep supervision).

    Needs loops.per="batch" and halting="none"."""
    ponder: float = 0.0
    """Weight of the ponder cost (loops used plus remainder, mean over tokens); needs halting="act"."""
    router_z: float = 0.0
    """Weight of the router z-loss, the mean of logsumexp(router logits)^2 over what is routed; needs experts. Where
    tokens exit early the sum is divided by the loops they were to run."""

    def __post_init__(self) -> None:
        check_bool("losses.per_loop", self.per_loop)
        check_number("losses.ponder", self.ponder, 0)
        check_number("losses.router_z", self.router_z, 0)


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over processes.

    None of it changes the result by more than rounding, but for dropout and noisy initial states, which are drawn for
    the rows that are computed together.
    """

    kind: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process holds the whole model. fsdp: each holds its share of parameters, gradients and moments, and
    gathers the recurrent block once per forward pass."""
    experts: int = 1
    """Processes over which the experts are spread; needs kind="fsdp"."""
    rows: int | None = None
    """Rows that a process computes at a time; None: all of its rows. Fewer take less memory: gradients add up."""
    timeout_s: float = 600.0
    """Longest wait for the other processes."""

    def __post_init__(self) -> None:
        check_choice("parallel.kind", self.kind, ("ddp", "fsdp"))
        check_int("parallel.experts", self.experts, 1)
        if self.rows is not None:
            check_int("parallel.rows", self.rows, 1)
        check_number("parallel.timeout_s", self.timeout_s, 0, 1e7, above=True)
        if self.experts > 1 and self.kind != "fsdp":
            raise ValueError(
                f"parallel.experts={self.experts} needs parallel.kind='fsdp', not {self.kind!r}; use kind='fsdp', or "
                "parallel.experts=1"
            )


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training."""

    every: int = 0
    """Steps between evaluations; 0 never evaluates."""
    rows: int = 256
    loops: tuple[int, ...] = ()
    """Loop counts to evaluate at, each with its own metrics; none: once, at the model's `max_loop_iters`."""

    def __post_init__(self) -> None:
        check_int("eval.every", self.every, 0)
        check_int("eval.rows", self.rows, 1, MAX_ROWS)
        if not isinstance(self.loops, tuple):
            raise ValueError(f"eval.loops={shown(self.loops)} must be a list of loop counts; use eval.loops=(1, 4)")
        for n_loops in self.loops:
            check_int("eval.loops", n_loops, 1, MAX_LOOPS)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's result. Device and threads are not in it: they belong to the machine."""

    model: MythosConfig
    data: Addition | KHop | Parity | Brackets | Mixed | Text | Shards | Stream | Chat
    steps: int
    batch_size: int
    """Rows of one optimizer step."""
    seed: int = 0
    dtype: Dtype = "float32"
    """float32; bfloat16 and float16: autocast over float32 weights, slow on CPUs without such units, float16 with a
    scaled loss for GPUs without bfloat16; float64: weights too."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loops: LoopsConfig = field(default_factory=LoopsConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    expert_bias_rate: float | None = None
    """How far one step moves the balancing bias of an expert; None: 1e-3 where there are experts."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log_every: int = 10
    checkpoint_loops: bool = False
    """Recompute each loop and outer block in the backward pass instead of keeping their activations: the same weights
    bit for bit, for less memory and more time."""
    compile: Literal["none", "block", "model"] = "none"
    """What torch.compile makes one graph of: the looped block, or the whole model, whose depth is then fixed."""
    init_from: str | None = None
    """Model folder, or repository of the Hugging Face hub, whose weights the run begins with."""

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1)
        check_int("batch_size", self.batch_size, 1, MAX_ROWS)
        check_int("seed", self.seed, 0, 2**63 - 1)
        check_choice("dtype", self.dtype, get_args(Dtype))
        if self.expert_bias_rate is not None:
            check_number("expert_bias_rate", self.expert_bias_rate, 0)
        check_int("log_every", self.log_every, 1)
        check_bool("checkpoint_loops", self.checkpoint_loops)
        check_choice("compile", self.compile, ("none", "block", "model"))
        if self.init_from is not None:
            check_text("init_from", self.init_from, "give a folder such as RUN/final")
        self._check_fit()

    def _check_fit(self) -> None:
        """Fields of different sections that have to fit each other."""
        model, data = self.model, self.data
        if not data.on_disk:
            self.check_data()
        if data.seq_len > model.max_seq_len:
            raise ValueError(
                f"model.max_seq_len={model.max_seq_len} is shorter than the {data.seq_len} tokens of a row of data "
                f"{data.name!r}; use model.max_seq_len={data.seq_len}"
            )
        if model.halting == "act" and self.loops.backprop_depth is not None:
            raise ValueError(
                f"loops.backprop_depth={self.loops.backprop_depth} must be None with model.halting='act', which needs "
                "the gradient of every loop; use loops.backprop_depth=None or model.halting='none'"
            )
        for name, value, none in (
            ("eval.loops", self.eval.loops, ()),
            ("loops.backprop_depth", self.loops.backprop_depth, None),
            ("checkpoint_loops", self.checkpoint_loops, False),
        ):
            if value and not model.recurrent_layers:
                raise ValueError(
                    f"{name}={value} needs a block to loop, but model.recurrent_layers=0; use {name}={none}"
                )
        if isinstance(data, KHop) and (data.target == "hop") != self.losses.per_loop:
            raise ValueError(
                f"losses.per_loop={self.losses.per_loop} does not fit data.target={data.target!r}: 'hop' has answers "
                "after every loop, 'root' one at the end; use losses.per_loop=true with 'hop', losses.per_loop=false "
                "with 'root'"
            )
        if self.losses.per_loop and (self.loops.per != "batch" or not model.recurrent_layers or model.halting == "act"):
            raise ValueError(
                "losses.per_loop=true needs loops.per='batch', a recurrent block and model.halting='none', not "
                f"loops.per={self.loops.per!r}, model.recurrent_layers={model.recurrent_layers} and "
                f"model.halting={model.halting!r}; change these or use losses.per_loop=false"
            )
        if self.parallel.experts > 1 and not (model.recurrent_layers and model.n_experts % self.parallel.experts == 0):
            raise ValueError(
                f"parallel.experts={self.parallel.experts} must divide model.n_experts={model.n_experts} of a "
                "recurrent block; use parallel.experts=1, or another number of either"
            )
        one_depth = self.loops.law == "fixed" and not self.loops.ramp_steps and not self.loops.mean_ramp_steps
        if self.compile == "model" and model.recurrent_layers and not one_depth:
            ramp = self.loops.ramp_steps or self.loops.mean_ramp_steps
            raise ValueError(
                "compile='model' makes a graph for each depth, so it needs loops.law='fixed' without a ramp, not "
                f"{self.loops.law!r} with {ramp}; use compile='block' with loops.per='batch'"
            )
        same_rows = self.loops.law == "fixed" or self.loops.per == "batch"
        if self.compile == "block" and not (model.recurrent_layers and model.halting == "none" and same_rows):
            raise ValueError(
                "compile='block' needs a recurrent block, model.halting='none' and rows that run equally deep, not "
                f"model.recurrent_layers={model.recurrent_layers}, {model.halting!r}, loops.law={self.loops.law!r} and "
                f"loops.per={self.loops.per!r}; change these or use compile='none'"
            )
        if self.compile == "model" and self.parallel.kind == "fsdp":
            raise ValueError(
                "compile='model' makes one graph of the model, and parallel.kind='fsdp' has to act between its parts; "
                "use compile='block', or parallel.kind='ddp'"
            )
        if self.compile != "none" and self.parallel.experts > 1:
            raise ValueError(
                f"compile={self.compile!r} makes graphs, in which tokens cannot travel to parallel.experts="
                f"{self.parallel.experts} processes; use compile='none', or parallel.experts=1"
            )
        if self.compile == "model" and self.checkpoint_loops:
            raise ValueError(
                "checkpoint_loops=True does not go with compile='model', whose graph decides what it recomputes; "
                "use compile='block' or checkpoint_loops=False"
            )
        layers = f"model.recurrent_layers={model.recurrent_layers}"
        if self.losses.ponder and not (model.recurrent_layers and model.halting == "act"):
            raise ValueError(
                f"losses.ponder={self.losses.ponder:g} needs a block with model.halting='act', not {layers} with "
                f"{model.halting!r}; use losses.ponder=0"
            )
        for name, value in (("losses.router_z", self.losses.router_z), ("expert_bias_rate", self.expert_bias_rate)):
            if value and not (model.recurrent_layers and model.n_experts):
                raise ValueError(
                    f"{name}={value:g} needs experts, not {layers} with model.n_experts={model.n_experts}; use {name}=0"
                )

    def check_data(self) -> None:
        """Whether the model has room for the data's tokens.

        Done when the configuration is made, unless the data is on disk: a recipe can be read before its data is
        prepared.

        Raises:
            ValueError, OSError: it has not, or the data cannot be read.
        """
        if self.data.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size} is too small for data {self.data.name!r}, which has "
                f"{self.data.vocab_size} tokens; use model.vocab_size={self.data.vocab_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `data` carries the name of its task under "task"."""
        values = dataclasses.asdict(self)
        values["data"] = {"task": self.data.name, **values["data"]}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Inverse of `to_dict`; sections and fields may be left out where they have defaults.

        Raises:
            TypeError: a value of another type.
            ValueError: an unknown section, field or task (with the nearest known one), or a value out of range.
        """
        values = dict(values)
        for name in ("model", "data"):
            if not isinstance(values.get(name), dict):
                raise ValueError(f"section {name!r} is missing; a run needs `model` and `data`")
        data = dict(values["data"])
        check_choice("data.task", data.get("task", ""), tuple(TASKS))
        values["data"] = _build(TASKS[data.pop("task")], data, "data.")
        try:
            values["model"] = MythosConfig.from_dict(values["model"])
        except (TypeError, ValueError) as error:
            raise type(error)(f"section model: {error}") from error
        return _build(cls, values, "")

    def to_yaml(self) -> str:
        return yaml.safe_dump(_plain(self.to_dict()), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> "TrainConfig":
        """Read what `to_yaml` wrote, or the same written by hand."""
        return cls._from_yaml_value(parse_yaml(text, "the configuration"))

    @classmethod
    def _from_yaml_value(cls, values: Any) -> "TrainConfig":
        if not isinstance(values, dict):
            raise ValueError("the configuration must be a YAML mapping with the sections `model` and `data`")
        return cls.from_dict(values)

    @classmethod
    def load(cls, path: str | Path) -> "TrainConfig":
        """Read a run's config.yaml."""
        path = Path(path)
        try:
            values = read_yaml(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist; name a run's config.yaml") from error
        with blamed_on(path):
            return cls._from_yaml_value(values)


def _build(cls: Any, values: dict[str, Any], prefix: str) -> Any:
    """An instance of dataclass `cls` from plain values; nested dataclasses from nested mappings."""
    hints = _hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        check_field(name, names, prefix)
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is missing; set it")
    return cls(**{name: _convert(value, hints[name], f"{prefix}{name}") for name, value in values.items()})


_hints = cache(get_type_hints)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """Check a value of YAML against its field's type, and undo what YAML does to it.

    Lists were tuples, and YAML 1.1 reads 3e-4 as text. Ranges are checked by the dataclasses.
    """
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and not isinstance(value, hint):
        if not isinstance(value, dict):
            raise ValueError(f"{name}={shown(value)} must be a section with fields; leave it out for the defaults")
        return _build(hint, value, f"{name}.")
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name}={shown(value)} must be a list, not {type(value).__name__}; use [a, b]")
        return tuple(_convert(item, get_args(hint)[0], f"{name}[{i}]") for i, item in enumerate(value))
    types = get_args(hint) or (hint,)
    if hint is bool:
        check_bool(name, value)
    if get_origin(hint) is Literal:
        check_choice(name, value, types)
    if str in types and not (value is None and type(None) in types):
        check_text(name, value)
    if isinstance(value, str) and float in types:
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{name}={shown(value)} must be a number; write it as 0.0003") from None
    return value


def _plain(value: Any) -> Any:
    """Tuples as lists, which is what safe YAML can hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return value
