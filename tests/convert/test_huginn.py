"""Huginn against the golden files of its authors' code."""

import json
from pathlib import Path

import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.convert import huginn
from open_mythos.engine.config import EngineConfig
from open_mythos.engine.llm import LLM
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.nn.initial_state import first_state
from tests.convert.golden import TOLERANCE, Golden, cached, worst

PUBLISHED = {
    "n_embd": 5280,
    "n_heads": 55,
    "intermediate_size": 17920,
    "padded_vocab_size": 65536,
    "block_size": 4096,
    "n_layers_in_prelude": 2,
    "n_layers_in_recurrent_block": 4,
    "n_layers_in_coda": 2,
    "mean_recurrence": 32,
    "rope_base": 50000,
    "norm_eps": 1e-6,
    "init_values": {"embed_scale": 72.6636, "std": 0.0087039},
}


@pytest.fixture(scope="module")
def golden(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(shared / "golden" / "huginn", tmp_path_factory.mktemp("huginn") / "model")


@torch.no_grad()
def test_logits_and_states(golden: Golden) -> None:
    h0 = golden.expected["h0"].expand(*golden.ids.shape, -1)
    for n_loops in golden.meta["loops"]["stored"]:
        trace = golden.model(golden.ids, n_loops, trace=True, initial_state=h0)
        assert worst(trace.logits, golden.expected[f"logits.loops{n_loops}"]) < TOLERANCE
        assert worst(trace.hidden, golden.expected["states"][:n_loops]) < TOLERANCE
    zero = golden.model(golden.ids, 4, initial_state=torch.zeros_like(h0))
    assert worst(zero, golden.expected["logits.zero_h0.loops4"]) < TOLERANCE


@pytest.mark.parametrize("cuts", [[13, 14, 15, 16, 17, 18], [5, 6, 18]], ids=["decode", "chunks"])
def test_cache(golden: Golden, cuts: list[int]) -> None:
    logits = cached(golden.model, golden.ids, cuts, golden.expected["h0"])
    assert worst(logits, golden.expected["logits.loops4"]) < TOLERANCE
    assert worst(logits[:, 13:], golden.expected["logits_cached"]) < TOLERANCE


@torch.no_grad()
def test_padded_rows_equal_those_without_padding(golden: Golden) -> None:
    """The authors' code ignores the mask, so their logits without padding are the reference."""
    expected, h0 = golden.expected["logits.loops4"], golden.expected["h0"].expand(*golden.ids.shape, -1)
    ids = torch.cat((torch.zeros(2, 3, dtype=torch.int64), golden.ids), dim=1)
    mask = (torch.arange(21) >= 3).expand(2, -1)
    first = torch.cat((torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0)), h0), dim=1)
    logits = golden.model(ids, attention_mask=mask, initial_state=first)[:, 3:]
    assert worst(logits, expected) < TOLERANCE


def test_greedy_text_of_generate_and_engine_from_a_zero_state(golden: Golden) -> None:
    prompts, answers = golden.ids, golden.expected["greedy"]
    golden.model.cfg.initial_state = "zero"
    try:
        assert golden.model.generate(prompts, 12, temperature=0).equal(answers)
        outputs = LLM(golden.model, config=EngineConfig(max_rows=2)).generate(
            [{"prompt_token_ids": row} for row in prompts.tolist()],
            SamplingParams(max_tokens=12, temperature=0, ignore_eos=True),
            progress=False,
        )
    finally:
        golden.model.cfg.initial_state = "truncated"
    assert [o.outputs[0].token_ids for o in outputs] == answers[:, prompts.shape[1] :].tolist()


@torch.no_grad()
def test_noise_has_the_law_of_the_authors(golden: Golden) -> None:
    ids = torch.zeros(64, 48, dtype=torch.int64)

    cfg = golden.model.cfg
    e = torch.empty(*ids.shape, 48)
    h = first_state(cfg, e, golden.model.make_view((64, 48)), None, torch.Generator().manual_seed(0), False)
    # A normal variable cut at three standard deviations has 0.9866 of its standard deviation.
    assert abs(h.std().item() / (0.9866 * cfg.state_std) - 1) < 0.01
    assert abs(h.mean().item()) < 0.01 * cfg.state_std
    assert h.abs().max() <= 3 * cfg.state_std


def test_published_size() -> None:
    cfg = huginn.to_config(PUBLISHED)
    with torch.device("meta"):
        model = OpenMythos(cfg)
    assert sum(p.numel() for p in model.parameters()) == 3_564_976_800
    assert {place.name for place in huginn.places(cfg).values() if place} == set(model.state_dict()) - {"head.weight"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("injection_type", "add"), ("n_embd", 0), ("qk_bias", False), ("tie_embeddings", False), ("init_values", None)],
)
def test_wrong_values_are_named(golden: Golden, tmp_path: Path, field: str, value: object) -> None:
    values = json.loads((golden.folder / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises((TypeError, ValueError), match="embed_scale" if field == "init_values" else field):
        OpenMythos.from_pretrained(tmp_path)


def test_a_missing_shard_is_named(golden: Golden, tmp_path: Path) -> None:
    for path in golden.folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match="model-00001-of-00002"):
        OpenMythos.from_pretrained(tmp_path)
