"""Functions of modules as machine code in the user's cache folder: a later process runs it without a compiler.

torch.export traces a function and AOTInductor compiles it. The weights are inputs of the library, so it serves any
weights of these shapes. Its name is a hash of everything that it depends on: the module, the arguments' shapes, the
source, the processor, torch and the number of threads. As with torch's own cache, whoever can write to that folder can
run code as this user.
"""

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from open_mythos.ops.batch_invariant import invariant
from open_mythos.ops.routes import cache_folder, processor

OPTIONS = {
    # Only the kernels are worth optimising. The rest, and what precompiled headers cost, doubled the compiler's time.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.precompile_headers": False,
    "aot_inductor.enable_line_tables": False,
    # Torch runs on these instructions already: they need no test programs.
    "cpp.vec_isa_ok": True,
}

log = logging.getLogger(__name__)


class Unstorable(ValueError):
    """Machine code depends on something that the name of its file cannot say."""


class MachineCode:
    """A function of a module and further arguments, run as machine code. For inference on a CPU.

    Arguments are tensors, plain values and objects in dataclasses, dicts, lists and tuples. Tensors that the function
    writes to are contiguous.
    """

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        # By module, so that a copy of the module runs its own weights; by what tells calls apart.
        self.loaded: WeakKeyDictionary[nn.Module, dict[Any, _Library]] = WeakKeyDictionary()

    def __call__(self, varying: list[tuple[Tensor, int]], module: nn.Module, *args: Any) -> Any:
        """Call the function; `varying`: tensors with a dimension whose length may be another in the next call."""
        if invariant() or torch.is_autocast_enabled("cpu"):
            return self.function(module, *args)
        # The tracer takes lengths of 0 and 1 for constants.
        lengths = {id(x): dim for x, dim in varying if x.shape[dim] > 1}
        tensors: list[Tensor] = []
        facts: list[Any] = [torch.get_num_threads()]
        _flatten(args, tensors, facts, lengths)
        libraries, key = self.loaded.setdefault(module, {}), tuple(facts)
        if key not in libraries or not libraries[key].fits():
            libraries[key] = _Library(_Traced(self.function, module, args), tensors, lengths)
        return libraries[key](tensors)


class _Library:
    """A loaded library, and where the weights that it is given stand."""

    def __init__(self, traced: "_Traced", tensors: list[Tensor], lengths: dict[int, int]) -> None:
        shapes = [(x.dtype, [-1 if i == lengths.get(id(x)) else n for i, n in enumerate(x.shape)]) for x in tensors]
        with ExitStack() as stack:
            try:
                path = path_of(f"{traced.function.__qualname__} {shapes} {traced.description}", traced.roots)
                path.parent.mkdir(parents=True, exist_ok=True)
                # One process compiles, and those that wait for it load the result.
                fcntl.flock(stack.enter_context(open(path.with_suffix(".lock"), "w")), fcntl.LOCK_EX)
            except (Unstorable, OSError) as error:
                log.warning("machine code cannot be stored (%s), so it is for this process alone", error)
                path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "code.so"
            if (outputs := _outputs(path)) is None:
                traced.compile(tensors, lengths, path)
                outputs = _outputs(path)
            self.outputs, self.places = outputs, traced.places()
            self.strides = [table[name].stride() for table, name in self.places]
            self.run = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1).run

    def fits(self) -> bool:
        """Return whether the module's weights lie in memory in the order that the code expects."""
        return [table[name].stride() for table, name in self.places] == self.strides

    def __call__(self, tensors: list[Tensor]) -> Any:
        return pytree.tree_unflatten(self.run([table[name] for table, name in self.places] + tensors), self.outputs)


class _Traced:
    """The function with every module that it uses: that of the call, and those of its arguments."""

    def __init__(self, function: FunctionType, module: nn.Module, args: Any) -> None:
        self.function, self.args = function, args
        self.roots = nn.ModuleList([module])
        self.description = repr(describe(args, self.roots))

    def places(self) -> list[tuple[dict[str, Any], str]]:
        """Return for each weight the dictionary of its module that it is in, and its name there."""
        tables = [table for module in self.roots.modules() for table in (module._parameters, module._buffers)]
        return [(table, name) for table in tables for name, x in table.items() if x is not None]

    def call(self, *tensors: Tensor) -> Any:
        """Call the function with other weights and other tensors in its arguments."""
        places = self.places()
        own = [table[name] for table, name in places]
        try:
            for (table, name), x in zip(places, tensors, strict=False):
                table[name] = x
            return self.function(self.roots[0], *_rebuild(self.args, iter(tensors[len(places) :])))
        finally:
            for (table, name), x in zip(places, own, strict=True):
                table[name] = x

    def compile(self, tensors: list[Tensor], lengths: dict[int, int], path: Path) -> None:
        """Write the library to `path`, and beside it its hash and the structure of its outputs."""
        inputs = [table[name] for table, name in self.places()] + tensors
        dynamic = tuple({lengths[id(x)]: torch.export.Dim.DYNAMIC} if id(x) in lengths else None for x in inputs)
        # Other tensors, because one that is given twice would be taken for one input. Their values do not matter.
        examples = tuple(map(torch.empty_like, inputs))
        with warnings.catch_warnings(), torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            warnings.simplefilter("ignore")
            # A weight as a constant would be compiled in, if it had few values.
            program = torch.export.export(_Program(self), examples, dynamic_shapes={"tensors": dynamic})
            if program.constants:
                names = ", ".join(program.constants)
                raise ValueError(f"{names}: compiled code needs every tensor in a module; register it as a buffer")
            options = OPTIONS | {"aot_inductor.output_path": folder}
            library = str(torch._inductor.aot_compile(program.module(check_guards=False), examples, options=options))
            outputs = pytree.treespec_dumps(program.call_spec.out_spec)
            if (nodes := Path(library).with_suffix(".json")).exists():
                os.replace(nodes, path.with_suffix(".json"))
            os.replace(library, path)
            # The facts come last: a library without those that fit it is not loaded.
            (partial := Path(folder) / "facts").write_text(json.dumps({"sha256": _hash(path), "outputs": outputs}))
            os.replace(partial, path.with_suffix(".facts"))


class _Program(nn.Module):
    """A traced call as the module that torch.export takes; its weights are inputs, so it has none."""

    def __init__(self, traced: _Traced) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, *tensors: Tensor) -> Any:
        return self.traced.call(*tensors)


def _outputs(path: Path) -> Any:
    """Return the structure of a library's outputs; None if it is not there or not whole, and so must not be loaded."""
    try:
        facts = json.loads(path.with_suffix(".facts").read_text())
        return pytree.treespec_loads(facts["outputs"]) if facts["sha256"] == _hash(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hash(path: Path) -> str:
    """Hash a library, and the file in which torch looks up the operators of this package that the library calls."""
    nodes = path.with_suffix(".json")
    return hashlib.sha256(path.read_bytes() + (nodes.read_bytes() if nodes.exists() else b"")).hexdigest()


def path_of(subject: str, roots: nn.Module) -> Path:
    """Return the path of the library for `subject` and modules like `roots`, on this machine.

    Raises:
        Unstorable, OSError: there can be no such file.
    """
    described = [subject, torch.__version__, processor(), torch.get_num_threads(), *_structure(roots)]
    return cache_folder() / "compiled" / f"{hashlib.sha256(repr(described).encode()).hexdigest()[:32]}.so"


def _structure(roots: nn.Module) -> Iterator[Any]:
    """Yield everything that code made from a module depends on: classes, their source, plain values, shapes."""
    for name, module in roots.named_modules():
        plain = {k: v for k, v in vars(module).items() if not isinstance(v, dict | set | Tensor | Callable)}
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        yield name, _source(type(module)), repr(plain), [(k, x.dtype, x.shape, x.stride()) for k, x in tensors]
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unstorable(f"{name}: a module with hooks")


@cache
def _source(kind: type) -> str:
    """Name a class and hash the source that it is defined in: its file, and all of `nn` and `ops` if it is ours."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if file is None:
        raise Unstorable(f"{kind.__qualname__}: a class without a source file")
    return f"{kind.__module__}.{kind.__qualname__} {_digest(file)} {_own_digest()}"


@cache
def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@cache
def _own_digest() -> str:
    package = Path(__file__).parents[1]
    return repr([_digest(str(file)) for folder in ("nn", "ops") for file in sorted((package / folder).glob("*.py"))])


def _flatten(x: Any, tensors: list[Tensor], key: list[Any], lengths: dict[int, int]) -> None:
    """Append the tensors of an argument to `tensors`, and to `key` what else tells calls apart in this process."""
    if isinstance(x, Tensor):
        dynamic = lengths.get(id(x))
        key += (x.dtype, *x.shape) if dynamic is None else (x.dtype, *x.shape[:dynamic], *x.shape[dynamic + 1 :])
        tensors.append(x if x.is_contiguous() else x.contiguous())
    elif isinstance(x, dict | list | tuple) or dataclasses.is_dataclass(x):
        items = _items(x)
        key.append((type(x), *items))
        for part in items.values():
            _flatten(part, tensors, key, lengths)
    elif isinstance(x, bool | int | float | str | None):
        key.append(x)
    elif hasattr(x, "__func__"):
        # Not the object itself, which would keep the module alive.
        key += (x.__func__, id(x.__self__))
    else:
        key.append(type(x))
        for name, value in vars(x).items():
            key += (name, value if isinstance(value, bool | int | float | str | None) else id(value))


def _items(x: Any) -> dict[Any, Any]:
    if isinstance(x, dict):
        return x
    return dict(enumerate(x)) if isinstance(x, list | tuple) else vars(x)


def _rebuild(x: Any, tensors: Iterator[Tensor]) -> Any:
    """Return an argument with its tensors replaced, in the order of `_flatten`."""
    if isinstance(x, Tensor):
        return next(tensors)
    if isinstance(x, dict):
        return {name: _rebuild(part, tensors) for name, part in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(_rebuild(part, tensors) for part in x)
    if dataclasses.is_dataclass(x):
        return dataclasses.replace(x, **{name: _rebuild(part, tensors) for name, part in vars(x).items()})
    return x


def describe(x: Any, roots: nn.ModuleList) -> Any:
    """Return what a later process will find the same about an argument, and add the modules that it uses to `roots`."""
    if isinstance(x, Tensor):
        return "tensor"
    if isinstance(x, bool | int | float | str | None):
        return x
    if isinstance(x, nn.Module):
        if all(x is not module for module in roots.modules()):
            roots.append(x)
        return next(name for name, module in roots.named_modules() if module is x)
    if isinstance(x, dict | list | tuple) or dataclasses.is_dataclass(x):
        return type(x).__name__, [(name, describe(part, roots)) for name, part in _items(x).items()]
    if hasattr(x, "__func__"):
        return x.__func__.__qualname__, describe(x.__self__, roots)
    return _source(type(x)), [(name, describe(part, roots)) for name, part in vars(x).items()]
