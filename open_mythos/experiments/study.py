"""An experiment is declared: arms to compare, what is measured of each, and a page that the numbers fill.

This module does the rest: it trains and measures every arm with every seed, once, resumes what was cut off, and writes
the report. `mythos exp` runs the studies of `EXPERIMENTS`; docs/experiments.md shows how to add one.

Shapes: S seeds, then the axes that a study names.
"""

import dataclasses
import functools
import importlib
import json
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from open_mythos.accounting import count_parameters
from open_mythos.files import read_json, read_text, write_text
from open_mythos.model import OpenMythos
from open_mythos.reports.document import Figure, Part, Report, write_record
from open_mythos.reports.figures import Curve, require_matplotlib
from open_mythos.reports.stats import Estimate
from open_mythos.train.checkpoint import CheckpointConfig
from open_mythos.train.config import TrainConfig
from open_mythos.train.run_folder import find_problem
from open_mythos.train.trainer import Trainer

MAX_RESULT_BYTES = 2**27
"""Bytes of a file of results; the largest recorded one has 2.2 MB."""

Result = dict[str, Any]
"""Plain values, as JSON has them."""
Places = Sequence[Any]
"""The values along an axis, such as numbers of loops."""


@dataclass(frozen=True)
class Lab:
    """The folder of an experiment's runs, with the options of the command."""

    runs: Path
    """A folder for each run. A finished run is not repeated; one that was cut off goes on."""
    quick: bool
    seeds: tuple[int, ...]
    threads: int = 1
    n_parts: int | None = None
    """Number of results to compute, for the progress; None: unknown."""
    begun: list[str] = field(default_factory=list)
    """Labels of the results so far, including those found in their files."""

    def trained(self, label: str, cfg: TrainConfig) -> OpenMythos:
        """Train what the configuration says, unless that was done, and return the model in eval mode."""
        if cfg.dtype == "auto":
            raise ValueError(f"{label}: dtype='auto' lets the machine choose what is measured; use dtype='float32'")
        folder = self.runs / label
        final, config = folder / "final", folder / "config.yaml"
        if config.exists() and not _is_of(config, cfg):
            print(f"{label}: a run of another configuration is removed")
            shutil.rmtree(folder)
        if find_problem(final) is not None:
            checkpoint = CheckpointConfig(max(1, cfg.steps // 10), 1)
            began, before = time.process_time(), self.cpu_s(label)
            try:
                Trainer(cfg, folder, device="cpu", threads=self.threads, checkpoint=checkpoint, resume=True).run()
            finally:
                if folder.exists():
                    write_text(folder / "cpu_s", f"{before + time.process_time() - began:.1f}\n")
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        torch.set_num_threads(self.threads)
        return OpenMythos.from_pretrained(final).eval()

    def measured(self, label: str, cfg: TrainConfig, measure: Callable[[OpenMythos], Result], **asked: Any) -> Result:
        """Train and measure; see `computed`. The result also has `cpu_s`."""
        return self.computed(
            label,
            lambda: measure(self.trained(label, cfg)) | {"cpu_s": self.cpu_s(label)},
            config=cfg.to_dict(),
            **asked,
        )

    def computed(self, label: str, compute: Callable[[], Result], **asked: Any) -> Result:
        """Return the result of `compute`, from its file where it was computed for the same `asked` before.

        Args:
            asked: everything that the numbers depend on; the result has it, and the `commit` of the code.
        """
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

    def cpu_s(self, label: str) -> float:
        """Return the CPU seconds that training took in all its parts, but for what was killed before it could write."""
        file = self.runs / label / "cpu_s"
        return float(read_text(file, 100)) if file.exists() else 0.0


def _is_of(config: Path, cfg: TrainConfig) -> bool:
    """Return whether a run's file means this configuration; fields that the file does not name have their defaults."""
    try:
        return TrainConfig.load(config) == cfg
    except (TypeError, ValueError):
        return False


@dataclass(frozen=True)
class Run:
    """One arm with one seed, to be measured."""

    arm: str
    config: Any
    """The arm's configuration with this seed, or what else `Study.arms` has for the arm."""
    seed: int
    settings: Mapping[str, Any]
    """What `Study.settings` says, such as the number of questions."""
    lab: Lab
    model: Any = None
    """The trained model in eval mode; None where the arm is no TrainConfig."""

    @property
    def label(self) -> str:
        """The name of the run's folder."""
        return f"{self.arm}-{self.seed}".replace(" ", "-")

    @property
    def folder(self) -> Path:
        """The run's folder, which has the metrics of training."""
        return self.lab.runs / self.label


@dataclass(frozen=True)
class Measure:
    """One quantity of one arm: values (S, ...) with a named axis for each dimension after the seeds."""

    values: np.ndarray
    axes: Mapping[str, Places]

    def where(self, **places: Any) -> "Measure":
        """Return the values at the named places, with the axes that are not named."""
        x, axes = self.values, dict(self.axes)
        for i, (name, along) in reversed(list(enumerate(self.axes.items(), 1))):
            if name in places:
                # A plain transformer has one value for all numbers of loops.
                x = x.take(0 if len(along) == 1 else list(along).index(places[name]), axis=i)
                del axes[name]
        return Measure(x, axes)

    def __getitem__(self, place: Any) -> Estimate:
        """Return the estimate at a place of the only axis."""
        return self.at(**{next(iter(self.axes)): place})

    def at(self, **places: Any) -> Estimate:
        """Return the estimate at the named places, averaged over the axes that are not named."""
        x = self.where(**places).values
        return Estimate(x.reshape(len(x), -1).mean(1))

    def curve(self, label: str) -> Curve:
        """Return a line of a figure along the only axis."""
        places = list(*self.axes.values())
        return curve(places, [self[place] for place in places], label)


def curve(xs: Sequence[float], estimates: Sequence[Estimate], label: str) -> Curve:
    """Return a line of a figure through estimates, in the order of `xs`, with their intervals."""
    points = sorted(zip(xs, estimates, strict=True), key=lambda point: point[0])
    mean, low, high = zip(*(estimate.interval for _, estimate in points), strict=True)
    return Curve([x for x, _ in points], mean, label, 0, low, high)


class Results:
    """The raw numbers of an experiment; `results[arm, name]` is a `Measure` with the axes that the study declares."""

    def __init__(self, study: "Study", raw: Result) -> None:
        self.study = study
        self.raw = raw
        self.runs: dict[str, list[Result]] = raw["runs"]

    def __getitem__(self, key: tuple[str, str]) -> Measure:
        arm, name = key
        values = [functools.reduce(lambda value, part: value[part], name.split("."), run) for run in self.runs[arm]]
        axes = dict(self.study.axes.get(name, {}))
        if isinstance(values[0], dict):
            # JSON has text for the places of the first axis; some arms and seeds lack some of them.
            first, declared = next(iter(axes.items()))
            axes[first] = [place for place in declared if all(str(place) in value for value in values)]
            values = [[value[str(place)] for place in axes[first]] for value in values]
        array = np.array(values, dtype=np.float64)
        return Measure(
            array, {axis: places[-n:] for (axis, places), n in zip(axes.items(), array.shape[1:], strict=True)}
        )

    def title(self, arm: str) -> str:
        """Return the arm's title."""
        return self.study.titles.get(arm, arm)

    def n_seeds(self, arm: str) -> str:
        """Return the number of an arm's seeds, as in '5 seeds'."""
        n = len(self.runs[arm])
        return f"{n} seed{'s' * (n > 1)}"

    def arm(self, arm: str) -> dict[str, Any]:
        """Return what pages state of an arm: title, number of parameters, configuration, mean CPU seconds, seeds."""
        first = self.runs[arm][0]
        found = {"name": arm, "title": self.title(arm), "n_seeds": self.n_seeds(arm)}
        if "cpu_s" in first:
            found |= {"config": first["asked"]["config"], "cpu_s": self[arm, "cpu_s"].at().mean}
            found |= {"parameters": self.raw["parameters"][arm]}
        return found


@dataclass(frozen=True)
class Study:
    """A question, the arms that answer it, and the page that states the answer."""

    title: str
    question: str
    page: str | Path
    """Markdown with the headings Protocol, Finding and Report; the latter two have holes, as in `{name:.2f}`, for what
    `fill` returns. A table's line that begins with `rows:` is repeated for every mapping in the list `rows`; an image
    is drawn by the function of its name in `figures`."""
    cost: tuple[str, str]
    """How long the quick form and the whole take on one CPU thread, measured."""
    arms: Callable[[bool], Mapping[str, Any]]
    """Returns by name what is compared, for the quick form or the whole: a TrainConfig, or, where nothing is trained,
    any plain values."""
    measure: Callable[[Run], Result]
    """Returns the numbers of one run as plain values."""
    fill: Callable[[Results], Mapping[str, Any]]
    """Returns what fills the holes of the page, besides `raw`, which is all raw numbers."""
    figures: Mapping[str, Callable[[Results, Path], None]] = field(default_factory=dict)
    """Functions that draw the page's images."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Titles of arms in tables and figures; an arm without one is shown by its name."""
    axes: Mapping[str, Mapping[str, Places]] = field(default_factory=dict)
    """Axes of every measured array, by its name; a dot leads into a nested one."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    n_seeds: Mapping[str, int] = field(default_factory=dict)
    """Arms that run only the first so many seeds."""
    settings: Callable[[Any, bool], Mapping[str, Any]] = lambda config, quick: {}
    """Returns what the numbers of an arm depend on besides its configuration, such as the number of questions."""
    prepare: Callable[[Lab, dict[str, Any]], Result] = lambda lab, arms: {}
    """Returns numbers that all arms share, before the runs; may also change the arms."""
    seeded: Callable[[Any, int], Any] = lambda config, seed: dataclasses.replace(config, seed=seed)
    """Returns an arm's configuration with a seed: weights, data and depths of its own."""

    def n_parts(self, lab: Lab) -> int:
        """Return how many runs the lab's options ask for."""
        return sum(min(len(lab.seeds), self.n_seeds.get(arm, len(lab.seeds))) for arm in self.arms(lab.quick))

    def run(self, lab: Lab) -> Result:
        """Return all raw numbers. Seeds are the outer loop, so that what is cut off leaves whole seeds."""
        arms = dict(self.arms(lab.quick))
        shared = self.prepare(lab, arms)
        runs: dict[str, list[Result]] = {arm: [] for arm in arms}
        for i, seed in enumerate(lab.seeds):
            for arm, config in arms.items():
                if i < self.n_seeds.get(arm, len(lab.seeds)):
                    runs[arm].append(self._run_one(lab, arm, config, seed) | {"seed": seed})
        sizes = {arm: count_parameters(cfg.model).total for arm, cfg in arms.items() if isinstance(cfg, TrainConfig)}
        return {"parameters": sizes} | shared | {"runs": runs}

    def _run_one(self, lab: Lab, arm: str, config: Any, seed: int) -> Result:
        run = Run(arm, config, seed, self.settings(config, lab.quick), lab)
        if not isinstance(config, TrainConfig):
            return lab.computed(run.label, lambda: self.measure(run), arm=config, seed=seed, **run.settings)
        run = dataclasses.replace(run, config=self.seeded(config, seed))
        return lab.measured(
            run.label, run.config, lambda model: self.measure(dataclasses.replace(run, model=model)), **run.settings
        )

    def text(self, heading: str) -> str:
        """Return the page's text under a heading, each paragraph on one line."""
        page = self.page.read_text(encoding="utf-8") if isinstance(self.page, Path) else self.page
        found = re.search(rf"^# {heading}\n(.*?)(?=^# |\Z)", page, re.MULTILINE | re.DOTALL)
        if found is None:
            raise ValueError(f"the page of {self.title!r} has no heading '# {heading}'; add it")
        return re.sub(r"(?<=\S)\n(?![-#|\n]|\w+: \|) *", " ", found[1]).strip()

    def report(self, raw: Result) -> Report:
        """Fill the page with the numbers, which are those of `run` or of a recorded report.json."""
        results = Results(self, raw)
        values = {"raw": raw, **self.fill(results)}
        parts: list[Part] = []
        for paragraph in self.text("Report").split("\n\n"):
            image = re.fullmatch(r"!\[(.*)\]\(([\w-]+)\.png\)", paragraph)
            if image:
                draw = functools.partial(self.figures[image[2]], results)
                parts.append(Figure(image[2], image[1].format_map(values), draw))
            else:
                parts.append("\n".join(_filled(line, values) for line in paragraph.split("\n")))
        return Report(self.text("Finding").format_map(values), parts)


def _filled(line: str, values: Mapping[str, Any]) -> str:
    """Fill the holes of a line, which for `rows: | {cell} |` becomes a line for each of `rows`."""
    repeated = re.fullmatch(r"(\w+): (\|.*)", line)
    if repeated is None:
        return line.format_map(values)
    return "\n".join(repeated[2].format_map({**values, **row}) for row in values[repeated[1]])


def vary(cfg: TrainConfig, **changes: Any) -> TrainConfig:
    """Return the run with other fields; a dict changes fields of the section, as in `model={"dim": 64}`."""
    sections = {
        name: dataclasses.replace(getattr(cfg, name), **x) for name, x in changes.items() if isinstance(x, dict)
    }
    return dataclasses.replace(cfg, **changes | sections)


def plain(cfg: TrainConfig, blocks: int) -> TrainConfig:
    """Return the run for a plain transformer of so many blocks."""
    layers = {"prelude_layers": blocks, "recurrent_layers": 0, "coda_layers": 0, "prelude_norm": False}
    return vary(cfg, model=layers)


def load(name: str) -> Study:
    """Return the study that `EXPERIMENTS` has under a name, which may be the path "module:NAME" to import it from."""
    from open_mythos.experiments import EXPERIMENTS

    study = EXPERIMENTS[name]
    if isinstance(study, str):
        module, _, attribute = study.partition(":")
        study = getattr(importlib.import_module(module), attribute)
    return study


def perform(name: str, lab: Lab, out: Path, command: str) -> Report:
    """Run an experiment and write its report into `out`: report.json, .md, .html and the figures."""
    require_matplotlib()
    study, began = load(name), time.perf_counter()
    lab = dataclasses.replace(lab, n_parts=study.n_parts(lab))
    raw = study.run(lab)
    origin = {
        "command": command,
        "quick": lab.quick,
        "seeds": lab.seeds,
        "commits": sorted(_commits(raw) or {commit()}),
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {lab.threads} thread",
        "wall_s": round(time.perf_counter() - began, 1),
    }
    return write(name, origin | {"results": raw}, out)


def write(name: str, record: Result, out: Path) -> Report:
    """Write the report of recorded numbers: what `perform` makes of new ones, or the content of a report.json."""
    study = load(name)
    texts = {"name": name, "title": study.title, "question": study.question, "protocol": study.text("Protocol")}
    record = json.loads(json.dumps(record | texts))
    report = study.report(record["results"])
    write_record(record, report, out)
    return report


def commit() -> str:
    """Return the commit of this code, with "-dirty" where files differ from it; "unknown" outside a checkout."""
    # The code's own checkout, wherever the command was given.
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except FileNotFoundError:
        return "unknown"


def _commits(value: Any) -> set[str]:
    """Return all commits that numbers come from."""
    return set(re.findall(r'"commit": "([^"]*)"', json.dumps(value)))
