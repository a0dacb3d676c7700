"""The trainer itself, with its optimizers, metrics and checkpoints: what a comparison of models leaves out."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tasks import Task, clocked
from open_mythos.tasks import Text
from open_mythos.train.checkpoint import CheckpointConfig
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.metrics import read_metrics
from open_mythos.train.muon import Muon
from open_mythos.train.optim import OptimConfig
from open_mythos.train.trainer import Trainer
from open_mythos.variants import VARIANTS


class Training(Task):
    """A variant with Muon, on bytes of the embedded novel. `folder` of the job's arguments gets the runs."""

    whole = True

    def setup(self) -> None:
        job, model = self.job, VARIANTS[self.job.arguments["variant"]]()
        steps, loops = job.arguments.get("steps", 10**6), LoopsConfig("fixed", job.n_loops)
        run: dict[str, Any] = {"optim": OptimConfig("muon"), "loops": loops, "log_every": 1}
        self.cfg = TrainConfig(model, Text(seq_len=job.tokens), steps, job.rows, **run)

    def info(self) -> dict[str, Any]:
        return {"tokens": self.job.rows * self.job.tokens}

    def trainer(self, checkpoint: CheckpointConfig | None = None) -> Trainer:
        """Make a new run, in a folder of its own."""
        out = Path(tempfile.mkdtemp(dir=self.job.arguments["folder"])) / "run"
        device: Any = self.job.device
        return Trainer(self.cfg, out, device=device, progress=False, checkpoint=checkpoint)


class Steps(Training):
    """Steps of one run. Its reading is the share of the last step's CPU time that Muon took."""

    def setup(self) -> None:
        super().setup()
        self.run_on = self.trainer()
        self.step, self.muon_s = 0, 0.0
        [muon] = [optimizer for optimizer in self.run_on.optimizers if isinstance(optimizer, Muon)]
        inner: Callable[[], None] = muon.step

        def timed() -> None:
            self.muon_s = clocked(inner, "cpu")["cpu"]

        muon.step = timed  # ty: ignore[invalid-assignment]

    def run(self, fresh: None) -> None:
        whole = clocked(lambda: self.run_on.train_step(self.step), "cpu")
        self.measured = {"muon": self.muon_s / whole["cpu"]}
        self.step += 1


class WholeRun(Training):
    """A run with a line of metrics after every step. Its reading is the share of time outside steps, by its timers."""

    def setup(self) -> None:
        super().setup()
        self.checkpoint = CheckpointConfig(self.job.arguments["checkpoint_every"])

    def fresh(self) -> Trainer:
        return self.trainer(self.checkpoint)

    def run(self, fresh: Trainer) -> None:
        fresh.run()
        steps_s = whole_s = 0.0
        for line in read_metrics(fresh.out_dir / "metrics.jsonl"):
            step_s = self.job.rows * self.job.tokens / line["perf/tok_s"]
            steps_s, whole_s = steps_s + step_s, whole_s + step_s / (1 - line["perf/overhead"])
        self.measured = {"overhead": 1 - steps_s / whole_s}


TASKS: dict[str, type[Task]] = {"steps": Steps, "run": WholeRun}
