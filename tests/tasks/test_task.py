"""Training on shards: rows that their number decides, mixtures, and a run from its configuration."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from open_mythos.cli import main
from open_mythos.data.documents import Reading
from open_mythos.data.prepare import Settings, prepare
from open_mythos.data.shards import TokenShards
from open_mythos.model import OpenMythos
from open_mythos.recipes import load_recipe
from open_mythos.tasks import Shards
from open_mythos.tokenization.tokenizer import BPETokenizer
from open_mythos.train.config import TrainConfig

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two prepared folders, of digits and of letters."""
    made = []
    for name, letters in (("digits", "0123456789"), ("letters", "abcdefghij")):
        folder = tmp_path_factory.mktemp(name)
        rng = np.random.default_rng(1)
        lines = ["".join(rng.choice(list(letters), 30)) for _ in range(300 if name == "digits" else 100)]
        (folder / "text.txt").write_text("\n".join(lines))
        settings = Settings(Reading(cut="lines"), 0.2)
        prepare([str(folder / "text.txt")], folder / "data", "bytes", settings, progress=False)
        made.append(str(folder / "data"))
    return made[0], made[1]


def test_an_epoch_reads_every_window_once(folders: tuple[str, str]) -> None:
    task, tokens = Shards(folders[:1], seq_len=50), TokenShards(folders[0], "train")
    n = (tokens.n_tokens - 1) // 50
    rows = task.batch(RNG, n)
    expected = {tuple(tokens.read(50 * i, 51).tolist()) for i in range(n)}
    got = torch.cat((rows.input_ids, rows.labels[:, -1:]), dim=1)
    assert torch.equal(rows.input_ids[:, 1:], rows.labels[:, :-1])
    assert {tuple(row) for row in got.tolist()} == expected and len(got) == n
    again = task.batch(RNG, n, first_row=n)
    assert not torch.equal(again.input_ids, rows.input_ids)
    assert sorted(again.input_ids.tolist()) == sorted(rows.input_ids.tolist())
    assert not torch.equal(dataclasses.replace(task, order_seed=1).batch(RNG, n).input_ids, rows.input_ids)


def test_rows_do_not_depend_on_how_they_are_asked_for(folders: tuple[str, str]) -> None:
    """Batches of any size, in any process, from any place: the row's number decides."""
    whole = Shards(folders, (2.0, 1.0), seq_len=20).batch(RNG, 2500).input_ids
    for first, rows in ((0, 1), (7, 63), (990, 40), (2499, 1)):
        part = Shards(folders, (2.0, 1.0), seq_len=20).batch(np.random.default_rng(first), rows, first_row=first)
        assert torch.equal(part.input_ids, whole[first : first + rows])


def test_a_mixture_has_its_shares(folders: tuple[str, str]) -> None:
    def share_of_letters(task: Shards) -> float:
        ids = task.batch(RNG, 1000).input_ids
        return ((ids >= ord("a")) & (ids <= ord("z"))).any(1).double().mean().item()

    assert share_of_letters(Shards(folders, (1.0, 9.0), seq_len=20)) == 0.9
    tokens = [TokenShards(folder, "train").n_tokens for folder in folders]
    assert abs(share_of_letters(Shards(folders, seq_len=20)) - tokens[1] / sum(tokens)) < 1e-3


def test_validation_is_held_out(folders: tuple[str, str]) -> None:
    task = Shards(folders, seq_len=31)
    rows = task.validation_batch(np.random.default_rng(0), 400).input_ids
    held_out = [TokenShards(folder, "validation") for folder in folders]
    windows = {tuple(s.read(i, 31).tolist()) for s in held_out for i in range(s.n_tokens - 31)}
    assert {tuple(row) for row in rows.tolist()} <= windows
    # A window of 31 holds all of a document or its end and the next one's beginning: none is of the training part.
    assert not {tuple(row) for row in rows.tolist()} & {
        tuple(s.read(i, 31).tolist())
        for s in (TokenShards(folder, "train") for folder in folders)
        for i in range(s.n_tokens - 31)
    }
    assert task.bytes_per_token == pytest.approx(30 / 31)


def test_refuses(folders: tuple[str, str], tmp_path: Path) -> None:
    BPETokenizer.train(["abc"], 259).save(tmp_path / "bpe")
    (tmp_path / "text.txt").write_text("some text " * 100)
    prepare(
        [str(tmp_path / "text.txt")], tmp_path / "data", str(tmp_path / "bpe"), Settings(held_out=0), progress=False
    )
    other = str(tmp_path / "data")
    for make, message in (
        (lambda: Shards(()), r"data.paths=\(\) must name folders"),
        (lambda: Shards(folders, (1.0,)), "data.weights has 1 values for 2 folders"),
        (lambda: Shards(folders, (1.0, 0.0)), "data.weights=0.0"),
        (lambda: Shards((*folders, other)).batch(RNG, 1), "was made with another tokenizer"),
        (lambda: Shards(folders, seq_len=10**6).batch(RNG, 1), r"data.seq_len=1000000 must be below the \d+ tokens of"),
        (lambda: Shards((other,), seq_len=9).validation_batch(RNG, 1), "prepare the data with a larger --held-out"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(FileNotFoundError, match="make it with mythos prepare-data"):
        Shards((str(tmp_path),)).batch(RNG, 1)


def test_from_text_to_a_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The commands one after another, as docs/data.md has them."""
    text = tmp_path / "text.jsonl"
    text.write_text(
        "\n".join(f'{{"text": "chapter {i} of a long story about the number {i * i}"}}' for i in range(400))
    )
    assert main(["train-tokenizer", str(text), "--out", str(tmp_path / "bpe"), "--vocab-size", "300"]) == 0
    prepare_data = ["prepare-data", str(text), "--out", str(tmp_path / "data"), "--tokenizer", str(tmp_path / "bpe")]
    assert main([*prepare_data, "--held-out", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "300 tokens in" in printed and "documents" in printed and "bytes per token" in printed
    recipe = load_recipe("tiny-text")
    cfg = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, vocab_size=300),
        data=Shards((str(tmp_path / "data"),), seq_len=32),
        steps=4,
        eval=dataclasses.replace(recipe.eval, every=4, rows=4, loops=(1, 2)),
    )
    assert TrainConfig.from_yaml(cfg.to_yaml()) == cfg
    (tmp_path / "run.yaml").write_text(cfg.to_yaml())
    run = ["train", "--config", str(tmp_path / "run.yaml"), "--device", "cpu", "--threads", "1"]
    assert main([*run, "--out", str(tmp_path / "run")]) == 0
    assert "val/bpb@2" in (tmp_path / "run" / "metrics.jsonl").read_text()
    model = OpenMythos.from_pretrained(tmp_path / "run" / "final")
    assert model.cfg.vocab_size == 300
    assert main([*prepare_data, "--held-out", "0.1"]) == 2
    assert "data made with other settings; use another folder" in capsys.readouterr().err
    assert main(["train-tokenizer", str(text), "--out", str(tmp_path / "bpe")]) == 2
