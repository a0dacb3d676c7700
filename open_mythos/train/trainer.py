"""The training loop: depths -> data -> model -> losses -> backward -> clip -> optimizers -> expert bias -> metrics.

    Trainer(recipe(), "runs/first").run()

A run is decided by its TrainConfig alone: the same configuration on the same machine with the same number of processes
gives the same weights bit for bit. Elsewhere sums may round differently. The run's config.yaml names the dtypes that
dtype="auto" has chosen.
"""

import contextlib
import dataclasses
import functools
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from open_mythos.checks import check_int
from open_mythos.device import Device, setup_device
from open_mythos.nn.depth import LoopPlan
from open_mythos.reports.terminal import ProgressLine
from open_mythos.tasks.rng import Purpose, stream
from open_mythos.tasks.task import IGNORE, Batch
from open_mythos.train.checkpoint import CheckpointConfig, Checkpoints, optimizer_shards, read_state, restore_optimizer
from open_mythos.train.config import EXPERT_BIAS_RATE, TrainConfig
from open_mythos.train.distributed import Interrupted, World, signals_into
from open_mythos.train.dtypes import settled
from open_mythos.train.evaluate import Score, evaluate, rows_of_rank, spectral_radius
from open_mythos.train.identity import CONFIG_FILE, open_data, verify_data
from open_mythos.train.init_from import open_initial
from open_mythos.train.loader import Loader
from open_mythos.train.losses import Share, total_loss
from open_mythos.train.metrics import MetricsWriter, last_step
from open_mythos.train.optim import build_optimizers, set_lr
from open_mythos.train.run_folder import CHECKPOINTS, RunFolder, save_model_folder
from open_mythos.train.sharding import ShardedModel
from open_mythos.train.step_guard import StepGuard
from open_mythos.train.tensor_shards import ShardReader, TensorShard
from open_mythos.train.trackers import Run, Tracker, Tracking

Metrics = dict[str, float]
Hook = Callable[["Trainer", int], Metrics | None]

SHOWN = {"loss": "train/loss", "loops": "loop/mean", "tokens/s": "perf/tok_s"}
"""Metrics of the live line, by their labels."""


class Trainer:
    """One run of a configuration into one folder.

    Writes `config.yaml` at the start, `metrics.jsonl` and `checkpoints/` as it goes, and at the end the model folder
    `final/`. Under torchrun each process makes one; the folder has to be the same for all.

    Args:
        cfg: the run.
        out_dir: made if absent; refused if it already holds a run, unless `resume`.
        progress: whether to show the live line in a terminal.
        checkpoint: when to save checkpoints, and which to keep.
        resume: go on from the newest whole checkpoint in `out_dir`; from the start if there is none.
        workers: processes that make batches ahead of time; 0: none.
        trackers: get what metrics.jsonl gets; see `make_trackers`.

    Raises:
        ValueError: `out_dir` holds a run (with `resume`: one of another configuration), the device is not there, or the
            data cannot be read. Nothing is written then.
        RankFailed: the processes of the run have different configurations, options or data.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        out_dir: str | Path,
        *,
        device: Device = "auto",
        threads: int | None = None,
        progress: bool = True,
        checkpoint: CheckpointConfig | None = None,
        resume: bool = False,
        workers: int = 0,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.cfg, self.trackers, self.progress, self.out_dir = cfg, trackers, progress, Path(out_dir)
        self.device = setup_device(device, threads)
        self.world = World(self.device, cfg.parallel)
        self.steps_done = 0
        """Steps of this run, before and after a resume."""
        self._signalled: list[int] = []
        self._stopping = self._late = False
        self._hooks: list[tuple[Hook, int]] = []
        check_int("workers", workers, 0)
        with self.world.reporting():
            self._setup(checkpoint or CheckpointConfig(), resume, workers)

    def _setup(self, checkpoint: CheckpointConfig, resume: bool, workers: int) -> None:
        """Open the run's folder and data, build model and optimizers, and load the newest checkpoint when resuming.

        Without a checkpoint, the weights of `cfg.init_from` are loaded if it is set. Every process has to call this:
        they compare configuration, options and data. `run` takes the folder's lock. Errors are those of the class.
        """
        cfg, world = self.cfg, self.world
        # Before the first of the calls in which processes wait for each other.
        options = {"configuration": cfg.to_yaml(), "options": repr((checkpoint, resume))}
        world.agree({name: _hash(text.encode()) for name, text in options.items()})
        world.check_fit(cfg.parallel, cfg.batch_size)
        self.checkpoints = Checkpoints(self.out_dir / CHECKPOINTS, checkpoint, world, self._describe)
        self.folder = RunFolder(self.out_dir, cfg, self.checkpoints, world, resume)
        self.cfg = cfg = self.folder.cfg = settled(self.folder.cfg, self.device, world, self._report)
        self.tokenizer, self.digests = open_data(cfg, self.folder.newest)
        world.agree({"data": _hash(repr(self.digests).encode())})
        self.validation = cfg.data.validation_batch(stream(cfg.seed, 0, Purpose.VALIDATION), cfg.eval.rows)
        self.sharded = ShardedModel(cfg, world, self.device)
        self.model = self.sharded.model
        self.optimizers = build_optimizers(self.model, cfg.optim, cfg.dtype)
        self.guard = StepGuard(cfg.guard, scaled=cfg.dtype == "float16")
        self.rows = world.rows(cfg.batch_size)
        place = None
        if self.folder.newest is not None:
            place = self._restore(self.folder.newest)
            self.folder.warn_of_more_steps(self.steps_done)
        elif cfg.init_from is not None:
            initial = open_initial(cfg.model, self.tokenizer, cfg.init_from)
            self.sharded.load(lambda name, start, n: initial[name][start : start + n])
        self.loader = Loader(cfg, self.rows, self.steps_done, workers, place)
        if self.steps_done < cfg.steps:
            verify_data(cfg.data, self._report)
        if cfg.eval.every:
            self.add_hook(Trainer.validate, cfg.eval.every)

    def add_hook(self, fn: Hook, every: int) -> None:
        """Call `fn(trainer, steps_done)` after every `every` steps; what it returns goes into metrics.jsonl."""
        check_int("every", every, 1)
        self._hooks.append((fn, every))

    def run(self) -> Path:
        """Train until `cfg.steps` steps are done in total, save the final model, and return its folder.

        Steps before a resume count. SIGTERM and SIGINT (Ctrl-C) stop the run after the current step and a checkpoint.

        Raises:
            FloatingPointError: `cfg.guard.max_skips` steps in a row were skipped, or a weight was not finite when a
                checkpoint was due.
            ValueError: another trainer holds the lock of the folder, or has changed the folder since this one was made.
            Interrupted: a signal stopped the run before its last step.
            RankFailed: the processes disagree on a step or on its numbers of loops.
        """
        final = self.folder.final
        if self.folder.is_done:
            return final
        with self.world.reporting(), contextlib.ExitStack() as stack:
            stack.enter_context(signals_into(self._signalled))
            metrics = tracking = None
            if self.world.is_first:
                stack.callback(self.folder.lock.release)
                self.folder.claim()
                metrics = self.folder.metrics
                run = Run(self.cfg.to_dict(), self.out_dir, self.steps_done, last_step(metrics))
                tracking = Tracking(self.trackers, run)
                self.folder.begin(self.steps_done)
            stack.callback(self.checkpoints.join)
            shown = self.progress and self.world.is_first
            with (
                MetricsWriter(metrics, self.steps_done, tracking) as writer,
                ProgressLine(self.cfg.steps, self.cfg.data.name, shown, self.steps_done) as line,
            ):
                self._loop(writer, line)
            # A signal that comes now changes nothing: there is less left to do than to do again.
            self.checkpoints.wait()
            state = self.sharded.full_state()
            if self.world.is_first:
                self.folder.lock.check()
                try:
                    save_model_folder(self.cfg.model, state, self.tokenizer, final, self.cfg)
                except OSError as error:
                    raise OSError(f"{error}, with --resume: it goes on from the newest checkpoint") from error
            self.folder.is_done = True
            return final

    def _report(self, line: str) -> None:
        if self.progress and self.world.is_first:
            print(f"mythos train: {line}", file=sys.stderr, flush=True)

    def _loop(self, writer: MetricsWriter, line: ProgressLine) -> None:
        cfg = self.cfg
        tokens, seconds, began = 0, 0.0, time.perf_counter()
        for step in range(self.steps_done, cfg.steps):
            done = step + 1
            log = done == 1 or done % cfg.log_every == 0 or done == cfg.steps
            started = time.perf_counter()
            n_tokens, values = self.train_step(step, log)
            tokens, seconds = tokens + n_tokens, seconds + time.perf_counter() - started
            if log:
                values["perf/tok_s"] = tokens / seconds
                # What is not a step: metrics, validation, checkpoints.
                values["perf/overhead"] = 1 - seconds / (time.perf_counter() - began)
                tokens, seconds, began = 0, 0.0, time.perf_counter()
                writer.write(done, values)
            line.advance({label: values[name] for label, name in SHOWN.items() if name in values} if log else None)
            for hook, every in self._hooks:
                if done % every == 0 and (extra := hook(self, done)):
                    writer.write(done, extra)
            self.steps_done = done
            # Several processes stop where the sum over them told all of it; one alone need not wait for the next.
            stopping = self._stopping or (self.world.size == 1 and bool(self._signalled))
            if stopping or self._late or self.checkpoints.is_due(done) or done == cfg.steps:
                if self.world.is_first:
                    self.folder.lock.check()
                writer.sync()
                self._save()
            if stopping and done < cfg.steps:
                raise Interrupted(done, self.checkpoints.wait())

    def _describe(self, folder: Path) -> None:
        """Write the files of a checkpoint besides tensors and numbers, so that it can stand alone."""
        (folder / CONFIG_FILE).write_text(self.cfg.to_yaml(), "utf-8")
        self.tokenizer.save(folder)

    def _save(self) -> None:
        # Between logged steps nothing else looks; and weights that are lost must not push good ones out.
        groups = {"model": self.sharded.shards()}
        for name, shard in groups["model"].items():
            if not shard.local.isfinite().all():
                raise FloatingPointError(
                    f"{name} is not finite after step {self.steps_done}, so nothing is saved; lower optim.lr or "
                    "lengthen schedule.warmup_steps"
                )
        parameters = self.sharded.named_shards()
        for i, optimizer in enumerate(self.optimizers):
            groups[f"optimizer{i}"] = optimizer_shards(optimizer, parameters)
        if self.loader.place is not None:
            groups["data"] = {"place": TensorShard(self.loader.place, self.rows.start, self.cfg.batch_size)}
        self.checkpoints.save(self.steps_done, groups, {"guard": self.guard.state(), "data": self.digests})

    def _restore(self, folder: Path) -> Tensor | None:
        """Put a checkpoint back, and return the place of this process's rows in a stream; None for other data."""
        # Whatever is random in a step is made from the seed, the step and the row, so there is no more state than this.
        reader, state, parameters = ShardReader(folder), read_state(folder), self.sharded.named_shards()
        self.steps_done = state["step"]
        self.guard.restore(state["guard"])
        self.sharded.load(functools.partial(reader.read, "model"))
        for i, optimizer in enumerate(self.optimizers):
            restore_optimizer(optimizer, parameters, reader, f"optimizer{i}")
        return reader.read("data", "place", self.rows.start, len(self.rows)) if reader.names("data") else None

    def train_step(self, step: int, log: bool = True) -> tuple[int, Metrics]:
        """Do optimizer step `step`; return its number of input tokens and, if `log`, its metrics.

        The host waits for the device once, to know whether loss and gradient allow the step. (Exits and distributed
        experts wait in every loop.)
        """
        cfg, data = self.cfg, self.loader.get(step)
        batch, depths = data.batch, data.depths
        # Before the first of the calls in which processes wait for each other.
        n_labels = self.world.agree(
            {"step": step, "depths": _hash(depths.tobytes())}, int((batch.labels != IGNORE).sum())
        )
        factor = cfg.schedule.factor(step, cfg.steps)
        set_lr(self.optimizers, factor)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.model.train()
        sums: dict[str, Tensor] = {}
        for plan, rows, is_last in self._micro_batches(depths.tolist()):
            self._seed(step, rows)
            part = batch.take(rows)
            share = Share(
                int((part.labels != IGNORE).sum()) / max(1, n_labels),
                len(plan.depths) / cfg.batch_size,
                1 / (int(depths.sum()) * batch.input_ids.shape[1]),
            )
            found = self._forward_backward(part, plan, share, is_last)
            sums = {name: x + sums[name] if name in sums else x for name, x in found.items()}
        values, is_taken = self._update(step, sums)
        n_tokens = cfg.batch_size * batch.input_ids.shape[1]
        if not log:
            return n_tokens, {}
        metrics = {
            "train/lr": factor * cfg.optim.lr,
            "train/skipped": self.guard.skipped,
            "loop/max": float(depths.max()),
        }
        if is_taken:  # else, numbers may not be finite, which is no JSON; that the step was left out says enough
            metrics |= {"loop/mean": values.pop("loops") / n_tokens} | self._model_metrics(sums.get("load"))
            metrics |= {f"train/{name}": x for name, x in values.items()}
        return n_tokens, metrics

    def _seed(self, step: int, rows: slice) -> None:
        """Let dropout and noisy initial states depend on the step and on the rows that are computed together."""
        seed = int(stream(self.cfg.seed, step, Purpose.MODEL, self.rows.start + rows.start).integers(2**63))
        # torch.manual_seed also writes down a stack of calls for GPUs: a tenth of a millisecond.
        seed_all = torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed
        seed_all(seed)

    def _forward_backward(self, part: Batch, plan: LoopPlan, share: Share, is_last: bool) -> dict[str, Tensor]:
        """Add the gradients of some rows, and return what is to be summed over all rows of the step."""
        ids, labels = self._on_device(part.input_ids), self._on_device(part.labels)
        documents = None if part.documents is None else self._on_device(part.documents)
        with self.sharded.accumulate(is_last):
            with self._autocast():
                out = self.sharded.forward(ids, plan=plan, trace=self.cfg.losses.per_loop, documents=documents)
            loss, parts = total_loss(out, labels, self.cfg.losses, share)
            # Gradients are averaged over the processes, and the loss of each is a share of the whole.
            (loss * (self.world.size * self.guard.scale)).backward()
        found = {"loss": loss.detach(), **parts, "loops": out.loops.sum()}
        return found if out.tokens_per_expert is None else {**found, "load": out.tokens_per_expert}

    def _model_metrics(self, load: Tensor | None) -> Metrics:
        """Return the balance of the experts and the spectral radius of the injection, where there are any."""
        metrics: Metrics = {}
        if load is not None:
            metrics["moe/max_load"] = (load / load.mean(dim=-1, keepdim=True)).max().item()
            metrics["moe/idle"] = (load == 0).float().mean().item()
        if (rho := spectral_radius(self.model)) is not None:
            metrics["lti/rho"] = rho
        return metrics

    def _micro_batches(self, depths: list[int]) -> Iterator[tuple[LoopPlan, slice, bool]]:
        """Yield for each part of this process's rows the loops they run, the rows, and whether they are the last."""
        cfg, n = self.cfg, len(self.rows)
        size = cfg.parallel.rows or n
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            n_ticks = None
            if cfg.parallel.experts > 1:
                # Every process calls the experts as often as the one that loops deepest.
                others = range(0, cfg.batch_size, n)
                n_ticks = max(depth for first in others for depth in depths[first + rows.start : first + rows.stop])
            own = depths[self.rows.start + rows.start : self.rows.start + rows.stop]
            yield LoopPlan(tuple(own), cfg.loops.backprop_depth, n_ticks), rows, rows.stop == n

    def _update(self, step: int, sums: dict[str, Tensor]) -> tuple[Metrics, bool]:
        """Sum over the processes, and take the step if the guard allows it; return the sums, and whether it did."""
        self.sharded.reduce_experts()
        gradients = self.sharded.gradients()
        grads = [g for g, _ in gradients]
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        squares = torch.stack(torch._foreach_norm(grads)).to(wide).square()
        copies = squares.new_tensor([copies for _, copies in gradients])
        # One exchange for all numbers that the processes add up.
        load = sums.get("load")
        names = [name for name in sums if name != "load"]
        signalled = squares.new_tensor(float(bool(self._signalled)))
        late = squares.new_tensor(float(self.world.is_first and self.checkpoints.is_late()))
        scalars = torch.stack((*(sums[name].to(wide) for name in names), signalled, late, (squares / copies).sum()))
        everything = self.world.sum(scalars if load is None else torch.cat((scalars, load.to(wide).flatten())))
        *numbers, n_signalled, n_late, square = everything[: len(names) + 3].tolist()
        self._stopping, self._late = n_signalled > 0, n_late > 0
        scale = self.guard.scale
        values = {**dict(zip(names, numbers, strict=True)), "grad_norm": square**0.5 / scale}
        if not self.guard.allows(step, values["loss"], values["grad_norm"]):
            return values, False
        limit = self.cfg.optim.clip_norm
        factor = 1.0 if limit is None else min(1.0, limit / (values["grad_norm"] + 1e-6))
        if factor != scale:
            torch._foreach_mul_(grads, factor / scale)
        for optimizer in self.optimizers:
            optimizer.step()
        if load is not None:
            sums["load"] = everything[len(names) + 3 :].view_as(load).to(load.dtype)
            rate = self.cfg.expert_bias_rate
            self.model.update_expert_bias(sums["load"], EXPERT_BIAS_RATE if rate is None else rate)
        return values, True

    def validate(self, steps_done: int) -> Metrics:
        """Return metrics on the validation rows at each of `cfg.eval.loops`; the rows are the same every time."""
        values: Metrics = {}
        rows = rows_of_rank(self.validation, self.world.rank, self.world.size)
        for n_loops in self.cfg.eval.loops or (None,):
            # Eager: a graph for the shapes of validation would take longer to make than it saves.
            eager = torch.compiler.set_stance("force_eager") if self.cfg.compile != "none" else contextlib.nullcontext()
            with self._autocast(), eager:
                own = evaluate(self.model, rows, n_loops, self.cfg.parallel.rows or len(self.rows))
            sums = torch.tensor(dataclasses.astuple(own), dtype=torch.float64)
            score = Score(*self.world.sum(sums).tolist())
            at = "" if n_loops is None else f"@{n_loops}"
            values[f"val/loss{at}"] = score.loss
            if self.cfg.data.bytes_per_token is None:
                values[f"val/accuracy{at}"] = score.accuracy
            else:
                values[f"val/bpb{at}"] = score.bits_per_byte(self.cfg.data.bytes_per_token)
        return values

    def _on_device(self, x: Tensor) -> Tensor:
        """Copy a tensor without waiting for what the GPU still has to do, which takes pinned memory."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.cfg.dtype not in ("bfloat16", "float16"):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.cfg.dtype))


def _hash(value: bytes) -> int:
    return int.from_bytes(hashlib.sha256(value).digest()[:7], "big")
