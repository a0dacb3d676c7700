"""int8 weights: every way of using a model, against the same model with the rounded values in floating point."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from open_mythos import LLM, OpenMythos, SamplingParams
from open_mythos.cli import main
from open_mythos.nn.quantized import Int8Experts, Int8Head, Int8Linear, quantize
from open_mythos.ops import int8
from open_mythos.ops.batch_invariant import Invariance, batch_invariant
from open_mythos.ops.int8 import Int8Weight, int8_linear, quantize_tensor
from open_mythos.recipes import load_recipe
from open_mythos.tokenization.tokenizer import ByteTokenizer
from tests.models import random_ids, scaled, tiny

SIZES = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "expert_dim": 32, "vocab_size": 259}


def model_of(attn_type: str = "gqa", **fields: object) -> OpenMythos:
    return scaled(tiny(attn_type=attn_type, **{**SIZES, **fields}), dtype=torch.float32).eval()


def rounded(model: OpenMythos) -> OpenMythos:
    """The model of an int8 one's values in floating point: the oracle."""
    oracle = OpenMythos(dataclasses.replace(model.cfg, weights="float"))
    own = dict(oracle.named_parameters())
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Int8Experts):
                for part, weight in zip(("gate_up", "down"), module.weights(torch.empty(0)), strict=True):
                    own.pop(f"{name}.{part}").copy_(weight.dequantize())
            elif isinstance(module, Int8Linear):
                own.pop(f"{name}.weight").copy_(module.weight.dequantize())
        rest = model.state_dict()
        for name, p in own.items():
            p.copy_(rest[name])
        for name, x in oracle.named_buffers():
            x.copy_(rest[name])
    return oracle.eval()


@pytest.mark.parametrize("shape", [(5, 32), (3, 7, 64), (2, 33)])
def test_rounding_is_to_the_nearest_of_255_steps(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape) * torch.logspace(-6, 3, shape[-2])[:, None]
    weight[..., 0, :] = 0
    stored = quantize_tensor(weight)
    assert stored.values.abs().max() <= int8.LARGEST and stored.shape == weight.shape
    assert ((stored.dequantize() - weight).abs() <= stored.scales[..., None] * 0.501).all()
    # A cast to bfloat16 and back changes no scale.
    assert torch.equal(stored.scales.bfloat16().float(), stored.scales)
    # Every output uses nearly all of the range.
    assert (stored.values.abs().amax(-1)[..., 1:] >= 126).all()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_rows", "K", "N"), [(1, 32, 24), (3, 96, 7), (7, 41, 24), (70, 64, 1)])
def test_products(
    exact: bool, dtype: torch.dtype, n_rows: int, K: int, N: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "products_are_exact", lambda: exact)
    x = (torch.randn(2, n_rows, K) * torch.logspace(-20, 5, n_rows)[:, None]).to(dtype)
    weight = quantize_tensor(torch.randn(N, K).to(dtype))
    out, expected = int8_linear(x, weight), x.double() @ weight.dequantize().double().T
    assert out.shape == (2, n_rows, N) and out.dtype == dtype
    size = x.double().norm(dim=-1, keepdim=True) * weight.dequantize().double().norm(dim=-1)
    assert ((out - expected).abs() < 0.03 * size).all()


def test_a_row_does_not_depend_on_the_others() -> None:
    assert int8.products_are_exact()
    weight, x = quantize_tensor(torch.randn(40, 72)), torch.randn(300, 72)
    alone = torch.cat([int8_linear(row[None], weight) for row in x])
    assert torch.equal(int8_linear(x, weight), alone)
    assert not int8_linear(torch.zeros(2, 72), weight).any()
    assert int8_linear(x[:0], weight).shape == (0, 40)


def test_inexact_products_are_batch_invariant_where_calls_have_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "products_are_exact", lambda: False)
    weight, x, state = quantize_tensor(torch.randn(4096, 1024)), torch.randn(64, 1024), Invariance()
    with torch.inference_mode(), batch_invariant(state):
        whole = int8_linear(x, weight)
        parts = [int8_linear(x[:n], weight) for n in (0, 1, 2, 5, 17)]
    assert not state.holds or all(torch.equal(whole[: len(part)], part) for part in parts)


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"n_experts": 0, "n_shared_experts": 0}, {"injection": "concat"}, {"tie_embeddings": False}],
)
def test_a_model_computes_with_the_rounded_values(attn_type: str, fields: dict[str, object]) -> None:
    model = quantize(model_of(attn_type, **fields))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    ids = random_ids(model.cfg, 2, 9)
    with torch.no_grad():
        out, expected = model(ids), rounded(model)(ids)
    assert out.dtype == torch.float32
    assert (out - expected).norm() < 0.05 * expected.norm()


def test_decoding_is_the_forward_pass() -> None:
    model = quantize(model_of())
    ids = random_ids(model.cfg, 2, 9)
    with torch.no_grad():
        whole = model(ids)
        cache = model.make_cache(2, 9, model.cfg.max_loop_iters)
        parts = torch.cat([model(ids[:, i : i + 3], cache=cache) for i in (0, 3, 6)], dim=1)
    assert (whole - parts).norm() < 0.03 * whole.norm()


def test_a_head_of_its_own_is_stored_beside_the_embedding(tmp_path: Path) -> None:
    model = quantize(model_of(tie_embeddings=False))
    assert not torch.equal(model.head.values, model.embed.values)
    model.save_pretrained(tmp_path)
    again = OpenMythos.from_pretrained(tmp_path)
    assert torch.equal(again.head.values, model.head.values) and torch.equal(again.head.scales, model.head.scales)


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_a_folder_holds_the_same_bits(attn_type: str, tmp_path: Path) -> None:
    model = quantize(model_of(attn_type))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["weights"] == "int8"
    again = OpenMythos.from_pretrained(tmp_path)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())
    assert isinstance(again.head, Int8Head) and not any(name.startswith("head") for name in after)
    copied = copy.deepcopy(again).to(torch.bfloat16)
    assert copied.dtype == torch.bfloat16 and copied.embed.values.dtype == torch.int8
    assert copied.head.weight.values is copied.embed.values
    floats = {name: x for name, x in load_file(tmp_path / "model.safetensors").items() if not name.endswith("values")}
    assert all(x.is_floating_point() for x in floats.values())


def test_a_folder_in_another_type_is_refused(tmp_path: Path) -> None:
    quantize(model_of()).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("values"))
    for changed, message in (
        (tensors | {name: tensors[name].float()}, f"{name} in F32, not one of I8"),
        ({key: x for key, x in tensors.items() if key != name}, f"{name} is missing"),
        (tensors | {"norm.weight": tensors["norm.weight"].to(torch.int8)}, "norm.weight in I8"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            OpenMythos.from_pretrained(tmp_path)


def test_the_engine_answers_as_generate_does() -> None:
    model = quantize(model_of())
    prompt = random_ids(model.cfg, 1, 6)
    llm = LLM(model, ByteTokenizer())
    assert llm.engine.invariant
    [answer] = llm.generate([prompt[0].tolist()], SamplingParams(max_tokens=8, temperature=0))
    assert answer.outputs[0].token_ids == model.generate(prompt, 8, temperature=0)[0, 6:].tolist()


def test_what_is_refused() -> None:
    model = model_of()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="has a value that is NaN"):
        quantize(broken)
    assert broken.cfg.weights == "float"
    quantize(model)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(model)
    with pytest.raises(ValueError, match="cannot be trained"):
        model.train()
    with pytest.raises(ValueError, match="cannot be compiled"):
        model.generate(random_ids(model.cfg, 1, 3), 2, compiled=True)
    with pytest.raises(RuntimeError, match="give no gradient"):
        int8_linear(
            torch.randn(1, 32, requires_grad=True), Int8Weight(torch.ones(2, 32, dtype=torch.int8), torch.ones(2))
        )
    with pytest.raises(ValueError, match="weights='int8' cannot be trained"):
        dataclasses.replace(load_recipe("tiny-khop"), model=model.cfg)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "float", tmp_path / "int8"
    model_of().save_pretrained(folder)
    ByteTokenizer().save(folder)
    assert main(["quantize", str(folder), "--out", str(out)]) == 0
    assert "% of" in capsys.readouterr().out
    assert main(["generate", str(out), "abc", "--max-new-tokens", "3"]) == 0
    assert main(["info", str(out)]) == 0
    assert main(["quantize", str(folder), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["quantize", str(out), "--out", str(tmp_path / "twice")]) == 2
    assert "quantized already" in capsys.readouterr().err
