"""generate against a loop over full forward passes, and its promises on seeds, stops, padding and modes."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos import KVCache, OpenMythos
from open_mythos.generation.sampling import Sampling, sample
from open_mythos.nn.halting import LatentDiff
from open_mythos.tokenization.tokenizer import ByteTokenizer, SymbolTokenizer
from tests.models import ATTENTIONS, RULES, THRESHOLDS, random_ids, scaled, tiny


@pytest.fixture(params=ATTENTIONS)
def model(request: pytest.FixtureRequest) -> OpenMythos:
    return scaled(tiny(attn_type=request.param), dtype=torch.float64)


@pytest.fixture
def text_model() -> OpenMythos:
    return scaled(tiny(vocab_size=259))


@torch.no_grad()
def without_cache(model: OpenMythos, row: list[int], n: int, **options: Any) -> list[int]:
    for _ in range(n):
        row = [*row, int(model(torch.tensor([row]), **options)[0, -1].argmax())]
    return row


@pytest.mark.parametrize("exit", RULES)
def test_greedy_is_argmax_of_full_passes(model: OpenMythos, exit: str | None) -> None:
    ids = random_ids(model.cfg, 3, 5)
    options = {"n_loops": 6, "exit": exit, "exit_threshold": THRESHOLDS.get(exit or "")}
    out = model.generate(ids, max_new_tokens=9, temperature=0, **options)
    assert out.tolist() == [without_cache(model, row, 9, **options) for row in ids.tolist()]


def test_plain_transformer_generates() -> None:
    model = scaled(tiny(recurrent_layers=0), dtype=torch.float64)
    ids = random_ids(model.cfg, 2, 5)
    out, loops = model.generate(ids, max_new_tokens=6, temperature=0, return_loops=True)
    assert out.tolist() == [without_cache(model, row, 6) for row in ids.tolist()]
    assert not loops.any()


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_prompts_of_any_length_as_if_alone(model: OpenMythos, temperature: float) -> None:
    """A list, a padded tensor, and one at a time; with a seed per row, whatever the company."""
    prompts = [random_ids(model.cfg, n, seed=n).tolist() for n in (1, 7, 3, 5)]
    options: dict[str, Any] = {"max_new_tokens": 6, "n_loops": 5, "temperature": temperature, "top_p": 0.9}
    alone = [model.generate(prompt, seed=40 + i, **options) for i, prompt in enumerate(prompts)]
    assert all(row[: len(prompt)] == prompt for row, prompt in zip(alone, prompts, strict=True))
    assert model.generate(prompts, seed=40, **options) == alone
    assert model.generate(prompts[::-1], seed=[43, 42, 41, 40], **options) == alone[::-1]
    ids = torch.zeros(4, 7, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, 7 - len(prompt) :], mask[i, 7 - len(prompt) :] = torch.tensor(prompt), 1
    padded = model.generate(ids, attention_mask=mask, seed=40, **options)
    assert [row[7 - len(prompt) :] for row, prompt in zip(padded.tolist(), prompts, strict=True)] == alone


def test_seeds_and_generators() -> None:
    model = scaled(tiny())
    ids = random_ids(model.cfg, 3, 4)
    outs = [model.generate(ids, max_new_tokens=12, seed=s) for s in (7, 7, 8)]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    drawn = [model.generate(ids, max_new_tokens=12, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model.generate(ids, max_new_tokens=4, seed=0)
    assert torch.equal(torch.get_rng_state(), before), "a seed must not touch the global generator"


@torch.no_grad()
def test_sampling_is_that_of_the_logits(model: OpenMythos) -> None:
    """Every option reaches the sampler: the same tokens as sampling from full forward passes."""
    row = random_ids(model.cfg, 5).tolist()
    for options in (
        {"temperature": 1.3, "top_k": None},
        {"temperature": 1.0, "top_k": 3},
        {"top_k": 10_000},
        {"top_p": 0.5},
        {"min_p": 0.3},
        {"repetition_penalty": 1.8, "temperature": 0.7},
    ):
        got = model.generate(row, max_new_tokens=6, n_loops=3, seed=11, **options)
        params = Sampling(**{"temperature": 1.0, "top_k": 50, **options})
        generator, ids = torch.Generator().manual_seed(11), torch.tensor([row])
        for _ in range(6):
            token = sample(model(ids, 3)[:, -1], params, generator, ids)
            ids = torch.cat((ids, token[:, None]), 1)
        assert got == ids[0].tolist(), options


def test_stop_on_an_id(model: OpenMythos) -> None:
    ids = random_ids(model.cfg, 4, 5)
    free = model.generate(ids, max_new_tokens=10, temperature=0)
    stop = int(free[0, 7])
    out, loops = model.generate(ids, max_new_tokens=10, temperature=0, stop=stop, pad_id=52, return_loops=True)
    for row, unstopped, used in zip(out.tolist(), free.tolist(), loops.tolist(), strict=True):
        end = next((i + 1 for i in range(5, 15) if unstopped[i] == stop), 15)
        assert row == (unstopped[:end] + [52] * 15)[: out.shape[1]]
        assert all(used[: end - 5]) and not any(used[end - 5 :])
    as_list = model.generate([row.tolist() for row in ids], max_new_tokens=10, temperature=0, stop=[stop, 51])
    assert as_list[0] == free[0, : free[0].tolist().index(stop, 5) + 1].tolist()


def test_stop_on_a_string(text_model: OpenMythos) -> None:
    tokenizer = ByteTokenizer()
    options: dict[str, Any] = {"tokenizer": tokenizer, "seed": 5, "top_k": None}
    free = text_model.generate("a river", max_new_tokens=40, **options)
    assert free.startswith("a river")
    new = free[len("a river") :]
    marker = next(new[i : i + 2] for i in range(4, len(new) - 2) if "\ufffd" not in new[i : i + 2])
    cut = text_model.generate("a river", max_new_tokens=40, stop=marker, **options)
    assert cut == "a river" + new[: new.index(marker)]
    both = text_model.generate(["a river", "so"], max_new_tokens=40, stop=[marker, 0], **options)
    assert both[0] == cut and both[1].startswith("so")


def test_on_token_and_loops(model: OpenMythos) -> None:
    """Loops are those of the trace at the position each token was read from."""
    ids = random_ids(model.cfg, 3, 5)
    heard: list[tuple[int, int, int]] = []
    out, loops = model.generate(
        ids, 7, n_loops=6, temperature=0, on_token=lambda *x: heard.append(x), return_loops=True
    )
    assert loops.shape == (3, 7) and loops.dtype == torch.int64
    trace = model(out[:, :-1], 6, trace=True)
    assert torch.equal(loops, trace.exit_loop[:, 4:] + 1)
    assert len(loops.unique()) > 1
    order = [(row, int(out[row, 5 + i]), int(loops[row, i])) for i in range(7) for row in range(3)]
    assert heard == order


def test_kinds_of_answers(text_model: OpenMythos) -> None:
    model, tokenizer = text_model, ByteTokenizer()
    ids = random_ids(model.cfg, 2, 4)
    assert isinstance(model.generate(ids, 3), torch.Tensor)
    assert isinstance(model.generate(ids.tolist(), 3)[0], list) and isinstance(model.generate([1, 2], 3)[0], int)
    assert isinstance(model.generate("ab", 3, tokenizer=tokenizer), str)
    assert isinstance(model.generate(["ab", "c"], 3, tokenizer=tokenizer)[1], str)
    text, loops = model.generate("ab", 3, tokenizer=tokenizer, return_loops=True)
    assert isinstance(text, str) and len(loops) == 3
    assert torch.equal(model.generate(ids.int(), 3, temperature=0), model.generate(ids, 3, temperature=0).int())


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_restored(training: bool) -> None:
    model = scaled(tiny(dropout=0.5)).train(training)
    model.coda.train(not training)
    ids = random_ids(model.cfg, 1, 4)
    outs = [model.generate(ids, max_new_tokens=8, temperature=0) for _ in range(2)]
    assert torch.equal(*outs), "dropout must be off inside"
    assert not outs[0].requires_grad
    assert model.training == training and model.coda.training != training and model.prelude.training == training

    def fail(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=8, on_token=fail)
    assert model.training == training and model.coda.training != training and torch.is_grad_enabled()


def test_the_context_may_be_filled_to_the_end() -> None:
    model = scaled(tiny(max_seq_len=12))
    ids = random_ids(model.cfg, 1, 5)
    assert model.generate(ids, max_new_tokens=7).shape == (1, 12)


def test_finished_tokens_save_compute() -> None:
    """With an exit rule the loop stops when every token of the call is done: fewer calls of the block."""
    model = scaled(tiny(halting="none"))
    ids, calls = random_ids(model.cfg, 1, 5), []
    model.recurrent.block.register_forward_hook(lambda *_: calls.append(1))
    model.generate(ids, max_new_tokens=4, n_loops=64, temperature=0)
    fixed = len(calls)
    calls.clear()
    _, loops = model.generate(
        ids, 4, n_loops=64, temperature=0, exit="latent_diff", exit_threshold=0.5, return_loops=True
    )
    assert fixed == 4 * 64 and len(calls) < fixed / 4
    assert sum(loops[0].tolist()) <= len(calls)


def test_text_keeps_the_prompt_and_the_seam() -> None:
    """The answer starts with the prompt as it was given, and decodes the rest together with it."""
    tokenizer = SymbolTokenizer(["foo", "bar"], separator=" ")
    torch.manual_seed(0)
    model = OpenMythos(tiny(vocab_size=tokenizer.vocab_size))
    answer = model.generate("foo bar", 3, temperature=0, tokenizer=tokenizer)
    assert answer.startswith("foo bar ")
    assert len(answer.split(" ")) == 5


def test_nan_logits_are_named() -> None:
    model = OpenMythos(tiny())
    torch.nn.init.constant_(model.norm.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="logits are NaN"):
        model.generate(torch.zeros(1, 3, dtype=torch.long), 2)


def test_a_plain_transformer_refuses_a_rule_object() -> None:
    model = OpenMythos(tiny(recurrent_layers=0))
    with pytest.raises(ValueError, match="recurrent_layers=0"):
        model.generate(torch.zeros(1, 3, dtype=torch.long), 2, exit=LatentDiff(0.03))


def test_rows_that_stop_move_as_few_others_as_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap is filled with the last row, and the rest of the cache stays where it is."""
    model = scaled(tiny(), dtype=torch.float64)
    ids = random_ids(model.cfg, 6, 5)
    free = model.generate(ids, max_new_tokens=6, temperature=0)
    kept: list[list[int]] = []
    monkeypatch.setattr(KVCache, "keep_rows", lambda self, rows, original=KVCache.keep_rows: (
        kept.append(list(rows)), original(self, rows)
    ))  # fmt: skip
    stop = int(free[1, 5])
    out = model.generate([row.tolist() for row in ids], max_new_tokens=6, temperature=0, stop=stop, seed=0)
    for row, unstopped in zip(out, free.tolist(), strict=True):
        end = next((i + 1 for i in range(5, 11) if unstopped[i] == stop), 11)
        assert row == unstopped[:end]
    assert kept and all(sum(i != row for i, row in enumerate(rows)) <= 6 - len(rows) for rows in kept)


def test_the_host_waits_once_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """At fixed depth one transfer brings tokens, loops and the check for NaN; the model itself waits for nothing."""
    model = scaled(tiny(halting="none", n_experts=0))
    waits: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                waits.append(str(func))
            return func(*args, **(kwargs or {}))

    ids = random_ids(model.cfg, 3, 5)
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: (waits.append("tolist"), original(x))[1])
    counted = []
    for n in (1, 6):
        waits.clear()
        with Count():
            model.generate(ids, max_new_tokens=n, temperature=0.8, top_k=5, top_p=0.9, seed=1)
        # tolist of a CPU tensor takes its scalars one by one, which a GPU would send together.
        counted.append((waits.count("tolist"), sum("nonzero" in wait for wait in waits)))
    (first, _), (all_six, nonzero) = counted
    assert all_six - first == 5 and nonzero == 0
