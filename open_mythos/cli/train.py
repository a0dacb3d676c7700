"""Commands that train."""

import inspect
import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from open_mythos.checks import NonNegativeInt, PositiveInt
from open_mythos.cli.options import MAX_NEW_TOKENS, TableKey, read
from open_mythos.cli.plugins import program
from open_mythos.device import Device, Dtype
from open_mythos.train.trackers import TRACKERS

if TYPE_CHECKING:
    from open_mythos.train.config import TrainConfig
    from open_mythos.train.trainer import Trainer

VOCAB_FLAGS = ("--model.vocab-size", "--model.vocab_size")
EXIT_INTERRUPTED = 75
"""Exit status of a training run that a signal has stopped and that can continue: "temporary failure" of sysexits.h."""


@dataclass
class Demo:
    """Train a model that answers longer questions by looping more, then a small text model, and draw both."""

    out: Path = Path("demo")
    """Folder for the figures, the table and both models; an earlier demo in it is replaced."""
    device: Device = "cpu"
    dtype: Dtype = "float32"
    threads: PositiveInt = 1
    """CPU threads. On a busy machine one is fastest."""
    seed: NonNegativeInt = 0

    def run(self, rest: list[str]) -> None:
        """train from nothing in minutes, and see more loops answer longer questions"""
        from open_mythos.cli.demo import run_demo

        run_demo(**vars(self))


class TrackerName(TableKey):
    table = TRACKERS


@dataclass
class RunOptions:
    """Options of commands that take a recipe or a run's configuration."""

    config: Path | None = None
    """A run's config.yaml, instead of a recipe; `mythos train` reproduces that run."""


@dataclass
class Train(RunOptions):
    """Train into a folder: config.yaml, metrics.jsonl, checkpoints/, and model and tokenizer in final/.

    Recipes: {recipes}. small-text and the pretraining recipes after chat take text that is prepared first. Any field of
    a recipe can be given, as in --steps 100 --seed 1 --optim.lr 3e-4 --model.dim 128; `mythos train RECIPE --help`
    lists them all.
    """

    out: Path | None = None
    """Folder of the run; it must not hold one yet."""
    init_from: str | None = None
    """Folder of a model, such as RUN/final, to begin with its weights: its architecture takes the place of the
    recipe's."""
    device: Device = "auto"
    threads: PositiveInt | None = None
    """CPU threads; left out: torch's choice."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints, in OUT/checkpoints; 0: only the clock decides."""
    checkpoint_minutes: float = 5.0
    """Minutes after which a checkpoint is saved in any case; 0: never. Ctrl-C, SIGTERM and the last step also save."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_every: NonNegativeInt = 0
    """Also keep those at multiples of so many steps."""
    track: Annotated[tuple[TrackerName, ...], tyro.conf.UseAppendAction] = ()
    """Where the run's numbers go besides metrics.jsonl; may be given several times."""
    resume: bool = False
    """Continue from the newest complete checkpoint, or start if there is none; more --steps go beyond the end."""
    workers: NonNegativeInt = 0
    """Processes that make batches ahead of time."""

    def run(self, rest: list[str], recipe: str, cfg: "TrainConfig") -> None:
        """train a recipe, or reproduce a run from its config.yaml"""
        if recipe == "chat" and self.init_from is None:
            raise ValueError(
                "--init-from is missing; name the folder of a model to fine-tune, as in --init-from RUN/final"
            )
        if self.out is None:
            raise ValueError("--out is missing; name a folder for the run, as in --out runs/first")

        from open_mythos.recipes import DATA
        from open_mythos.train.checkpoint import CheckpointConfig
        from open_mythos.train.trackers import make_trackers
        from open_mythos.train.trainer import Interrupted, Trainer

        checkpoint = CheckpointConfig(self.checkpoint_every, self.keep_last, self.keep_every, self.checkpoint_minutes)
        options = {name: getattr(self, name) for name in ("device", "threads", "resume", "workers")}
        trackers = make_trackers(self.track)
        try:
            cfg = _fit_vocabulary(cfg, self.config is not None or any(arg.startswith(VOCAB_FLAGS) for arg in rest))
            trainer = Trainer(cfg, self.out, checkpoint=checkpoint, trackers=trackers, **options)
        except FileNotFoundError as error:
            if recipe not in DATA:
                raise
            raise FileNotFoundError(f"{error}. For {recipe}:\n{DATA[recipe]}") from None
        if trainer.world.is_first:
            print("\n".join(_size_and_time(self, recipe, trainer)), flush=True)
        try:
            final = trainer.run()
        except Interrupted as interrupted:
            print(f"mythos train: {interrupted}", file=sys.stderr)
            raise SystemExit(EXIT_INTERRUPTED) from None
        if trainer.world.is_first:
            print(f"The model is in {final}, the run's numbers in {self.out / 'metrics.jsonl'}.\nNext:")
            print("\n".join(_next(trainer, shlex.quote(str(final)))))


def _size_and_time(args: Train, recipe: str, trainer: "Trainer") -> list[str]:
    """Describe the size and time of a run, as far as they are known before its first step."""
    from open_mythos.accounting import count_parameters
    from open_mythos.recipes import CPU_SECONDS, load_recipe
    from open_mythos.reports.terminal import duration

    cfg, rows = trainer.cfg, f"{trainer.cfg.batch_size:,} rows of {trainer.cfg.data.seq_len:,} tokens"
    lines = [
        f"{recipe or args.config}: {count_parameters(cfg.model).total:,} parameters; {cfg.steps:,} steps of {rows}, "
        f"{cfg.steps * cfg.batch_size * cfg.data.seq_len:,} tokens in all."
    ]
    if trainer.steps_done:
        lines.append(f"It continues after step {trainer.steps_done:,}, in {cfg.dtype}.")
    whole = load_recipe(recipe) if recipe in CPU_SECONDS else None
    # The dtype of Muon's iteration changes a step by a fifth.
    same = {"steps": cfg.steps, "seed": cfg.seed, "dtype": "float32"}
    if whole is not None and cfg == replace(whole, **same, optim=replace(whole.optim, muon_dtype=cfg.optim.muon_dtype)):
        seconds = CPU_SECONDS[recipe] * (cfg.steps - trainer.steps_done) / whole.steps
        lines.append(
            f"About {duration(seconds)} on one core of a server CPU with AVX-512; the time left on this machine is "
            "measured from the first steps."
        )
        return lines
    lines.append("The time left is measured from the first steps.")
    if recipe not in ("", "chat", *CPU_SECONDS) and trainer.device.type == "cpu":
        lines.append(f"This recipe is made for GPUs: {program()} plan {recipe} shows its time on them.")
    return lines


def _next(trainer: "Trainer", folder: str) -> list[str]:
    """Return commands for the model that has just been trained, each on a line of its own."""
    from open_mythos.tasks.task import example

    cfg, tokenizer, mythos = trainer.cfg, trainer.tokenizer, f"  {program()}"
    if cfg.data.name == "chat":
        lines = [f"{mythos} generate {folder} 'What is a loop?' --chat", f"{mythos} chat {folder}"]
    elif cfg.data.bytes_per_token is None:
        prompt, answer, n_tokens = example(trainer.validation, tokenizer)
        lines = [
            f"{mythos} generate {folder} {shlex.quote(prompt)} --max-new-tokens {n_tokens} --temperature 0",
            f"  (The right answer is {answer}; docs/tasks.md says how each task is asked.)",
        ]
    else:
        # Whole words of held-out text: its first and last word may be cut.
        text = tokenizer.decode(trainer.validation.input_ids[0].tolist())
        prompt = " ".join(text.split()[1:-1][:3]) or text[:8]
        room = min(cfg.model.max_seq_len - len(tokenizer.encode(prompt)), cfg.model.max_output_tokens)
        limit = f" --max-new-tokens {room}" if room < MAX_NEW_TOKENS else ""
        lines = [f"{mythos} generate {folder} {shlex.quote(prompt)}{limit} --show-loops"]
    return [*lines, f"{mythos} info {folder}"]


def _fit_vocabulary(cfg: "TrainConfig", is_given: bool) -> "TrainConfig":
    """Give the model as many tokens as the prepared data has; refuse another number that the user has given."""
    if cfg.data.name not in ("shards", "stream") or cfg.init_from is not None:
        return cfg
    ours, theirs = cfg.model.vocab_size, cfg.data.vocab_size
    if ours == theirs:
        return cfg
    if is_given:
        raise ValueError(
            f"model.vocab_size={ours} is not the {theirs} tokens of the data, and the model could give out tokens that "
            f"the tokenizer lacks, or lack some; use --model.vocab-size {theirs}"
        )
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts
        print(f"The model gets the data's {theirs:,} tokens instead of {ours:,}: --model.vocab-size {theirs}")
    return replace(cfg, model=replace(cfg.model, vocab_size=theirs))


def read_run(options: type[RunOptions], command: str, rest: list[str]) -> tuple[Any, str, "TrainConfig"]:
    """Return the command's options, the recipe's name ("" for a file) and the run's configuration."""
    words = [arg for arg in rest if arg not in ("-h", "--help")]
    args, overrides = read(options, f"{command} RECIPE", words, return_unknown_args=True)  # ty: ignore[not-iterable]
    from open_mythos.recipes import RECIPES, load_recipe
    from open_mythos.train.config import TrainConfig

    # A recipe may stand anywhere; a misspelt one is recognised where no flag precedes it.
    place = next((i for i, arg in enumerate(overrides) if arg in RECIPES), 0)
    recipe = overrides.pop(place) if overrides and not overrides[place].startswith("-") else ""
    asked = ["--help"] * (len(words) < len(rest))
    if asked and not recipe:
        text = (inspect.getdoc(options) or "").format(recipes=", ".join(RECIPES))
        read(options, f"{command} RECIPE", asked, description=text)
    if bool(recipe) == (args.config is not None):
        raise ValueError(f"give either a recipe ({', '.join(RECIPES)}) or --config FILE, as in {command} tiny-text")
    cfg = load_recipe(recipe) if args.config is None else TrainConfig.load(args.config)
    if isinstance(args, Train) and args.init_from is not None:
        from open_mythos.train.init_from import adopt

        cfg = adopt(cfg, args.init_from)
    usage = f"{command} {recipe or '--config FILE'}{' --out DIR' if options is Train else ''}"
    only_flags = (tyro.conf.AvoidSubcommands,)
    return args, recipe, read(TrainConfig, usage, [*overrides, *asked], default=cfg, config=only_flags)
