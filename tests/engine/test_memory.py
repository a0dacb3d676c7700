"""The pages that are used are those of the formula, and none is left behind, whatever happens to the requests."""

import random

import pytest
import torch

from open_mythos.accounting import kv_bytes_per_token
from open_mythos.engine.engine import Engine, EngineConfig
from open_mythos.engine.scheduler import QueueFull
from open_mythos.engine.sequence import Phase
from open_mythos.generation.sampling_params import SamplingParams
from tests.engine.mixes import COSTS, Outcome, empty, record
from tests.models import scaled, tiny


def run(n_requests: int) -> dict[str, int]:
    """Many short requests through few pages; at every step the bytes in use are the formula's."""
    rng, model = random.Random(0), scaled(tiny(max_seq_len=64, max_loop_iters=3, dim=16, n_heads=2, n_kv_heads=1))
    config = EngineConfig(max_rows=8, max_queue=20, kv_tokens=150, page_tokens=8, prefix_reuse=False)
    engine, outcome = Engine(model, config=config, costs=COSTS), Outcome()
    record(engine, outcome)
    begun, live, seen = 0, [], dict.fromkeys(("done", "cancelled", "refused", "most_bytes"), 0)
    while begun < n_requests or engine.busy:
        while begun < n_requests and rng.random() < 0.5:
            prompt = [rng.randrange(53) for _ in range(rng.choice([1, 5, 8, 20]))]
            params = SamplingParams(max_tokens=rng.choice([1, 2, 9, 20]), n_loops=rng.choice([1, 2, 3]), seed=begun)
            begun += 1
            try:
                live.append(engine.add(prompt, params))
            except QueueFull:
                seen["refused"] += 1
                assert engine.scheduler.n_waiting == config.max_queue
        if live and rng.random() < 0.1:
            engine.cancel(live[rng.randrange(len(live))])
        for event in engine.step():
            if event.finish_reason is not None:
                seen["cancelled" if event.finish_reason == "abort" else "done"] += 1
                live.remove(event.request)
        expected = sum(
            -(-(sequence.n_computed + sequence.n_running) // 8) * 8 * kv_bytes_per_token(model.cfg, sequence.n_loops, 4)
            for sequence in engine.sequences.values()
            if sequence.phase not in (Phase.WAITING, Phase.SWAPPED)
        )
        n_bytes = engine.scheduler.block_manager.n_used * engine.kv.pages[0].nbytes
        assert n_bytes == expected
        seen["most_bytes"] = max(seen["most_bytes"], n_bytes)
    empty(engine)
    assert seen["done"] + seen["cancelled"] + seen["refused"] == n_requests
    seen["preempted"], seen["pool_bytes"] = outcome.n_preempted, engine.n_pages * engine.kv.pages[0].nbytes
    print(seen)
    return seen


def test_no_page_is_left() -> None:
    assert min(run(1000).values()) > 0


@pytest.mark.slow
def test_no_page_is_left_by_many() -> None:
    assert min(run(10_000).values()) > 0


def test_nan_stays_with_its_request() -> None:
    """A token whose embedding is NaN ends its request with an error; its pages serve others unharmed."""
    model = scaled(tiny(max_seq_len=64))
    with torch.no_grad():
        model.head = torch.nn.Linear(32, 53, bias=False)
        model.embed.weight[7] = torch.nan
    # With reuse: the token before the NaN has met it as a masked key, and its page must not be found by others.
    config = EngineConfig(max_rows=2, kv_tokens=120, page_tokens=8)
    engine = Engine(model, config=config, costs=COSTS)
    params = SamplingParams(max_tokens=4, temperature=0.0)

    def answer(*prompts: list[int]) -> list[tuple[list[int], str | None]]:
        requests = [engine.add(prompt, params) for prompt in prompts]
        while engine.busy:
            engine.step()
        return [(request.token_ids, request.finish_reason) for request in requests]

    [expected] = answer([1, 2, 3])
    assert expected[1] == "length"
    [other] = answer([1] * 16 + [2])
    for _ in range(4):
        assert answer([1, 2, 3], [1] * 20 + [7, 9]) == [expected, ([], "error")]
        assert answer([1] * 16 + [2]) == [other]
    empty(engine)


def test_an_error_in_a_step_ends_its_requests_and_not_the_engine() -> None:
    model = scaled(tiny(max_seq_len=64))
    engine = Engine(model, config=EngineConfig(max_rows=3, kv_tokens=100), costs=COSTS)
    params = SamplingParams(max_tokens=4, temperature=0.0)
    first = engine.add([1, 2, 3], params)
    while engine.busy:
        engine.step()
    for stage in ("encode", "decode"):
        requests = [engine.add([i + 1, 2, 3], params) for i in range(5)]
        for _ in range(3 if stage == "decode" else 0):
            engine.step()
        working = getattr(model, stage)
        setattr(model, stage, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            while engine.busy:
                engine.step()
        setattr(model, stage, working)
        assert {request.finish_reason for request in requests} == {"error"} and not engine.busy
        empty(engine)
        again = engine.add([1, 2, 3], params)
        while engine.busy:
            engine.step()
        assert again.token_ids == first.token_ids
