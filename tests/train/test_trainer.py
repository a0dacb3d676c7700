"""Real runs: what they write, that they learn, and that they can be repeated bit for bit."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import LoopPlan
from open_mythos.tasks import Addition, KHop, Text
from open_mythos.tasks.task import Batch
from open_mythos.tokenization.tokenizer import load_tokenizer
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.losses import LossConfig
from open_mythos.train.metrics import read_metrics
from open_mythos.train.optim import OptimConfig
from open_mythos.train.schedule import ScheduleConfig
from open_mythos.train.trainer import Trainer


def run_config(steps: int = 20, **changes) -> TrainConfig:
    model = MythosConfig(
        vocab_size=16, dim=32, n_heads=2, n_kv_heads=1, max_seq_len=32, max_loop_iters=3, prelude_layers=1,
        coda_layers=1, attn_type="gqa", n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=16,
        lora_rank=2, injection="diagonal", halting="none", prelude_norm=True, dropout=0.1,
    )  # fmt: skip
    fields = {
        "model": model, "data": Addition(1, 2), "steps": steps, "batch_size": 16, "log_every": 5,
        "optim": OptimConfig("muon", lr=3e-3, muon_lr=1e-2), "schedule": ScheduleConfig(warmup_steps=2),
        "loops": LoopsConfig("poisson", 3, backprop_depth=2), "losses": LossConfig(router_z=1e-3),
        "eval": EvalConfig(every=10, rows=20, loops=(1, 4)),
    }  # fmt: skip
    return TrainConfig(**(fields | changes))


def without_timing(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_metrics(folder)]


def test_run_learns_writes_its_files_and_repeats(tmp_path: Path) -> None:
    first = Trainer(run_config(), tmp_path / "a", device="cpu", progress=False).run()
    assert first == tmp_path / "a" / "final"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "checkpoints",
        "config.yaml",
        "final",
        "metrics.jsonl",
    ]

    lines = read_metrics(tmp_path / "a" / "metrics.jsonl")
    train = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train] == [1, 5, 10, 15, 20]
    names = {"train/loss", "train/ce", "train/router_z", "train/grad_norm", "train/lr", "loop/mean", "lti/rho",
             "loop/max", "moe/max_load", "moe/idle", "perf/tok_s", "perf/overhead", "train/skipped",
             "step"}  # fmt: skip
    assert set(train[0]) == names
    assert train[-1]["train/loss"] < train[0]["train/loss"] - 0.3
    validation = [line for line in lines if "val/loss@1" in line]
    assert [line["step"] for line in validation] == [10, 20]
    assert {"val/loss@4", "val/accuracy@1", "val/accuracy@4"} <= set(validation[0])

    # The run's own config.yaml, given back, gives the same weights and the same log.
    again = TrainConfig.load(tmp_path / "a" / "config.yaml")
    Trainer(again, tmp_path / "b", device="cpu", progress=False).run()
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a/final" / file).read_bytes() == (tmp_path / "b/final" / file).read_bytes()
    assert without_timing(tmp_path / "a/metrics.jsonl") == without_timing(tmp_path / "b/metrics.jsonl")

    Trainer(dataclasses.replace(again, seed=1), tmp_path / "c", device="cpu", progress=False).run()
    assert without_timing(tmp_path / "a/metrics.jsonl") != without_timing(tmp_path / "c/metrics.jsonl")


def test_final_folder_is_the_trained_model(tmp_path: Path) -> None:
    trainer = Trainer(run_config(steps=2), tmp_path, device="cpu", progress=False)
    final = trainer.run()
    model = OpenMythos.from_pretrained(final)
    for name, p in trainer.model.state_dict().items():
        assert torch.equal(p, model.state_dict()[name]), name
    assert load_tokenizer(final).encode("1+2=3$") == [1, 10, 2, 11, 3, 13]
    assert not list(tmp_path.glob("*.partial"))


def test_one_step_equals_plain_torch(tmp_path: Path) -> None:
    """One AdamW step of the trainer against the same step written out."""
    cfg = run_config(
        steps=1, dtype="float64", optim=OptimConfig("adamw", lr=1e-2, decay="all", clip_norm=0.5),
        loops=LoopsConfig("fixed", 2), schedule=ScheduleConfig(shape="constant"),
    )  # fmt: skip
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dropout=0.0, n_experts=0),
                              losses=LossConfig())  # fmt: skip
    seen: list[Batch] = []

    class Recorder(Addition):
        def batch(self, rng, rows, depths=None, first_row=0):
            seen.append(super().batch(rng, rows, depths))
            return seen[-1]

    trainer = Trainer(dataclasses.replace(cfg, data=Recorder(1, 2)), tmp_path, device="cpu", progress=False)
    model = OpenMythos(cfg.model).double()
    model.load_state_dict(trainer.model.state_dict())
    seen.clear()
    trainer.train_step(0)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    logits = model.train()(seen[0].input_ids, plan=LoopPlan((2,) * 16)).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), seen[0].labels.flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    for (name, p), q in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_a_step_does_not_depend_on_what_ran_before(tmp_path: Path) -> None:
    """Evaluating, or any other use of torch's generator between steps, leaves the run as it was."""
    cfg = run_config(steps=6)
    quiet = Trainer(dataclasses.replace(cfg, eval=EvalConfig()), tmp_path / "a", device="cpu", progress=False)
    noisy = Trainer(cfg, tmp_path / "b", device="cpu", progress=False)
    noisy.add_hook(lambda trainer, steps_done: torch.rand(steps_done).sum().mul(0).item() or None, every=1)
    for trainer in (quiet, noisy):
        trainer.run()
    for name, p in quiet.model.state_dict().items():
        assert torch.equal(p, noisy.model.state_dict()[name]), name


def test_hooks_are_called_and_logged(tmp_path: Path) -> None:
    trainer = Trainer(run_config(steps=7, eval=EvalConfig()), tmp_path, device="cpu", progress=False)
    trainer.add_hook(lambda trainer, steps_done: {"mine": steps_done / 2}, every=3)
    trainer.run()
    mine = [(line["step"], line["mine"]) for line in read_metrics(tmp_path / "metrics.jsonl") if "mine" in line]
    assert mine == [(3, 1.5), (6, 3.0)]


@pytest.mark.parametrize("left", ["config.yaml", "metrics.jsonl", "final"])
def test_a_folder_with_a_run_is_refused(tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir()
    with pytest.raises(ValueError, match=f"already holds a run \\({left}\\); go on with it with --resume"):
        Trainer(run_config(), tmp_path, device="cpu")


def test_nothing_is_written_when_the_data_cannot_be_read(tmp_path: Path) -> None:
    cfg = run_config(
        data=Text(path="no such file.txt"),
        losses=LossConfig(),
        model=MythosConfig(vocab_size=259, dim=16, n_heads=2, n_kv_heads=2, attn_type="gqa", halting="none"),
    )
    with pytest.raises(ValueError, match="no such file"):
        Trainer(cfg, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_unknown_device_and_threads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device='tpu'"):
        Trainer(run_config(), tmp_path, device="tpu")  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match="threads=0"):
        Trainer(run_config(), tmp_path, threads=0)


def test_divergence_is_named(tmp_path: Path) -> None:
    cfg = run_config(optim=OptimConfig("adamw", lr=1e30, clip_norm=None), eval=EvalConfig(), log_every=1)
    with pytest.raises(FloatingPointError, match=r"at step \d+, and 10 steps in a row were left out; lower optim.lr"):
        Trainer(cfg, tmp_path, device="cpu", progress=False).run()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    trainer = Trainer(run_config(steps=2, dtype=dtype), tmp_path, device="cpu", progress=False)
    trainer.run()
    assert trainer.model.dtype == (torch.float64 if dtype == "float64" else torch.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"injection": "lti", "halting": "act", "n_experts": 4},
        {"recurrent_layers": 0, "halting": "none", "lora_rank": 0},
    ],
    ids=["act", "plain"],
)
def test_other_models(tmp_path: Path, changes: dict) -> None:
    base = run_config()
    ponder = 0.01 if changes["halting"] == "act" else 0.0
    cfg = dataclasses.replace(
        base, steps=3, model=dataclasses.replace(base.model, **changes), losses=LossConfig(ponder=ponder),
        loops=LoopsConfig("poisson", 3), eval=EvalConfig(every=3, rows=5), log_every=1,
    )  # fmt: skip
    Trainer(cfg, tmp_path, device="cpu", progress=False).run()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert ("train/ponder" in lines[0]) == bool(ponder)
    assert set(lines[-1]) == {"step", "val/loss", "val/accuracy"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learns_on_a_gpu(tmp_path: Path, dtype: str) -> None:
    cfg = run_config(steps=40, dtype=dtype)
    Trainer(cfg, tmp_path, device="cuda", progress=False).run()
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in line]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.3


def test_the_task_sees_the_depths_of_its_rows(tmp_path: Path) -> None:
    """Every row of a hop-by-hop task is asked for as many hops as the model loops."""
    plans: list[tuple[int, ...]] = []
    batches: list[Batch] = []

    class Recorder(KHop):
        def batch(self, rng, rows, depths=None, first_row=0):
            batches.append(super().batch(rng, rows, depths))
            return batches[-1]

    base = run_config(loops=LoopsConfig("uniform", 3), losses=LossConfig())
    model = dataclasses.replace(base.model, vocab_size=24, n_experts=0)
    cfg = dataclasses.replace(base, model=model, data=Recorder(), batch_size=64)
    trainer = Trainer(cfg, tmp_path, device="cpu", progress=False)
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: plans.append(kwargs["plan"].depths), with_kwargs=True
    )
    batches.clear()
    trainer.train_step(0)
    assert set(plans[0]) == {1, 2, 3, 4, 5}
    for ids, answer, depth in zip(
        batches[0].input_ids.tolist(), batches[0].labels[:, -1].tolist(), plans[0], strict=True
    ):
        symbol = ids[-1]
        for _ in range(depth):
            symbol = ids[symbol]
        assert symbol == answer


def test_a_step_reads_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the data to the experts' biases; on a GPU each reading waits for all that was asked for before."""
    reads: list[str] = []

    class Items(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
                reads.append("item")
            return func(*args, **(kwargs or {}))

    cfg = run_config(loops=LoopsConfig("fixed", 3), dtype="float32", losses=LossConfig(router_z=1e-3))
    trainer = Trainer(cfg, tmp_path, device="cpu", progress=False)
    trainer.train_step(0, log=False)
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda x: (x.is_floating_point() and reads.append("list"), tolist(x))[1]
    )
    with Items():
        trainer.train_step(1, log=False)
        assert reads == ["list"]
        trainer.train_step(2, log=True)
    assert len(reads) > 2
