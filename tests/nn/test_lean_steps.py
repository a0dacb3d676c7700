"""How many operations a decode step dispatches: in small models they take longer than the arithmetic."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos.model import OpenMythos
from tests.models import random_ids, scaled, tiny


class Operations(TorchDispatchMode):
    """Counts the operations that Python calls, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(model: OpenMythos, n_loops: int, **options: Any) -> Counter[str]:
    """Return the operations of the second token that a cache gets at batch size 1.

    In inference mode a composite operation, such as `linear`, counts as the one call that it is.
    """
    ids = random_ids(model.cfg, 1, 6)
    cache = model.make_cache(1, 8, n_loops)
    with torch.inference_mode():
        for new in (ids[:, :4], ids[:, 4:5]):
            model(new, cache=cache, n_loops=n_loops, **options)
        with Operations() as step:
            model(ids[:, 5:], cache=cache, n_loops=n_loops, **options)
    return step.counts


@pytest.mark.parametrize(
    ("limit", "options", "fields"),
    [
        (40, {}, {"n_experts": 0, "n_shared_experts": 0, "lora_rank": 0, "halting": "none"}),
        (70, {"exit": "fixed"}, {}),
        (80, {"exit": "act", "exit_threshold": 1.0}, {}),
        (80, {"exit": "latent_diff", "exit_threshold": 1e-9}, {}),
        (86, {"exit": "kl", "exit_threshold": 1e-12}, {}),
    ],
    ids=["plain", "fixed", "act", "latent_diff", "kl"],
)
def test_a_loop_dispatches_few_operations(limit: int, options: dict[str, Any], fields: dict[str, Any]) -> None:
    model = scaled(tiny(**fields, max_loop_iters=6), dtype=torch.float32)
    if model.recurrent.act is not None:
        torch.nn.init.constant_(model.recurrent.act.halt.bias, -30.0)  # every loop runs
    few, many = (operations(model, n, **options) for n in (3, 6))
    per_loop = (many - few).total() / 3
    assert per_loop <= limit, (many - few).most_common()


def test_no_loop_at_fixed_depth_reads_a_value() -> None:
    """The host waits for the device nowhere inside the loop, so a GPU is never idle."""
    model = scaled(tiny(max_loop_iters=6), dtype=torch.float32)
    few, many = (operations(model, n, exit="fixed") for n in (3, 6))
    reads = {"aten._local_scalar_dense.default", "aten.item.default", "aten.nonzero.default", "aten.is_nonzero.default"}
    assert not reads & set(many - few)
