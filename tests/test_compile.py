"""Compiled against eager: the same values and gradients, in as few graphs as promised, without a graph break."""

import contextlib
import copy
import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from open_mythos import LoopPlan, OpenMythos
from open_mythos.compile import compile_model
from open_mythos.ops.machine_code import _Traced, path_of
from open_mythos.tasks import Addition
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.losses import LossConfig, total_loss
from open_mythos.train.trainer import Trainer
from tests.models import ATTENTIONS, THRESHOLDS, random_ids, scaled, tiny, worst_of

# What torch's tracer says of its own doings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*script_method.* is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> CompileCounterWithBackend:
    """A backend that runs autograd's graphs as they are and counts what it is given."""
    return CompileCounterWithBackend("aot_eager")


def step(model: OpenMythos, call, n_loops: int, n_grad: int | None = None) -> list[Tensor]:
    """Loss, router's counts and gradients of one training step."""
    ids = random_ids(model.cfg, 3, 7)
    model.zero_grad()
    out = call(ids, plan=LoopPlan((n_loops,) * 3, n_grad))
    loss, _ = total_loss(out, ids.roll(-1, 1), LossConfig(router_z=0.1))
    loss.backward()
    counts = [] if out.tokens_per_expert is None else [out.tokens_per_expert]
    return [loss.detach(), *counts, *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]


@pytest.mark.parametrize(("attn_type", "checkpoint"), [("gqa", False), ("mla", True)])
def test_one_graph_serves_any_number_of_loops(attn_type: str, checkpoint: bool) -> None:
    model = scaled(tiny(attn_type=attn_type, halting="none"), dtype=torch.float64).train()
    expected = {n_loops: step(model, model, n_loops) for n_loops in (1, 4, 8, 3)}
    counter = graphs()
    assert compile_model(model, "block", backend=counter) is model
    assert model.recurrent is not None
    model.recurrent.checkpoint_loops = checkpoint
    for n_loops, eager in expected.items():
        assert worst_of(step(model, model, n_loops), eager) < 1e-12
    assert counter.frame_count == 1


@pytest.mark.parametrize("scope", ["block", "model"])
def test_documents(scope: Literal["block", "model"]) -> None:
    """One graph for rows whose documents differ from call to call."""
    model = scaled(tiny(halting="none"), dtype=torch.float64).train()
    packed = [torch.randint(2, (3, 7), generator=torch.Generator().manual_seed(i)).cumsum(1) for i in range(3)]
    expected = [step(model, partial(model, documents=documents), 2) for documents in packed]
    counter = graphs()
    call = compile_model(model, scope, backend=counter)
    for documents, eager in zip(packed, expected, strict=True):
        assert worst_of(step(model, partial(call, documents=documents), 2), eager) < 1e-12
    assert counter.frame_count == 1
    assert worst_of(expected[0], expected[1]) > 1e-3


def test_experts_too_large_to_run_all_of_them() -> None:
    """They go through the grouped product, of which torch's own traces in bf16 alone."""
    model = scaled(tiny(halting="none", n_experts=16, expert_dim=64)).train()
    ids = random_ids(model.cfg, 8, 30)
    outputs = []
    for call in (model, compile_model(model, "block", backend="aot_eager")):
        model.zero_grad()
        out = call(ids, plan=LoopPlan((3,) * 8))
        out.logits.square().mean().backward()
        outputs.append([out.logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert worst_of(outputs[1], outputs[0]) < 1e-5


def test_a_window_of_back_propagation_takes_four_graphs() -> None:
    """With and without gradients, each for a state that has one and one that has none; for any number of loops."""
    model = scaled(tiny(halting="none"), dtype=torch.float64).train()
    cases = [(5, 2), (8, 3), (4, 4), (3, None)]
    expected = [step(model, model, *case) for case in cases]
    counter = graphs()
    compile_model(model, "block", backend=counter)
    for case, eager in zip(cases, expected, strict=True):
        assert worst_of(step(model, model, *case), eager) < 1e-12
    assert counter.frame_count == 4


@pytest.mark.parametrize(("attn_type", "halting"), [("gqa", "none"), ("mla", "act")])
def test_a_whole_call_is_one_graph(attn_type: str, halting: str) -> None:
    """Also with the model's halting: every loop runs, and what has exited stays as it is."""
    model = scaled(tiny(attn_type=attn_type, halting=halting), dtype=torch.float64).train()
    eager = step(model, model, 4)
    counter = graphs()
    compiled = compile_model(model, "model", backend=counter)
    for _ in range(2):
        assert worst_of(step(model, compiled, 4), eager) < 1e-12
    assert counter.frame_count == 1


@pytest.mark.parametrize("scope", ["block", "model"])
def test_inference_compiles_too(scope) -> None:
    model = scaled(tiny(halting="none"), dtype=torch.float64)
    ids = random_ids(model.cfg, 2, 9)
    with torch.no_grad():
        expected = model(ids, n_loops=6)
        counter = graphs()
        compiled = compile_model(model, scope, backend=counter)
        torch.testing.assert_close(compiled(ids, n_loops=6), expected, rtol=0, atol=1e-12)
    assert counter.frame_count == 1


@pytest.mark.parametrize("exit", [None, "fixed", "kl"])
@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_decoding_takes_three_graphs(attn_type: str, exit: str | None) -> None:
    """One each for what comes before, in and behind the loop, whatever the cache's length and the loops run.

    One more where a rule reads predictions: the last loop makes none.
    """
    model = scaled(tiny(attn_type=attn_type), dtype=torch.float64)
    ids, counter = random_ids(model.cfg, 2, 12), graphs()
    assert compile_model(model, "decode", backend=counter) is model
    for n_loops, room in ((6, 12), (3, 20), (6, 31)):
        options = {"exit": exit, "exit_threshold": THRESHOLDS.get(exit or ""), "n_loops": n_loops}
        static, ordinary = (model.make_cache(2, room, n_loops, static=static) for static in (True, False))
        for new in (slice(0, 9), *(slice(i, i + 1) for i in range(9, 12))):
            got, expected = (model(ids[:, new], cache=cache, **options) for cache in (static, ordinary))
            assert worst_of([got], [expected]) < 1e-12
    assert counter.frame_count == (4 if exit == "kl" else 3)


@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_compiled_text_is_the_eager_text(attn_type: str) -> None:
    """Rows stop at times of their own and run different loops; prompts of several lengths."""
    model = scaled(tiny(attn_type=attn_type), dtype=torch.float64)
    compile_model(model, "decode", backend="aot_eager")
    prompts, calls = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], {False: [], True: []}
    options = {"exit": "kl", "exit_threshold": 0.03, "n_loops": 6, "seed": 3, "repetition_penalty": 1.2}
    alone = model.generate(prompts, 12, **options)
    stop = alone[0][6]
    answers = [
        model.generate(
            prompts, 12, **options, stop=stop, return_loops=True, compiled=compiled,
            on_token=lambda *x, compiled=compiled: calls[compiled].append(x),
        )
        for compiled in (False, True)
    ]  # fmt: skip
    assert answers[0] == answers[1] and calls[False] == calls[True]
    assert len({len(row) for row in answers[0][1]}) > 1 and len({n for row in answers[0][1] for n in row}) > 1


def test_machine_code_is_used_once_it_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a call that leaves `compiled` out: for the same model, number of rows and rule, whatever the weights."""
    calls: list[str] = []

    def stand_in(stage):
        return lambda lengths, *args: (calls.append(stage.__qualname__), stage(*args))[1]

    def uses(model: OpenMythos, rows: int = 2, **options) -> bool:
        calls.clear()
        ids = random_ids(model.cfg, rows, 4)
        text = model.generate(ids, 5, temperature=0, **options)
        used = bool(calls)
        assert torch.equal(text, model.generate(ids, 5, temperature=0, **options | {"compiled": False}))
        return used

    monkeypatch.setattr("open_mythos.compile.MachineCode", stand_in)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = scaled(tiny(), dtype=torch.float64)
    path_of(".", model).parent.mkdir(parents=True)
    assert not uses(model)
    assert uses(model, compiled=True) and {"TransformerBlock.forward", "RecurrentBlock.advance"} <= set(calls)
    assert uses(model.train()) and uses(scaled(tiny(), dtype=torch.float64, seed=1))
    assert not uses(model, rows=3) and not uses(model, exit="latent_diff") and not uses(model.float())
    assert not uses(scaled(tiny(rope_theta=100.0), dtype=torch.float64))
    # Nothing was decoded by machine code, so none is there.
    model.generate(random_ids(model.cfg, 1, 4), 1, compiled=True)
    assert not uses(model, rows=1)


@torch.no_grad()
def test_stages_called_by_hand_stay_as_they_were() -> None:
    """One loop at a time on a static cache, and arguments by name, before and after compiling."""
    model, ids, results = scaled(tiny(halting="none"), dtype=torch.float64), None, []
    for compiled in (False, True):
        if compiled:
            compile_model(model, "decode", backend="eager")
        ids, cache, steps = random_ids(model.cfg, 2, 4), model.make_cache(2, 4, 3, static=True), []
        for token in ids.split(1, dim=1):
            view = model.make_view((2, 1), cache=cache)
            h = e = model.encode(token, view=view)
            for loop in range(3):
                at = dataclasses.replace(view, lockstep=loop)
                h = model.recur(h, e, torch.full((2,), loop), at)
            steps.append(model.readout(h, view, last_only=True))
            cache.advance(1, None)
        results.append(torch.cat(steps, dim=1))
    assert worst_of(results[1:], results[:1]) < 1e-12


@torch.no_grad()
def test_beyond_the_graphs_it_goes_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_mythos.compile.MANY_SHAPES", 1)
    model = compile_model(scaled(tiny(), dtype=torch.float64), "decode", backend="eager")
    for rows in (1, 2):
        ids = random_ids(model.cfg, rows, 4)
        static, ordinary = (model.make_cache(rows, 4, 4, static=static) for static in (True, False))
        told = pytest.warns(UserWarning, match="1 graphs of .* are made") if rows == 2 else contextlib.nullcontext()
        with told:
            for token in ids.split(1, dim=1):
                got, expected = (model(token, 4, cache=cache) for cache in (static, ordinary))
                assert worst_of([got], [expected]) < 1e-12


@pytest.mark.parametrize("scope", ["block", "decode"])
@torch.no_grad()
def test_a_copy_runs_its_own_weights(scope) -> None:
    model = scaled(tiny(halting="none"))
    ids = random_ids(model.cfg, 2, 5)

    def last(model: OpenMythos) -> Tensor:
        cache = model.make_cache(2, 6, static=True)
        model(ids, cache=cache)
        return torch.cat((model(ids), model(ids[:, :1], cache=cache)), dim=1)

    compile_model(model, scope, backend="eager")
    before = last(model)
    other = copy.deepcopy(model)
    for p in model.parameters():
        p.zero_()
    assert torch.equal(last(other), before) and not last(model).any()


def test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = OpenMythos(tiny(recurrent_layers=0, halting="none"))
    with pytest.raises(ValueError, match="scope='loop' must be one of"):
        compile_model(model, "loop")  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match=r"model\.recurrent_layers=0; use scope='model'"):
        compile_model(model, "block", backend="eager")

    def no_compiler() -> str:
        raise torch._inductor.exc.InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"install g\+\+ \(or set CXX to another\)"):
        compile_model(model)


@pytest.mark.parametrize("scope", ["block", "model"])
def test_a_compiled_run_equals_an_eager_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope) -> None:
    monkeypatch.setattr("open_mythos.train.sharding.compile_model", partial(compile_model, backend="aot_eager"))
    cfg = TrainConfig(
        model=tiny(halting="none"), data=Addition(1, 2), steps=3, batch_size=6, dtype="float64",
        eval=EvalConfig(every=3, rows=4, loops=(1, 6)), log_every=1,
    )  # fmt: skip
    weights = []
    for compiled in ("none", scope):
        folder = tmp_path / compiled
        trainer = Trainer(dataclasses.replace(cfg, compile=compiled), folder, device="cpu", progress=False)
        trainer.run()
        weights.append([*trainer.model.state_dict().values()])
        assert OpenMythos.from_pretrained(folder / "final").cfg == cfg.model
    assert worst_of(weights[1], weights[0]) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("attn_type", ATTENTIONS)
@pytest.mark.parametrize("scope", ["block", "model"])
def test_machine_code_computes_the_same(attn_type: str, scope) -> None:
    model = scaled(tiny(attn_type=attn_type, halting="none")).train()
    eager = step(model, model, 4)
    assert worst_of(step(model, compile_model(model, scope), 4), eager) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("attn_type", ATTENTIONS)
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.float32), (3, torch.float32), (9, torch.float32), (1, torch.bfloat16)]
)
@torch.no_grad()
def test_machine_code_decodes_the_same(attn_type: str, rows: int, dtype: torch.dtype) -> None:
    """One row, few, and more than a sum over weights is good for; half precision is no further off than eager."""
    cfg = tiny(attn_type=attn_type, n_experts=32, expert_dim=128, dim=128)
    exact, model = (scaled(cfg, dtype=dtype) for dtype in (torch.float64, dtype))
    compiled = compile_model(copy.deepcopy(model), "decode")
    ids = random_ids(cfg, rows, 6)
    caches = [each.make_cache(rows, 6, 4, static=each is compiled) for each in (compiled, model, exact)]
    for new in (slice(0, 4), slice(4, 5), slice(5, 6)):
        calls = zip((compiled, model, exact), caches, strict=True)
        got, eager, truth = (each(ids[:, new], 4, cache=cache).double() for each, cache in calls)
        if dtype is torch.float32:
            assert worst_of([got], [eager]) < 1e-5
        assert (got - truth).norm() < 1.5 * (eager - truth).norm() + 1e-5 * truth.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attn_type", "options"), [("gqa", {}), ("mla", {}), ("gqa", {"exit": "kl", "exit_threshold": 0.03})]
)
def test_a_later_process_compiles_nothing(attn_type: str, options: dict, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = scaled(tiny(attn_type=attn_type))
    ids, made = random_ids(model.cfg, 3, 6), []
    compile = _Traced.compile
    monkeypatch.setattr(_Traced, "compile", lambda *args: (made.append(args[-1]), compile(*args)))
    eager, first = (model.generate(ids, 12, 6, 0.0, **options, compiled=compiled) for compiled in (False, True))
    n_made = len(made)
    # A copy has loaded nothing; half of its cache is longer. `compiled` left out finds what there is.
    other = copy.deepcopy(model)
    assert torch.equal(eager, first) and torch.equal(other.generate(ids, 12, 6, 0.0, **options), eager)
    assert torch.equal(other.generate(ids, 20, 6, 0.0, **options, compiled=True)[:, :18], eager)
    assert len(made) == n_made == len(set(made))


@pytest.mark.parametrize("attn_type", [pytest.param("gqa", marks=pytest.mark.slow), "mla"])
def test_a_call_at_fixed_depth_can_be_exported(attn_type: str) -> None:
    model = scaled(tiny(attn_type=attn_type, halting="none"), dtype=torch.float64)
    ids, others = random_ids(model.cfg, 2, 9), random_ids(model.cfg, 2, 9, seed=1)
    exported = torch.export.export(model, (ids,), {"n_loops": 3}).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(others, n_loops=3), model(others, n_loops=3), rtol=0, atol=1e-12)
