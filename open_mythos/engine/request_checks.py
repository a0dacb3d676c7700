"""Checks of a request against the model, made once, before it waits."""

from collections.abc import Hashable
from weakref import WeakValueDictionary

from open_mythos.checks import check_int
from open_mythos.config import MythosConfig
from open_mythos.generation.prompts import check_room
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import check_n_loops
from open_mythos.nn.halting import Fixed, HaltingRule, LastDecides, make_rule

Rules = WeakValueDictionary[Hashable, HaltingRule]
"""Exit rules in use, by the options that requests give for them."""


def check_request(params: SamplingParams, n_prompt: int, cfg: MythosConfig, has_tokenizer: bool) -> None:
    """Refuse what does not fit the context, the vocabulary, or an engine without a tokenizer."""
    if params.n != 1:
        raise ValueError(f"n={params.n} is for LLM.generate; add a request for each answer, with seeds of their own")
    check_room(n_prompt, params.max_tokens, cfg, "max_tokens")
    remedy = f"use ids of the vocabulary, from 0 to {cfg.vocab_size - 1}"
    for token in params.stop_token_ids:
        check_int("stop_token_ids", token, 0, cfg.vocab_size - 1, remedy)
    for token, _ in params.biases:
        check_int("logit_bias", token, 0, cfg.vocab_size - 1, remedy)
    if params.stop_strings and not has_tokenizer:
        raise ValueError(f"stop={params.stop_strings[0]!r} is text, which needs a tokenizer; use stop_token_ids")
    if params.schema is not None and not has_tokenizer:
        raise ValueError("json_schema is about text, which needs a tokenizer; give one to the engine")


def depth_of(
    params: SamplingParams, model: OpenMythos, rules: Rules, together: bool
) -> tuple[HaltingRule, int, Hashable]:
    """Return the exit rule, the most loops, and a key that is equal for equal depths; add a new rule to `rules`.

    Args:
        together: a prompt's tokens leave with its last one, by any rule that lets them leave.
    """
    cfg, block = model.cfg, model.recurrent
    n_loops = check_n_loops(params.n_loops, cfg)
    exit, threshold, min_loops = params.exit, params.exit_threshold, params.min_loops
    if block is None:
        for name in ("exit", "exit_threshold", "min_loops"):
            if (value := getattr(params, name)) is not None:
                raise ValueError(f"{name}={value!r} needs a model with a recurrent block; leave {name} out")
        return rules.setdefault(None, Fixed()), 1, None
    if min_loops is not None:
        check_int("min_loops", min_loops, 1, n_loops, f"use 1 to n_loops={n_loops}")
    if isinstance(exit, HaltingRule):
        if min_loops is not None or threshold is not None:
            raise ValueError("min_loops and exit_threshold are for a rule given by name; set the rule's own")
        if together and not isinstance(exit, Fixed | LastDecides):
            exit = rules.setdefault(exit, LastDecides(exit))
        return exit, n_loops, (n_loops, exit)
    if exit is None and threshold is not None:
        raise ValueError(f"exit_threshold={threshold} needs a rule to belong to; pass exit='kl' too")
    # Equal options share one rule object, so that their tokens form one batch in the loop.
    own = "fixed" if block.act is None else cfg.halting
    key = (own if exit is None else exit, threshold, cfg.min_loops if min_loops is None else min_loops)
    rule = make_rule(*key, cfg, block.act)
    if together and not isinstance(rule, Fixed):
        rule = LastDecides(rule)
    return rules.setdefault(key, rule), n_loops, (n_loops, *key)
