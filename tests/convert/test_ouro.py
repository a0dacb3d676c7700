"""Ouro against the golden files of its authors' code."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from open_mythos import OpenMythos
from open_mythos.convert import ouro
from open_mythos.engine.config import EngineConfig
from open_mythos.engine.llm import LLM
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.nn.halting import Ouro
from tests.convert.golden import TOLERANCE, Golden, cached, worst

PUBLISHED = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 5632,
    "vocab_size": 49152,
    "max_position_embeddings": 65536,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}


@pytest.fixture(scope="module")
def golden(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    return Golden(shared / "golden" / "ouro", tmp_path_factory.mktemp("ouro") / "model")


@torch.no_grad()
def test_logits_and_states(golden: Golden) -> None:
    for n_loops in golden.meta["loops"]["stored"]:
        with pytest.warns(match="beyond the 4 loops") if n_loops > 4 else nullcontext():
            trace = golden.model(golden.ids, n_loops, trace=True)
        assert worst(trace.logits, golden.expected[f"logits.loops{n_loops}"]) < TOLERANCE
        assert worst(trace.hidden, golden.expected["states"][:n_loops]) < TOLERANCE


@pytest.mark.parametrize("cuts", [[13, 14, 15, 16, 17, 18], [5, 6, 18]], ids=["decode", "chunks"])
def test_cache(golden: Golden, cuts: list[int]) -> None:
    assert worst(cached(golden.model, golden.ids, cuts), golden.expected["logits.loops4"]) < TOLERANCE


@torch.no_grad()
def test_padded_rows_equal_those_without_padding(golden: Golden) -> None:
    expected = golden.expected
    mask = expected["padded.attention_mask"]
    logits = golden.model(expected["padded.input_ids"], attention_mask=mask) * mask[..., None]
    assert worst(logits, expected["padded.logits"]) < TOLERANCE


def test_greedy_text_of_generate_and_engine(golden: Golden) -> None:
    prompts, answers = golden.ids, golden.expected["greedy"]
    assert golden.model.generate(prompts, 12, temperature=0).equal(answers)
    llm = LLM(golden.model, config=EngineConfig(max_rows=2))
    outputs = llm.generate(
        [{"prompt_token_ids": row} for row in prompts.tolist()],
        SamplingParams(max_tokens=12, temperature=0, ignore_eos=True),
        progress=False,
    )
    assert [o.outputs[0].token_ids for o in outputs] == answers[:, prompts.shape[1] :].tolist()


@torch.no_grad()
def test_exits(golden: Golden) -> None:
    """The first token sees no other, so its exit does not depend on what exited tokens leave to attend to."""
    loops = {}
    for name in (name for name in golden.expected if name.startswith("exit_loop.thr")):
        threshold = float(name.removeprefix("exit_loop.thr"))
        trace = golden.model(golden.ids, exit="ouro", exit_threshold=threshold, trace=True)
        loops[threshold] = trace.exit_loop + 1
        assert loops[threshold][:, 0].equal(golden.expected[name][:, 0])
        wanted = golden.expected[f"logits.exit.thr{name.removeprefix('exit_loop.thr')}"]
        assert worst(trace.logits[:, 0], wanted[:, 0]) < TOLERANCE
    assert (loops[min(loops)] < 4).any(), "a token that leaves the loop computes no more of it"


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_the_rule_on_the_states_of_the_authors(golden: Golden, threshold: float) -> None:
    states, act = golden.expected["states"][:4], golden.model.recurrent.act
    rule = Ouro(act, threshold)
    state, exit_loop = rule.init(states[0], torch.tensor([4, 4])), torch.full(golden.ids.shape, 4)
    for loop in (0, 1, 2):
        state, done = rule.update(state, states[0], states[loop], torch.tensor([loop, loop]))
        exit_loop = torch.where(done & (exit_loop == 4), loop + 1, exit_loop)
    assert exit_loop.equal(golden.expected[f"exit_loop.thr{threshold}"])


def test_threshold_one_never_exits_in_any_dtype(golden: Golden) -> None:
    model = OpenMythos.from_pretrained(golden.folder, dtype="bfloat16")
    with torch.no_grad():
        model.recurrent.act.halt.bias.fill_(100.0)
        assert (model(golden.ids, exit="ouro", exit_threshold=1.0, trace=True).exit_loop == 3).all()
        assert (model(golden.ids, exit="ouro", exit_threshold=0.9, trace=True).exit_loop == 0).all()


@pytest.mark.parametrize(("layers", "n"), [(24, 1_434_652_673), (48, 2_667_974_657)])
def test_published_sizes(layers: int, n: int) -> None:
    cfg = ouro.to_config(PUBLISHED | {"num_hidden_layers": layers})
    with torch.device("meta"):
        model = OpenMythos(cfg)
    assert sum(p.numel() for p in model.parameters()) == n
    names = {place.name for place in ouro.places(cfg).values() if place}
    assert names == set(model.state_dict())


def test_saved_and_loaded_again(golden: Golden, tmp_path: Path) -> None:
    golden.model.save_pretrained(tmp_path / "own")
    again = OpenMythos.from_pretrained(tmp_path / "own")
    with torch.no_grad():
        assert again(golden.ids).equal(golden.model(golden.ids))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("hidden_size", -1),
        ("hidden_size", "48"),
        ("num_hidden_layers", 2**40),
        ("total_ut_steps", 0),
        ("rms_norm_eps", float("nan")),
        ("rope_scaling", {"type": "linear"}),
        ("early_exit_threshold", 2.0),
        ("vocab_size", None),
    ],
)
def test_wrong_values_are_named(golden: Golden, tmp_path: Path, field: str, value: object) -> None:
    values = json.loads((golden.folder / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises((TypeError, ValueError), match=field if field != "early_exit_threshold" else "act_threshold"):
        OpenMythos.from_pretrained(tmp_path)


def test_wrong_tensors_are_listed(golden: Golden) -> None:
    places = ouro.places(golden.model.cfg)
    tensors = {name: torch.zeros(place.shape) for name, place in places.items() if place}
    tensors["model.extra"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T
    with pytest.raises(
        ValueError, match=r"1\.mlp\.up_proj\.weight is missing; model\.extra is unknown; lm_head\.weight"
    ):
        ouro.to_state(tensors, golden.model.cfg)


def test_pickles_are_refused(golden: Golden, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((golden.folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pickled"):
        OpenMythos.from_pretrained(tmp_path)
