"""Checks of what a call to the model is given, made before any work is done."""

from typing import Any

import torch
from torch import Tensor

from open_mythos.checks import check_int
from open_mythos.config import MAX_LOOPS, MythosConfig
from open_mythos.nn.cache import KVCache
from open_mythos.nn.depth import LoopPlan

REMOVED = {
    "kv_cache": "cache=model.make_cache(batch_size, max_len, n_loops)",
    "start_pos": "cache=, which counts its tokens itself",
}
"""Arguments of open-mythos 0.5.0 that are gone, and what to write instead."""


def refuse_unknown(given: dict[str, Any]) -> None:
    """Raise for arguments that `forward` does not have."""
    for name in given:
        if name in REMOVED:
            raise TypeError(f"{name}= was an argument of open-mythos 0.5.0; use {REMOVED[name]}")
        raise TypeError(f"forward() has no argument {name!r}; see help(OpenMythos.forward)")


def check_ids(input_ids: Tensor, cfg: MythosConfig) -> None:
    """input_ids has to be (B, T) integers inside the vocabulary, with at least one row and one token."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids must be a (B, T) tensor of int64, not {type(input_ids).__name__}; use torch.tensor([ids])"
        )
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids has dtype {input_ids.dtype}, but token ids are integers; use input_ids.long()")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, but (B, T) with at least one row of at least one token is "
            "needed; give an empty prompt a start token"
        )
    # On a GPU the range stays the embedding kernel's own check: reading it here would wait for all that is under way.
    # Neither meta nor fake tensors, a subclass, hold numbers.
    no_numbers = input_ids.is_meta or type(input_ids) is not Tensor
    if torch.compiler.is_compiling() or no_numbers or input_ids.is_cuda:
        return
    low, high = torch.stack(input_ids.aminmax()).tolist()
    if low < 0 or high >= cfg.vocab_size:
        raise ValueError(
            f"input_ids has the id {low if low < 0 else high}, outside 0 to {cfg.vocab_size - 1} of "
            f"vocab_size={cfg.vocab_size}; check that tokenizer and model belong together"
        )


def check_mask(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """attention_mask has to have the shape of input_ids."""
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask must be a tensor, not {type(attention_mask).__name__}; use torch.ones_like(input_ids)"
        )
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but it covers the new tokens and so has "
            f"input_ids' shape {tuple(input_ids.shape)}"
        )


def check_documents(documents: Tensor | None, shape: tuple[int, int], cache: KVCache | None) -> None:
    """documents has to have the shape of input_ids and to count upwards in each row, and does not go with a cache."""
    if documents is None:
        return
    if cache is not None:
        raise ValueError(
            "documents= does not go with cache=, which holds one document per row; leave documents out and give each "
            "document a row of its own"
        )
    if not isinstance(documents, Tensor) or documents.dtype not in (torch.int64, torch.int32):
        kind = documents.dtype if isinstance(documents, Tensor) else type(documents).__name__
        raise TypeError(f"documents must be a (B, T) tensor of int64, not {kind}; number the documents of each row")
    if tuple(documents.shape) != tuple(shape):
        raise ValueError(
            f"documents has shape {tuple(documents.shape)}, but numbers the tokens and so has input_ids' shape "
            f"{tuple(shape)}"
        )
    # Numbers are looked at where that is free, as in check_ids.
    no_numbers = documents.is_meta or type(documents) is not Tensor
    if torch.compiler.is_compiling() or no_numbers or documents.is_cuda:
        return
    falls = (documents.diff(dim=1) < 0).nonzero()
    if len(falls):
        b, t = falls[0].tolist()
        raise ValueError(
            f"documents falls from {documents[b, t]} to {documents[b, t + 1]} in row {b}, but the tokens of a document "
            "stand together; number the documents of a row upwards"
        )


def check_room(
    input_ids: Tensor, cache: KVCache | None, cfg: MythosConfig, dtype: torch.dtype, device: torch.device
) -> None:
    """The tokens have to fit the context, or the cache's slots; and the cache has to be of the model's kind."""
    B, T = input_ids.shape
    if cache is None:
        if T > cfg.max_seq_len:
            raise ValueError(
                f"input_ids has {T} tokens, more than max_seq_len={cfg.max_seq_len}; shorten the prompt or build the "
                "model with a larger max_seq_len"
            )
        return
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must come from model.make_cache, not {type(cache).__name__}")
    if (cache.dtype, cache.device) != (dtype, device):
        raise ValueError(
            f"cache holds {cache.dtype} on {cache.device}, but the model is {dtype} on {device}; make a new one"
        )
    if cache.batch_size != B:
        raise ValueError(
            f"cache was made for batch_size={cache.batch_size} but input_ids has {B} rows; make one of {B} rows"
        )
    if cache.length + T > cache.max_len:
        raise ValueError(
            f"cache holds {cache.length} of max_len={cache.max_len} tokens and cannot take {T} more; "
            f"make it with max_len={cache.length + T} or more"
        )


def check_n_loops(n_loops: int | None, cfg: MythosConfig, cache: KVCache | None = None) -> int:
    """The loops a call means: an int in [1, 4096] within the cache's levels; for None those, else `max_loop_iters`."""
    if n_loops is None:
        if cache is not None:
            return cache.n_loops
        return cfg.max_loop_iters if cfg.recurrent_layers else 1
    if not cfg.recurrent_layers:
        raise ValueError(f"n_loops={n_loops!r}, but recurrent_layers=0 makes a plain transformer; leave n_loops out")
    check_int("n_loops", n_loops, 1, MAX_LOOPS, "use n_loops=8, or leave n_loops out for the model's own")
    if cache is not None and n_loops > cache.n_loops:
        raise ValueError(
            f"n_loops={n_loops} is deeper than the cache, which has {cache.n_loops} levels; "
            f"make it with make_cache(..., n_loops={n_loops})"
        )
    return n_loops


def check_plan(plan: LoopPlan, input_ids: Tensor, cfg: MythosConfig, trace: bool, others: dict[str, Any]) -> None:
    """A plan has to fit the batch and the halting, and stands alone: `others` are arguments that do not go with it."""
    if not isinstance(plan, LoopPlan):
        raise TypeError(f"plan={plan!r} must be a LoopPlan; use plan=LoopPlan(depths=(8,) * batch_size)")
    for name, given in others.items():
        if given is not None:
            raise ValueError(f"{name}={given!r} does not go with plan=, which is for training; leave {name} out")
    if len(plan.depths) != input_ids.shape[0]:
        raise ValueError(f"plan.depths has {len(plan.depths)} depths for {input_ids.shape[0]} rows; give one per row")
    if trace and cfg.halting == "act":
        raise ValueError(
            "trace=True with plan= gives the logits of every loop's state, but halting='act' reads out a weighted sum "
            "of states and may end the loop early; use halting='none' or leave trace out"
        )
    deepest = max(plan.depths)
    if trace and min(plan.depths) != deepest:
        raise ValueError(
            f"plan.depths goes from {min(plan.depths)} to {deepest}, but trace=True needs one depth for all rows; give "
            "every row the same depth or leave trace out"
        )
    if cfg.halting == "act" and plan.n_grad is not None and plan.n_grad < deepest:
        raise ValueError(
            f"plan.n_grad={plan.n_grad} is below the plan's {deepest} loops, but halting='act' learns from every loop; "
            "use n_grad=None or halting='none'"
        )


def check_generator(generator: torch.Generator | None) -> None:
    """generator has to be one of torch's."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator={generator!r} must be a torch.Generator; use torch.Generator().manual_seed(0)")


def check_load(tokens_per_expert: Tensor, cfg: MythosConfig) -> None:
    """tokens_per_expert has to have a row for each block of the core and a column for each expert."""
    if not isinstance(tokens_per_expert, Tensor):
        raise TypeError(
            f"tokens_per_expert must be a tensor, not {type(tokens_per_expert).__name__}; pass that of a TrainOutput"
        )
    shape = (cfg.recurrent_layers, cfg.n_experts)
    if tuple(tokens_per_expert.shape) != shape:
        raise ValueError(
            f"tokens_per_expert has shape {tuple(tokens_per_expert.shape)}, but (recurrent_layers, n_experts) is "
            f"{shape}; pass that of a TrainOutput"
        )
