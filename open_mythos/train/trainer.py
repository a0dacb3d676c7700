"""The training loop: depths -> data -> model -> losses -> backward -> clip -> optimizers -> expert bias -> metrics.

    Trainer(recipe(), "runs/first").run()

A run is decided by its TrainConfig alone: the same configuration on the same machine gives the same weights bit for
bit. On another machine, or with another number of threads, sums may round differently.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import torch

from open_mythos.checks import check_int
from open_mythos.compiling import compile_model
from open_mythos.device import Device, setup_device
from open_mythos.files import write_text
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import LoopPlan
from open_mythos.nn.injection import DiagonalInjection, LTIInjection
from open_mythos.train.checkpoint import (
    Checkpoints,
    Keeping,
    load,
    optimizer_tensors,
    restore_optimizer,
    save_model_folder,
)
from open_mythos.train.config import EXPERT_BIAS_RATE, TrainConfig
from open_mythos.train.evaluate import evaluate
from open_mythos.train.init_from import load_initial
from open_mythos.train.losses import total_loss
from open_mythos.train.metrics import MetricsWriter, ProgressLine, last_step
from open_mythos.train.optim import build_optimizers, set_lr
from open_mythos.train.rng import Purpose, stream
from open_mythos.train.trackers import Run, Tracker, Tracking

Metrics = dict[str, float]
Hook = Callable[["Trainer", int], Metrics | None]

SHOWN = {"loss": "train/loss", "loops": "loop/mean", "tok/s": "perf/tok_s"}  # what the live line has room for


class Trainer:
    """One run of a configuration into one folder.

    Writes `config.yaml` at the start, `metrics.jsonl` and `checkpoints/` as it goes, and at the end the model folder
    `final/`.

    Args:
        cfg: the run.
        out_dir: made if absent; refused if it already holds a run, unless `resume`.
        progress: whether to show the live line in a terminal.
        keeping: when to save checkpoints.
        resume: go on from the newest whole checkpoint in `out_dir`; from the start if there is none.
        trackers: get what metrics.jsonl gets; see `make_trackers`.

    Raises:
        ValueError: `out_dir` holds a run (with `resume`: one of another configuration), the device is not there, or the
            data cannot be read. Nothing is written then.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        out_dir: str | Path,
        *,
        device: Device = "auto",
        threads: int | None = None,
        progress: bool = True,
        keeping: Keeping | None = None,
        resume: bool = False,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.cfg = cfg
        self.trackers = trackers
        self.out_dir = Path(out_dir)
        self._check_folder(resume)
        self.keeping = keeping or Keeping()
        self.checkpoints = Checkpoints(self.out_dir / "checkpoints", self.keeping)
        self.device = setup_device(device, threads)
        self.progress = progress
        cfg.check_data()
        self.tokenizer = cfg.data.tokenizer()
        self.validation = cfg.data.validation_batch(stream(cfg.seed, 0, Purpose.VALIDATION), cfg.eval.rows)

        torch.manual_seed(cfg.seed)
        weights_dtype = torch.float64 if cfg.dtype == "float64" else torch.float32
        self.model = OpenMythos(cfg.model).to(self.device, weights_dtype)
        if self.model.recurrent is not None:
            # Validation too reads no clock, so that a run repeated gives the same metrics bit for bit.
            self.model.recurrent.compaction = "counts"
            self.model.recurrent.checkpoint_loops = cfg.checkpoint_loops
        self._forward = self.model if cfg.compile == "none" else compile_model(self.model, cfg.compile)
        self.expert_bias_rate = EXPERT_BIAS_RATE if cfg.expert_bias_rate is None else cfg.expert_bias_rate
        self.optimizers = build_optimizers(self.model, cfg.optim)
        self.steps_done = 0
        """Of this run, before and after a resume."""
        self._names: dict[torch.Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        if resume and (newest := self.checkpoints.newest()) is not None:
            self._restore(newest)
        elif cfg.init_from is not None:
            load_initial(self.model, self.tokenizer, cfg.init_from)
        self._hooks: list[tuple[Hook, int]] = []
        if cfg.eval.every:
            self.add_hook(Trainer.validate, cfg.eval.every)

    def add_hook(self, fn: Hook, every: int) -> None:
        """Call `fn(trainer, steps_done)` after every `every` steps; what it returns goes into metrics.jsonl."""
        check_int("every", every, 1)
        self._hooks.append((fn, every))

    def run(self) -> Path:
        """Train up to `cfg.steps` steps and return the folder of the final model.

        With checkpoints, SIGTERM and SIGINT (Ctrl-C) end the run after the step in work and a save.

        Raises:
            FloatingPointError: the loss or the gradient is not finite at a logged step, or a weight when it is to be
                saved.
            Interrupted: a signal ended the run.
        """
        cfg = self.cfg
        final = self.out_dir / "final"
        if final.exists():
            return final
        metrics = self.out_dir / "metrics.jsonl"
        tracking = Tracking(self.trackers, Run(cfg.to_dict(), self.out_dir, self.steps_done, last_step(metrics)))
        self.out_dir.mkdir(parents=True, exist_ok=True)
        if not (self.out_dir / "config.yaml").exists():
            write_text(self.out_dir / "config.yaml", cfg.to_yaml())
        with (
            MetricsWriter(metrics, self.steps_done, tracking) as writer,
            ProgressLine(cfg.steps, cfg.data.name, self.progress, self.steps_done) as line,
            _signals(self.keeping.every > 0) as signalled,
        ):
            tokens, seconds = 0, 0.0
            for step in range(self.steps_done, cfg.steps):
                done = step + 1
                log = done == 1 or done % cfg.log_every == 0 or done == cfg.steps
                started = time.perf_counter()
                n_tokens, values = self.train_step(step, log)
                tokens, seconds = tokens + n_tokens, seconds + time.perf_counter() - started
                if log:
                    values["perf/tok_s"] = tokens / seconds
                    tokens, seconds = 0, 0.0
                    writer.write(done, values)
                line.advance({label: values[name] for label, name in SHOWN.items()} if log else None)
                for hook, every in self._hooks:
                    if done % every == 0 and (extra := hook(self, done)):
                        writer.write(done, extra)
                self.steps_done = done
                if done == cfg.steps:
                    break
                if self.keeping.every and (signalled or done % self.keeping.every == 0):
                    self._save()
                if signalled:
                    saved = self.checkpoints.wait()
                    raise Interrupted(done, saved)
        self.checkpoints.wait()
        save_model_folder(self.model, self.tokenizer, final)
        return final

    def _save(self) -> None:
        # Between logged steps nothing else looks; and weights that are lost must not push good ones out.
        for name, p in self.model.named_parameters():
            if not p.isfinite().all():
                raise FloatingPointError(
                    f"{name} is not finite after step {self.steps_done}, so nothing is saved; lower optim.lr or "
                    "lengthen schedule.warmup_steps"
                )
        groups = {"model": {name: x for name, x in self.model.state_dict().items() if name != "head.weight"}}
        for i, optimizer in enumerate(self.optimizers):
            groups[f"optimizer{i}"] = optimizer_tensors(optimizer, self._names)
        self.checkpoints.save(self.steps_done, groups)

    def _restore(self, folder: Path) -> None:
        groups, self.steps_done = load(folder)
        # Whatever is random in a step is made from the seed and the step, so there is no more state than this.
        self.model.load_state_dict({**groups["model"], "head.weight": groups["model"]["embed.weight"]})
        for i, optimizer in enumerate(self.optimizers):
            restore_optimizer(optimizer, self._names, groups[f"optimizer{i}"])

    def _check_folder(self, resume: bool) -> None:
        path = self.out_dir / "config.yaml"
        if not resume:
            for name in ("config.yaml", "metrics.jsonl", "checkpoints", "final"):
                if (self.out_dir / name).exists():
                    raise ValueError(
                        f"{self.out_dir} already holds a run ({name}); go on with it with --resume, use another "
                        "folder, or remove this one"
                    )
        elif path.exists() and (theirs := TrainConfig.load(path).to_dict()) != (ours := self.cfg.to_dict()):
            name = next(name for name in ours if ours[name] != theirs[name])
            raise ValueError(
                f"{path} has {name}={theirs[name]!r}, not {ours[name]!r}: resume with the configuration that the run "
                f"began with (--config {path}), or use another folder"
            )

    def train_step(self, step: int, log: bool = True) -> tuple[int, Metrics]:
        """Do optimizer step `step`; return its number of input tokens and, if `log`, its metrics.

        On a GPU only reading the metrics waits for the device: the trainer asks it nothing in other steps.
        """
        cfg = self.cfg
        depths = cfg.loops.depths(cfg.seed, step, cfg.batch_size)
        rng = stream(cfg.seed, step, Purpose.DATA)
        batch = cfg.data.batch(rng, cfg.batch_size, depths, first_row=step * cfg.batch_size)
        plan = LoopPlan(tuple(depths.tolist()), cfg.loops.backprop_depth)
        factor = cfg.schedule.factor(step, cfg.steps)
        set_lr(self.optimizers, factor)
        # Dropout and noisy initial states then depend on the step alone, as the data does.
        torch.manual_seed(int(stream(cfg.seed, step, Purpose.MODEL).integers(2**63)))

        self.model.train()
        with self._autocast():
            out = self._forward(self._on_device(batch.input_ids), plan=plan, trace=cfg.losses.per_loop)
        loss, parts = total_loss(out, self._on_device(batch.labels), cfg.losses)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        # An infinite limit only measures the norm.
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.optim.clip_norm or math.inf)
        for optimizer in self.optimizers:
            optimizer.step()
        max_load = None
        if out.tokens_per_expert is not None:
            max_load = self.model.update_expert_bias(out.tokens_per_expert, self.expert_bias_rate)

        n_tokens = batch.input_ids.numel()
        if not log:
            return n_tokens, {}
        values = {
            "train/loss": loss.item(),
            **{f"train/{name}": value.item() for name, value in parts.items()},
            "train/grad_norm": grad_norm.item(),
            "train/lr": factor * cfg.optim.lr,
            "loop/mean": out.loops.float().mean().item(),
        }
        if max_load is not None:
            values["moe/max_load"] = max_load.item()
        if (rho := self._rho()) is not None:
            values["lti/rho"] = rho
        _check_finite(step, values)
        return n_tokens, values

    def validate(self, steps_done: int) -> Metrics:
        """Metrics on the validation rows at each of `cfg.eval.loops`; the rows are the same every time."""
        values: Metrics = {}
        for n_loops in self.cfg.eval.loops or (None,):
            # Eager: a graph for the shapes of validation would take longer to make than it saves.
            eager = torch.compiler.set_stance("force_eager") if self.cfg.compile != "none" else contextlib.nullcontext()
            with self._autocast(), eager:
                score = evaluate(self.model, self.validation, n_loops, self.cfg.batch_size)
            at = "" if n_loops is None else f"@{n_loops}"
            values[f"val/loss{at}"] = score.loss
            if self.cfg.data.bytes_per_token is None:
                values[f"val/accuracy{at}"] = score.accuracy
            else:
                values[f"val/bpb{at}"] = score.bits_per_byte(self.cfg.data.bytes_per_token)
        return values

    def _on_device(self, x: torch.Tensor) -> torch.Tensor:
        """Copied without waiting for what the GPU still has to do, which takes pinned memory."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.cfg.dtype != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _rho(self) -> float | None:
        """Spectral radius of the state's linear update, where the injection has one."""
        injection = None if self.model.recurrent is None else self.model.recurrent.injection
        return injection.get_A().max().item() if isinstance(injection, LTIInjection | DiagonalInjection) else None


class Interrupted(Exception):
    """A signal has ended a run."""

    def __init__(self, steps_done: int, saved: bool) -> None:
        what = "saved" if saved else "which could not be saved"
        super().__init__(f"stopped after step {steps_done}, {what}; go on with the same command and --resume")


@contextlib.contextmanager
def _signals(caught: bool) -> Generator[list[int]]:
    """A list that SIGTERM and SIGINT are put into, if `caught`. Only the main thread can be told of signals."""
    seen: list[int] = []
    caught = caught and threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if caught else ()
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_finite(step: int, values: Metrics) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name}={value} at step {step} must be finite; lower optim.lr or lengthen schedule.warmup_steps"
            )
