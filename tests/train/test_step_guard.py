"""Steps that must not be taken: values that are not finite, in one process of two, and spikes."""

import math
import random
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from open_mythos.nn import moe
from open_mythos.train import trainer as module
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.distributed import ParallelConfig
from open_mythos.train.losses import LossConfig
from open_mythos.train.optim import OptimConfig
from open_mythos.train.step_guard import GuardConfig
from open_mythos.train.trainer import Trainer
from tests.train.ranks import run_ranks
from tests.train.test_distributed import config
from tests.train.test_faults import SPREADS

SITES = ("loss", "gradient", "backward", "router", "activation", "halting")
VALUES = (math.nan, math.inf, -math.inf)


class Injector:
    """Puts one value into one place of the next step of this process."""

    def __init__(self, run: Trainer) -> None:
        self.site, self.value, self.rng = "", 0.0, random.Random(0)
        self._wrap(module, "total_loss", lambda found: (self.spoil("loss", found[0]), found[1]))
        self._wrap(moe, "float32_linear", lambda logits: self.spoil("router", logits))
        self._wrap(run.sharded, "gradients", self._spoil_gradient)
        run.model.prelude[0].register_forward_hook(lambda _, __, y: self._spoil_backward(self.spoil("activation", y)))
        if run.model.recurrent is not None and run.model.recurrent.act is not None:
            self._wrap(run.model.recurrent.act, "forward", lambda p: self.spoil("halting", p))

    @staticmethod
    def _wrap(owner: object, name: str, fn) -> None:
        original = getattr(owner, name)
        mock.patch.object(owner, name, lambda *args, **kwargs: fn(original(*args, **kwargs))).start()

    def spoil(self, site: str, x: Tensor) -> Tensor:
        if site != self.site or not x.numel():  # a process may have no tokens
            return x
        self.site = ""
        spoilt = torch.zeros_like(x).flatten()
        spoilt[self.rng.randrange(x.numel())] = self.value
        return x + spoilt.view_as(x)

    def _spoil_backward(self, y: Tensor) -> Tensor:
        if y.requires_grad:
            y.register_hook(lambda g: self.spoil("backward", g))
        return y

    def _spoil_gradient(self, gradients: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
        if self.site == "gradient":
            g = self.rng.choice([g for g, _ in gradients if g.numel()])
            g.copy_(self.spoil("gradient", g))
        return gradients


def held(run: Trainer) -> list[Tensor]:
    """Copies of everything that a step changes."""
    moments = [x for one in run.optimizers for fields in one.state.values() for x in fields.values()]
    everything = [*(piece.local for piece in run.sharded.shards().values()), *moments]
    return [(x.to_local() if isinstance(x, DTensor) else x).clone() for x in everything]


def inject(folder: str, cfg: TrainConfig, n: int) -> None:
    """Good steps, and between them steps with a value that is not finite in process 1."""
    run = Trainer(cfg, folder, device="cpu", threads=1, progress=False)
    injector = Injector(run)
    sites = [site for site in SITES if site != "halting" or cfg.model.halting == "act"]
    skipped = {(site, value): 0 for site in sites for value in VALUES}
    step = 0
    for trial in range(n):
        for site in sites:
            run.train_step(step)
            before, left_out, value = held(run), run.guard.skipped, VALUES[trial % len(VALUES)]
            if run.world.rank == run.world.size - 1:
                injector.site, injector.value, injector.rng = site, value, random.Random(trial)
            run.train_step(step + 1)
            assert not injector.site
            after, left_out = held(run), run.guard.skipped - left_out
            run.world.agree({"left out": left_out})
            assert all(x.isfinite().all() for x in after)
            same = all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
            assert same == bool(left_out)
            # A logit of -inf is an expert that is not chosen, and the last loop's probability of an exit is not read.
            assert left_out or site == "halting" or (site == "router" and math.isinf(value)), (site, value)
            skipped[site, value] += left_out
            step += 2
    if run.world.is_first:
        print(cfg.parallel, cfg.model.halting, step, {f"{site} {value}": n for (site, value), n in skipped.items()})


@pytest.mark.parametrize(
    ("model", "spread", "n"),
    [("poisson", "ddp", 2), ("act", "experts", 2)]
    + [pytest.param(model, spread, 20, marks=pytest.mark.slow) for model in ("poisson", "act") for spread in SPREADS],
)
def test_nothing_that_is_not_finite_reaches_a_weight(tmp_path: Path, model: str, spread: str, n: int) -> None:
    cfg = config(model, SPREADS[spread], batch_size=4, steps=10_000, dtype="float32", eval=EvalConfig())
    run_ranks(2, inject, str(tmp_path / "run"), cfg, n)


def overflow(folder: str, cfg: TrainConfig) -> None:
    """Train with a scale that is too large at the start, and again from step 20 on."""
    run = Trainer(cfg, folder, device="cpu", threads=1, progress=False)
    losses = []
    for step in range(cfg.steps):
        if step == 20:
            run.guard.scale = 2.0**40
        scale, left_out, before = run.guard.scale, run.guard.skipped, held(run)
        values = run.train_step(step)[1]
        if run.guard.skipped > left_out:
            assert run.guard.scale == scale / 2
            assert all(torch.equal(x, y) for x, y in zip(before, held(run), strict=True))
        else:
            assert run.guard.scale == scale
            losses.append(values["train/loss"])
        counted = {fields["step"].item() for fields in run.optimizers[0].state.values()}
        assert counted == ({len(losses)} if losses else set())
    assert 10 <= run.guard.skipped <= 40 and len(losses) == cfg.steps - run.guard.skipped
    assert sum(losses[-10:]) < sum(losses[:10]) - 5
    if run.world.is_first:
        print(
            f"{run.guard.skipped} steps left out, scale {run.guard.scale:g}, loss {losses[0]:.2f} to {losses[-1]:.2f}"
        )


@pytest.mark.parametrize(
    "spread", ["alone", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("fsdp", marks=pytest.mark.slow)]
)
def test_float16_overflow(tmp_path: Path, spread: str) -> None:
    """The scale is halved, the step does not count, and training goes on and learns."""
    parallel = SPREADS.get(spread, ParallelConfig())
    cfg = config("poisson", parallel, batch_size=8, steps=100, dtype="float16", eval=EvalConfig())
    run_ranks(1 if spread == "alone" else 2, overflow, str(tmp_path / "run"), cfg)


def spike(folder: str, cfg: TrainConfig, spikes: set[int]) -> None:
    """Some steps have a loss that is 30 times too high in the last process."""
    run, total_loss = Trainer(cfg, folder, device="cpu", threads=1, progress=False), module.total_loss
    now = 0

    def higher(*args: object):
        loss, parts = total_loss(*args)
        return loss * (30 if now in spikes and run.world.rank == run.world.size - 1 else 1), parts

    allows, seen = run.guard.allows, []

    def watched(step: int, loss: float, norm: float) -> bool:
        seen.append((step, loss, norm, allows(step, loss, norm)))
        return seen[-1][-1]

    with mock.patch.object(module, "total_loss", higher), mock.patch.object(run.guard, "allows", watched):
        for now in range(cfg.steps):
            run.train_step(now)
    # The rule written out: above mean + 6 sigma of the last 128 that were taken, once there are 64.
    taken: list[tuple[float, float]] = []
    for step, loss, norm, allowed in seen:
        past = np.array(taken[-128:])
        limit = past.mean(0) + 6 * past.std(0, ddof=1) if len(past) >= 64 else np.inf
        assert allowed == bool(np.all(np.array([loss, norm]) <= limit)), step
        assert not (allowed and step in spikes)
        if allowed:
            taken.append((loss, norm))
    print(f"{run.guard.skipped} of {cfg.steps} steps left out, {len(spikes)} of them planted")


@pytest.mark.parametrize("spread", ["alone", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_spikes_are_left_out(tmp_path: Path, spread: str) -> None:
    slow = spread != "alone"
    cfg = config(
        "poisson", SPREADS.get(spread, ParallelConfig()), batch_size=4, steps=400 if slow else 120, dtype="float32",
        eval=EvalConfig(), guard=GuardConfig(spike_sigmas=6), losses=LossConfig(),
        optim=OptimConfig("muon", lr=1e-3, muon_lr=1e-3),
    )  # fmt: skip
    run_ranks(1 + slow, spike, str(tmp_path / "run"), cfg, {80, 81, 110, 300} if slow else {80, 81, 110})
