"""The input of a call to the model: checks of its arguments, made before any work, and the view made from them.

Shapes: B rows, T new tokens, S key slots (earlier tokens, then the new ones).
"""

from typing import Any

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.nn.cache import KVCache, Scratch
from open_mythos.nn.rope import rotary_table
from open_mythos.nn.view import View

REMOVED = {
    "kv_cache": "cache=model.make_cache(batch_size, max_len, n_loops)",
    "start_pos": "cache=, which counts its tokens itself",
}
"""Arguments of open-mythos 0.5.0 that are gone, each with its replacement."""


def refuse_unknown(given: dict[str, Any]) -> None:
    """Raise for arguments that `forward` does not have."""
    for name in given:
        if name in REMOVED:
            raise TypeError(f"{name}= was an argument of open-mythos 0.5.0; use {REMOVED[name]}")
        raise TypeError(f"forward() has no argument {name!r}; see help(OpenMythos.forward)")


def check_ids(input_ids: Tensor, cfg: MythosConfig) -> None:
    """Refuse ids that are not (B, T) integers inside the vocabulary, with at least one row and one token."""
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
    # On a GPU the embedding kernel itself checks the range: reading it here would wait for all work under way.
    # Meta and fake tensors (a subclass) hold no numbers.
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
    """Refuse a mask of another shape than that of input_ids."""
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
    """Refuse documents of another shape than that of input_ids, ones that fall within a row, and ones with a cache."""
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
    # Numbers are checked where that is free, as in check_ids.
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
    """Refuse tokens that do not fit the context or the cache's slots, and a cache of another dtype, device or batch."""
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


def make_view(
    shape: tuple[int, int],
    rope_dim: int,
    rope_theta: float,
    dtype: torch.dtype,
    device: torch.device,
    attention_mask: Tensor | None = None,
    cache: KVCache | None = None,
    documents: Tensor | None = None,
) -> View:
    """Return the view of a call that brings `shape` = (B, T) new tokens.

    Args:
        attention_mask: (B, T), nonzero for tokens and zero for padding, which may stand anywhere; None: no padding.
        cache: holds the earlier tokens of the same rows.
        documents: (B, T), the number of each token's document in its row; a new one begins wherever the number changes.
            Positions count on across documents, because attention depends on their differences alone. Not with a cache.
    """
    B, T = shape
    valid = None if attention_mask is None else attention_mask.bool()
    starts = None if documents is None else _starts(documents)
    if valid is None and (cache is None or not (cache.padded or cache.is_static)):
        # 1. Without padding every row stands at the same position, so one row of angles serves all. A static cache has
        # its length on the device and takes the general way below.
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + T, device=device)[None].expand(B, T)
        # None: a causal square, or a single query that sees every slot; kernels are fastest without a mask.
        mask = None
        if (past and T > 1) or starts is not None:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)[None]
        if mask is not None and starts is not None:
            mask = mask & (positions[:1] >= starts[..., None])
        rope = rotary_table(positions[:1], rope_dim, rope_theta, dtype)
        return View(cache or Scratch(), positions, rope, None if mask is None else mask[:, None], starts=starts)
    # 2. With padding each row has positions and visible slots of its own.
    new = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    visible, query = (new, torch.arange(T, device=device)) if cache is None else cache.visible(new)
    # A position counts the tokens before it and no padding, so a row padded on the left has the positions that it
    # would have alone. Padding before the first token would be at -1, hence the clamp.
    n_earlier = torch.zeros(B, dtype=torch.int64, device=device) if cache is None else cache.n_valid
    positions = (n_earlier[:, None] + new.cumsum(1) - 1).clamp(min=0)
    # A query sees the slots up to its own that hold tokens. Slots count padding, unlike positions.
    slots, query = torch.arange(visible.shape[1], device=device), query[:, None]
    # A padding query would see nothing and its softmax would be 0/0, so every query sees itself.
    mask = (visible[:, None] & (slots <= query)) | (slots == query)
    if starts is not None:
        mask = mask & (slots >= starts[..., None])
    rope = rotary_table(positions, rope_dim, rope_theta, dtype)
    return View(cache or Scratch(), positions, rope, mask[:, None], valid)


def _starts(documents: Tensor) -> Tensor:
    """Return the slot at which each token's document begins: (B, T) -> (B, T) int64."""
    slots = torch.arange(documents.shape[1], device=documents.device)
    # The roll brings the row's last number to slot 0; whether slot 0 begins or not, its start is 0.
    begins = documents != documents.roll(1, dims=1)
    return (slots * begins).cummax(dim=1).values
