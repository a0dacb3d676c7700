"""Models of tensors that hold no numbers: on the meta device, and fake. And what a build leaves alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from open_mythos import LoopPlan, OpenMythos, mythos_1t
from open_mythos.train.losses import LossConfig, total_loss
from tests.models import ATTENTIONS, tiny

ROOT = Path(__file__).resolve().parent.parent


def use(model: OpenMythos, ids: Tensor) -> list[torch.Size]:
    """Shapes of logits, of a trace and of every gradient of a training step."""
    shapes = [model(ids, n_loops=3).shape, model(ids, n_loops=3, trace=True).hidden.shape]
    out = model.train()(ids, plan=LoopPlan((3, 5, 2)))
    total_loss(out, ids, LossConfig())[0].backward()
    assert out.tokens_per_expert is not None and out.logits.shape == (3, 70, 53)
    return [*shapes, *(p.grad.shape for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@pytest.mark.parametrize("halting", ["none", "act"])
def test_meta_and_fake_tensors_have_the_shapes_of_real_ones(attn_type: str, halting: str) -> None:
    """With experts large enough for the grouped product. Under ACT every loop runs: nobody can tell who has exited."""
    cfg = tiny(attn_type=attn_type, halting=halting, expert_dim=64, n_experts=16, max_seq_len=80)
    expected = use(OpenMythos(cfg), torch.zeros(3, 70, dtype=torch.int64))
    with torch.device("meta"):
        model, ids = OpenMythos(cfg), torch.zeros(3, 70, dtype=torch.int64)
        assert all(p.is_meta for p in model.parameters())
        assert use(model, ids) == expected
    with FakeTensorMode():
        model, ids = OpenMythos(cfg), torch.zeros(3, 70, dtype=torch.int64)
        assert all(isinstance(p.data, FakeTensor) for p in model.parameters())
        assert use(model, ids) == expected


def test_a_build_on_meta_imports_nothing_heavy() -> None:
    """torch's `normal_` on the meta device imports sympy, which takes a second and 70 MiB."""
    code = (
        "import sys, torch, open_mythos as om\n"
        "with torch.device('meta'):\n"
        "    for injection in ('lti', 'diagonal', 'concat', 'add'):\n"
        "        om.OpenMythos(om.MythosConfig(injection=injection))\n"
        "print('sympy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_build_draws_each_value_once() -> None:
    """Numbers drawn by the constructors would be thrown away: the generator stands where `init_weights` leaves it."""
    cfg = tiny()
    torch.manual_seed(0)
    model = OpenMythos(cfg)
    after = torch.rand(4)
    torch.manual_seed(0)
    with torch.device("meta"):
        again = OpenMythos(cfg)
    assert torch.equal(torch.rand(4), torch.rand(4, generator=torch.Generator().manual_seed(0)))
    assert all(p.is_meta for p in again.parameters())
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(OpenMythos(cfg).parameters(), model.parameters(), strict=True))
    assert torch.equal(torch.rand(4), after)


def test_the_largest_model_takes_no_memory_on_meta() -> None:
    with torch.device("meta"):
        model = OpenMythos(mythos_1t())
    assert sum(p.numel() for p in model.parameters()) > 9e11
