"""One folder, read and written by both libraries."""

import filecmp
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from open_mythos.assets import novel
from open_mythos.hf import MythosForCausalLM, MythosHFConfig, MythosModel
from open_mythos.model import OpenMythos
from open_mythos.tokenization.chat_template import render, save_template
from open_mythos.tokenization.tokenizer import BPETokenizer
from tests.models import random_ids, scaled, tiny


def same(a: OpenMythos, b: OpenMythos) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(m == n and x.dtype == y.dtype and torch.equal(x, y) for (m, x), (n, y) in pairs)


def test_transformers_reads_what_we_write(net: OpenMythos, folder: Path) -> None:
    model, base = AutoModelForCausalLM.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert type(model) is MythosForCausalLM and type(base) is MythosModel
    assert same(model.net, net) and same(base.net, net)
    assert model.net.head.weight is model.net.embed.weight and not model.training
    ids = random_ids(net.cfg, 2, 9)
    assert torch.equal(model(ids).logits, net(ids))
    assert torch.equal(net.head(base(ids).last_hidden_state), net(ids))


def test_we_read_what_transformers_writes(net: OpenMythos, folder: Path, tmp_path: Path) -> None:
    """And it is the same file, byte by byte."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert same(OpenMythos.from_pretrained(tmp_path), net)
    _, differ, absent = filecmp.cmpfiles(folder, tmp_path, [path.name for path in folder.iterdir()], shallow=False)
    assert not differ and not absent


def test_dtype_is_ours(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert same(model.net, OpenMythos.from_pretrained(folder, dtype="bfloat16"))


def test_a_clean_process_loads_the_folder_by_its_code(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    scaled(tiny()).save_pretrained(folder)
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; assert 'open_mythos' not in sys.modules;"
        f"m = A.from_pretrained({str(folder)!r}, trust_remote_code=True);"
        "print(m.generate(max_new_tokens=3, do_sample=False, input_ids=__import__('torch').tensor([[1, 2]])).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = OpenMythos.from_pretrained(folder).generate(torch.tensor([[1, 2]]), 3, temperature=0)
    assert done.stdout.strip() == str(ours.tolist())


def test_a_configuration_alone_makes_a_fresh_model(folder: Path, tmp_path: Path) -> None:
    cfg = AutoConfig.from_pretrained(folder)
    assert cfg.mythos() == OpenMythos.from_pretrained(folder).cfg
    assert (cfg.hidden_size, cfg.num_hidden_layers, cfg.tie_word_embeddings) == (32, 6, True)
    torch.manual_seed(1)
    fresh = AutoModelForCausalLM.from_config(cfg)
    torch.manual_seed(1)
    assert same(fresh.net, OpenMythos(cfg.mythos()))


def test_a_configuration_written_alone_is_read_by_both(folder: Path) -> None:
    cfg = MythosHFConfig.from_pretrained(folder)
    before = OpenMythos.from_pretrained(folder).cfg
    cfg.save_pretrained(folder)
    assert OpenMythos.from_pretrained(folder).cfg == before == AutoConfig.from_pretrained(folder).mythos()


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    scaled(tiny()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["other"] = tensors.pop("norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit its config.json: missing_keys model.mythos.norm.weight"):
        MythosForCausalLM.from_pretrained(tmp_path)


def test_a_bad_field_is_named() -> None:
    with pytest.raises(ValueError, match="n_heads=7 must divide dim=2048"):
        MythosHFConfig(n_heads=7, attn_type="gqa")


def test_the_tokenizer_is_ours(tmp_path: Path) -> None:
    ours = BPETokenizer.train_from_text(novel()[:20_000], 400)
    scaled(tiny(vocab_size=ours.vocab_size)).save_pretrained(tmp_path)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = novel()[30_000:31_000] + " \u00e9\u4e16\U0001f600\n\n  x"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)


def test_the_chat_template_is_ours(tmp_path: Path) -> None:
    ours = BPETokenizer.train_from_text(novel()[:20_000], 400)
    scaled(tiny(vocab_size=ours.vocab_size)).save_pretrained(tmp_path)
    ours.save(tmp_path)
    save_template(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "And 3 + 3?"},
    ]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == render(messages, ours, reply=True)[0]


def test_a_larger_vocabulary_is_saved(tmp_path: Path) -> None:
    """As trainers make it for tokens of their own."""
    scaled(tiny()).save_pretrained(tmp_path)
    model, ids = MythosForCausalLM.from_pretrained(tmp_path), random_ids(tiny(), 2, 5)
    before = model(ids).logits
    model.resize_token_embeddings(60)
    assert torch.equal(model(ids).logits[..., :53], before) and model.net.head.weight is model.net.embed.weight
    model.save_pretrained(tmp_path)
    assert same(OpenMythos.from_pretrained(tmp_path), model.net) and model.net.embed.num_embeddings == 60
    assert torch.equal(OpenMythos.from_pretrained(tmp_path)(ids), model(ids).logits)
