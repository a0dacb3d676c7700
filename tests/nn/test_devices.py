"""Every tensor of a call is on the model's device: a GPU refuses others, or waits while they are copied.

A model on the meta device takes the code paths of a GPU; a tensor that some code makes without a device shows as one on
the CPU. No number is computed, so this shows nothing of results.
"""

import traceback
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from open_mythos import LoopPlan, OpenMythos
from open_mythos.nn.recurrent import RecurrentBlock
from tests.models import ATTENTIONS, PARTS, RULES, tiny

T = 6
SOME = [("gqa", part) for part in ("default", "diagonal", "two-layers", "odd-experts", "no-halting")]
SOME += [("mla", "default"), ("mla", "no-halting"), ("gqa", "no-experts")]


class OnlyMeta(TorchDispatchMode):
    """Refuses every operator that takes or makes a tensor elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.n += 1
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, Tensor) and not x.is_meta:
                place = [frame for frame in traceback.extract_stack() if "open_mythos" in frame.filename][-1]
                raise AssertionError(f"{func} on {x.device} in {place.filename}:{place.lineno}: {place.line}")
        return out


def on_meta(**fields: Any) -> OpenMythos:
    with torch.device("meta"):
        return OpenMythos(tiny(**fields)).to(torch.bfloat16)


def ids(n: int = T) -> Tensor:
    return torch.zeros(2, n, dtype=torch.int64, device="meta")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("attn_type", "part"), SOME)
@torch.no_grad()
def test_forward_prefill_and_decode(attn_type: str, part: str, static: bool) -> None:
    model = on_meta(attn_type=attn_type, **PARTS[part]).eval()
    with OnlyMeta() as mode:
        for mask in (None, torch.ones_like(ids())):
            model(ids(), 2, exit="fixed", attention_mask=mask, trace=mask is None)
            cache = model.make_cache(2, 2 * T, 3, static=static)
            for n in (T, 1, 1):
                model(ids(n), 2, cache=cache, exit="fixed", attention_mask=mask if n == T else None)
            cache.rewind(T)
    assert mode.n > 200


@pytest.mark.parametrize(("attn_type", "part"), SOME)
def test_training(attn_type: str, part: str) -> None:
    """Rows at depths of their own, windows of back-propagation, packed rows, and the gradients."""
    model = on_meta(attn_type=attn_type, **PARTS[part]).train()
    plans = [LoopPlan((2, 2))] + ([LoopPlan((1, 3), 2)] if model.cfg.halting == "none" else [])
    with OnlyMeta():
        for plan in plans:
            out = model(ids(), plan=plan, documents=ids())
            out.logits.sum().backward()
    assert all(p.grad is None or p.grad.is_meta for p in model.parameters())


@pytest.mark.parametrize("exit", RULES)
@pytest.mark.parametrize("attn_type", ATTENTIONS)
@torch.no_grad()
def test_rules_that_exit(attn_type: str, exit: str | None) -> None:
    """One token at a time without a host's look at who is left, which a static cache does not need."""
    model = on_meta(attn_type=attn_type).eval()
    cache = model.make_cache(2, T, 4, static=True)
    view = model.make_view((2, 1), cache=cache)
    with OnlyMeta():
        model.run(ids(1), view, 2, model.exit_rule(exit=exit), cache, last_only=True)


def test_a_tensor_without_a_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the checks: what these tests look for is found, and named by the package's line."""
    original = RecurrentBlock.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        torch.zeros(3)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RecurrentBlock, "forward", forward)
    with pytest.raises(AssertionError, match=r"aten.zeros.default on cpu in .*model.py:\d+: return self.recurrent"):
        with OnlyMeta():
            on_meta()(ids(), 2, exit="fixed")
