"""Runs that are cut off and go on: the same weights, moments and numbers as a run that was not, whatever happens."""

import json
import random
import resource
import signal
import warnings
from pathlib import Path

import pytest
import torch

from open_mythos.cli import main
from open_mythos.tasks import Addition
from open_mythos.train.checkpoint import CheckpointConfig, Checkpoints, find_problem
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.distributed import ParallelConfig, World
from open_mythos.train.losses import LossConfig
from open_mythos.train.metrics import read_metrics
from open_mythos.train.optim import OptimConfig
from open_mythos.train.trainer import Trainer
from tests.models import tiny

STEPS = 12


def config(**changes: object) -> TrainConfig:
    """A small run with all that has a state: experts that are balanced, dropout, sampled depth, two optimizers."""
    model = tiny(dropout=0.1, halting="none", initial_state="normal")
    values = {
        "model": model, "data": Addition(1, 2), "steps": STEPS, "batch_size": 4, "log_every": 1,
        "optim": OptimConfig("muon", lr=1e-2), "loops": LoopsConfig("poisson", 2, max_loops=4),
        "losses": LossConfig(router_z=1e-3), "eval": EvalConfig(every=5, rows=4, loops=(1, 3)),
        "expert_bias_rate": 1e-2,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def trainer(folder: Path, cfg: TrainConfig | None = None, every: int = 3, **options: object) -> Trainer:
    checkpoint = CheckpointConfig(every, **{k: options.pop(k) for k in ("last", "milestones") if k in options})
    return Trainer(cfg or config(), folder, device="cpu", threads=1, progress=False, checkpoint=checkpoint, **options)


def state(run: Trainer) -> dict[str, torch.Tensor]:
    """Everything that a step changes."""
    names = {p: name for name, p in run.model.named_parameters()}
    optimizers = {
        f"{i}/{names[p]}/{field}": x
        for i, optimizer in enumerate(run.optimizers)
        for p, fields in optimizer.state.items()
        for field, x in fields.items()
    }
    return {**run.model.state_dict(), **optimizers}


def opened(folder: Path) -> Checkpoints:
    """The checkpoints of a run, for one process that only reads them."""
    world = World(torch.device("cpu"), ParallelConfig())
    return Checkpoints(folder / "checkpoints", CheckpointConfig(1), world, lambda folder: None)


def numbers(folder: Path) -> list[dict[str, float]]:
    """The log without what a clock says."""
    return [
        {k: v for k, v in line.items() if not k.startswith("perf/")} for line in read_metrics(folder / "metrics.jsonl")
    ]


def assert_same(run: Trainer, whole: Trainer) -> None:
    got, expected = state(run), state(whole)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert numbers(run.out_dir) == numbers(whole.out_dir)
    weights = Path("final") / "model.safetensors"
    assert (run.out_dir / weights).read_bytes() == (whole.out_dir / weights).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """The run that nothing happens to."""
    run = trainer(tmp_path_factory.mktemp("runs") / "whole", every=0)
    run.run()
    return run


class Crash(Exception):
    pass


def crash_after(step: int):
    def hook(run: Trainer, done: int) -> None:
        if done == step:
            raise Crash

    return hook


@pytest.mark.parametrize("at", [1, 3, 4, 11])
def test_a_crash_costs_the_steps_since_the_last_save(tmp_path: Path, whole: Trainer, at: int) -> None:
    run = trainer(tmp_path / "run")
    run.add_hook(crash_after(at), 1)
    with pytest.raises(Crash):
        run.run()
    run.checkpoints.wait()
    again = trainer(tmp_path / "run", resume=True)
    assert again.steps_done == (at - 1) // 3 * 3
    again.run()
    assert_same(again, whole)
    # There is nothing left to do, and nothing is done.
    assert trainer(tmp_path / "run", resume=True).run() == tmp_path / "run" / "final"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_in_float64(tmp_path: Path, kind: str) -> None:
    cfg = config(dtype="float64", optim=OptimConfig(kind, lr=1e-2))
    full = trainer(tmp_path / "full", cfg, every=0)
    full.run()
    run = trainer(tmp_path / "run", cfg)
    run.add_hook(crash_after(8), 1)
    with pytest.raises(Crash):
        run.run()
    run.checkpoints.wait()
    again = trainer(tmp_path / "run", cfg, resume=True)
    again.run()
    assert_same(again, full)


def newest_step(folder: Path) -> int:
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-????????")), default=0)


def test_a_signal_ends_a_run_that_goes_on(tmp_path: Path, whole: Trainer, capsys: pytest.CaptureFixture) -> None:
    """Through the command: the step is finished and saved, the status says so, --resume goes on."""
    (tmp_path / "run.yaml").write_text(config().to_yaml())
    out = tmp_path / "run"
    command = ["train", "--config", str(tmp_path / "run.yaml"), "--out", str(out), "--device", "cpu", "--threads", "1"]
    saving = [*command, "--checkpoint-every", "100"]
    step, seen = Trainer.train_step, []

    def signalled(self: Trainer, number: int, log: bool = True):
        if number in (4, 7) and number not in seen:
            seen.append(number)
            signal.raise_signal(signal.SIGTERM if number == 4 else signal.SIGINT)
        return step(self, number, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        for stopped in (5, 8):
            with pytest.raises(SystemExit) as exit:
                main([*saving, "--resume"])
            assert exit.value.code == 75
            told = f"stopped after step {stopped}, saved; go on with the same command and --resume"
            assert told in capsys.readouterr().err
        assert main([*saving, "--resume"]) == 0
    assert numbers(out) == numbers(whole.out_dir)
    weights = Path("final") / "model.safetensors"
    assert (out / weights).read_bytes() == (whole.out_dir / weights).read_bytes()
    assert main(command) == 2
    assert "already holds a run (config.yaml); go on with it with --resume" in capsys.readouterr().err
    assert main([*command, "--resume", "--seed", "1"]) == 2
    assert (
        "differs from this command in seed: 0 in the run, 1 now. Go on with the configuration"
        in capsys.readouterr().err
    )


def test_what_is_kept(tmp_path: Path) -> None:
    run = trainer(tmp_path, every=1, last=3, milestones=4)
    run.run()
    kept = sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [4, 8, 10, 11, 12]
    assert all(find_problem(path) is None for path in (tmp_path / "checkpoints").iterdir())


def test_damage_is_named_and_passed_over(tmp_path: Path) -> None:
    """Bit flips, cut files, missing, exchanged and foreign ones, in every file of the newest checkpoint."""
    run = trainer(tmp_path, config(steps=7), every=2)
    run.run()
    older, newest = (tmp_path / "checkpoints" / f"step-0000000{step}" for step in (6, 7))
    files = {path: path.read_bytes() for path in sorted(newest.iterdir())}
    assert {path.name for path in files} == {
        "model-00000.safetensors", "optimizer0-00000.safetensors", "optimizer1-00000.safetensors", "state.json",
        "manifest.json", "config.yaml", "mythos_tokenizer.json",
    }  # fmt: skip
    checkpoints, rng = opened(tmp_path), random.Random(0)

    def assert_found(path: Path) -> None:
        with pytest.warns(UserWarning, match=f"{path.name}.*going back to the checkpoint before"):
            assert checkpoints.newest() == older

    for trial in range(60):
        path, good = rng.choice(list(files.items()))
        bad = bytearray(good)
        if trial % 3:
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        else:
            del bad[rng.randrange(len(bad)) :]
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match="going back to the checkpoint before"):
            assert checkpoints.newest() == older
        path.write_bytes(good)
    for path, good in files.items():
        path.unlink()
        assert_found(path)
        path.write_bytes(good)
    name = "model-00000.safetensors"
    (newest / name).write_bytes((older / name).read_bytes())
    assert_found(newest / name)
    (newest / name).write_bytes(files[newest / name])
    (newest / "notes.txt").write_text("x")
    assert_found(newest / "notes.txt")
    (newest / "notes.txt").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.newest() == newest


def test_a_run_goes_on_behind_a_damaged_checkpoint(tmp_path: Path, whole: Trainer) -> None:
    run = trainer(tmp_path / "run")
    run.add_hook(crash_after(11), 1)
    with pytest.raises(Crash):
        run.run()
    run.checkpoints.wait()
    path = tmp_path / "run" / "checkpoints" / "step-00000009" / "model-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"model-00000\.safetensors is damaged"):
        again = trainer(tmp_path / "run", resume=True)
    assert again.steps_done == 6
    again.run()
    assert_same(again, whole)
    assert find_problem(path.parent) is None


def test_damaged_ones_do_not_push_new_ones_out(tmp_path: Path) -> None:
    run = trainer(tmp_path, config(steps=7), every=1, last=2)
    for step in (5, 6):
        run.steps_done = step
        run._save()
    run.checkpoints.wait()
    for step in (5, 6):
        (tmp_path / "checkpoints" / f"step-0000000{step}" / "state.json").write_text("x")
    for step in (1, 2, 3):
        run.steps_done = step
        run._save()
        assert run.checkpoints.wait()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-0000000{step}" for step in (2, 3, 5, 6)]
    with pytest.warns(UserWarning, match="is damaged"):
        newest = run.checkpoints.newest()
    assert newest is not None and newest.name == "step-00000003"


def test_weights_that_are_lost_are_not_saved(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", config(log_every=100, eval=EvalConfig()), every=2)

    def lose(run: Trainer, done: int) -> None:
        if done == 5:
            with torch.no_grad():
                run.model.embed.weight[0, 0] = torch.nan

    run.add_hook(lose, 1)
    with pytest.raises(FloatingPointError, match=r"is not finite after step 6, so nothing is saved; lower optim\.lr"):
        run.run()
    run.checkpoints.wait()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]


@pytest.mark.filterwarnings("ignore:the checkpoint of step:UserWarning")
def test_a_full_disk_stops_nothing(tmp_path: Path, whole: Trainer) -> None:
    """No file may grow beyond some size: saves fail at different places, older checkpoints stay, training ends well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = random.Random(0)
    run = trainer(tmp_path / "run", every=1)
    save, failed = run.checkpoints.save, []

    def limited(step: int, groups, state) -> None:
        save(step, groups, state)
        if not run.checkpoints.wait():
            failed.append(step)
        newest = opened(tmp_path / "run").newest()
        assert newest is not None and int(newest.name[5:]) == max({*range(1, step + 1)} - {*failed})

    run.checkpoints.save = limited
    write = run.checkpoints._write

    def write_less(step: int, groups, state) -> None:
        if step in (3, 4, 7, 8, 9):
            resource.setrlimit(resource.RLIMIT_FSIZE, (sizes.randrange(60_000), before[1]))
        try:
            write(step, groups, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    run.checkpoints._write = write_less
    run.run()
    assert failed == [3, 4, 7, 8, 9]
    assert_same(run, whole)


def test_resume_without_anything_starts(tmp_path: Path, whole: Trainer) -> None:
    run = trainer(tmp_path / "run", resume=True)
    assert run.steps_done == 0
    run.run()
    assert_same(run, whole)


def test_a_line_cut_short_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "x": 2.0}) + '\n{"step": 2, "x": 3')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "x": 2.0}]


def test_refuses(tmp_path: Path) -> None:
    wrong = (("every", -1, "checkpoint_every"), ("last", 0, "keep_last"), ("milestones", 1.5, "keep_every"))
    for field, value, name in wrong:
        with pytest.raises((TypeError, ValueError), match=name):
            CheckpointConfig(**{field: value})
    run = trainer(tmp_path, config(steps=3), every=1)
    run.run()
    with pytest.raises(ValueError, match=r"differs from this command in steps: 3 in the run, 2 now"):
        trainer(tmp_path, config(steps=2), resume=True)
