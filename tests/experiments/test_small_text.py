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
from open_mythos.experiments import prepared_text, small_text
from open_mythos.experiments.study import Lab, Results, perform
from open_mythos.recipes import load_recipe
from open_mythos.recipes.text import SMALL_TEXT_DATA
from open_mythos.tasks.task import Batch
from open_mythos.train.config import TrainConfig
from tests.experiments.test_exits import sharpened

ROWS = small_text.SWEEP_ROWS


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
    data = dataclasses.replace(cfg.data, paths=(str(shards),), seq_len=20)
    return dataclasses.replace(cfg, data=data, steps=2, batch_size=2)


@pytest.fixture
def every(base: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, TrainConfig]:
    monkeypatch.setattr(small_text, "load_recipe", lambda _: base)
    return small_text.arms(quick=False)


def test_the_arms_have_the_same_parameters_and_the_same_flops() -> None:
    costs = {name: small_text.costs(cfg) for name, cfg in small_text.arms(quick=False).items()}
    assert costs["sampled"] == costs["fixed"]
    for key in ("parameters", "parameters_without_embedding"):
        assert costs["parameters"][key] == pytest.approx(costs["sampled"][key], rel=1e-3)
        assert costs["flops"][key] > 1.5 * costs["sampled"][key]
    for key in ("flops", "flops_without_head"):
        # The plain one has as many blocks as the looped one unrolled, and no injection: 4 to 7 % more.
        assert costs["flops"][key] == pytest.approx(costs["sampled"][key], rel=0.07)
        assert costs["parameters"][key] < 0.7 * costs["sampled"][key]


def test_arms_of_a_seed_read_the_same_tokens(base: TrainConfig, every: dict[str, TrainConfig]) -> None:
    runs = [small_text.seeded(small_text.at_rate(cfg, rate), 3) for rate, cfg in enumerate(every.values(), 1)]
    for run in runs:
        first = run.data.batch(np.random.default_rng(0), 8).input_ids
        assert torch.equal(first, runs[0].data.batch(np.random.default_rng(0), 8).input_ids)
    assert [run.optim.muon_lr / base.optim.muon_lr for run in runs] == [1, 2, 3, 4, 5]
    other = small_text.seeded(base, 4).data.batch(np.random.default_rng(0), 8).input_ids
    assert not torch.equal(first, other)


def test_bits_are_those_of_separate_calls(base: TrainConfig, every: dict[str, TrainConfig]) -> None:
    batch = prepared_text.held_out(base, 11)
    for cfg in (base, every["parameters"]):
        model, calls = sharpened(cfg, 3), (1, 3) if cfg is base else (None,)
        with torch.no_grad():
            expected = [F.cross_entropy(model(batch.input_ids, n).mT, batch.labels, reduction="none") for n in calls]
        bits = small_text.window_bits(model, batch, (1, 3)).numpy()
        np.testing.assert_allclose(bits, torch.stack(expected).sum(-1) / math.log(2), rtol=1e-5)


def test_the_sweep_is_scored_on_text_that_no_run_reads(base: TrainConfig) -> None:
    def windows(batch: Batch) -> set[tuple[int, ...]]:
        return {tuple(row) for row in torch.cat((batch.input_ids, batch.labels), 1).tolist()}

    n = (TokenShards(base.data.paths[0], "train").n_tokens - 1) // 20
    longest = dataclasses.replace(base, steps=1, batch_size=n - ROWS)
    read = longest.data.batch(np.random.default_rng(0), longest.batch_size)
    # Few words make equal windows at different places; those of the whole epoch say how many are different at all.
    epoch = longest.data.batch(np.random.default_rng(0), n)
    assert len(prepared_text.unread(longest, ROWS).labels) + len(read.labels) == len(epoch.labels)
    assert windows(prepared_text.unread(longest, ROWS)) | windows(read) == windows(epoch)
    with pytest.raises(ValueError, match="use more text"):
        prepared_text.unread(dataclasses.replace(longest, batch_size=n - ROWS + 1), ROWS)


def test_null_lines_are_those_of_counting(base: TrainConfig) -> None:
    data = base.data
    batch = prepared_text.held_out(base, 5)
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
    found = list(prepared_text.null_lines(base, batch).values())
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
    prepared_text.prepare_corpus(Path("other/small-text"), 2048)
    cfg = load_recipe("small-text")
    here, there = (load_index(Path(folder)) for folder in (cfg.data.paths[0], "other/small-text"))
    assert here["splits"] == there["splits"] and here["counts"]["validation"]["documents"] > 0
    cfg.check_data()


def test_the_whole_in_small(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    recipe = load_recipe("small-text")
    model = dataclasses.replace(recipe.model, vocab_size=259, dim=32, n_heads=2, n_kv_heads=2, expert_dim=32)
    data = dataclasses.replace(recipe.data, paths=(str(shards),), seq_len=20)
    monkeypatch.setattr(small_text, "load_recipe", lambda _: dataclasses.replace(recipe, model=model, data=data))
    monkeypatch.setattr(small_text, "SWEEP_ROWS", 2)
    out, lab = tmp_path / "out", Lab(tmp_path / "runs", True, (0, 1))
    perform("small_text", lab, out, "command")
    results = json.loads((out / "report.json").read_text())["results"]
    arms = [*small_text.LOOPED, *small_text.PLAIN]
    assert {name: len(sweep) for name, sweep in results["sweep"].items()} == dict.fromkeys(arms, 3)
    read = Results(small_text.STUDY, results)
    bits = {name: read[name, "bits"].values / results["bytes_per_window"] for name in read.runs}
    shapes = {"sampled": (2, 7), "fixed": (2, 7), "parameters": (2, 1), "flops": (2, 1), "unnormed": (1, 7)}
    assert {name: x.shape[:2] for name, x in bits.items()} == shapes
    # One of 259 bytes costs 8 bits before the first step.
    assert all(((x > 1) & (x < 8.5)).all() for x in bits.values())
    report = (out / "report.md").read_text()
    for value in (bits["sampled"][:, 0].mean(), bits["flops"].mean()):
        assert f"| {value:.4f} (" in report
    for name in ("loops", "closer"):
        assert (out / f"{name}.svg").read_text().startswith("<?xml")
    # Half a bit more for one of them, and the words turn.
    assert "better than plain, same FLOPs" not in small_text.STUDY.report(results).finding
    for run in results["runs"]["flops"]:
        run["bits"] = [[x + 0.5 * results["bytes_per_window"] for x in row] for row in run["bits"]]
    finding = small_text.STUDY.report(results).finding
    assert finding.count("better than plain, same FLOPs (-0.") == 2
