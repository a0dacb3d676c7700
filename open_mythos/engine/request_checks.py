"""Checks of a request against the model, before it waits."""

from collections.abc import Hashable, Sequence
from weakref import WeakValueDictionary

from open_mythos.checks import check_int
from open_mythos.config import MythosConfig
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import check_n_loops
from open_mythos.nn.halting import Fixed, HaltingRule, make_rule
from open_mythos.tokenization.tokenizer import Tokenizer

Rules = WeakValueDictionary[Hashable, HaltingRule]
"""Rules by what requests say of them."""


def prompt_ids(prompt: str | Sequence[int], tokenizer: Tokenizer | None, cfg: MythosConfig) -> list[int]:
    """The ids of a prompt."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"prompt={prompt!r:.60} is text, which needs a tokenizer; give one to the engine, or ids")
        prompt = tokenizer.encode(prompt)
    if not isinstance(prompt, Sequence) or not all(type(i) is int for i in prompt):
        raise TypeError(f"prompt={prompt!r:.60} must be text or a list of ids; use [1, 2, 3]")
    if not prompt:
        raise ValueError("the prompt is empty, but a next token follows something; give it at least one token")
    for token in (min(prompt), max(prompt)):
        remedy = "check that tokenizer and model belong together"
        check_int("prompt: the id", token, 0, cfg.vocab_size - 1, remedy)
    return list(prompt)


def check_length(n_prompt: int, max_tokens: int, cfg: MythosConfig) -> None:
    """Refuse what the context does not hold."""
    room = min(cfg.max_output_tokens, cfg.max_seq_len - n_prompt)
    if room < min(1, max_tokens):
        raise ValueError(f"the prompt's {n_prompt} tokens fill max_seq_len={cfg.max_seq_len}; shorten the prompt")
    if max_tokens > room:
        raise ValueError(
            f"max_tokens={max_tokens} must be at most {room}; the prompt has {n_prompt} tokens, "
            f"max_seq_len={cfg.max_seq_len} and max_output_tokens={cfg.max_output_tokens}, so use max_tokens={room} or "
            "less, or a shorter prompt"
        )


def check_tokens(params: SamplingParams, cfg: MythosConfig) -> None:
    """Refuse ids that the vocabulary does not have."""
    remedy = f"use ids of the vocabulary, from 0 to {cfg.vocab_size - 1}"
    for token in params.stop_token_ids:
        check_int("stop_token_ids", token, 0, cfg.vocab_size - 1, remedy)
    for token, _ in params.biases:
        check_int("logit_bias", token, 0, cfg.vocab_size - 1, remedy)


def depth_of(params: SamplingParams, model: OpenMythos, rules: Rules) -> tuple[HaltingRule, int, Hashable]:
    """The rule and the most loops, and what tells one depth from another; a new rule is added to `rules`."""
    cfg, block = model.cfg, model.recurrent
    n_loops = check_n_loops(params.n_loops, cfg)
    exit = params.exit
    if block is None:
        for name in ("exit", "exit_threshold", "min_loops"):
            if (value := getattr(params, name)) is not None:
                raise ValueError(f"{name}={value!r} needs a model with a recurrent block; leave {name} out")
        return rules.setdefault(None, Fixed()), 1, None
    min_loops = cfg.min_loops
    if params.min_loops is not None:
        check_int("min_loops", params.min_loops, 1, n_loops, f"use 1 to n_loops={n_loops}")
        min_loops = params.min_loops
    if isinstance(exit, HaltingRule):
        if params.min_loops is not None or params.exit_threshold is not None:
            raise ValueError("min_loops and exit_threshold are for a rule given by name; set the rule's own")
        return exit, n_loops, (n_loops, exit)
    if exit is None and params.exit_threshold is not None:
        raise ValueError(f"exit_threshold={params.exit_threshold} needs a rule to belong to; pass exit='kl' too")
    own = "fixed" if block.act is None else "act"
    name, threshold = own if exit is None else exit, params.exit_threshold
    rule = make_rule(name, threshold, min_loops, cfg, block.act)
    key = (name, threshold, min_loops)
    return rules.setdefault(key, rule), n_loops, (n_loops, *key)
