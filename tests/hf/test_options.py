"""The options of transformers' `generate`, each against what it has to equal, and refusals of what cannot work."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache

from open_mythos.generation.sampling import sample
from open_mythos.generation.sampling_params import Sampling
from open_mythos.hf import MythosForCausalLM
from open_mythos.hf.modeling import CACHE
from open_mythos.model import OpenMythos
from open_mythos.nn.depth import LoopPlan
from open_mythos.nn.view import View
from tests.hf.conftest import N, greedy, padded
from tests.models import random_ids, scaled, tiny, worst


def test_beams_and_groups_of_returns_do_not_depend_on_the_cache(model: MythosForCausalLM, net: OpenMythos) -> None:
    ids, mask = padded("left", net)
    options = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2}
    answers = [
        greedy(model, ids, **options, **cache)
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"})
    ]
    assert answers[0].shape[0] == 6 and not torch.equal(answers[0][0], answers[0][1])
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[2], answers[1])


@pytest.mark.parametrize("n_loops", [2, None, 8])
def test_prompt_lookup_changes_no_token(model: MythosForCausalLM, net: OpenMythos, n_loops: int | None) -> None:
    ids = random_ids(net.cfg, 1, 4).repeat(1, 5)
    assert torch.equal(
        greedy(model, ids, n_loops=n_loops, prompt_lookup_num_tokens=3), greedy(model, ids, n_loops=n_loops)
    )


def test_a_draft_at_fewer_loops_changes_no_token(
    model: MythosForCausalLM, net: OpenMythos, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, depths, run_loop = random_ids(net.cfg, 1, 6), set(), OpenMythos.run_loop

    def recorded(self: OpenMythos, ids: Tensor, view: View, depth: int, *args: Any) -> Any:
        depths.add(depth)
        return run_loop(self, ids, view, depth, *args)

    monkeypatch.setattr(
        OpenMythos,
        "run_loop",
        lambda self, ids, view, depth, *args: (depths.add(depth), run_loop(self, ids, view, depth, *args))[1],
    )
    plain = greedy(model, ids, n_loops=8)
    assert depths == {8}
    assert torch.equal(greedy(model, ids, n_loops=8, assistant_model=model.draft(2)), plain)
    assert depths == {2, 8}


@pytest.mark.parametrize("exit", ["kl", "latent_diff", "fixed"])
def test_exits_are_ours(model: MythosForCausalLM, net: OpenMythos, exit: str) -> None:
    ids = random_ids(net.cfg, 3, 7)
    ours = net.generate(ids, N, 8, temperature=0, exit=exit, exit_threshold=None if exit == "fixed" else 0.3)
    options = {} if exit == "fixed" else {"exit_threshold": 0.3}
    assert torch.equal(greedy(model, ids, n_loops=8, exit=exit, **options), ours)


def test_min_loops_replaces_that_of_the_configuration(tmp_path: Path) -> None:
    ids = random_ids(tiny(), 2, 9)
    scaled(tiny(min_loops=3)).save_pretrained(tmp_path)
    late = MythosForCausalLM.from_pretrained(tmp_path)
    scaled(tiny()).save_pretrained(tmp_path)
    soon = MythosForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(soon(ids, min_loops=3).logits, late(ids).logits)
    assert not torch.equal(soon(ids).logits, late(ids).logits)
    assert torch.equal(soon(ids, min_loops=1).logits, soon(ids).logits)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 9},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_sampling_has_our_probabilities(folder: Path, net: OpenMythos, options: dict[str, Any]) -> None:
    """20,000 draws of ours against the probabilities after transformers' processors: no frequency 5 sigma away."""
    model, ids = AutoModelForCausalLM.from_pretrained(folder), random_ids(net.cfg, 1, 7)
    theirs = {"top_k": 0, **options}
    out = model.generate(
        ids,
        max_new_tokens=1,
        do_sample=True,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **theirs,
    )
    expected = out.scores[0].softmax(-1)[0]
    n, sampling = 20_000, Sampling(**{"top_k": None, **options})
    with torch.no_grad():
        logits = net(ids)[:, -1]
    drawn = sample(logits.expand(n, -1), sampling, torch.Generator().manual_seed(1), ids.expand(n, -1))
    share = torch.bincount(drawn, minlength=len(expected)) / n
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()
    assert (expected > 0).sum() >= (share > 0).sum()


def test_hidden_states_are_those_after_each_loop(model: MythosForCausalLM, net: OpenMythos) -> None:
    ids = random_ids(net.cfg, 2, 7)
    out = model(ids, output_hidden_states=True, n_loops=5)
    trace = net(ids, 5, trace=True)
    assert len(out.hidden_states) == 6
    assert torch.equal(torch.stack(out.hidden_states[:-1]), trace.hidden)
    assert torch.equal(net.head(out.hidden_states[-1]), out.logits)
    made = greedy(model, ids, output_hidden_states=True, return_dict_in_generate=True)
    assert [step[-1].shape[1] for step in made.hidden_states] == [7] + [1] * (N - 1)


def checkpoint(model: MythosForCausalLM) -> None:
    """By the name of transformers 6 where there is one: warnings are errors here."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_ours(folder: Path, net: OpenMythos, checkpointing: bool) -> None:
    ids, mask = padded("right", net)
    labels = ids.masked_fill(mask == 0, -100)
    model = MythosForCausalLM.from_pretrained(folder).train()
    if checkpointing:
        checkpoint(model)
    assert model.net.recurrent.checkpoint_loops == checkpointing
    torch.manual_seed(0)  # of noise as the initial state
    out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    assert getattr(out, CACHE) is None
    plan = LoopPlan((net.cfg.max_loop_iters,) * 3)
    torch.manual_seed(0)
    logits = OpenMythos.from_pretrained(folder).train()(ids, attention_mask=mask, plan=plan).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs(out.loss - expected) < 1e-5
    assert all(x.grad is not None for x in model.net.recurrent.block.parameters() if x.requires_grad)


def test_checkpoints_change_no_gradient(folder: Path, net: OpenMythos) -> None:
    ids, grads = random_ids(net.cfg, 2, 9), []
    for enable in (False, True):
        torch.manual_seed(0)
        model = MythosForCausalLM.from_pretrained(folder).train()
        if enable:
            checkpoint(model)
        model(ids, labels=ids).loss.backward()
        grads.append([x.grad for x in model.parameters() if x.grad is not None])
    assert all(worst(a, b) < 1e-5 for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations_agree(folder: Path, net: OpenMythos, implementation: str) -> None:
    model = MythosForCausalLM.from_pretrained(folder, attn_implementation=implementation)
    ids, mask = padded("left", net)
    assert worst(model(ids, attention_mask=mask).logits, net(ids, attention_mask=mask)) < 1e-5


def test_device_map_auto(folder: Path, net: OpenMythos) -> None:
    pytest.importorskip("accelerate")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    ids = random_ids(net.cfg, 2, 5)
    assert torch.equal(greedy(model, ids), net.generate(ids, N, temperature=0))


def test_a_static_decode_compiles_to_one_graph(tmp_path: Path) -> None:
    """Without a break, and without another graph for each length."""
    cfg = tiny(max_loop_iters=2, n_experts=0)
    scaled(cfg).save_pretrained(tmp_path)
    model, ids = MythosForCausalLM.from_pretrained(tmp_path), random_ids(cfg, 2, 5)
    config = CompileConfig(backend="eager", mode=None, fullgraph=True)
    config._compile_all_devices = True
    counters.clear()
    compiled = greedy(model, ids, cache_implementation="static", compile_config=config)
    assert torch.equal(compiled, greedy(model, ids))
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]


def test_either_name_of_the_cache_is_taken(model: MythosForCausalLM, net: OpenMythos) -> None:
    ids = random_ids(net.cfg, 2, 6)
    with torch.no_grad():
        answers = []
        for name in ("cache", "past_key_values"):
            first = model(ids[:, :4])
            answers.append(model(ids[:, 4:], **{name: getattr(first, CACHE)}).logits)
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized' holds keys and values of one loop"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({CACHE: DynamicCache()}, "cache is a DynamicCache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "cannot use output_attentions"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "inputs_embeds"),
        ({"n_loops": 0}, "n_loops=0"),
        ({"exit": "never"}, "exit='never'"),
        ({"min_loops": 0}, "min_loops=0"),
        ({"max_new_tokens": 100}, "more than max_seq_len=64"),
        ({"n_lops": 3}, "n_lops"),
    ],
    ids=str,
)
def test_refusals(model: MythosForCausalLM, net: OpenMythos, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        model.generate(random_ids(net.cfg, 1, 4), **{"max_new_tokens": 4, "do_sample": False, **options})


def test_attention_of_others_is_refused(folder: Path) -> None:
    with pytest.raises((ValueError, ImportError), match=r"(?i)flash"):
        MythosForCausalLM.from_pretrained(folder, attn_implementation="flash_attention_2")
