"""What all experiments do alike: train and measure each run once, and go on where they were cut off.

An experiment is a file that holds `EXPERIMENT`; `mythos exp` runs it.
"""

import dataclasses
import importlib
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from open_mythos.files import read_json, read_text, write_text
from open_mythos.model import OpenMythos
from open_mythos.reports.document import Report, write_record
from open_mythos.reports.figures import require_matplotlib
from open_mythos.train.checkpoint import CheckpointConfig
from open_mythos.train.config import TrainConfig
from open_mythos.train.final import find_problem
from open_mythos.train.trainer import Trainer

MAX_RESULT_BYTES = 2**27
"""Of what an experiment measured; the largest recorded one has 2.2 MB."""

Result = dict[str, Any]
"""Plain values, as JSON has them."""


@dataclass(frozen=True)
class Experiment:
    """A question, and how it is answered."""

    title: str
    question: str
    protocol: str
    """Markdown: what is trained, measured, compared with what, and what the null control is."""
    cost: tuple[str, str]
    """How long the quick form and the whole take on one CPU thread, measured."""
    run: "Callable[[Lab], Result]"
    """All raw numbers."""
    report: Callable[[Result], Report]
    """What they say. It sees the numbers as JSON gives them back: keys are text, tuples are lists."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    n_parts: "Callable[[Lab], int] | None" = None
    """How many results a lab computes for it, so that its progress can be told; None: that is not known beforehand."""


@dataclass(frozen=True)
class Lab:
    """Where an experiment's runs are, and how much of it is asked for."""

    runs: Path
    """A folder per run. A run that is there and the same is not repeated; one that was cut off goes on."""
    quick: bool
    seeds: tuple[int, ...]
    threads: int = 1
    n_parts: int | None = None
    """Results that the experiment computes, where that is known."""
    begun: list[str] = field(default_factory=list)
    """Labels of the results so far, those that were found in their files included."""

    def trained(self, label: str, cfg: TrainConfig) -> OpenMythos:
        """The model that the configuration makes, in eval mode; its metrics are in `self.runs / label`."""
        folder = self.runs / label
        final, config = folder / "final", folder / "config.yaml"
        if config.exists() and not _is_of(config, cfg):
            print(f"{label}: a run of another configuration is removed")
            shutil.rmtree(folder)
        if find_problem(final) is not None:
            checkpoint = CheckpointConfig(max(1, cfg.steps // 10), 1)
            began, before = time.process_time(), self._cpu_s(label)
            try:
                Trainer(cfg, folder, device="cpu", threads=self.threads, checkpoint=checkpoint, resume=True).run()
            finally:
                if folder.exists():
                    write_text(folder / "cpu_s", f"{before + time.process_time() - began:.1f}\n")
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        torch.set_num_threads(self.threads)
        return OpenMythos.from_pretrained(final).eval()

    def measured(self, label: str, cfg: TrainConfig, measure: Callable[[OpenMythos], Result], **asked: Any) -> Result:
        """Train, and measure; `asked` is what the numbers depend on besides, so that others are not taken for them.

        Returns:
            What `measure` returns, with `asked` (which has the configuration), `commit` and `cpu_s`: of training, in
            all its parts where it was cut off, but for what was killed without a chance to write.
        """

        def both() -> Result:
            numbers = measure(self.trained(label, cfg))
            return {"cpu_s": self._cpu_s(label)} | numbers

        return self.computed(label, both, config=cfg.to_dict(), **asked)

    def computed(self, label: str, compute: Callable[[], Result], **asked: Any) -> Result:
        """What `compute` returns, or what it returned when the same was `asked` before."""
        file = self.runs / label / "result.json"
        self.begun.append(label)
        asked = json.loads(json.dumps(asked))
        if file.exists():
            result = read_json(file, MAX_RESULT_BYTES, finite=False)
            if isinstance(result, dict) and result.get("asked") == asked:
                return result
        torch.set_num_threads(self.threads)
        of = "" if self.n_parts is None else f" of {self.n_parts}"
        print(f"Part {len(self.begun)}{of}: {label}", flush=True)
        result = {"asked": asked, "commit": commit()} | compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(result) + "\n")
        return json.loads(json.dumps(result))

    def _cpu_s(self, label: str) -> float:
        file = self.runs / label / "cpu_s"
        return float(read_text(file, 100)) if file.exists() else 0.0


def _is_of(config: Path, cfg: TrainConfig) -> bool:
    """Whether a run's file means this configuration: fields that it does not know have their defaults."""
    try:
        return TrainConfig.load(config) == cfg
    except (TypeError, ValueError):
        return False


def load(name: str) -> Experiment:
    """The experiment of a name."""
    return importlib.import_module(f"open_mythos.experiments.{name}").EXPERIMENT


def perform(name: str, lab: Lab, out: Path, command: str) -> Report:
    """Run an experiment and write its report into `out`: report.json, .md, .html and the figures."""
    require_matplotlib()
    experiment = load(name)
    began = time.perf_counter()
    if experiment.n_parts is not None:
        lab = replace(lab, n_parts=experiment.n_parts(lab))
    raw = experiment.run(lab)
    results = {
        "name": name,
        "title": experiment.title,
        "question": experiment.question,
        "protocol": experiment.protocol,
        "command": command,
        "quick": lab.quick,
        "seeds": lab.seeds,
        "commits": sorted(_commits(raw) or {commit()}),
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {lab.threads} thread",
        "wall_s": round(time.perf_counter() - began, 1),
        "results": raw,
    }
    results = json.loads(json.dumps(results))
    report = experiment.report(results["results"])
    write_record(results, report, out)
    return report


def seeded(cfg: TrainConfig, seed: int) -> TrainConfig:
    """The same run with weights, data and depths of its own."""
    return dataclasses.replace(cfg, seed=seed)


def commit() -> str:
    """The commit of this code, with "-dirty" where files differ from it; "unknown" outside a checkout."""
    # The code's own checkout, wherever the command was given.
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except FileNotFoundError:
        return "unknown"


def _commits(value: Any) -> set[str]:
    """All commits that numbers come from."""
    if isinstance(value, dict):
        own = {value["commit"]} if "commit" in value else set()
        return own.union(*(_commits(item) for item in value.values()))
    return set().union(*(_commits(item) for item in value)) if isinstance(value, list) else set()
