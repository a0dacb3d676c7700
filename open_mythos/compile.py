"""torch.compile where it pays: a graph for the looped block, for a whole call at fixed depth, or for decoding."""

import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import wraps
from types import FunctionType, MethodType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from open_mythos.checks import check_choice
from open_mythos.nn.block import TransformerBlock
from open_mythos.nn.halting import Exit, HaltingRule
from open_mythos.nn.recurrent import RecurrentBlock
from open_mythos.nn.static_cache import StaticKVCache, StaticLevel
from open_mythos.nn.view import View
from open_mythos.ops.linear import is_traced
from open_mythos.ops.machine_code import MachineCode, Unstorable, describe, path_of

Scope = Literal["block", "model", "decode"]

MANY_SHAPES = 64
"""Batch sizes, and other things that need a graph of their own, up to which decoding compiles."""


def compile_model(model: Any, scope: Scope = "model", backend: str = "inductor") -> Callable[..., Any]:
    """Return a function with the signature of `model(...)` that runs compiled, without graph breaks.

    In "block" and "model" shapes are static, and so are training mode and whether there are gradients: each combination
    is compiled when it first occurs, for tens of seconds, and at most eight of them (torch's `recompile_limit`). A call
    with a cache, whose length grows, is therefore left to `model(...)` itself.

    Args:
        model: an `OpenMythos`.
        scope: "block" compiles one loop, in place, and returns `model`: one graph for any number of loops, as long as
            all rows run the same number and none exits. "model" compiles everything from the ids to the output, with
            the loops unrolled: the fastest for small models, one graph for each plan or `n_loops`. No loop is then left
            out when every token has exited; the result is the same. "decode" compiles, in place, what a call with a
            `StaticKVCache` and one new token per row does, and returns `model`; other calls run as before. One program
            for all loops and cache lengths, so tokens that are done still stop; another number of rows, rule or
            threshold is another program. On a CPU they are stored in the user's cache folder; elsewhere torch makes
            them in every process, at most 64.
        backend: of torch.compile.

    Raises:
        ValueError: `scope` is unknown, or "block" for a model without one, or the weights are int8.
        RuntimeError: the backend is "inductor", the model is on a CPU and there is no C++ compiler.
    """
    check_choice("scope", scope, get_args(Scope))
    if model.cfg.weights == "int8":
        raise ValueError("weights='int8' cannot be compiled yet; use compiled=False, or the model it was made from")
    if backend == "inductor" and model.device.type == "cpu":
        _check_compiler()
    if scope == "model":
        return torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    if scope == "decode":
        _compile_decode(model, backend)
        return model
    if model.recurrent is None:
        raise ValueError("scope='block' needs a block to loop, but model.recurrent_layers=0; use scope='model'")
    # A method of the instance, so that a deep copy of the model calls it on the copy.
    loop = torch.compile(RecurrentBlock.loop, fullgraph=True, dynamic=False, backend=backend)
    model.recurrent.loop = MethodType(loop, model.recurrent)
    return model


def _compile_decode(model: Any, backend: str) -> None:
    """Compile, in place, the stages of a call that brings one token per row to a static cache."""
    whole: list[tuple[nn.Module, str]] = [(model, "encode"), (model, "readout")]
    blocks = [(block, "forward") for block in (*model.prelude, *model.coda)]
    loop = [] if model.recurrent is None else [(model.recurrent, "loop"), (model.recurrent, "advance")]
    if any(name in vars(owner) for owner, name in (*whole, *blocks, *loop)):
        return  # has been compiled before
    stored = backend == "inductor" and model.device.type == "cpu"
    made: dict[Any, Callable[..., Any]] = {}
    # On a CPU blocks instead of what contains them: one library serves them all, with the weights of each.
    for owner, name in (*(blocks if stored else whole), *loop):
        stage = getattr(type(owner), name)
        if stage not in made:
            made[stage] = _of_one_token(stage, MachineCode(stage) if stored else _graphs(stage, backend))
        setattr(owner, name, MethodType(made[stage], owner))


def _of_one_token(stage: FunctionType, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Run `compiled` for calls that bring one token per row to a static cache; other calls run `stage`."""

    @wraps(stage)
    def call(self: nn.Module, *args: Any, **options: Any) -> Any:
        place = next((i for i, x in enumerate(args) if isinstance(x, View)), None)
        if place is None or options or self.training or is_traced():
            return stage(self, *args, **options)
        view, rest = args[place], args[place + 1 :]
        if isinstance(view.store, StaticKVCache) and view.loop_index is None:
            view = replace(view, store=view.store.at(0))
        if not isinstance(view.store, StaticLevel) or view.positions.shape[1] > 1:
            return stage(self, *args)
        if isinstance(self, TransformerBlock):
            # The layer's own keys and values alone, so that the code is the same for every layer.
            view, rest = replace(view, store=replace(view.store, stored=[view.store.stored[rest[0]]])), (0,)
        if rest and isinstance(rest[-1], Exit) and not rest[-1].rule.needs_probe:
            rest = (*rest[:-1], replace(rest[-1], probe=None))  # which would make all of the model's weights inputs
        # One program for caches of any length, and for every loop.
        lengths = [(x, 1) for stored in view.store.stored for x in stored]
        lengths += [] if view.mask is None else [(view.mask, 3)]
        return compiled(lengths, self, *args[:place], replace(view, lockstep=None), *rest)

    return call


def _graphs(stage: FunctionType, backend: str) -> Callable[..., Any]:
    """Compile a stage by torch.compile, which makes its graphs anew in every process."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    compiled = torch.compile(  # ty: ignore[no-matching-overload] (two options are missing in torch's overloads)
        stage,
        fullgraph=True,
        dynamic=False,
        backend=backend,
        recompile_limit=MANY_SHAPES,
        isolate_recompiles=True,
        # A stage's modules are those of one model in eval mode, and checking that again took up to a fifth of a token.
        options={"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe},
    )

    def call(lengths: list[tuple[Tensor, int]], *args: Any) -> Any:
        for x, dim in lengths:
            if not hasattr(x, "_dynamo_dynamic_indices"):
                torch._dynamo.mark_dynamic(x, dim)
        try:
            return compiled(*args)
        except FailOnRecompileLimitHit:
            warnings.warn(f"{MANY_SHAPES} graphs of {stage.__name__} are made; others run uncompiled", stacklevel=3)
            return stage(*args)

    return call


def compile_decode(model: Any, n_rows: int, rule: HaltingRule | None, wanted: bool | None) -> Callable[[], None] | None:
    """Compile `model` for decoding so many rows if it is `wanted`, or None and has been done on this machine before.

    Returns: None if the model is to decode without; else a function to call when it has decoded, which notes that down.
    """
    record = None
    # Nothing is stored for a model on another device or compiled by another backend.
    if wanted is not False and model.device.type == "cpu" and "encode" not in vars(model):
        with suppress(Unstorable, OSError):
            record = path_of(f"decode {n_rows} {describe(rule, nn.ModuleList([model]))}", model).with_suffix(".made")
    if not wanted and (record is None or not record.exists()):
        return None
    compile_model(model, "decode")

    def note() -> None:
        with suppress(OSError):  # a warning has said that nothing can be stored
            if record is not None:
                record.touch()

    return note


def _check_compiler() -> None:
    if shutil.which(os.environ.get("CXX", "g++")):
        return  # without the import of torch's compiler, which takes a second
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            "compiling for a CPU needs a C++ compiler, and there is none; install g++ (or set CXX to another), "
            "or do without: compile='none' in training, compiled=False in generate"
        ) from error
