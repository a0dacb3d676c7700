"""What a request asks for besides its prompt."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from open_mythos.checks import check_bool, check_int
from open_mythos.generation.sampling import Sampling
from open_mythos.nn.halting import HaltingRule

MAX_LOGPROBS = 20
"""The most of the best tokens whose log-probabilities can be asked for."""


@dataclass(frozen=True)
class SamplingParams(Sampling):
    """How a request is answered: how tokens are chosen (`Sampling`), when it ends, and how deep it thinks.

    Raises:
        TypeError, ValueError: a field is not usable, whatever the model.
    """

    n: int = 1
    """Answers to each prompt; answer i has the seed `seed + i`, which wraps around at the largest int64."""
    max_tokens: int = 16
    """New tokens of each answer, the stop token included; 0 computes the prompt only."""
    seed: int | None = None
    """Seed of the request's own random numbers, any int64; None: a fresh one. Equal seeds draw equally, whatever else
    runs."""
    stop: str | Sequence[str] = ()
    """Strings that end an answer. The text ends before them."""
    stop_token_ids: Sequence[int] = ()
    """Ids that end an answer and are its last token, beside the tokenizer's end token."""
    ignore_eos: bool = False
    """Go on after the tokenizer's end token."""
    logprobs: int | None = None
    """Return the log-probability of each token, and those of so many best ones; None: neither."""
    prompt_logprobs: int | None = None
    """Return the log-probability of each token of the prompt but the first, and those of so many best ones; None:
    neither. The whole prompt is then computed, whatever beginning of it could be reused."""
    json_schema: str | Mapping[str, Any] | None = None
    """JSON schema that the answer has to match, as JSON or as a mapping; None: any text. Stored as JSON. It needs the
    extra `structured`."""
    n_loops: int | None = None
    """The most loops a token may take; None: the model's `max_loop_iters`."""
    min_loops: int | None = None
    """The fewest; None: the model's `min_loops`."""
    exit: str | HaltingRule | None = None
    """The rule that lets a token leave the loop, as in `OpenMythos.forward`; None: the model's own."""
    exit_threshold: float | None = None
    """Of that rule; None: its default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("n", self.n, 1, 2**16, "use n=1")
        check_int("max_tokens", self.max_tokens, 0, 2**31, "use max_tokens=16")
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**63 - 1, "use seed=0")
        for name, one in (("stop", "'.'"), ("stop_token_ids", "0")):
            given = getattr(self, name)
            if not isinstance(given, Iterable):
                raise TypeError(f"{name}={given!r} must be a list; use {name}=[{one}], or leave it out")
            if not isinstance(given, str):
                # A copy: what is checked here is what is meant, whatever becomes of the list.
                object.__setattr__(self, name, tuple(given))
        for text in self.stop_strings:
            if not isinstance(text, str):
                raise TypeError(f"stop={text!r} must be a string; use stop_token_ids for ids")
            if not text:
                raise ValueError("stop='' would end every answer at once; use a string of at least one character")
        for token in self.stop_token_ids:
            check_int("stop_token_ids", token, 0, 2**31, "use ids of the vocabulary")
        check_bool("ignore_eos", self.ignore_eos)
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _as_json(self.json_schema))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 0, MAX_LOGPROBS, f"use {name}=5 or less")

    @property
    def schema(self) -> str | None:
        """`json_schema` as JSON."""
        assert self.json_schema is None or isinstance(self.json_schema, str)
        return self.json_schema

    def of_answer(self, place: int) -> "SamplingParams":
        """The parameters of answer `place` alone."""
        seed = None if self.seed is None else (self.seed + place + 2**63) % 2**64 - 2**63
        return replace(self, n=1, seed=seed)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def _as_json(schema: object) -> str:
    if isinstance(schema, str):
        return schema
    remedy = 'use a schema such as {"type": "object"}'
    if not isinstance(schema, Mapping):
        raise TypeError(f"json_schema={schema!r:.60} must be JSON or a mapping; {remedy}")
    try:
        return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"json_schema cannot be written as JSON ({error!s:.100}); {remedy}") from None
