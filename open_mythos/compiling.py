"""torch.compile where it pays: one graph for the looped block, or one for a whole call at fixed depth."""

from collections.abc import Callable
from types import MethodType
from typing import Any, Literal, get_args

import torch

from open_mythos.checks import check_choice
from open_mythos.model import OpenMythos
from open_mythos.nn.recurrent import RecurrentBlock

Scope = Literal["block", "model"]


def compile_model(model: OpenMythos, scope: Scope = "model", backend: str = "inductor") -> Callable[..., Any]:
    """A function with the signature of `model(...)` that runs compiled, without graph breaks.

    Shapes are static, and so are training mode and whether there are gradients: each combination is compiled when it
    first occurs, for tens of seconds, and at most eight of them (torch's `recompile_limit`). A call with a cache, whose
    length grows, is therefore left to `model(...)` itself.

    Args:
        scope: "block" compiles one loop, in place, and returns `model`: one graph for any number of loops, as long as
            all rows run the same number and none exits. "model" compiles everything from the ids to the output, with
            the loops unrolled: the fastest for small models, one graph for each plan or `n_loops`. No loop is then left
            out when every token has exited; the result is the same.
        backend: of torch.compile.

    Raises:
        ValueError: `scope` is unknown, or "block" for a model without one.
        RuntimeError: the backend is "inductor", the model is on a CPU and there is no C++ compiler.
    """
    check_choice("scope", scope, get_args(Scope))
    if backend == "inductor" and model.device.type == "cpu":
        _check_compiler()
    if scope == "model":
        return torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    if model.recurrent is None:
        raise ValueError("scope='block' needs a block to loop, but model.recurrent_layers=0; use scope='model'")
    # A method of the instance, so that a deep copy of the model calls it on the copy.
    loop = torch.compile(RecurrentBlock.loop, fullgraph=True, dynamic=False, backend=backend)
    model.recurrent.loop = MethodType(loop, model.recurrent)
    return model


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            "compiling for a CPU needs a C++ compiler, and there is none; install g++ (or set CXX to another), "
            "or train with compile='none'"
        ) from error
