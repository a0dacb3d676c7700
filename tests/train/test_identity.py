"""Going on with a run: only as the run that it is, with the data and the tokenizer that it began with."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_mythos.cli import main
from open_mythos.data.documents import Reading
from open_mythos.data.prepare import Settings, prepare
from open_mythos.tasks import Addition, Chat, Shards, Stream, Text
from open_mythos.tasks import shards as shards_task
from open_mythos.tokenization.tokenizer import BPETokenizer, load_tokenizer
from open_mythos.train import identity
from open_mythos.train.config import EvalConfig, TrainConfig
from open_mythos.train.distributed import ParallelConfig
from open_mythos.train.optim import OptimConfig
from open_mythos.train.trainer import Trainer
from tests.train.test_resume import Crash, config, crash_after, trainer

WORDS = ("never", "ever", "north", "south", "river", "mountain", "loop", "token")


def sentences(seed: int, n: int = 400) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 6)) + f" {seed}" for _ in range(n)]


def write_text_file(path: Path, seed: int) -> None:
    path.write_text("\n".join(sentences(seed)))


def write_shards(path: Path, seed: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    source = path.with_suffix(".txt")
    write_text_file(source, seed)
    prepare([str(source)], path, "bytes", Settings(Reading(cut="lines"), 0.2), progress=False)


def write_parquet(path: Path, seed: int) -> None:
    path.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": sentences(seed)}), path / "a.parquet", row_group_size=100)


def write_chat(path: Path, seed: int) -> None:
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{seed}"}] for i in range(60)]
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))


TASKS: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], object], str]] = {
    "bytes": (write_text_file, lambda path: Text(str(path), seq_len=9), "data.path"),
    "bpe": (write_text_file, lambda path: Text(str(path), "bpe", 300, seq_len=9), "data.path"),
    "shards": (write_shards, lambda path: Shards((str(path),), seq_len=9), "data.paths[0]"),
    "stream": (
        write_parquet, lambda path: Stream(str(path), vocabulary="bytes", seq_len=9, held_out=0.2), "data.dataset"
    ),
    "chat": (write_chat, lambda path: Chat((str(path),), seq_len=64, held_out=0.2), "data.paths[0]"),
}  # fmt: skip
"""How to make the data of a task, the task, and the field that names the data."""


def small(data: object, **changes: object) -> TrainConfig:
    model = dataclasses.replace(config().model, vocab_size=300, max_seq_len=64)
    return config(**{"model": model, "data": data, "steps": 4, "eval": EvalConfig(), **changes})


def begin(folder: Path, cfg: TrainConfig, stop: int = 3) -> None:
    """Train up to a crash after step `stop`, with a checkpoint after each step before."""
    run = trainer(folder, cfg, every=1)
    run.add_hook(crash_after(stop), 1)
    with pytest.raises(Crash):
        run.run()


@pytest.mark.parametrize("kind", TASKS)
def test_other_data_under_the_same_name_is_refused(tmp_path: Path, kind: str) -> None:
    write, make, field = TASKS[kind]
    path, run = tmp_path / "data", tmp_path / "run"
    write(path, 1)
    begin(run, small(make(path)))
    write(path, 2)
    with pytest.raises(ValueError, match=r"not what the run of .*step-00000002 was trained on \(digest of") as error:
        trainer(run, small(make(path)), resume=True)
    assert f"{field}: " in str(error.value) and "in the run" in str(error.value)
    write(path, 1)
    again = trainer(run, small(make(path)), resume=True)
    assert again.steps_done == 2
    again.run()


def test_parquet_of_the_same_sizes_is_other_data(tmp_path: Path) -> None:
    """Equal row counts and sizes of row groups: the footers' statistics still differ."""
    for seed, letter in ((1, "a"), (2, "b")):
        (tmp_path / str(seed)).mkdir()
        table = pa.table({"text": [letter * 40] * 300})
        pq.write_table(table, tmp_path / str(seed) / "a.parquet", compression="none", use_dictionary=False)
    one, two = (Stream(str(tmp_path / name), vocabulary="bytes", seq_len=9) for name in "12")
    assert one._groups.commit == two._groups.commit
    assert one.digests() != two.digests()


def test_the_checkpoints_bpe_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the library now made another one of the same text."""
    path, run = tmp_path / "text.txt", tmp_path / "run"
    write_text_file(path, 1)
    whole = trainer(tmp_path / "whole", small(Text(str(path), "bpe", 300, seq_len=9)))
    whole.run()
    begin(run, small(Text(str(path), "bpe", 300, seq_len=9)))
    other = BPETokenizer.train_from_text("\n".join(sentences(9)), 300)
    monkeypatch.setattr(BPETokenizer, "train_from_text", lambda *args: other)
    again = trainer(run, small(Text(str(path), "bpe", 300, seq_len=9)), resume=True)
    again.run()
    text = sentences(1)[0]
    assert load_tokenizer(run / "final").encode(text) == load_tokenizer(tmp_path / "whole" / "final").encode(text)
    assert other.encode(text) != load_tokenizer(run / "final").encode(text)
    weights = "final/model.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_another_tokenizer_under_the_same_name_is_refused(tmp_path: Path) -> None:
    write_chat(tmp_path / "chat.jsonl", 1)
    for name, seed in (("one", 1), ("two", 2)):
        BPETokenizer.train_from_text("\n".join(sentences(seed)), 290).save(tmp_path / name)
    shutil.copytree(tmp_path / "one", tmp_path / "tokenizer")
    cfg = small(Chat((str(tmp_path / "chat.jsonl"),), str(tmp_path / "tokenizer"), seq_len=64, held_out=0.2))
    begin(tmp_path / "run", cfg)
    shutil.copytree(tmp_path / "two", tmp_path / "tokenizer", dirs_exist_ok=True)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data))  # nothing that was opened before
    with pytest.raises(ValueError, match=r"the data's tokenizer is not the one in .*step-00000002"):
        trainer(tmp_path / "run", cfg, resume=True)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("suffix", [".bin", ".ends"])
def test_damaged_shards_are_refused_before_anything_is_written(tmp_path: Path, split: str, suffix: str) -> None:
    write_shards(tmp_path / "data", 1)
    cfg = small(Shards((str(tmp_path / "data"),), seq_len=9))
    [path] = (tmp_path / "data" / split).glob(f"*{suffix}")
    data = bytearray(path.read_bytes())
    data[8] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{split}/00000\.bin is damaged; remove .* repeat the mythos prepare-data"):
        trainer(tmp_path / "run", cfg)
    assert not (tmp_path / "run").exists()


def test_shards_with_another_tokenizer_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", 1)
    BPETokenizer.train_from_text("\n".join(sentences(1)), 259).save(tmp_path / "data")
    with pytest.raises(ValueError, match=r"another tokenizer \(.*tokenizer\.json.*\) than its text was encoded with"):
        trainer(tmp_path / "run", small(Shards((str(tmp_path / "data"),), seq_len=9)))


def test_shards_that_are_damaged_during_a_pause(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", 1)
    cfg = small(Shards((str(tmp_path / "data"),), seq_len=9))
    begin(tmp_path / "run", cfg)
    [path] = (tmp_path / "data" / "train").glob("*.bin")
    path.write_bytes(bytes(b ^ (i % 50 == 0) for i, b in enumerate(path.read_bytes())))
    with pytest.raises(ValueError, match="is damaged"):
        trainer(tmp_path / "run", cfg, resume=True)


def test_long_verifying_shows_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path / "data", 1)
    monkeypatch.setattr(shards_task, "QUIET_S", -1.0)
    monkeypatch.setattr(shards_task, "REPEAT_S", -1.0)
    lines: list[str] = []
    identity.verify_data(Shards((str(tmp_path / "data"),), seq_len=9), lines.append)
    shares = [int(line.partition(": ")[2].partition("%")[0]) for line in lines]
    assert lines[0].startswith("verifying the prepared data: ") and "GB" in lines[0]
    assert shares == sorted(shares) and shares[-1] == 100


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_of_a_machine_share_the_verifying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    write_shards(tmp_path / "data", 1)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    data = Shards((str(tmp_path / "data"),), seq_len=9)
    [path] = (tmp_path / "data" / "train").glob("*.bin")
    path.write_bytes(path.read_bytes()[::-1])
    if rank:
        identity.verify_data(data, print)  # the one shard of each split is the other process's
    else:
        with pytest.raises(ValueError, match="is damaged"):
            identity.verify_data(data, print)


def test_only_the_fields_that_differ_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path / "run", small(Addition(1, 2)))
    command = ["train", "--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "run"), "--resume"]
    command += ["--device", "cpu", "--threads", "1"]
    assert main([*command, "--optim.lr", "0.1"]) == 2
    said = capsys.readouterr().err
    assert "config.yaml differs from this command in --optim.lr: 0.01 in the run, 0.1 now. Go on with" in said
    assert "betas" not in said
    assert main([*command, "--optim.lr", "0.1", "--data.max-digits", "3", "--seed", "5"]) == 2
    said = capsys.readouterr().err
    for part in (
        "seed: 0 in the run, 5 now",
        "optim.lr: 0.01 in the run, 0.1 now",
        "--data.max-digits: 2 in the run, 3",
    ):
        assert part in said
    with pytest.raises(ValueError, match=r"in data\.task: 'addition' in the run, 'text' now\. Go on"):
        trainer(tmp_path / "run", small(Text(seq_len=9)), resume=True)


@pytest.mark.parametrize("changes", [{"seed": 7}, {"batch_size": 8}, {"optim": OptimConfig("muon", lr=0.5)}], ids=str)
def test_a_lost_configuration_is_no_way_to_another_run(tmp_path: Path, changes: dict[str, object]) -> None:
    begin(tmp_path / "run", small(Addition(1, 2)))
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"step-00000002/config\.yaml differs from this command in "):
        trainer(tmp_path / "run", small(Addition(1, 2), **changes), resume=True)
    trainer(tmp_path / "run", small(Addition(1, 2)), resume=True).run()
    assert TrainConfig.load(tmp_path / "run" / "config.yaml") == small(Addition(1, 2))


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 80, b"steps: [", b"model: {dim: x}\ndata: {task: addition}\nsteps: 1"]
)
def test_a_damaged_configuration_is_named_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    begin(tmp_path / "run", small(Addition(1, 2)))
    path = tmp_path / "run" / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"If .*run/config\.yaml is damaged, put the config\.yaml of a checkpoint in"):
        trainer(tmp_path / "run", small(Addition(1, 2)), resume=True)
    shutil.copy(tmp_path / "run" / "checkpoints" / "step-00000002" / "config.yaml", path)
    assert trainer(tmp_path / "run", small(Addition(1, 2)), resume=True).steps_done == 2


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    """As when the folders of two runs were mixed: config.yaml fits, the newest checkpoint does not."""
    begin(tmp_path / "one", small(Addition(1, 2)))
    begin(tmp_path / "two", small(Addition(1, 2), seed=9), stop=4)
    shutil.copytree(tmp_path / "two" / "checkpoints", tmp_path / "one" / "checkpoints", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"step-00000003/config\.yaml differs from this command in seed: 9 in the run"):
        trainer(tmp_path / "one", small(Addition(1, 2)), resume=True)


def test_a_checkpoint_of_an_earlier_version_says_nothing_about_data(tmp_path: Path) -> None:
    write_text_file(tmp_path / "text.txt", 1)
    cfg = small(Text(str(tmp_path / "text.txt"), seq_len=9))
    with pytest.warns(UserWarning, match="does not say which data it was trained on"):
        identity.check_data({"data.path": "a"}, None, tmp_path)
    identity.check_data({}, None, tmp_path)
    begin(tmp_path / "run", cfg)
    parallel = dataclasses.replace(cfg, parallel=ParallelConfig(rows=2))  # how it is spread is no part of the run
    assert isinstance(trainer(tmp_path / "run", parallel, resume=True), Trainer)
