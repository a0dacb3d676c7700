"""Commands that use a model, or tell what one costs."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from open_mythos.checks import check_int
from open_mythos.cli.options import MAX_NEW_TOKENS, Exit, SamplingOptions, read
from open_mythos.config import MAX_LOOPS
from open_mythos.device import Device, Dtype, setup_device


@dataclass
class GenerateArgs(SamplingOptions):
    """Continue a prompt with the model of a folder, and print the text as it comes."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the model and its tokenizer, such as RUN/final."""
    prompt: Annotated[str, tyro.conf.Positional]
    max_new_tokens: int = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    """Strings that end the text; the tokenizer's end token always does. The text is printed as it comes, so a stop
    string itself may be shown."""
    chat: bool = False
    """The prompt is a user's message, in the template that the recipe chat trains; only the answer is printed."""
    show_loops: bool = False
    """Colour every token by the loops it took."""
    compiled: bool = False
    """Decode with machine code made for this model: 10 to 20 s at first, then up to twice as fast. Needs a C++
    compiler on a CPU."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    threads: int | None = None

    def __post_init__(self) -> None:
        self.check()
        check_int("max_new_tokens", self.max_new_tokens, 1)


def generate(rest: list[str]) -> None:
    """continue a prompt, with as many loops as you like"""
    args = read(GenerateArgs, "mythos generate", rest)
    if not args.folder.is_dir():
        raise FileNotFoundError(f"folder {args.folder} does not exist; give a model's folder, such as RUN/final")
    import torch
    from rich.console import Console

    from open_mythos.model import OpenMythos
    from open_mythos.reports.terminal import loop_style, loop_summary, write
    from open_mythos.tokenization.chat_template import end_of_turn, render, turns_unknown
    from open_mythos.tokenization.tokenizer import TextStream, load_tokenizer

    device = setup_device(args.device, args.threads)
    model = OpenMythos.from_pretrained(args.folder, device=device, dtype=getattr(torch, args.dtype))
    tokenizer = load_tokenizer(args.folder)
    if args.chat and (warning := turns_unknown(args.folder, "leave --chat out to have the prompt continued")):
        print(f"mythos generate: {warning}", file=sys.stderr)
    most = args.n_loops or model.cfg.max_loop_iters
    console, started = Console(highlight=False, soft_wrap=True), False

    def show(_: int, token: int, loops: int) -> None:
        nonlocal started
        if not started:
            # Not before: an argument may yet be refused.
            write(console, "" if args.chat else args.prompt)
            started = True
        write(console, stream.push(token), loop_style(loops, most) if args.show_loops else "")

    prompt = render([{"role": "user", "content": args.prompt}], tokenizer, reply=True)[0] if args.chat else args.prompt
    stream = TextStream(tokenizer, tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
    end = end_of_turn(tokenizer) if args.chat else tokenizer.eos_id
    _, loops = model.generate(
        prompt,
        args.max_new_tokens,
        args.n_loops,
        args.temperature,
        args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        exit=args.exit,
        exit_threshold=args.exit_threshold,
        stop=args.stop if end is None else (*args.stop, end),
        tokenizer=tokenizer,
        seed=args.seed,
        on_token=show,
        return_loops=True,
        compiled=args.compiled,
    )
    write(console, stream.flush() + "\n")
    if args.show_loops:
        console.print(loop_summary(console, loops, most))


@dataclass
class InfoArgs:
    """What a model costs: parameters, compute and memory, from its configuration alone."""

    model: Annotated[str, tyro.conf.Positional]
    """A variant (200k, 3m, 30m, 120m, 1b, 3b, 7b, 8b_fine, 10b, 50b, 100b, 500b, 1t) or the folder of a model."""
    gpu_gb: float = 80.0
    """Memory of one GPU in GB, for the count of GPUs."""
    kv_gb: float | None = None
    """GB for keys and values: how many tokens and requests the engine holds in them. Left out: room for 32 whole
    contexts, at most 10 GB."""
    tokenizer: str | None = None
    """Count with the vocabulary of this tokenizer: "bytes", a folder, a tokenizer.json, or a model's name on the
    Hugging Face hub."""
    vocab_size: int | None = None
    """Count with so many tokens in the vocabulary."""


def info(rest: list[str]) -> None:
    """count a model's parameters, FLOPs per token, cache and memory"""
    args = read(InfoArgs, "mythos info", rest)
    from open_mythos.costs.info import print_info

    if args.tokenizer is not None:
        if args.vocab_size is not None:
            raise ValueError(f"--vocab-size {args.vocab_size} and --tokenizer are both given; give one")
        from open_mythos.tokenization.tokenizer import open_tokenizer

        args.vocab_size = open_tokenizer(args.tokenizer).vocab_size
    print_info(args.model, args.gpu_gb, args.vocab_size, args.kv_gb)


@dataclass
class EvalArgs:
    """Bits per byte of a text by loops: a table, eval.json and a figure."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the model and its tokenizer, such as RUN/final."""
    text: tuple[str, ...]
    """Files (.txt, .md, .jsonl, .parquet), or folders that hold such. Every token of them is scored once."""
    n_loops: str = ""
    """Loops to score at, as in 1,2,4,8,16; left out: doubling, up to twice the model's max_loop_iters."""
    out: Path | None = None
    """Folder for eval.json and the figure; left out: FOLDER/eval."""
    exit: Exit | None = None
    """Rule that lets a token leave the loop early; left out: the model's own."""
    exit_threshold: float | None = None
    """Threshold of that rule; left out: its default."""
    context: int | None = None
    """Tokens of a window, half of which at least precede each token; left out: those of a row of training, where
    FOLDER is RUN/final, else the model's max_seq_len."""
    column: str = "text"
    """Field of a JSON line, or column of a parquet file, with the text."""
    device: Device = "auto"
    dtype: Dtype = "float32"
    threads: int | None = None


def evaluate(rest: list[str]) -> None:
    """bits per byte of a text, by loops"""
    args = read(EvalArgs, "mythos eval", rest)
    if not args.folder.is_dir():
        raise FileNotFoundError(f"folder {args.folder} does not exist; give a model's folder, such as RUN/final")
    try:
        n_loops = [int(n) for n in args.n_loops.split(",")] if args.n_loops else []
    except ValueError:
        raise ValueError(f"--n-loops {args.n_loops} must be numbers with commas between; use 1,2,4,8") from None
    for n in n_loops:
        check_int("n_loops", n, 1, MAX_LOOPS, "use n_loops=1,2,4,8")
    if args.context is not None:
        check_int("context", args.context, 1)
    from rich.console import Console

    from open_mythos.evals.by_loops import evaluate_files, print_results

    out = args.folder / "eval" if args.out is None else args.out
    results = evaluate_files(
        args.folder,
        args.text,
        n_loops,
        out,
        exit=args.exit,
        exit_threshold=args.exit_threshold,
        context=args.context,
        column=args.column,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
    )
    print_results(Console(), results)
    print(f"In {out}: eval.json, bits_per_byte.png, bits_per_byte.svg")
