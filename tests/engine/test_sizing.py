"""The engine's pages take the bytes that accounting and `mythos info` tell."""

import pytest
import torch

from open_mythos import SamplingParams
from open_mythos.accounting import kv_bytes_per_token, n_layers
from open_mythos.costs.tables import PAGE_TOKENS
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.engine.scheduler import QueueFull
from tests.models import ATTENTIONS, scaled, tiny


@pytest.mark.parametrize("attn_type", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("recurrent_layers", [0, 1, 2])
def test_pages_are_the_formula_rounded_up_to_pages(attn_type: str, dtype: torch.dtype, recurrent_layers: int) -> None:
    model = scaled(tiny(attn_type=attn_type, recurrent_layers=recurrent_layers), dtype=dtype)
    engine = Engine(model, config=EngineConfig(max_rows=2, kv_tokens=100))
    assert engine.config.page_tokens == PAGE_TOKENS == EngineConfig().page_tokens
    cfg, size = model.cfg, dtype.itemsize
    blocks = -(-100 // PAGE_TOKENS)
    each = kv_bytes_per_token(cfg, cfg.max_loop_iters, size)
    assert engine.n_pages * engine.kv.pages[0].nbytes == blocks * PAGE_TOKENS * each
    assert engine.n_pages == blocks * n_layers(cfg, cfg.max_loop_iters)


@pytest.mark.parametrize("n_loops", [1, 3, 4])
def test_as_many_requests_hold_pages_as_the_table_says(n_loops: int) -> None:
    """Requests of 32 tokens in the pages of 100 tokens at 4 loops; one more has to wait for pages."""
    model = scaled(tiny())
    engine = Engine(model, config=EngineConfig(max_rows=20, kv_tokens=100, prefix_reuse=False))
    told = engine.n_pages // n_layers(model.cfg, n_loops) // (32 // PAGE_TOKENS)
    for _ in range(told + 1):
        engine.add([1] * 17, SamplingParams(max_tokens=16, n_loops=n_loops, exit="fixed"))
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.scheduler.n_admitted)
    assert most == told


def test_a_full_queue_is_told() -> None:
    engine = Engine(scaled(tiny()), config=EngineConfig(max_rows=1, max_queue=2))
    engine.add([1])
    engine.add([2])
    with pytest.raises(QueueFull, match="max_queue=2"):
        engine.add([3])
