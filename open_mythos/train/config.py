"""A run's configuration: nested dataclasses, checked when made, that round-trip through YAML exactly."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from open_mythos.checks import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    check_field,
    check_int,
    check_number,
    check_section,
    check_text,
    shown,
)
from open_mythos.config import MAX_LOOPS, MythosConfig, check_part
from open_mythos.device import AutoDtype
from open_mythos.files import blamed_on, parse_yaml, read_yaml
from open_mythos.tasks import TASKS, Task
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.schedule import ScheduleConfig
from open_mythos.train.step_guard import GuardConfig

EXPERT_BIAS_RATE = 1e-3
"""Source: Wang et al. 2024, arXiv 2408.15664."""

Rows = Annotated[int, Range(1, 2**24)]
"""Rows of one step or one evaluation."""
BelowOne = Annotated[float, Range(0, 1, below=True)]
AdjustLR = Literal["match_rms_adamw", "original"]
MuonDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and its rates. The schedule scales `lr` and `muon_lr` alike."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: PositiveFloat = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    decay: Literal["matrices", "all"] = "matrices"
    """Parameters that decay: hidden matrices, or all as with a bare torch.optim.AdamW."""
    muon_lr: PositiveFloat = 3e-4
    """Peak rate of Muon; with adjust_lr="match_rms_adamw" on the scale of AdamW's."""
    momentum: BelowOne = 0.95
    adjust_lr: AdjustLR = "match_rms_adamw"
    muon_dtype: MuonDtype | None = None
    """Dtype of Muon's iteration; None: bfloat16 with dtype="bfloat16", with dtype="auto" the faster one, else that of
    the weights."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global norm of the gradient; None does not clip."""

    def __post_init__(self) -> None:
        check_section(self, "optim.")
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ValueError(f"optim.betas={shown(self.betas)} must be two numbers; use optim.betas=(0.9, 0.95)")
        for i, beta in enumerate(self.betas):
            check_number(f"optim.betas[{i}]", beta, 0, 1, below=True)


@dataclass(frozen=True)
class LossConfig:
    """Loops after which the cross-entropy is taken, and weights of the auxiliary losses; 0 leaves a part out."""

    per_loop: bool = False
    """Cross-entropy after every loop, averaged, not only after the last (deep supervision).

    Needs loops.per="batch" and halting="none"."""
    ponder: NonNegativeFloat = 0.0
    """Weight of the ponder cost (loops used plus remainder, mean over tokens); needs halting="act"."""
    router_z: NonNegativeFloat = 0.0
    """Weight of the router z-loss, the mean of logsumexp(router logits)^2 over all routed tokens; needs experts. Where
    tokens exit early the sum is divided by the loops they were to run."""

    def __post_init__(self) -> None:
        check_section(self, "losses.")


@dataclass(frozen=True)
class ParallelConfig:
    """Distribution of a run over processes.

    None of it changes the result by more than rounding, but for dropout and noisy initial states, which are drawn for
    the rows that are computed together.
    """

    kind: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process has the whole model. fsdp: each has its share of parameters, gradients and moments, and
    gathers the recurrent block once per forward pass."""
    experts: PositiveInt = 1
    """Processes over which the experts are distributed; needs kind="fsdp"."""
    rows: PositiveInt | None = None
    """Rows that a process computes at a time; None: all of its rows. Fewer take less memory: gradients add up."""
    timeout_s: Annotated[float, Range(0, 1e7, above=True)] = 600.0
    """Longest wait for the other processes."""

    def __post_init__(self) -> None:
        check_section(self, "parallel.")
        if self.experts > 1 and self.kind != "fsdp":
            raise ValueError(
                f"parallel.experts={self.experts} needs parallel.kind='fsdp', not {self.kind!r}; use kind='fsdp', or "
                "parallel.experts=1"
            )


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0 never evaluates."""
    rows: Rows = 256
    loops: tuple[int, ...] = ()
    """Loop counts to evaluate at, each with its own metrics; none: once, at the model's `max_loop_iters`."""

    def __post_init__(self) -> None:
        check_section(self, "eval.")
        if not isinstance(self.loops, tuple):
            raise ValueError(f"eval.loops={shown(self.loops)} must be a list of loop counts; use eval.loops=(1, 4)")
        for n_loops in self.loops:
            check_int("eval.loops", n_loops, 1, MAX_LOOPS)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's result. Device and threads are not in it: they belong to the machine."""

    model: MythosConfig
    data: Task
    steps: PositiveInt
    batch_size: Rows
    """Rows of one optimizer step."""
    seed: NonNegativeInt = 0
    dtype: AutoDtype = "float32"
    """float32; bfloat16 and float16: autocast over float32 weights, slow on CPUs without such units, float16 with a
    scaled loss for GPUs without bfloat16; float64: weights too; auto: float32 or bfloat16, whichever this machine
    computes a step faster in, which the run's config.yaml then names."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loops: LoopsConfig = field(default_factory=LoopsConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    expert_bias_rate: NonNegativeFloat | None = None
    """Change of an expert's balancing bias in one step; None: 1e-3 where there are experts."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log_every: PositiveInt = 10
    checkpoint_loops: bool = False
    """Recompute each loop and outer block in the backward pass instead of storing their activations: the same weights
    bit for bit, for less memory and more time."""
    compile: Literal["none", "block", "model"] = "none"
    """Part that torch.compile makes one graph of: the looped block, or the whole model, whose depth is then fixed."""
    init_from: str | None = None
    """Model folder, or repository of the Hugging Face hub, whose weights the run begins with."""

    def __post_init__(self) -> None:
        check_section(self)
        if self.init_from is not None:
            check_text("init_from", self.init_from, "give a folder such as RUN/final")
        if not self.data.on_disk:
            self.check_data()
        for message, applies in self._faults().items():
            if applies:
                raise ValueError(message)
        self.data.check_losses(self.losses.per_loop)

    def _faults(self) -> dict[str, object]:
        """Return what fields of different sections must not say together: each message, and whether it applies."""
        model, data, loops, losses, parallel = self.model, self.data, self.loops, self.losses, self.parallel
        has_loops, layers = model.recurrent_layers > 0, f"model.recurrent_layers={model.recurrent_layers}"
        need_loops = {
            "eval.loops": (self.eval.loops, ()),
            "loops.backprop_depth": (loops.backprop_depth, None),
            "checkpoint_loops": (self.checkpoint_loops, False),
        }
        need_experts = {"losses.router_z": losses.router_z, "expert_bias_rate": self.expert_bias_rate or 0.0}
        return {
            f"model.max_seq_len={model.max_seq_len} is shorter than the {data.seq_len} tokens of a row of data "
            f"{data.name!r}; use model.max_seq_len={data.seq_len}": data.seq_len > model.max_seq_len,
            "model.weights='int8' cannot be trained; use model.weights='float'": model.weights == "int8",
            f"loops.backprop_depth={loops.backprop_depth} must be None with model.halting='act', which needs the "
            "gradient of every loop; use loops.backprop_depth=None or model.halting='none'": (
                model.halting == "act" and loops.backprop_depth is not None
            ),
            **{
                f"{name}={value} needs a block to loop, but model.recurrent_layers=0; use {name}={none}": (
                    value and not has_loops
                )
                for name, (value, none) in need_loops.items()
            },
            "losses.per_loop=true needs loops.per='batch', a recurrent block and model.halting='none', not "
            f"loops.per={loops.per!r}, {layers} and model.halting={model.halting!r}; change these or use "
            "losses.per_loop=false": (
                losses.per_loop and not (loops.per == "batch" and has_loops and model.halting != "act")
            ),
            f"parallel.experts={parallel.experts} must divide model.n_experts={model.n_experts} of a recurrent "
            "block; use parallel.experts=1, or another number of either": (
                parallel.experts > 1 and not (has_loops and model.n_experts % parallel.experts == 0)
            ),
            f"losses.ponder={losses.ponder:g} needs a block with model.halting='act', not {layers} with "
            f"{model.halting!r}; use losses.ponder=0": losses.ponder and not (has_loops and model.halting == "act"),
            **{
                f"{name}={value:g} needs experts, not {layers} with model.n_experts={model.n_experts}; use {name}=0": (
                    value and not (has_loops and model.n_experts)
                )
                for name, value in need_experts.items()
            },
            **self._compile_faults(has_loops, layers),
        }

    def _compile_faults(self, has_loops: bool, layers: str) -> dict[str, object]:
        """Return the faults of `compile`, as `_faults` does."""
        halting, loops, parallel = self.model.halting, self.loops, self.parallel
        ramp, is_even = loops.ramp_steps or loops.mean_ramp_steps, loops.law == "fixed" or loops.per == "batch"
        return {
            "compile='model' makes a graph for each depth, so it needs loops.law='fixed' without a ramp, not "
            f"{loops.law!r} with {ramp}; use compile='block' with loops.per='batch'": (
                self.compile == "model" and has_loops and (loops.law != "fixed" or ramp)
            ),
            "compile='block' needs a recurrent block, model.halting='none' and rows that run equally deep, not "
            f"{layers}, {halting!r}, loops.law={loops.law!r} and loops.per={loops.per!r}; change these or use "
            "compile='none'": self.compile == "block" and not (has_loops and halting == "none" and is_even),
            "compile='model' makes one graph of the model, and parallel.kind='fsdp' has to act between its parts; "
            "use compile='block', or parallel.kind='ddp'": self.compile == "model" and parallel.kind == "fsdp",
            f"compile={self.compile!r} makes graphs, in which tokens cannot travel to parallel.experts="
            f"{parallel.experts} processes; use compile='none', or parallel.experts=1": (
                self.compile != "none" and parallel.experts > 1
            ),
            "checkpoint_loops=True does not go with compile='model', whose graph decides what it recomputes; use "
            "compile='block' or checkpoint_loops=False": self.compile == "model" and self.checkpoint_loops,
        }

    def check_data(self) -> None:
        """Check that the model has room for the data's tokens.

        Done when the configuration is made, unless the data is on disk, which a recipe can be read without.

        Raises:
            ValueError, OSError: it has not, or the data cannot be read.
        """
        if self.data.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size} is too small for data {self.data.name!r}, which has "
                f"{self.data.vocab_size} tokens; use model.vocab_size={self.data.vocab_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; `data` has the name of its task under "task"."""
        values = dataclasses.asdict(self)
        return {**values, "data": {"task": self.data.name, **values["data"]}}

    @classmethod
    def from_dict(cls, values: Any) -> "TrainConfig":
        """Return the configuration that `to_dict` gave; sections and fields with defaults may be left out.

        Raises:
            TypeError: a value of another type.
            ValueError: an unknown section, field or task (with the nearest known one), or a value out of range.
        """
        if not isinstance(values, dict):
            raise ValueError("the configuration must be a YAML mapping with the sections `model` and `data`")
        for name in ("model", "data"):
            if not isinstance(values.get(name), dict):
                raise ValueError(f"section {name!r} is missing; a run needs `model` and `data`")
        data = dict(values["data"])
        check_part("data.task", data.get("task", ""), TASKS, "TASKS")
        task = _build(TASKS[data.pop("task")], data, "data.")
        try:
            model = MythosConfig.from_dict(values["model"])
        except (TypeError, ValueError) as error:
            raise type(error)(f"section model: {error}") from error
        return _build(cls, {**values, "model": model, "data": task}, "")

    def to_yaml(self) -> str:
        # By way of JSON, since safe YAML has no tuples.
        return yaml.safe_dump(json.loads(json.dumps(self.to_dict())), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str) -> "TrainConfig":
        """Read what `to_yaml` wrote, or the same written by hand."""
        return cls.from_dict(parse_yaml(text, "the configuration"))

    @classmethod
    def load(cls, path: str | Path) -> "TrainConfig":
        """Read a run's config.yaml."""
        path = Path(path)
        try:
            values = read_yaml(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist; name a run's config.yaml") from error
        with blamed_on(path):
            return cls.from_dict(values)


def flat_fields(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields of nested sections by their full names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat_fields(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _build(cls: Any, values: dict[str, Any], prefix: str) -> Any:
    """Make an instance of dataclass `cls` of plain values; nested dataclasses of nested mappings."""
    hints, fields = _hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        check_field(name, list(fields), prefix)
    for name, f in fields.items():
        if name not in values and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}{name} is missing; set it")
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
    if str in types and not (value is None and type(None) in types):
        check_text(name, value)
    if isinstance(value, str) and float in types:
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{name}={shown(value)} must be a number; write it as 0.0003") from None
    return value
