"""What was published of open-mythos 0.5.0: its snippets, its import paths, its parameter counts."""

import importlib
import inspect
import subprocess
import sys

import pytest
import torch

import open_mythos
import open_mythos.main
from open_mythos import VARIANTS, MythosConfig, OpenMythos
from open_mythos.variants import sized
from tests.models import ATTENTIONS, tiny

USAGE = """
import torch
from open_mythos.main import OpenMythos, MythosConfig


attn_type = "ATTENTION"  # or "gqa"

base = {
    "vocab_size": 1000,
    "dim": 256,
    "n_heads": 8,
    "max_seq_len": 128,
    "max_loop_iters": 4,
    "prelude_layers": 1,
    "coda_layers": 1,
    "n_experts": 8,
    "n_shared_experts": 1,
    "n_experts_per_tok": 2,
    "expert_dim": 64,
    "lora_rank": 8,
    "attn_type": attn_type,
}

if attn_type == "gqa":
    cfg = MythosConfig(**base, n_kv_heads=2)
else:
    cfg = MythosConfig(
        **base,
        n_kv_heads=8,
        kv_lora_rank=32,
        q_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    )

model = OpenMythos(cfg)
total = sum(p.numel() for p in model.parameters())
print(f"\\n[{attn_type.upper()}] Parameters: {total:,}")

ids = torch.randint(0, cfg.vocab_size, (2, 16))
logits = model(ids, n_loops=4)
print(f"[{attn_type.upper()}] Logits shape: {logits.shape}")

out = model.generate(ids, max_new_tokens=8, n_loops=8)
print(f"[{attn_type.upper()}] Generated shape: {out.shape}")

A = model.recurrent.injection.get_A()
print(
    f"[{attn_type.upper()}] Spectral radius \u03c1(A) max: {A.max().item():.4f} (must be < 1)"
)
"""

VARIANTS_SNIPPET = """
from open_mythos import (
    mythos_1b,
    mythos_3b,
    mythos_7b,
    mythos_10b,
    mythos_50b,
    mythos_100b,
    mythos_500b,
    mythos_1t,
    OpenMythos,
)

cfg = mythos_7b()  # returns a MythosConfig
model = OpenMythos(cfg)
"""

COUNTS = {
    "1b": 1_064_028_034,
    "3b": 3_041_725_186,
    "10b": 9_981_316_994,
    "50b": 50_374_247_426,
    "100b": 99_545_072_130,
    "500b": 497_849_137_154,
    "1t": 999_326_352_386,
}
# dim, n_experts, expert_dim, loops, context, longest output.
SHAPES = {
    "1b": (2048, 64, 2048, 16, 4096, 4096),
    "3b": (3072, 64, 4096, 16, 4096, 4096),
    "10b": (4096, 128, 5632, 24, 8192, 4096),
    "50b": (6144, 256, 9728, 32, 8192, 4096),
    "100b": (8192, 256, 13568, 32, 1_000_000, 131072),
    "500b": (12288, 512, 23040, 48, 1_000_000, 131072),
    "1t": (16384, 512, 34560, 64, 1_000_000, 131072),
}
DEFAULTS = (
    "vocab_size 32000, dim 2048, n_heads 16, n_kv_heads 4, max_seq_len 4096, max_loop_iters 16, prelude_layers 2, "
    "coda_layers 2, attn_type mla, kv_lora_rank 512, q_lora_rank 1536, qk_rope_head_dim 64, qk_nope_head_dim 128, "
    "v_head_dim 128, n_experts 64, n_shared_experts 2, n_experts_per_tok 4, expert_dim 512, act_threshold 0.99, "
    "rope_theta 500000.0, lora_rank 16, max_output_tokens 4096, dropout 0.0"
)


def count(cfg: MythosConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in OpenMythos(cfg).parameters())


@pytest.mark.parametrize("attn_type", ATTENTIONS)
def test_usage_snippet(attn_type: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(USAGE.replace("ATTENTION", attn_type), "usage", "exec"), {})
    printed = capsys.readouterr().out
    total = count(MythosConfig(**snippet_config(attn_type)))
    for line in (
        f"Parameters: {total:,}",
        "Logits shape: torch.Size([2, 16, 1000])",
        "Generated shape: torch.Size([2, 24])",
        "(A) max: 0.3679 (must be < 1)",
    ):
        assert f"[{attn_type.upper()}] " in printed and line in printed


def snippet_config(attn_type: str) -> dict:
    names: dict = {"OpenMythos": object, "MythosConfig": dict, "torch": torch}
    body = USAGE.split("from open_mythos.main import OpenMythos, MythosConfig")[1].split("model =")[0]
    exec(body.replace("ATTENTION", attn_type), names)
    return names["cfg"]


def test_variants_snippet() -> None:
    names: dict = {}
    with torch.device("meta"):
        exec(VARIANTS_SNIPPET, names)
    assert isinstance(names["cfg"], MythosConfig) and isinstance(names["model"], OpenMythos)
    assert 3e9 < sum(p.numel() for p in names["model"].parameters()) < 1e10


def test_star_import_brings_every_public_name() -> None:
    names: dict = {}
    exec("from open_mythos import *", names)
    assert set(open_mythos.__all__) <= set(names)
    assert {
        "OpenMythos",
        "MythosConfig",
        "MythosTokenizer",
        "load_tokenizer",
        *(f.__name__ for f in VARIANTS.values()),
    } <= set(names)


def test_old_import_path_is_the_new_one() -> None:
    for name in (
        "OpenMythos MythosConfig LTIInjection ACTHalting LoRAAdapter MoEFFN GQAttention MLAttention RMSNorm "
        "TransformerBlock RecurrentBlock Expert loop_index_embedding apply_rope"
    ).split():
        assert getattr(open_mythos.main, name) is getattr(open_mythos, name)


def test_first_fields_are_the_published_ones() -> None:
    given = [f"{name} {value}" for name, value in MythosConfig().to_dict().items()]
    assert given[:23] == DEFAULTS.split(", ")
    assert list(inspect.signature(MythosConfig).parameters)[:23] == [item.split()[0] for item in DEFAULTS.split(", ")]


@pytest.mark.parametrize("name", COUNTS)
def test_variants_have_the_published_counts(name: str) -> None:
    cfg = VARIANTS[name]()
    assert count(cfg) == COUNTS[name]
    shape = (cfg.dim, cfg.n_experts, cfg.expert_dim, cfg.max_loop_iters, cfg.max_seq_len, cfg.max_output_tokens)
    assert shape == SHAPES[name]


def test_other_published_counts() -> None:
    assert count(MythosConfig()) == 436_035_842
    addition = sized(16, 256, 8, 2, 32, 4, 1, 4, 1, 2, 512, lora_rank=8)
    assert count(addition) == 3_386_658


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_about_its_name(name: str) -> None:
    size = float(name.split("_")[0][:-1]) * {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[name.split("_")[0][-1]]
    assert count(VARIANTS[name]()) == pytest.approx(size, rel=0.15)


BUILD_ALL = """
import resource, time
import torch
from open_mythos import VARIANTS, OpenMythos
for name, variant in VARIANTS.items():
    start = time.perf_counter()
    with torch.device("meta"):
        model = OpenMythos(variant())
    print(name, round(time.perf_counter() - start, 3), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_every_variant_builds_small_on_meta() -> None:
    """Prints name, seconds, and the process's peak memory so far in MiB; the memory is bounded here."""
    done = subprocess.run([sys.executable, "-c", BUILD_ALL], capture_output=True, text=True, check=True)
    print(done.stdout)
    assert all(int(line.split()[2]) < 1024 for line in done.stdout.splitlines())


def test_what_the_table_of_differences_names_is_so() -> None:
    """Keywords that were renamed, and the module that is gone: docs/open_mythos.md, "Coming from open-mythos 0.5.0"."""
    from open_mythos.nn.block import TransformerBlock
    from open_mythos.nn.depth import LoRAAdapter, loop_index_embedding
    from open_mythos.nn.moe import MoEFFN
    from open_mythos.nn.recurrent import RecurrentBlock

    for function, old, new in (
        (loop_index_embedding, "loop_t", "loop_index"),
        (LoRAAdapter.forward, "loop_t", "loop_index"),
        (TransformerBlock, "use_moe", "recurrent"),
        (RecurrentBlock.forward, "freqs_cis", "view"),
    ):
        names = inspect.signature(function).parameters
        assert new in names and old not in names
    with pytest.raises(ModuleNotFoundError, match=r"open_mythos\.moda"):
        importlib.import_module("open_mythos.moda")
    experts = MoEFFN(tiny(n_experts=2, n_shared_experts=1))
    assert experts.experts is not None and experts.shared is not None and not hasattr(experts, "routed_experts")
