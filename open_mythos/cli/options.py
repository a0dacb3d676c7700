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
from open_mythos.device import Device, Dtype, setup_device
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


def _options_of(names: Sequence[str], **changes: tuple[Any, Any]) -> Any:
    """Make a dataclass of some options of a request; `changes` gives type and default where a flag has its own."""
    made = []
    for name in names:
        kind, default = changes.get(name, (OPTIONS[name].type, OPTIONS[name].default))
        flag = Annotated[kind, tyro.conf.arg(help=OPTIONS[name].metadata["help"])]  # ty: ignore[invalid-type-form]
        made.append((name, flag, dataclasses.field(default=default)))
    return dataclasses.make_dataclass("SamplingOptions", made, kw_only=True, namespace={"__post_init__": check_bounds})


_NAMES = ["n_loops", "exit", "exit_threshold", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"]
SamplingOptions: Any = _options_of(_NAMES, exit=(Exit | None, None), top_k=(int, 50))
"""How many loops a token takes and how the next one is chosen: options of `mythos generate` and `mythos chat`."""


def chosen(args: Any) -> dict[str, Any]:
    """Return the `SamplingOptions` of a command by name, as `SamplingParams` and `generate` take them."""
    return {name: getattr(args, name) for name in _NAMES}


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds no model, before torch is imported."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist; give a model's folder, such as RUN/final")
    if not os.path.lexists(folder / "config.json"):  # a link that leads nowhere is for the reader of models to explain
        raise FileNotFoundError(f"folder {folder} has no config.json; give a model's folder, such as RUN/final")


@dataclasses.dataclass(kw_only=True)
class MachineOptions:
    """Options of commands that compute."""

    device: Device = "auto"
    dtype: Dtype = "float32"
    threads: PositiveInt | None = None


@dataclasses.dataclass(kw_only=True)
class ModelOptions(MachineOptions):
    """Options of commands that load a model."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of the model and its tokenizer, such as RUN/final."""

    def load(self) -> "tuple[OpenMythos, Tokenizer]":
        """Load the model and its tokenizer."""
        import torch

        from open_mythos.model import OpenMythos
        from open_mythos.tokenization.tokenizer import load_tokenizer

        device = setup_device(self.device, self.threads)
        tokenizer = load_tokenizer(self.folder)
        return OpenMythos.from_pretrained(self.folder, device=device, dtype=getattr(torch, self.dtype)), tokenizer


def read(options: type[T], command: str, rest: Sequence[str], **how: Any) -> T:
    """Read a command's options; `how` goes to tyro.

    Raises:
        ValueError: a value cannot be used; the message names the flag as it is typed.
        SystemExit: --help was asked for, or tyro has printed what is wrong with the flags themselves.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _registry(none="default" in how):
            found = tyro.cli(options, prog=command, args=list(rest), **how)
        check_section(found[0] if isinstance(found, tuple) else found)
        return found
    except SystemExit as end:
        # tyro draws a frame around every message. Messages about a value are printed as those of other errors.
        error = end.__context__
        while error is not None and not (isinstance(error, ValueError) and _is_ours(error)):
            error = error.__context__
        if error is None:
            sys.stderr.write(said.getvalue())
            raise
        flag = re.search(r"Error parsing (--[\w.-]+):", said.getvalue())
        raise ValueError(f"{flag[1]} {error}" if flag else str(error)) from None


def _is_ours(error: BaseException) -> bool:
    """Tell whether a line of this package raised the error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("open_mythos.")


def _registry(none: bool) -> ConstructorRegistry:
    """Return the rules that read values; where `none`, a field that may be None also takes the word None."""
    registry = ConstructorRegistry()
    for rule in (partial(_optional, none=none), _several, _number, _choice):
        registry.primitive_rule(rule)
    return registry


def _optional(info: PrimitiveTypeInfo, none: bool) -> PrimitiveConstructorSpec | None:
    """Read a value that may be None."""
    kinds = get_args(info.type) if get_origin(info.type) in (typing.Union, types.UnionType) else ()
    if len(kinds) != 2 or types.NoneType not in kinds:
        return None
    kind = kinds[kinds[0] is types.NoneType]
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None

    def convert(words: list[str]) -> Any:
        return None if none and words == ["None"] else spec.instance_from_str(words)

    return dataclasses.replace(
        spec,
        metavar=spec.metavar + "|None" * none,
        instance_from_str=convert,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
    )


def _several(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Read any number of values."""
    kinds = get_args(info.type)
    if get_origin(info.type) is not tuple or kinds[1:] != (...,) or tyro.conf.UseAppendAction in info.markers:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec) or spec.nargs != 1:
        return None
    convert, written = spec.instance_from_str, spec.str_from_instance
    return PrimitiveConstructorSpec(
        "*",
        f"[{spec.metavar} ...]",
        lambda words: tuple(convert([word]) for word in words),
        lambda value: isinstance(value, tuple) and all(map(spec.is_instance, value)),
        lambda value: [word for item in value for word in written(item)],
    )


def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Read a number, and refuse other words in plain English."""
    if info.type not in (int, float):
        return None
    kind, name, example = (int, "INT", "a whole number") if info.type is int else (float, "FLOAT", "a number")

    def convert(words: list[str]) -> Any:
        try:
            return kind(words[0])
        except ValueError:
            raise ValueError(f"{_short(words[0])} must be {example}") from None

    return PrimitiveConstructorSpec(
        1, name, convert, lambda value: isinstance(value, int | kind), lambda value: [str(value)]
    )


def _choice(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Read one of some words; a refusal names the nearest."""
    if isinstance(info.type, type) and issubclass(info.type, TableKey):
        allowed = tuple(info.type.table)
    elif get_origin(info.type) is Literal and all(isinstance(name, str) for name in get_args(info.type)):
        allowed = get_args(info.type)
    else:
        return None

    def convert(words: list[str]) -> Any:
        if words[0] not in allowed:
            remedy = did_you_mean(words[0], allowed)
            raise ValueError(f"{_short(words[0])} must be one of {', '.join(allowed)}{remedy}")
        return words[0]

    return PrimitiveConstructorSpec(
        1, f"{{{','.join(allowed)}}}", convert, lambda value: value in allowed, lambda value: [value]
    )


def flags(options: type) -> dict[str, str]:
    """Return the flag of each field of a command's options, nested ones with dots; "" for positional arguments."""
    found = {}
    for name, hint in typing.get_type_hints(options, include_extras=True).items():
        if get_origin(hint) is typing.ClassVar:
            continue
        markers = getattr(hint, "__metadata__", ())
        alone, named = tyro.conf.Positional in markers, next((m.name for m in markers if getattr(m, "name", "")), "")
        sections = [
            kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and dataclasses.is_dataclass(kind)
        ]
        for section in sections:  # a field of type Task holds one of its subclasses
            sections += [each for each in section.__subclasses__() if each not in sections]
        for section in sections:
            found |= {
                f"{name}.{field}": f"--{name.replace('_', '-')}.{flag[2:]}" for field, flag in flags(section).items()
            }
        if not sections:
            found[name] = "" if alone else "--" + (named or name.replace("_", "-"))
    return found


def _short(word: str) -> str:
    return word if len(word) <= 40 else word[:40] + "..."
