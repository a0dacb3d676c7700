"""Text from a model: one prompt, a padded batch, or a list of prompts of different lengths.

Shapes: B rows, T prompt tokens, N new tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos.checks import check_int
from open_mythos.compile import compile_decode
from open_mythos.config import MythosConfig
from open_mythos.generation.prompts import check_room, encode_prompt
from open_mythos.generation.sampling import DIVERGED, generator_of, sample
from open_mythos.generation.sampling_params import Biases, Sampling
from open_mythos.generation.speculative import speculate
from open_mythos.nn.depth import check_n_loops
from open_mythos.nn.eval_mode import evaluating
from open_mythos.nn.halting import HaltingRule
from open_mythos.nn.initial_state import check_generator
from open_mythos.nn.inputs import check_ids, check_mask
from open_mythos.nn.static_cache import StaticKVCache
from open_mythos.tokenization.chat_template import END, Message, end_of_turn, render
from open_mythos.tokenization.detokenizer import AnswerText
from open_mythos.tokenization.tokenizer import Tokenizer

OnToken = Callable[[int, int, int], Any]
"""on_token(row, token_id, loops), called for every new token as soon as it is chosen."""


class GenerationMixin(nn.Module):
    """`generate` for a model that has the four methods declared here."""

    cfg: MythosConfig
    make_cache: Callable[..., Any]
    make_view: Callable[..., Any]
    run: Callable[..., Any]
    exit_rule: Callable[..., HaltingRule | None]

    def generate(
        self, input_ids: Any, max_new_tokens: int = 64, n_loops: int | None = None, temperature: float = 1.0,
        top_k: int | None = 50, *, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0, presence_penalty: float = 0.0, logit_bias: Mapping[int, float] | Biases = (),
        attention_mask: Tensor | None = None, exit: str | HaltingRule | None = None,
        exit_threshold: float | None = None, stop: int | str | Sequence[int | str] = (),
        tokenizer: Tokenizer | None = None, seed: int | Sequence[int] | None = None,
        generator: torch.Generator | None = None, on_token: OnToken | None = None, return_loops: bool = False,
        pad_id: int = 0, compiled: bool | None = None, draft_loops: int | None = None, num_speculative_tokens: int = 4,
    ) -> Any:  # fmt: skip
        """Continue prompts, in eval mode and without gradients; the model's mode is restored afterwards.

        Args:
            input_ids: a tensor (B, T), a string or a list of ids for one prompt, or a list of such prompts of any
                lengths. Strings need a `tokenizer`.
            max_new_tokens: tokens to add, at most `max_output_tokens`; prompt and new tokens have to fit `max_seq_len`.
            n_loops: loops per token; None: `max_loop_iters`.
            temperature, top_k, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty, logit_bias: see
                `Sampling`; temperature 0 is greedy.
            attention_mask: (B, T), zero for padding on the left; only with a tensor of prompts.
            exit, exit_threshold: a halting rule for this call, as in `OpenMythos.forward`.
            stop: ids or strings that end a row. A stop id is the row's last token; strings need a `tokenizer`.
            seed: one int64 per row, or one s that gives row i the seed s + i. Rows draw independently of each other.
            generator: one generator for all rows, instead of seeds.
            on_token: called with (row, token_id, loops) for every new token.
            return_loops: also return the loops of each new token, which are those of the position that predicted it.
            pad_id: fills the rows of a tensor that stopped before the longest.
            compiled: decode with machine code for this model and number of rows, and no row leaves before the last.
                True makes it if need be, in tens of seconds; None uses what is stored; see `compile_model`.
            draft_loops, num_speculative_tokens: draft so many tokens of one row with so many loops, and verify them at
                once: the same text as without if greedy, the same distribution if not; see `speculative`.

        Returns:
            Prompts with their continuations, of the kind that was given: a (B, T + N) tensor, one string, one list of
            ids, or a list of them. Text is cut before a stop string. With `return_loops`, (that, loops): a (B, N) int64
            tensor with 0 for padding if a tensor was given, else a list per prompt.

        Raises:
            TypeError, ValueError: an argument is unusable or the context too short; nothing has been generated.
            RuntimeError: `compiled` on a CPU without a C++ compiler.
        """
        cfg = self.cfg
        penalties = repetition_penalty, frequency_penalty, presence_penalty
        params = Sampling(temperature, top_k, top_p, min_p, *penalties, logit_bias)
        prompts = _read_prompts(input_ids, attention_mask, tokenizer, cfg, next(self.parameters()).device)
        _check_rest(prompts, max_new_tokens, params, on_token, pad_id, cfg)
        depth, rule = check_n_loops(n_loops, cfg), self.exit_rule(exit, exit_threshold)
        stops = _Stops(stop, prompts, tokenizer, cfg.vocab_size)
        generators = _generators(seed, generator, len(prompts.ids))
        with evaluating(self):
            if draft_loops is not None:
                drafting = self, draft_loops, num_speculative_tokens, depth, rule, params, generators, compiled
                new, loops = speculate(*drafting, prompts.ids, prompts.mask, max_new_tokens, stops.hit, on_token)
                return prompts.answer(new, loops, stops, pad_id, return_loops)
            note = compile_decode(self, len(prompts.ids), rule, compiled)
            args = prompts, max_new_tokens, depth, rule, params, generators, stops, on_token, note is not None
            new, loops = self._decode(*args)
        if note is not None and max(map(len, new)) > 1:
            note()
        return prompts.answer(new, loops, stops, pad_id, return_loops)

    def _decode(
        self,
        prompts: "_Prompts",
        max_new_tokens: int,
        depth: int,
        rule: HaltingRule | None,
        params: Sampling,
        generators: torch.Generator | list[torch.Generator] | None,
        stops: "_Stops",
        on_token: OnToken | None,
        compiled: bool,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Return every row's new tokens, and the loops of each. A row that has stopped leaves, unless `compiled`."""
        n_rows, T = prompts.ids.shape
        # The last token is never fed back.
        cache = self.make_cache(n_rows, T + max_new_tokens - 1, depth if self.cfg.recurrent_layers else None)
        ids, mask = prompts.ids.long(), prompts.mask
        # Earlier tokens are collected only for the penalties that need them.
        seen = None if params.repetition_penalty == 1 else ids if mask is None else ids.where(mask, -1)
        answered = ids[:, :0] if params.penalizes_answer else None
        rows = list(range(n_rows))  # the row in the answer of each row of the batch
        new: list[list[int]] = [[] for _ in rows]
        used: list[list[int]] = [[] for _ in rows]
        stopped: set[int] = set()
        for _ in range(max_new_tokens):
            view = self.make_view((len(rows), ids.shape[1]), mask, cache)
            logits, result = self.run(ids, view, depth, rule, cache, last_only=True)
            tokens = sample(logits[:, -1], params, generators, seen, answered)
            # At fixed depth the host waits for nothing else in a token.
            news = torch.stack((tokens, result.loops[:, -1], logits.isnan().any(-1)[:, -1])).T.tolist()
            if any(bad for _, _, bad in news):
                raise FloatingPointError(DIVERGED)
            for row, (token, loops, _) in sorted(zip(rows, news, strict=True)):
                if row in stopped:
                    continue
                new[row].append(token)
                used[row].append(loops)
                if on_token is not None:
                    on_token(row, token, loops)
                if stops.hit(row, token):
                    stopped.add(row)
            keep = [i for i, row in enumerate(rows) if row not in stopped]
            if not keep:
                break
            ids, mask = tokens[:, None], None
            seen, answered = (None if x is None else torch.cat((x, ids), dim=1) for x in (seen, answered))
            if len(keep) < len(rows) and not isinstance(cache, StaticKVCache):
                keep = _close_up(keep)
                rows = [rows[i] for i in keep]
                cache.keep_rows(keep)
                index = torch.tensor(keep, device=ids.device)
                ids = ids[index]
                seen, answered = (None if x is None else x[index] for x in (seen, answered))
                if isinstance(generators, list):
                    generators = [generators[i] for i in keep]
            if compiled and not isinstance(cache, StaticKVCache):
                cache = StaticKVCache.over(cache)
        return new, used


def reply(model: GenerationMixin, tokenizer: Tokenizer, messages: Sequence[Message], *args: Any, **options: Any) -> str:
    """Return the assistant's next message; further arguments are those of `generate`, from `max_new_tokens` on."""
    ids, _ = render(messages, tokenizer, reply=True)
    out = model.generate(ids, *args, stop=end_of_turn(tokenizer), tokenizer=tokenizer, **options)
    return tokenizer.decode(out[len(ids) :]).split(END)[0]


@dataclass
class _Prompts:
    """Prompts as one left-padded batch, and the kind in which they were given."""

    ids: Tensor
    mask: Tensor | None
    kind: str
    single: bool
    texts: Sequence[str] = ()
    """The prompts themselves, when they are text."""

    def lists(self) -> list[list[int]]:
        """Return the prompts without padding."""
        lengths = [self.ids.shape[1]] * len(self.ids) if self.mask is None else self.mask.sum(1).tolist()
        return [ids[len(ids) - n :] for ids, n in zip(self.ids.tolist(), lengths, strict=True)]

    def answer(
        self, new: list[list[int]], loops: list[list[int]], stops: "_Stops", pad_id: int, with_loops: bool
    ) -> Any:
        """Join prompts and new tokens to the result of `generate`."""
        if self.kind == "tensor":
            out = torch.cat((self.ids, self._padded(new, pad_id).to(self.ids.dtype)), dim=1)
            return (out, self._padded(loops, 0)) if with_loops else out
        if self.kind == "text":
            rows: list[Any] = [text + stops.text(row) for row, text in enumerate(self.texts)]
        else:
            rows = [ids + row for ids, row in zip(self.lists(), new, strict=True)]
        answer, used = (rows[0], loops[0]) if self.single else (rows, loops)
        return (answer, used) if with_loops else answer

    def _padded(self, rows: list[list[int]], fill: int) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=self.ids.device)


def _read_prompts(
    prompts: Any, mask: Tensor | None, tokenizer: Tokenizer | None, cfg: MythosConfig, device: torch.device
) -> _Prompts:
    if isinstance(prompts, Tensor):
        check_ids(prompts, cfg)
        check_mask(prompts, mask)
        if mask is not None:
            mask = mask.bool()
            if not mask[:, -1].all() or (mask[:, :-1] & ~mask[:, 1:]).any():
                raise ValueError("attention_mask must be zeros, then ones in every row: pad prompts on the left")
        return _Prompts(prompts, mask, "tensor", False)
    if mask is not None:
        raise ValueError(
            "attention_mask goes with a tensor of prompts; a list of prompts is padded here, so leave it out"
        )
    single = isinstance(prompts, str) or (isinstance(prompts, Sequence) and all(isinstance(x, int) for x in prompts))
    rows = [prompts] if single else prompts
    if not isinstance(rows, Sequence) or not rows:
        raise TypeError(
            f"input_ids={prompts!r} must be a (B, T) tensor, a string, a list of ids, or a list of prompts; "
            "use torch.tensor([ids])"
        )
    kind = "text" if isinstance(rows[0], str) else "ids"
    if any(isinstance(row, str) != (kind == "text") for row in rows):
        raise TypeError("input_ids mixes strings and ids; give prompts of one kind")
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in rows]
    ids = [encode_prompt(row, tokenizer, cfg, f"input_ids[{i}]") for i, row in enumerate(rows)]
    width = max(map(len, ids))
    batch = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=device)
    check_ids(batch, cfg)
    lengths = torch.tensor([len(row) for row in ids], device=device)
    mask = torch.arange(width, device=device) >= width - lengths[:, None] if min(map(len, ids)) < width else None
    return _Prompts(batch, mask, kind, single, rows if kind == "text" else ())


def _check_rest(
    prompts: _Prompts, max_new_tokens: int, params: Sampling, on_token: OnToken | None, pad_id: int, cfg: MythosConfig
) -> None:
    check_int("max_new_tokens", max_new_tokens, 1)
    check_room(prompts.ids.shape[1], max_new_tokens, cfg, "max_new_tokens")
    for token, _ in params.biases:
        check_int("logit_bias", token, 0, cfg.vocab_size - 1)
    if on_token is not None and not callable(on_token):
        raise TypeError(f"on_token={on_token!r} must be a function of (row, token_id, loops); use on_token=print")
    check_int("pad_id", pad_id, 0, cfg.vocab_size - 1)


class _Stops:
    """The ids and strings that end a row."""

    def __init__(self, stop: Any, prompts: _Prompts, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        items = [stop] if isinstance(stop, str) or not isinstance(stop, Iterable) else list(stop)
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int | str):
                raise TypeError(f"stop={item!r} must be a token id or a string; use stop=[0] or stop=['.']")
            if isinstance(item, int) and not 0 <= item < vocab_size:
                raise ValueError(f"stop={item} is no id of the vocabulary; use 0 to {vocab_size - 1}")
            if item == "":
                raise ValueError("stop='' would end every row at once; use a string of at least one character")
        self.ids = {item for item in items if isinstance(item, int)}
        strings = [item for item in items if isinstance(item, str)]
        if strings and tokenizer is None:
            raise ValueError(f"stop={strings[0]!r} is a string, which needs tokenizer=; pass it, or stop on a token id")
        self.answers: list[AnswerText] = []
        # Decoded together with the prompt, so that what stands between the two is not lost.
        if tokenizer is not None and (strings or prompts.kind == "text"):
            self.answers = [AnswerText(tokenizer, strings, ids) for ids in prompts.lists()]
        self.texts = [""] * len(self.answers)

    def hit(self, row: int, token: int) -> bool:
        """Take a row's new token, and return whether the row ends with it."""
        if self.answers:
            self.texts[row] += self.answers[row].push(token)
            if self.answers[row].stopped is not None:
                return True
        return token in self.ids

    def text(self, row: int) -> str:
        """Return the continuation of a row that has ended."""
        return self.texts[row] + self.answers[row].flush()


def _generators(
    seed: Any, generator: torch.Generator | None, n_rows: int
) -> torch.Generator | list[torch.Generator] | None:
    check_generator(generator)
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("seed and generator both say where randomness comes from; give one of them")
    seeds = [seed + i for i in range(n_rows)] if type(seed) is int else seed
    if not isinstance(seeds, Sequence) or not all(type(s) is int for s in seeds):
        raise TypeError(f"seed={seed!r} must be an int, or one int per row; use seed=0")
    if len(seeds) != n_rows:
        raise ValueError(f"seed has {len(seeds)} values for {n_rows} rows; give one per row, or one int")
    for s in seeds:
        check_int("seed", s, -(2**63), 2**63 - 1)
    return [generator_of(s) for s in seeds]


def _close_up(keep: list[int]) -> list[int]:
    """Return `keep`, ascending, in the order that moves fewest rows: the last ones fill the gaps."""
    n = len(keep)
    stay, fill = [i for i in keep if i < n], [i for i in keep if i >= n]
    return [i if i in stay else fill.pop() for i in range(n)]
