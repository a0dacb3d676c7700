"""Runs that begin with the weights of a folder."""

import dataclasses
from pathlib import Path

import huggingface_hub
import pytest
import torch

from open_mythos import model_folder
from open_mythos.cli import main
from open_mythos.model import OpenMythos
from open_mythos.tasks import Addition, Text
from open_mythos.tokenization.tokenizer import ByteTokenizer
from open_mythos.train.checkpoint import CheckpointConfig
from open_mythos.train.config import TrainConfig
from open_mythos.train.depth_sampling import LoopsConfig
from open_mythos.train.init_from import FREE, adopt, open_initial
from open_mythos.train.trainer import Trainer
from tests.models import scaled, tiny


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A model over bytes, with experts, halting and depth LoRA."""
    scaled(tiny(vocab_size=259), seed=7).save_pretrained(tmp_path / "model")
    ByteTokenizer().save(tmp_path / "model")
    return str(tmp_path / "model")


def run_config(folder: str, **model) -> TrainConfig:
    return TrainConfig(
        tiny(vocab_size=259, **model), Text(seq_len=16), 2, 2, loops=LoopsConfig("fixed", 2), init_from=folder
    )


def test_a_run_begins_with_the_weights(folder: str, tmp_path: Path) -> None:
    cfg = run_config(folder, dropout=0.1, max_seq_len=200, max_output_tokens=5)
    assert TrainConfig.from_yaml(cfg.to_yaml()) == cfg
    trainer = Trainer(cfg, tmp_path / "run", device="cpu", progress=False)
    expected = scaled(tiny(vocab_size=259), seed=7).state_dict()
    for name, x in trainer.model.state_dict().items():
        assert torch.equal(x, expected[name]), name
    assert trainer.model.head.weight is trainer.model.embed.weight
    trainer.run()
    assert OpenMythos.from_pretrained(tmp_path / "run" / "final").cfg == cfg.model


def test_a_resumed_run_goes_on_from_its_own_weights(folder: str, tmp_path: Path) -> None:
    command = ["train", "tiny-text", "--init-from", folder, "--data.seq-len", "16", "--batch-size", "2"]
    options = ["--eval.loops", "1", "--device", "cpu", "--threads", "1"]
    assert main([*command, *options, "--steps", "4", "--out", str(tmp_path / "whole")]) == 0
    cfg = TrainConfig.load(tmp_path / "whole" / "config.yaml")
    first = Trainer(cfg, tmp_path / "run", device="cpu", progress=False, checkpoint=CheckpointConfig(every=2))
    first.add_hook(lambda trainer, step: (_ for _ in ()).throw(RuntimeError("crash")), 3)
    with pytest.raises(RuntimeError, match="crash"):
        first.run()
    first.checkpoints.wait()
    Path(folder).rename(tmp_path / "gone")
    Trainer(
        cfg, tmp_path / "run", device="cpu", progress=False, checkpoint=CheckpointConfig(every=2), resume=True
    ).run()
    name = "final/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_model_or_tokenizer_is_refused(folder: str) -> None:
    for changes, named in (
        ({"dim": 64}, f"model.dim=64 is not the 32 of init_from='{folder}'; use model.dim=32"),
        ({"max_loop_iters": 5}, "model.max_loop_iters=5 is not the 4"),
        ({"rope_theta": 1000.0}, "model.rope_theta=1000.0"),
        ({"halting": "none"}, "model.halting='none'"),
    ):
        with pytest.raises(ValueError) as caught:
            open_initial(tiny(vocab_size=259, **changes), ByteTokenizer(), folder)
        assert named in str(caught.value)
    with pytest.raises(ValueError, match="the data's tokenizer is not the one of init_from"):
        open_initial(tiny(vocab_size=259), Addition().tokenizer(), folder)


def test_what_may_differ_changes_no_output(folder: str) -> None:
    changes = {"max_seq_len": 200, "max_output_tokens": 5, "dropout": 0.5}
    assert set(changes) == set(FREE)
    model = OpenMythos(tiny(vocab_size=259, **changes)).eval()
    state = open_initial(model.cfg, ByteTokenizer(), folder)
    whole = {name: rows[:] for name, rows in state.items()}
    model.load_state_dict({**whole, "head.weight": whole["embed.weight"]})
    ids = torch.arange(40)[None]
    assert torch.equal(model(ids), OpenMythos.from_pretrained(folder)(ids))


def test_a_damaged_folder_is_refused(folder: str) -> None:
    state = scaled(tiny(vocab_size=259)).state_dict()
    state.pop("norm.weight")
    model_folder.save(folder, tiny(vocab_size=259), state)
    with pytest.raises(ValueError, match=r"norm\.weight is missing"):
        open_initial(tiny(vocab_size=259), ByteTokenizer(), folder)


def test_the_command_takes_the_architecture_over(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Also where the recipe's rows do not fit it, as long as the fields given do."""
    command = ["train", "tiny-text", "--init-from", folder, "--device", "cpu", "--threads", "1", "--steps", "1"]
    assert main([*command, "--out", str(tmp_path / "a")]) == 2
    assert "--model.max-seq-len 64 is shorter than the 128 tokens" in capsys.readouterr().err
    options = ["--batch-size", "2", "--data.seq-len", "64", "--model.dropout", "0.1"]
    assert main([*command, *options, "--out", str(tmp_path / "a")]) == 0
    cfg = TrainConfig.load(tmp_path / "a" / "config.yaml")
    assert cfg.model == tiny(vocab_size=259, dropout=0.1) and cfg.init_from == folder
    assert main([*command, *options, "--model.dim", "64", "--out", str(tmp_path / "b")]) == 2
    assert "--model.dim 64 is not the 32 of --init-from" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    # The run's own configuration needs no flag to be the same run.
    assert main(["train", "--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "c")]) == 0
    weights_file = "final/model.safetensors"
    assert (tmp_path / "a" / weights_file).read_bytes() == (tmp_path / "c" / weights_file).read_bytes()


def test_a_repository_of_the_hub(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    cfg = adopt(dataclasses.replace(run_config(folder), init_from=None), "someone/model")
    assert cfg.model == tiny(vocab_size=259) and cfg.init_from == "someone/model"
    open_initial(cfg.model, ByteTokenizer(), "someone/model")
    assert asked[0] == ("someone/model", ["*.json", "model*.safetensors"])


def test_init_from_is_a_name() -> None:
    with pytest.raises(ValueError, match=r"init_from='' must be text .*; give a folder such as RUN/final"):
        run_config("")
