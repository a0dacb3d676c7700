"""The comparison on text: its arms, its measures against slow ones, and the whole in small."""

import dataclasses
import json
import math
import random
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from open_mythos.assets import novel
from open_mythos.cli import main
from open_mythos.data.documents import Reading
from open_mythos.data.prepare import Settings, prepare
from open_mythos.data.shards import TokenShards, load_index
from open_mythos.experiments import small_text, small_text_report
from open_mythos.model import OpenMythos
from open_mythos.recipes import load_recipe
from open_mythos.recipes.text import SMALL_TEXT_DATA
from open_mythos.train.config import TrainConfig
from open_mythos.train.data import Batch
from open_mythos.train.trainer import Trainer


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred kilobytes of five words, as bytes."""
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(0).choices(["the ", "rose ", "is ", "red ", "and \n"], k=24_000)
    (folder / "text.txt").write_text("".join(words))
    prepare([str(folder / "text.txt")], folder / "data", "bytes", Settings(Reading(cut="lines"), 0.2), progress=False)
    return folder / "data"


@pytest.fixture
def base(shards: Path) -> TrainConfig:
    cfg = load_recipe("small-text")
    data = dataclasses.replace(small_text.task(cfg), paths=(str(shards),), seq_len=20)
    return dataclasses.replace(cfg, data=data, steps=2, batch_size=2)


def test_the_arms_have_the_same_parameters_and_the_same_flops() -> None:
    costs = {name: small_text.costs(cfg) for name, cfg in small_text.arms(load_recipe("small-text")).items()}
    assert costs["sampled"] == costs["fixed"]
    for key in ("parameters", "parameters_without_embedding"):
        assert costs["parameters"][key] == pytest.approx(costs["sampled"][key], rel=1e-3)
        assert costs["flops"][key] > 1.5 * costs["sampled"][key]
    for key in ("flops", "flops_without_head"):
        # The plain one has as many blocks as the looped one unrolled, and no injection: 4 to 7 % more.
        assert costs["flops"][key] == pytest.approx(costs["sampled"][key], rel=0.07)
        assert costs["parameters"][key] < 0.7 * costs["sampled"][key]


def test_arms_of_a_seed_read_the_same_tokens(base: TrainConfig) -> None:
    runs = [small_text.seeded(cfg, 3, rate) for rate, cfg in enumerate(small_text.arms(base).values(), 1)]
    for run in runs:
        first = run.data.batch(np.random.default_rng(0), 8).input_ids
        assert torch.equal(first, runs[0].data.batch(np.random.default_rng(0), 8).input_ids)
    assert [run.optim.muon_lr / base.optim.muon_lr for run in runs] == [1, 2, 3, 4]
    other = small_text.seeded(base, 4, 1.0).data.batch(np.random.default_rng(0), 8).input_ids
    assert not torch.equal(first, other)


def test_bits_are_those_of_separate_calls(base: TrainConfig) -> None:
    torch.manual_seed(0)
    batch = small_text.held_out(small_text.task(base), 11)
    for cfg in (base, small_text.arms(base)["parameters"]):
        model = OpenMythos(cfg.model).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3)
            calls = (1, 3) if cfg is base else (None,)
            expected = [F.cross_entropy(model(batch.input_ids, n).mT, batch.labels, reduction="none") for n in calls]
        bits = small_text.window_bits(model, batch, (1, 3))
        np.testing.assert_allclose(bits, torch.stack(expected).sum(-1) / math.log(2), rtol=1e-5)


def test_the_sweep_is_scored_on_text_that_no_run_reads(base: TrainConfig) -> None:
    def windows(batch: Batch) -> set[tuple[int, ...]]:
        return {tuple(row) for row in torch.cat((batch.input_ids, batch.labels), 1).tolist()}

    n = (TokenShards(base.data.paths[0], "train").n_tokens - 1) // 20
    longest = dataclasses.replace(base, steps=1, batch_size=n - small_text.SWEEP_ROWS)
    read = longest.data.batch(np.random.default_rng(0), longest.batch_size)
    # Few words make equal windows at different places; those of the whole epoch say how many are different at all.
    epoch = longest.data.batch(np.random.default_rng(0), n)
    assert len(small_text.unread(longest).labels) + len(read.labels) == len(epoch.labels)
    assert windows(small_text.unread(longest)) | windows(read) == windows(epoch)
    with pytest.raises(ValueError, match="use more text"):
        small_text.unread(dataclasses.replace(longest, batch_size=n - small_text.SWEEP_ROWS + 1))


def test_null_lines_are_those_of_counting(base: TrainConfig) -> None:
    data = small_text.task(base)
    batch = small_text.held_out(data, 5)
    train = TokenShards(data.paths[0], "train")
    ids = train.read(0, train.n_tokens).tolist()
    single, double = {}, {}
    for before, token in zip([None, *ids], ids, strict=False):
        single[token] = single.get(token, 0) + 1
        double[before, token] = double.get((before, token), 0) + 1
    bits = [0.0, 0.0]
    for before, token in zip(batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist(), strict=True):
        p = (single[token] + 1) / (len(ids) + train.info["vocab_size"])
        bits[0] -= math.log2(p)
        bits[1] -= math.log2((double.get((before, token), 0) + 100 * p) / (single[before] + 100))
    found = list(small_text.null_lines(data, batch).values())
    assert found[:2] == pytest.approx([x / batch.labels.numel() / data.bytes_per_token for x in bits])
    assert 0.1 < found[2] < 4


def test_the_corpus_is_prepared_as_the_commands_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paragraphs = novel().split("\n\n")[:600]
    for folder in ("data", "other"):
        Path(folder).mkdir()
        lines = [json.dumps({"text": text}) + "\n" for text in paragraphs]
        Path(folder, "corpus.jsonl").write_text("".join(lines))
    commands = [shlex.split(line)[1:] for line in SMALL_TEXT_DATA.splitlines()]
    assert [args[0] for args in commands] == ["fetch-corpus", "train-tokenizer", "prepare-data"]
    for args in commands[1:]:
        assert main(args) == 0
    small_text.prepare_corpus(Path("other/small-text"), 2048)
    cfg = load_recipe("small-text")
    here, there = (load_index(Path(folder)) for folder in (small_text.task(cfg).paths[0], "other/small-text"))
    assert here["splits"] == there["splits"] and here["counts"]["validation"]["documents"] > 0
    cfg.check_data()


def test_a_verdict_needs_the_interval_and_every_seed() -> None:
    noise = np.random.default_rng(0).normal(size=(3, 400))
    assert small_text_report.verdict(noise + 1) == "higher"
    assert small_text_report.verdict(noise - 1) == "lower"
    assert small_text_report.verdict(noise - noise.mean()) == "undecided"
    assert small_text_report.verdict(noise + np.array([[3.0], [3.0], [-1.0]])) == "undecided"
    low, high = small_text_report.interval(noise[0])
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert low < noise[0].mean() < high


def test_the_whole_in_small(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    recipe = load_recipe("small-text")
    model = dataclasses.replace(recipe.model, vocab_size=259, dim=32, n_heads=2, n_kv_heads=2, expert_dim=32)
    recipe = dataclasses.replace(recipe, model=model, data=dataclasses.replace(recipe.data, seq_len=20))
    monkeypatch.setattr(small_text, "load_recipe", lambda _: recipe)
    monkeypatch.setattr(small_text, "SWEEP_ROWS", 2)
    args = small_text.Args(tmp_path / "out", tmp_path / "runs", shards, seeds=(0, 1), windows=5, quick=True)
    small_text.main(dataclasses.replace(args, seeds=(0,)))
    first = json.loads((args.out / "report.json").read_text())
    assert {name: len(sweep) for name, sweep in first["sweep"].items()} == dict.fromkeys(small_text.TITLES, 3)
    trained = []
    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: trained.append(self.out_dir.name) or run(self))
    small_text.main(args)
    assert trained == [f"{name}-1" for name in small_text.TITLES]
    results = json.loads((args.out / "report.json").read_text())
    assert {name: runs[:1] for name, runs in results["runs"].items()} == first["runs"]
    bits = small_text_report.bits_per_byte(results)
    assert {name: x.shape for name, x in bits.items()} == {
        name: (2, 7 if name in ("sampled", "fixed") else 1, 5) for name in small_text.TITLES
    }
    # One of 259 bytes costs 8 bits before the first step.
    assert all(((x > 1) & (x < 8.5)).all() for x in bits.values())
    report = (args.out / "report.md").read_text()
    for value in (bits["sampled"][:, 0].mean(), bits["flops"].mean()):
        assert f"| {value:.4f} (" in report
    assert (args.out / "loops.png").stat().st_size > 10_000
    assert (args.out / "loops.svg").read_text().startswith("<?xml")
