"""The trainer itself, with its optimizers, metrics and checkpoints: what a comparison of models leaves out."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tasks import Task
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
        job = self.job
        self.cfg = TrainConfig(
            VARIANTS[job.arguments["variant"]](),
            Text(seq_len=job.tokens),
            steps=job.arguments.get("steps", 10**6),
            batch_size=job.rows,
            optim=OptimConfig("muon"),
            loops=LoopsConfig("fixed", job.n_loops),
            log_every=1,
        )

    def info(self) -> dict[str, Any]:
        return {"tokens": self.job.rows * self.job.tokens}

    def trainer(self, checkpoint: CheckpointConfig | None = None) -> Trainer:
        """Make a new run, in a folder of its own."""
        out = Path(tempfile.mkdtemp(dir=self.job.arguments["folder"])) / "run"
        device = "cuda" if self.job.device == "cuda" else "cpu"
        return Trainer(self.cfg, out, device=device, progress=False, checkpoint=checkpoint)


class Steps(Training):
    """Steps of one run. Its reading is the share of the last step's CPU time that Muon took."""

    def setup(self) -> None:
        super().setup()
        self.run_on = self.trainer()
        self.step, self.muon_s = 0, 0.0
        [muon] = [optimizer for optimizer in self.run_on.optimizers if isinstance(optimizer, Muon)]
        self._inner: Callable[[], None] = muon.step
        muon.step = self._timed  # ty: ignore[invalid-assignment]

    def _timed(self) -> None:
        start = time.process_time()
        self._inner()
        self.muon_s = time.process_time() - start

    def run(self, fresh: None) -> None:
        start = time.process_time()
        self.run_on.train_step(self.step)
        self.measured = {"muon": self.muon_s / (time.process_time() - start)}
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
