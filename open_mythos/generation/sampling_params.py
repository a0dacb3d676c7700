"""The options of a request: the one declaration that the commands, the engine and the HTTP server share. No torch.

Each option is a field with its default and its meaning; a number also has a `Bound`. The commands make flags of the
fields (cli/options.py), the server makes its bounds of them (server/protocol.py), and the classes here check them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import TYPE_CHECKING, Any

from open_mythos.checks import MAX_INT, check_bool, check_int, check_number
from open_mythos.config import MAX_LOOPS

if TYPE_CHECKING:
    from open_mythos.nn.halting import HaltingRule

MAX_LOGIT_BIASES = 1024
"""Tokens whose logits one request may raise or lower."""
MAX_LOGPROBS = 20
"""The most of the best tokens whose log-probabilities a request may ask for."""
Biases = tuple[tuple[int, float], ...]
"""Pairs of a token id and the number that is added to its logit."""


@dataclass(frozen=True)
class Bound:
    """The numbers that an option may take, from `low` up to `high` (None: no limit)."""

    low: float
    high: float | None = None
    remedy: str = ""
    is_above: bool = False
    """True if `low` itself is not allowed."""

    def check(self, name: str, value: object, is_int: bool) -> None:
        """Refuse a value outside the bound."""
        if is_int:
            check_int(name, value, int(self.low), MAX_INT if self.high is None else int(self.high), self.remedy)
        else:
            check_number(
                name, value, self.low, inf if self.high is None else self.high, above=self.is_above, remedy=self.remedy
            )


def _option(default: Any, help: str, *bound: Any, **more: Any) -> Any:
    """Declare an option: its default, its meaning and, for a number, the arguments of its `Bound`."""
    return field(default=default, metadata={"help": help, "bound": Bound(*bound, **more) if bound else None})


@dataclass(frozen=True)
class Sampling:
    """Options that choose the next token; the defaults draw from the model's own distribution.

    Raises:
        TypeError: a field is no number (a bool is none), or `logit_bias` is no mapping.
        ValueError: a field is out of range.
    """

    # fmt: off
    temperature: float = _option(
        1.0, "Divides the logits; 0 is greedy: the best token, whatever the filters say.",
        0, remedy="use 0 for greedy, or 1.0")
    top_k: int | None = _option(None, "Keep the k best tokens; 0 keeps all.", 0, remedy="use top_k=0 to keep all")
    top_p: float = _option(
        1.0, "Keep the fewest best tokens whose probabilities sum to at least top_p; 0 keeps the best one.",
        0, 1, "use top_p=1.0 to keep all")
    min_p: float = _option(
        0.0, "Keep the tokens at least min_p times as probable as the best.", 0, 1, "use min_p=0.0 to keep all")
    repetition_penalty: float = _option(
        1.0, "Divides the positive logits of tokens in prompt and answer, and multiplies the negative ones.",
        0, remedy="use 1.0 for none", is_above=True)
    frequency_penalty: float = _option(
        0.0, "Subtracted from a logit for each time its token occurs in the answer so far.", -2, 2, "use 0.0 for none")
    presence_penalty: float = _option(
        0.0, "Subtracted once from the logits of all tokens in the answer so far.", -2, 2, "use 0.0 for none")
    logit_bias: Mapping[int, float] | Biases = field(default=(), metadata={
        "help": "Numbers from -100 to 100 that are added to the logits of these ids; stored as `biases`."})
    # fmt: on

    def __post_init__(self) -> None:
        check_bounds(self)
        # A mapping cannot be hashed, and may change after it was checked.
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def biases(self) -> Biases:
        """`logit_bias` as pairs in the order of the ids."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    @property
    def penalizes_answer(self) -> bool:
        """True if the choice depends on the tokens of the answer so far."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0


@dataclass(frozen=True)
class SamplingParams(Sampling):
    """Options of a request: how its tokens are chosen, when it ends, and how many loops a token takes.

    Raises:
        TypeError, ValueError: a field is unusable with any model.
    """

    # fmt: off
    n: int = _option(
        1, "Answers to each prompt; answer i has the seed `seed + i`, which wraps around at the largest int64.",
        1, 2**16, "use n=1")
    max_tokens: int = _option(
        16, "New tokens of each answer at most, the stop token included; 0 computes the prompt only.",
        0, 2**31, "use max_tokens=16")
    seed: int | None = _option(
        None, "Seed of the request's own random numbers, any int64; left out: a fresh one. Equal seeds draw equally, "
        "whatever else runs.", -(2**63), 2**63 - 1, "use seed=0")
    stop: str | Sequence[str] = _option((), "Strings that end an answer. The text ends before them.")
    stop_token_ids: Sequence[int] = _option(
        (), "Ids that end an answer and are its last token, in addition to the tokenizer's end token.")
    ignore_eos: bool = _option(False, "Continue after the tokenizer's end token.")
    logprobs: int | None = _option(
        None, "Return the log-probability of each token, and those of this many best tokens; left out: neither.",
        0, MAX_LOGPROBS, "use logprobs=5 or less")
    prompt_logprobs: int | None = _option(
        None, "Return the same for each prompt token but the first; left out: neither. The whole prompt is then "
        "computed, even where a cached prefix could be reused.", 0, MAX_LOGPROBS, "use prompt_logprobs=5 or less")
    json_schema: str | Mapping[str, Any] | None = _option(
        None, "JSON schema that the answer has to match, as JSON or as a mapping, stored as JSON; left out: any text. "
        "It needs the extra `structured`.")
    n_loops: int | None = _option(
        None, "The most loops a token may take; left out: the model's max_loop_iters.",
        1, MAX_LOOPS, "use n_loops=8, or leave n_loops out for the model's own")
    min_loops: int | None = _option(None, "The fewest loops of a token; left out: the model's min_loops.")
    exit: "str | HaltingRule | None" = field(default=None, metadata={
        "help": "Rule that lets a token leave the loop early; left out: the model's own."})
    exit_threshold: float | None = _option(
        None, "Threshold of that rule; left out: its default.", 0, is_above=True)
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, example in (("stop", "'.'"), ("stop_token_ids", "0")):
            given = getattr(self, name)
            if not isinstance(given, Iterable):
                raise TypeError(f"{name}={given!r} must be a list; use {name}=[{example}], or leave it out")
            if not isinstance(given, str):
                # A copy, because a caller may change the list after it was checked.
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

    @property
    def schema(self) -> str | None:
        """`json_schema` as JSON."""
        assert self.json_schema is None or isinstance(self.json_schema, str)
        return self.json_schema

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def sampling(self) -> Sampling:
        """The options that choose the next token, alone."""
        return Sampling(**{option.name: getattr(self, option.name) for option in fields(Sampling)})

    def of_answer(self, place: int) -> "SamplingParams":
        """Return the parameters of answer `place` alone."""
        seed = None if self.seed is None else (self.seed + place + 2**63) % 2**64 - 2**63
        return replace(self, n=1, seed=seed)


OPTIONS = {option.name: option for option in fields(SamplingParams)}
"""Every option by its name: a field whose metadata has its `help` and, for a number, its `bound`."""


def check_bounds(options: object) -> None:
    """Refuse numbers out of range in any object whose fields are options; None is allowed where it is the default."""
    for name, option in OPTIONS.items():
        value, bound = getattr(options, name, option.default), option.metadata.get("bound")
        if bound is not None and (value is not None or option.default is not None):
            bound.check(name, value, is_int=option.type in (int, int | None))


def _biases(given: object) -> Biases:
    remedy = "use a mapping such as {50: -100}"
    pairs = tuple(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise TypeError(f"logit_bias={given!r:.60} must map ids to numbers; {remedy}")
    if len(pairs) > MAX_LOGIT_BIASES:
        raise ValueError(f"logit_bias has {len(pairs)} entries, at most {MAX_LOGIT_BIASES} are allowed; send fewer")
    for token, bias in pairs:
        check_int("logit_bias", token, 0, 2**31, "use ids of the vocabulary")
        check_number(f"logit_bias[{token}]", bias, -100, 100, remedy="use -100 to exclude a token")
    return tuple(sorted(pairs))


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
