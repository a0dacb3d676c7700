"""Checks of prompts that `generate`, the engine and `LLM` share."""

from collections.abc import Sequence
from typing import Any

from open_mythos.checks import check_int
from open_mythos.config import MythosConfig
from open_mythos.tokenization.tokenizer import Tokenizer


def encode_prompt(prompt: Any, tokenizer: Tokenizer | None, cfg: MythosConfig, name: str = "prompt") -> list[int]:
    """Return the ids of a prompt given as text or ids; `name` is what messages call it."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name}={prompt!r:.60} is text, which needs a tokenizer; give one, or ids")
        prompt = tokenizer.encode(prompt)
    if not isinstance(prompt, Sequence) or not all(type(i) is int for i in prompt):
        raise TypeError(f"{name}={prompt!r:.60} must be a string or a list of ids; use 'She was ' or [1, 2]")
    if not prompt:
        raise ValueError(f"the {name} is empty, but a next token follows something; give it at least one token")
    for token in (min(prompt), max(prompt)):
        remedy = f"the model has vocab_size={cfg.vocab_size}; check that tokenizer and model belong together"
        check_int(f"{name}: the id", token, 0, cfg.vocab_size - 1, remedy)
    return list(prompt)


def check_room(n_prompt: int, n_new: int, cfg: MythosConfig, name: str) -> None:
    """Refuse more new tokens than the context or the configuration allow; `name` is their option."""
    room = min(cfg.max_output_tokens, cfg.max_seq_len - n_prompt)
    if room < min(1, n_new):
        raise ValueError(f"the prompt's {n_prompt} tokens fill max_seq_len={cfg.max_seq_len}; shorten the prompt")
    if n_new > room:
        raise ValueError(
            f"{name}={n_new} must be at most {room}; the prompt has {n_prompt} tokens, max_seq_len={cfg.max_seq_len} "
            f"and max_output_tokens={cfg.max_output_tokens}, so use {name}={room} or less, or a shorter prompt"
        )
