"""A run's configuration: YAML gives it back, the command line reaches nested fields, nonsense is refused."""

import dataclasses
from pathlib import Path

import pytest
import tyro

from open_mythos.config import MythosConfig
from open_mythos.recipes import RECIPES
from open_mythos.tasks import Addition, KHop, Text
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.losses import LossConfig
from open_mythos.train.optim import OptimConfig


def model(**changes) -> MythosConfig:
    fields = {
        "vocab_size": 300,
        "dim": 16,
        "n_heads": 2,
        "n_kv_heads": 2,
        "max_seq_len": 128,
        "attn_type": "gqa",
        "halting": "none",
    }
    return MythosConfig(**({"halting": "none"} | fields | changes))


def config(**changes) -> TrainConfig:
    return TrainConfig(**({"model": model(), "data": Addition(), "steps": 10, "batch_size": 4} | changes))


CONFIGS = {
    **{name: recipe() for name, recipe in RECIPES.items()},
    "khop": config(data=KHop(max_distance=3)),
    "text": config(data=Text(path="a.txt", kind="bpe", bpe_vocab_size=300), optim=OptimConfig("muon", lr=1e-7)),
    "odd": config(
        seed=2**40, dtype="bfloat16", eval=EvalConfig(every=3, loops=(1, 2)), losses=LossConfig(router_z=1e-3),
        checkpoint_loops=True,
        loops=LoopsConfig("poisson_lognormal", 7.5, per="batch", max_loops=30, backprop_depth=3),
        optim=OptimConfig(betas=(0.1 + 0.2, 1 / 3), clip_norm=None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_yaml_round_trip_is_exact(cfg: TrainConfig) -> None:
    again = TrainConfig.from_yaml(cfg.to_yaml())
    assert again == cfg
    assert again.to_yaml() == cfg.to_yaml()


def test_yaml_written_by_hand() -> None:
    cfg = TrainConfig.from_yaml(
        "model: {vocab_size: 16, dim: 16, n_heads: 2, n_kv_heads: 2, max_seq_len: 32, attn_type: gqa}\n"
        "data: {task: addition}\nsteps: 5\nbatch_size: 2\noptim: {lr: 3e-4, clip_norm: 1e0}\n"
    )
    assert cfg.optim.lr == 3e-4
    assert cfg.optim.clip_norm == 1.0
    assert cfg.loops == LoopsConfig()


def test_command_line_overrides_nested_fields() -> None:
    arguments = ["--optim.lr", "3e-3", "--steps", "7", "--seed", "5", "--loops.mean", "6", "--data.max-digits", "4",
                 "--eval.loops", "1", "2", "--model.dim", "32"]  # fmt: skip
    cfg = tyro.cli(TrainConfig, default=config(), args=arguments, config=(tyro.conf.AvoidSubcommands,))
    expected = config(
        model=model(dim=32), data=Addition(2, 4), steps=7, seed=5, optim=OptimConfig(lr=3e-3),
        loops=LoopsConfig(mean=6), eval=EvalConfig(loops=(1, 2)),
    )  # fmt: skip
    assert cfg == expected
    assert TrainConfig.from_yaml(cfg.to_yaml()) == cfg


def test_a_frozen_run() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().steps = 3  # ty: ignore[invalid-assignment]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": -5}, "batch_size=-5"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, f"use seed={2**63 - 1}"),
        ({"dtype": "fp16"}, "dtype='fp16'"),
        ({"log_every": 0}, "log_every=0"),
        ({"expert_bias_rate": -1.0}, "expert_bias_rate=-1"),
        ({"model": model(vocab_size=15)}, "use model.vocab_size=16"),
        ({"model": model(max_seq_len=17)}, "use model.max_seq_len=18"),
        ({"data": Text(kind="bpe", bpe_vocab_size=301)}, "use model.vocab_size=301"),
        ({"model": model(halting="act"), "loops": LoopsConfig(backprop_depth=2)}, "loops.backprop_depth=2"),
        ({"model": model(recurrent_layers=0), "eval": EvalConfig(loops=(1,))}, r"use eval.loops=\(\)"),
        ({"model": model(recurrent_layers=0), "loops": LoopsConfig(backprop_depth=2)}, "use loops.backprop_depth=None"),
        ({"model": model(recurrent_layers=0), "checkpoint_loops": True}, "use checkpoint_loops=False"),
        ({"losses": LossConfig(ponder=0.1)}, "losses.ponder=0.1"),
        ({"compile": "all"}, "compile='all' must be one of"),
        ({"compile": "model", "loops": LoopsConfig("poisson", 3)}, "use compile='block' with loops.per='batch'"),
        ({"compile": "model", "loops": LoopsConfig(max_loops=4, ramp_steps=9)}, "'fixed' with 9; use compile='block'"),
        ({"compile": "model", "checkpoint_loops": True}, "use compile='block' or checkpoint_loops=False"),
        ({"compile": "block", "loops": LoopsConfig("poisson", 3)}, "loops.per='sequence'; change these or use"),
        ({"compile": "block", "model": model(halting="act")}, "'act', loops.law='fixed'"),
        ({"compile": "block", "model": model(recurrent_layers=0)}, "model.recurrent_layers=0"),
        ({"losses": LossConfig(per_loop=True)}, "not loops.per='sequence'"),
        (
            {"model": model(halting="act"), "loops": LoopsConfig(per="batch"), "losses": LossConfig(per_loop=True)},
            "model.halting='act'; change these or use",
        ),
        ({"model": model(recurrent_layers=0, halting="act"), "losses": LossConfig(ponder=0.1)}, "use losses.ponder=0"),
        ({"model": model(n_experts=0), "losses": LossConfig(router_z=0.1)}, "losses.router_z=0.1"),
        ({"model": model(recurrent_layers=0), "losses": LossConfig(router_z=0.1)}, "use losses.router_z=0"),
        ({"model": model(n_experts=0), "expert_bias_rate": 0.1}, "use expert_bias_rate=0"),
        ({"model": model(recurrent_layers=0), "expert_bias_rate": 0.1}, "use expert_bias_rate=0"),
    ],
)
def test_refuses(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "named"), [({"steps": True}, "steps=True"), ({"seed": 1.5}, "seed=1.5"), ({"dtype": 32}, "dtype=32"),
     ({"checkpoint_loops": 1}, "checkpoint_loops=1")],
)  # fmt: skip
def test_refuses_types(changes: dict, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        config(**changes)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"every": -1}, "eval.every=-1"),
        ({"rows": 0}, "eval.rows=0"),
        ({"loops": (0,)}, "eval.loops=0"),
        ({"loops": 4}, "eval.loops=4"),
        ({"loops": (4097,)}, "eval.loops=4097"),
    ],
)
def test_refuses_eval(kwargs: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        EvalConfig(**kwargs)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("lr:", "learning_rate:", "'optim.learning_rate' is no field"),
        ("warmup_steps:", "warmup_step:", "did you mean 'schedule.warmup_steps'"),
        ("task: addition", "task: additoin", "data.task='additoin'.* use data.task='addition'"),
        ("task: addition", "tusk: addition", "data.task='' must be one of"),
        ("steps: 10\n", "", "steps is missing"),
        ("data:", "date:", "section 'data' is missing"),
        ("lr: 0.0003", "lr: fast", "optim.lr='fast'"),
    ],
)
def test_refuses_yaml(old: str, new: str, named: str) -> None:
    text = config().to_yaml()
    assert old in text
    with pytest.raises(ValueError, match=named):
        TrainConfig.from_yaml(text.replace(old, new, 1))


def test_refuses_yaml_of_another_type() -> None:
    with pytest.raises(TypeError, match="steps='ten' must be int"):
        TrainConfig.from_yaml(config().to_yaml().replace("steps: 10\n", "steps: ten\n", 1))


@pytest.mark.parametrize("text", ["", "[1]", "model: 3\ndata: {}", "steps"])
def test_refuses_yaml_that_is_no_configuration(text: str) -> None:
    with pytest.raises(ValueError, match="`model` and `data`"):
        TrainConfig.from_yaml(text)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "model: 3"])
def test_a_file_that_is_no_configuration_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml: .*(is no YAML; correct this|`model` and `data`)"):
        TrainConfig.load(path)


def test_refuses_an_empty_section() -> None:
    with pytest.raises(ValueError, match=r"optim=None must be a section"):
        TrainConfig.from_dict(config().to_dict() | {"optim": None})
