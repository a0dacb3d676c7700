"""What training needs of the model: gradient in every part, experts that come into balance, refused short windows."""

import pytest
import torch
import torch.nn.functional as F

from open_mythos import LoopPlan, OpenMythos, TrainOutput
from tests.models import PARTS, random_ids, tiny


def step(model: OpenMythos, optimizer: torch.optim.Optimizer, ids: torch.Tensor, plan: LoopPlan) -> TrainOutput:
    """One step on predicting the next token."""
    out = model(ids, plan=plan)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    total = loss + (0.01 * out.ponder_cost if out.ponder_cost is not None else 0)
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return out


@pytest.mark.parametrize(
    ("attn_type", "part"),
    [
        ("gqa", "default"),
        ("mla", "diagonal"),
        pytest.param("mla", "default", marks=pytest.mark.slow),
        pytest.param("gqa", "concat", marks=pytest.mark.slow),
        pytest.param("gqa", "no-experts", marks=pytest.mark.slow),
        pytest.param("mla", "two-layers", marks=pytest.mark.slow),
    ],
)
def test_every_parameter_gets_gradient(attn_type: str, part: str) -> None:
    """From fresh weights, over 100 steps: every tensor, and every loop's row of loop-specific parameters."""
    cfg = tiny(attn_type=attn_type, **PARTS[part])
    model = OpenMythos(cfg).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    reached = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for i in range(100):
        step(model, optimizer, random_ids(cfg, 4, 9, seed=i), LoopPlan((4, 2, 3, 4)))
        for name, p in model.named_parameters():
            assert torch.isfinite(p.grad).all(), name
            reached[name] |= p.grad != 0
    for name, mask in reached.items():
        assert mask.float().mean() > 0.9, name
    if cfg.lora_rank:
        assert reached["recurrent.lora.scale.weight"].all(1).all()
    for name, mask in reached.items():
        if "experts." in name:
            assert mask.flatten(1).any(1).all(), f"{name}: an expert without gradient"


def test_fresh_act_spends_its_loops() -> None:
    """0.5.0 halted every token at loop 2 at first, so that loops 3 to 16 never learned."""
    cfg = tiny(max_loop_iters=16)
    out = OpenMythos(cfg).train()(random_ids(cfg, 2, 9), plan=LoopPlan((16, 16)))
    assert float(out.loops.float().mean()) > 12


def load_ratio(model: OpenMythos) -> float:
    """Largest expert's load over the mean, on 2,048 tokens: few enough tokens look uneven by chance alone."""
    with torch.no_grad():
        load = model(random_ids(model.cfg, 64, 32, seed=12345), plan=LoopPlan((4,) * 64)).tokens_per_expert
    return float(load.max() / load.mean())


def skewed() -> OpenMythos:
    """Two of eight experts take most tokens: they like one channel, which is large for every token."""
    model = OpenMythos(tiny(n_experts=8, n_experts_per_tok=2, halting="none", injection="diagonal")).train()
    with torch.no_grad():
        model.embed.weight.normal_()
        model.embed.weight[:, 0] = 3.0
        router = model.recurrent.block.ffn.router.weight
        router.normal_(std=0.1)
        router[:2, 0] += 0.25
    return model


def test_bias_updates_bring_experts_into_balance() -> None:
    """Below 1.3 times the mean after 200 updates, the weights being as they are."""
    model = skewed()
    first = load_ratio(model)
    for i in range(200):
        with torch.no_grad():
            out = model(random_ids(model.cfg, 8, 16, seed=i), plan=LoopPlan((4,) * 8))
        model.update_expert_bias(out.tokens_per_expert, 1e-2)
    last = load_ratio(model)
    print(f"largest over mean load: {first:.2f} at first, {last:.2f} after 200 updates of 0.01")
    assert first > 2 and last < 1.3


@pytest.mark.slow
def test_balance_is_reached_while_the_model_learns() -> None:
    """The lowest ratio seen within 200 steps is below 1.3 with updates, and stays above 2 without."""
    lowest = {}
    for rate in (2e-2, 0.0):
        torch.manual_seed(0)
        model = skewed()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
        ratios = []
        for i in range(200):
            out = step(model, optimizer, random_ids(model.cfg, 8, 16, seed=i), LoopPlan((4,) * 8))
            model.update_expert_bias(out.tokens_per_expert, rate)
            if i % 20 == 19:
                ratios.append(load_ratio(model))
        lowest[rate] = min(ratios)
    print(f"lowest ratio of largest to mean load while learning, by update rate: {lowest}")
    assert lowest[2e-2] < 1.3 and lowest[0.0] > 2


def test_update_moves_each_bias_towards_the_mean() -> None:
    cfg = tiny(recurrent_layers=2)
    model = OpenMythos(cfg)
    load = torch.tensor([[10.0, 0, 5, 5], [1, 1, 1, 1]])
    assert model.update_expert_bias(load, 0.5) == 2.0
    biases = [block.ffn.router_bias for block in model.recurrent.blocks]
    assert torch.equal(biases[0], torch.tensor([-0.5, 0.5, 0, 0])) and not biases[1].any()


def test_statistics_belong_to_training() -> None:
    cfg = tiny()
    model, ids = OpenMythos(cfg), random_ids(cfg, 2, 5)
    out = model.train()(ids, plan=LoopPlan((3, 2)))
    assert out.tokens_per_expert.shape == (1, 4)
    assert out.tokens_per_expert.sum() == 2 * 5 * (3 + 2) and not out.tokens_per_expert.requires_grad
    out = OpenMythos(tiny(n_experts=0, halting="none")).train()(ids, plan=LoopPlan((3, 2)))
    assert out.tokens_per_expert is None and out.router_z_loss is None and out.ponder_cost is None


def test_traced_plan_gives_the_logits_of_every_shallower_call() -> None:
    torch.manual_seed(0)
    model = OpenMythos(tiny(halting="none")).double().train()
    ids = torch.randint(0, model.cfg.vocab_size, (3, 7))
    out = model(ids, plan=LoopPlan((4, 4, 4)), trace=True)
    assert out.loop_logits is not None
    for n_loops, logits in enumerate(out.loop_logits, start=1):
        torch.testing.assert_close(logits, model(ids, n_loops=n_loops))
    torch.testing.assert_close(out.loop_logits[-1], out.logits)


def test_traced_plan_refuses_uneven_depths() -> None:
    model = OpenMythos(tiny(halting="none"))
    with pytest.raises(ValueError, match=r"plan.depths .* leave trace out"):
        model(torch.zeros(2, 5, dtype=torch.long), plan=LoopPlan((1, 2)), trace=True)
