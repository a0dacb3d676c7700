"""torch.compile where it pays: a graph for the looped block, for a whole call at fixed depth, or for decoding."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from types import MethodType
from typing import Any, Literal, get_args

import torch
from torch import nn

from open_mythos.checks import check_choice
from open_mythos.nn.recurrent import RecurrentBlock
from open_mythos.nn.static_cache import StaticKVCache, StaticLevel
from open_mythos.nn.view import View
from open_mythos.ops.linear import is_traced

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
            `StaticKVCache` and one new token per row does, and returns `model`; other calls run as before. One graph
            for all loops and cache lengths, so tokens that are done still stop; another number of rows, rule or
            threshold is another graph, of at most 64.
        backend: of torch.compile.

    Raises:
        ValueError: `scope` is unknown, or "block" for a model without one, or the weights are int8.
        RuntimeError: the backend is "inductor", the model is on a CPU and there is no C++ compiler.
    """
    check_choice("scope", scope, get_args(Scope))
    if model.cfg.weights == "int8":
        raise ValueError("weights='int8' cannot be compiled yet; use compiled=False, or the model it was made from")
    if scope == "decode" and "encode" in vars(model):
        return model  # has been compiled before
    if backend == "inductor" and model.device.type == "cpu":
        _check_compiler()
    if scope == "model":
        return torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    if scope == "decode":
        stages: list[tuple[nn.Module, str]] = [(model, "encode"), (model, "readout")]
        if model.recurrent is not None:
            stages += [(model.recurrent, "loop"), (model.recurrent, "advance")]
        for owner, name in stages:
            setattr(owner, name, MethodType(_of_one_token(name, getattr(type(owner), name), backend), owner))
        return model
    if model.recurrent is None:
        raise ValueError("scope='block' needs a block to loop, but model.recurrent_layers=0; use scope='model'")
    # A method of the instance, so that a deep copy of the model calls it on the copy.
    loop = torch.compile(RecurrentBlock.loop, fullgraph=True, dynamic=False, backend=backend)
    model.recurrent.loop = MethodType(loop, model.recurrent)
    return model


def _of_one_token(name: str, stage: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Compile a stage for calls that bring one token per row to a static cache; other calls run as before."""
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

    @wraps(stage)
    def call(self: nn.Module, *args: Any, **options: Any) -> Any:
        place = next((i for i, x in enumerate(args) if isinstance(x, View)), None)
        if place is None or options or self.training or is_traced():
            return stage(self, *args, **options)
        view = args[place]
        if isinstance(view.store, StaticKVCache) and view.loop_index is None:
            view = replace(view, store=view.store.at(0))
        if not isinstance(view.store, StaticLevel) or view.positions.shape[1] > 1:
            return stage(self, *args)
        for x in (view.mask, *(x for stored in view.store.stored for x in stored)):
            if not hasattr(x, "_dynamo_dynamic_indices"):
                # One graph for caches of any length.
                torch._dynamo.mark_dynamic(x, 3 if x is view.mask else 1)
        try:
            return compiled(self, *args[:place], view, *args[place + 1 :])
        except FailOnRecompileLimitHit:
            warnings.warn(f"{MANY_SHAPES} graphs of {name} are made; others run uncompiled", stacklevel=2)
            return stage(self, *args)

    return call


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            "compiling for a CPU needs a C++ compiler, and there is none; install g++ (or set CXX to another), "
            "or do without: compile='none' in training, compiled=False in generate"
        ) from error
