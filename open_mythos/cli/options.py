"""Options of the commands: those that several commands share, their reading, and their names in messages."""

import contextlib
import dataclasses
import io
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from open_mythos.checks import PositiveInt, check_section, did_you_mean
from open_mythos.config import HALTING_RULES
from open_mythos.device import AutoDtype, Device, setup_device
from open_mythos.generation.sampling_params import OPTIONS, check_bounds

if TYPE_CHECKING:
    from open_mythos.model import OpenMythos
    from open_mythos.tokenization.tokenizer import Tokenizer

T = TypeVar("T")
MAX_NEW_TOKENS = 64
"""New tokens of `mythos generate`, unless the option says otherwise."""


class TableKey(str):
    """A word that has to be a key of `table`, as the table is when the command line is read."""

    table: ClassVar[Mapping[str, Any]]


class Exit(TableKey):
    table = HALTING_RULES


_NAMES = ["n_loops", "exit", "exit_threshold", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"]
_CHANGES = {"exit": (Exit | None, None), "top_k": (int, 50)}
"""Types and defaults of flags that differ from the option of a request."""
SamplingOptions: Any = dataclasses.make_dataclass(
    "SamplingOptions",
    [
        (
            name,
            Annotated[kind, tyro.conf.arg(help=OPTIONS[name].metadata["help"])],  # ty: ignore[invalid-type-form]
            dataclasses.field(default=default),
        )
        for name in _NAMES
        for kind, default in [_CHANGES.get(name, (OPTIONS[name].type, OPTIONS[name].default))]
    ],
    kw_only=True,
    namespace={"__post_init__": check_bounds},
)
"""How many loops a token takes and how the next one is chosen: options of `mythos generate` and `mythos chat`."""


def chosen(args: Any) -> dict[str, Any]:
    """Return the `SamplingOptions` of a command by name, as `SamplingParams` and `generate` take them."""
    return {name: getattr(args, name) for name in _NAMES}


@dataclasses.dataclass(kw_only=True)
class ModelOptions:
    """Options of commands that load a model."""

    device: Device = "auto"
    dtype: AutoDtype = "auto"
    """auto: bfloat16 where this machine computes the model faster in it, else float32, which is exact."""
    threads: PositiveInt | None = None
    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the model and its tokenizer, such as RUN/final."""

    def load(self) -> "tuple[OpenMythos, Tokenizer]":
        """Load the model and its tokenizer."""
        import torch

        from open_mythos.model import OpenMythos
        from open_mythos.tokenization.tokenizer import load_tokenizer

        device = setup_device(self.device, self.threads)
        tokenizer = load_tokenizer(self.folder)
        model = OpenMythos.from_pretrained(self.folder, device=device, dtype=self.dtype)
        if self.dtype == "auto" and model.dtype is not torch.float32:
            name = str(model.dtype).removeprefix("torch.")
            print(f"The model runs in {name}, which is faster here; --dtype float32 is exact.", file=sys.stderr)
        return model, tokenizer


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds no model, before torch is imported."""
    if not os.path.lexists(folder / "config.json"):  # a link that leads nowhere is for the reader of models to explain
        fault = "has no config.json" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"folder {folder} {fault}; give a model's folder, such as RUN/final")


def read(options: type[T], command: str, rest: Sequence[str], **how: Any) -> T:
    """Read a command's options; `how` goes to tyro.

    Raises:
        ValueError: a value cannot be used; the message names the flag as it is typed.
        FileNotFoundError: the folder holds no model.
        SystemExit: --help was asked for, or tyro has printed what is wrong with the flags themselves.
    """
    printed, registry = io.StringIO(), ConstructorRegistry()
    for rule in (partial(_optional, none="default" in how), _several, _word):
        registry.primitive_rule(rule)
    try:
        with contextlib.redirect_stderr(printed), registry:
            found = tyro.cli(options, prog=command, args=list(rest), **how)
    except SystemExit as end:
        # tyro draws a frame around every message. Messages about a value are printed as those of other errors.
        error = end.__context__
        while error is not None and not (isinstance(error, ValueError) and _is_ours(error)):
            error = error.__context__
        if error is None:
            sys.stderr.write(printed.getvalue())
            raise
        flag = re.search(r"Error parsing (--[\w.-]+):", printed.getvalue())
        raise ValueError(f"{flag[1]} {error}" if flag else str(error)) from None
    args = found[0] if isinstance(found, tuple) else found
    check_section(args)
    if isinstance(args, ModelOptions):
        check_folder(args.folder)
    return found


def _is_ours(error: BaseException) -> bool:
    """Tell whether a line of this package raised the error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("open_mythos.")


def _inner(kind: Any, info: PrimitiveTypeInfo) -> Any:
    """Return the rule that reads one value of a compound type, or None."""
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, info.markers))
    return spec if isinstance(spec, PrimitiveConstructorSpec) else None


def _optional(info: PrimitiveTypeInfo, none: bool) -> PrimitiveConstructorSpec | None:
    """Read a value that may be None; where `none`, also from the word None."""
    kinds = get_args(info.type) if get_origin(info.type) in (typing.Union, types.UnionType) else ()
    others = [kind for kind in kinds if kind is not types.NoneType]
    if len(kinds) != 2 or len(others) != 1 or (spec := _inner(others[0], info)) is None:
        return None
    return dataclasses.replace(
        spec,
        metavar=spec.metavar + "|None" * none,
        instance_from_str=lambda words: None if none and words == ["None"] else spec.instance_from_str(words),
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )


def _several(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Read any number of values."""
    kinds = get_args(info.type)
    if get_origin(info.type) is not tuple or kinds[1:] != (...,) or tyro.conf.UseAppendAction in info.markers:
        return None
    if (spec := _inner(kinds[0], info)) is None or spec.nargs != 1:
        return None
    return PrimitiveConstructorSpec(
        "*",
        f"[{spec.metavar} ...]",
        lambda words: tuple(spec.instance_from_str([word]) for word in words),
        lambda value: isinstance(value, tuple) and all(map(spec.is_instance, value)),
        lambda value: [word for item in value for word in spec.str_from_instance(item)],
    )


def _word(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Read a number or one of some words, and refuse others in plain English; the remedy is the nearest word."""
    kind, allowed = info.type, ()
    if isinstance(kind, type) and issubclass(kind, TableKey):
        allowed = tuple(kind.table)
    elif get_origin(kind) is Literal and all(isinstance(name, str) for name in get_args(kind)):
        allowed = get_args(kind)
    elif kind not in (int, float):
        return None
    expected = f"one of {', '.join(allowed)}" if allowed else "a whole number" if kind is int else "a number"

    def convert(words: list[str]) -> Any:
        [word] = words
        try:
            return allowed[allowed.index(word)] if allowed else kind(word)
        except ValueError:
            short = word[:40] + "..." * (len(word) > 40)
            raise ValueError(f"{short} must be {expected}{did_you_mean(word, allowed)}") from None

    return PrimitiveConstructorSpec(
        1,
        f"{{{','.join(allowed)}}}" if allowed else kind.__name__.upper(),
        convert,
        lambda value: value in allowed if allowed else isinstance(value, (int, kind)),
        lambda value: [str(value)],
    )


def flags(options: type) -> dict[str, str]:
    """Return the flag of each field of a command's options, nested ones with dots; "" for positional arguments."""
    found = {}
    for name, hint in typing.get_type_hints(options, include_extras=True).items():
        if get_origin(hint) is typing.ClassVar:
            continue
        flag = name.replace("_", "-")
        sections = [
            each for each in (hint, *get_args(hint)) if isinstance(each, type) and dataclasses.is_dataclass(each)
        ]
        for section in sections:  # a field of type Task holds one of its subclasses
            sections += [each for each in section.__subclasses__() if each not in sections]
            found |= {f"{name}.{field}": f"--{flag}.{inner[2:]}" for field, inner in flags(section).items()}
        if not sections:
            markers = getattr(hint, "__metadata__", ())
            named = next((marker.name for marker in markers if getattr(marker, "name", "")), flag)
            found[name] = "" if tyro.conf.Positional in markers else f"--{named}"
    return found
