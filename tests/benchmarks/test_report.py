"""The report from a small results file, the reach, resuming, and installing peers."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers
from benchmarks.__main__ import Args, main
from benchmarks.case import Outcome, Reach, Results, Row, plain
from benchmarks.cases import CASES, reach_of
from benchmarks.machine import describe, file_name
from benchmarks.overview import HEADLINES, overview
from benchmarks.page import BEGIN, END
from benchmarks.peers import Peer, install
from benchmarks.report import render, write_report
from benchmarks.stats import Spread

MADE_BY = {"source": "abc", "device": "cpu", "threads": 1, "quick": False, "environment": {}}
MACHINE = {
    "cpu": "some processor",
    "flags": ["avx2"],
    "cores": 2,
    "memory_bytes": 2**34,
    "python": "3.11.0",
    "environment": {"ATEN_CPU_CAPABILITY": "avx2"},
    "limits": {
        "worker": {"torch": "2.13.0", "threads": 1, "cpu_capability": "AVX2", "gpu": None},
        "products": {"float32": [{"F.linear": 88e9}, {"F.linear": 90e9}], "bfloat16": [{"F.linear": 5e9}]},
        "stream": {"read": 18.9e9, "copy": 26e9},
    },
}


def record(outcome: Outcome | None = None, error: str | None = None, quick: bool = False) -> dict[str, Any]:
    return {
        "title": "a title",
        "protocol": "How it is measured.",
        "error": error,
        **(plain(outcome) if outcome else {}),
        "date": "2026-01-01",
        "seconds": 12.0,
        "load": [0.5, 1.5],
        "commit": "0123456789",
        "made_by": {**MADE_BY, "quick": quick},
    }


def outcome(value: float, itself: tuple[float, ...] = (0.98, 1.0, 1.02)) -> Outcome:
    spread = Spread.of([value - 0.05, value, value + 0.05])
    row = Row(
        "train_mid", "a training step", value, "x", "2.00 s", "1.00 s", spread, Spread.of(itself), 1.9, "31%", "62%"
    )
    sides = {"ours": {"parameters": 1234567, "cpu": Spread.of([1.0]), "peak_bytes": 3 * 2**20, "share": 0.62}}
    gate = {"forward": 2e-7, "gradients": 3e-6, "loops": 8, "seed": 0}
    limits = {"shapes": [[8, 16, 32]], "rates": [{"F.linear": 80e9, "oneDNN": 200e9}]}
    return Outcome([row], sides, gate, limits, ["A note."])


def line(text: str, starts: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(starts))


def test_report_says_what_was_found() -> None:
    cases = {"train_mid": record(outcome(1.5)), "decode_128": record(error="Different: logits | differ\nmore")}
    text = render({"machine": MACHINE, "cases": cases}, "performance", "some-processor")
    assert line(text, "| a training step") == (
        "| a training step (`train_mid`) | 2.00 s | 1.00 s | **1.50** | >= 1.4 | yes | 1.48-1.52 (1.45-1.55), n=3 "
        "| 0.99-1.01 (0.98-1.02) | 1.90 | 31%, 62% |"
    )
    assert line(text, "| a title (`decode_128`)").startswith(
        "| a title (`decode_128`) | no figure: Different: logits \\| differ |"
    )
    for said in (
        "forward within 2.0e-07, gradients within 3.0e-06, 8 loops on both sides; draw 0",
        "1,234,567 parameters, cpu 1000 ms (1000-1000), peak memory 3 MiB.",
        "A note.",
        "Commit 0123456789, 2026-01-01, 12 s, cpu, 1 thread(s), load 0.5 before and 1.5 after.",
        "| 8 | 16 | 32 | 80 | 200 |",
        "| libraries' variables set | ATEN_CPU_CAPABILITY=avx2 |",
        "float32 F.linear 90, bfloat16 F.linear 5",
        "CPU time of one thread",
    ):
        assert said in text
    assert "--quick`: this shows" not in text
    columns = {
        row.count("|") - row.count("\\|")
        for row in text.splitlines()
        if row.startswith(("| a t", "|---|---|---|---|---|---|"))
    }
    assert len(columns) == 1


def test_sides_that_are_not_timed() -> None:
    row = Row("kv_cache_bytes", "a cache", 2.67, peer="61,440 B/token", ours="23,040 B/token")
    sides = {"ours": {"bytes": 3041280, "bytes_per_token": 23040.0}, "open_mythos_0_5": {"error": 0.03}}
    text = render(
        {"machine": {}, "cases": {"kv_cache_bytes": record(Outcome([row], sides))}}, "performance", "some-processor"
    )
    assert "- ours: 3,041,280 bytes, 23,040 per token." in text
    assert line(text, "| a cache").split(" | ")[3:6] == ["**2.67**", ">= 2.67", "yes"]


def test_training_has_tokens_and_a_share_of_the_peak() -> None:
    sides = {"ours": {"seconds": 2.0, "flops": 90e9, "tokens_per_s": 1024.0}}
    text = render(
        {"machine": MACHINE, "cases": {"train_mid": record(Outcome(sides=sides))}}, "performance", "some-processor"
    )
    assert (
        "- ours: 90 GFLOP at 45 GFLOP/s, 1,024 tok/s, 50% of what the machine's largest float32 products reach." in text
    )


def test_figures_within_the_noise_claim_nothing() -> None:
    for value, itself, met in (
        (1.5, (0.5, 1.0, 2.0), "yes; no difference shown"),
        (1.05, (0.9, 1.0, 1.3), "no; no difference shown"),
        (1.05, (1.0, 1.0, 1.0), "no"),
        (0.7, (1.0, 1.0, 1.0), "no"),
    ):
        text = render(
            {"machine": {}, "cases": {"train_mid": record(outcome(value, itself))}}, "performance", "some-processor"
        )
        assert line(text, "| a training step").split(" | ")[5] == met


def test_quick_figures_are_marked() -> None:
    text = render(
        {"machine": {}, "cases": {"train_mid": record(outcome(1.5), quick=True)}}, "performance", "some-processor"
    )
    assert "No figure here is to be quoted" in text


def test_scaling_has_a_table_and_a_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curve = {
        "sizes": [1, 2],
        "flops": [10, 20],
        "times": [asdict(Spread.of([0.1, 0.11])), asdict(Spread.of([0.2]))],
        "line": [0.1, 0.2],
        "deviations": [0.05, -0.12],
    }
    results = Results(tmp_path / "performance" / "zen.json")
    results.put("scaling", (), record(Outcome(curves={"loops": curve, "rows": curve})))
    assert write_report(tmp_path / "performance") == tmp_path / "performance.md"
    assert "| loops | 2 | 200 ms | -12% |" in (tmp_path / "performance" / "zen.md").read_text()
    assert (tmp_path / "performance" / "zen-scaling.png").stat().st_size > 1000


def test_the_overview_has_a_column_for_each_machine(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "performance"
    for cpu, value in (("AMD EPYC", 1.5), ("Intel(R) Xeon(R) Processor", 0.9)):
        results = Results(folder / f"{file_name(cpu)}.json")
        results.data["machine"] = MACHINE | {"cpu": cpu}
        results.put("train_mid", (), record(outcome(value)))
    text = write_report(folder).read_text()
    assert "|  | AMD EPYC | Intel Xeon Processor |" in text
    assert line(text, "| training step, (c)") == "| training step, (c) | **1.50** (1.48-1.52) | **0.90** (0.88-0.93) |"
    assert "[Intel Xeon Processor](performance/intel-xeon-processor.md): 1 of " in text and "0 of 1 bounds" in text
    assert (folder / "intel-xeon-processor.md").is_file() and (folder / "overview.svg").stat().st_size > 1000
    # Every row of the overview is a row of some case.
    ids = {id for page in HEADLINES.values() for labels in page.values() for id in labels}
    assert all(any(id.startswith(name) for name in CASES) for id in ids)


def test_reach() -> None:
    assert Reach(1.4).met(1.4) and not Reach(1.4).met(1.39)
    assert Reach(50, at_most=True).met(50) and not Reach(50, at_most=True).met(51)
    assert (Reach(0.8).text("share"), Reach(50, at_most=True).text("ms"), Reach(1.4).text("x")) == (
        ">= 80%",
        "<= 50 ms",
        ">= 1.4",
    )
    reach = reach_of("train_addition.share")
    assert reach is not None and reach.met(0.81)


def test_finished_cases_are_not_done_again(tmp_path: Path) -> None:
    results = Results(tmp_path / "out.json")
    for name, case in (("decode_128", record(error="WorkerError: it died")), ("train_mid", record(outcome(1.5)))):
        results.put(name, ("train_addition", "train_mid", "decode_128"), case)
    read = Results(tmp_path / "out.json")
    assert list(read.data["cases"]) == ["train_mid", "decode_128"]
    assert read.data == json.loads(json.dumps(results.data))
    made = {"title": "a title", "made_by": MADE_BY}
    assert read.done("train_mid", **made)
    assert not read.done("train_mid", **made, protocol="Another way.")
    assert not read.done("train_mid", title="a title", made_by={**MADE_BY, "source": "changed"})
    assert not read.done("decode_128", **made) and not read.done("prefill_1b", **made)


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    for args, message in (
        (Args(cases=("train_mid,train_mdi",), out=tmp_path), "train_mdi is no case; use some of train_addition"),
        (Args(threads=0, out=tmp_path), "--threads 0 must be at least 1"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(args)
    assert not list(tmp_path.iterdir())


def test_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Args(list=True)) == 0
    listed = capsys.readouterr().out
    for name in ("train_addition", "decode_960", "kv_cache_bytes", "memory_train_mid", "scaling"):
        assert name in listed


def test_machine_is_described() -> None:
    machine = describe()
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 2**28 and machine["cpu"]


@pytest.mark.parametrize("outcome", ["good", "failed", "torch"])
def test_peers_are_installed_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    calls = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        target = Path(command[command.index("--target") + 1])
        (target / ("torch" if outcome == "torch" else "package")).mkdir(parents=True)
        return subprocess.CompletedProcess(command, int(outcome == "failed"), "", "no index")

    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    monkeypatch.setattr(subprocess, "run", pip)
    peer = Peer("open-mythos==0.5.0", dependencies=False)
    assert peer.folder == tmp_path / "open-mythos-0.5.0"
    if outcome == "good":
        assert (install(peer) / "package").is_dir() and install(peer) == peer.folder
        assert len(calls) == 1 and "--no-deps" in calls[0] and calls[0][-1] == "open-mythos==0.5.0"
    else:
        with pytest.raises(RuntimeError, match="package index" if outcome == "failed" else "installs torch"):
            install(peer)
        assert not peer.folder.exists()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_the_published_peer_installs() -> None:
    """Needs a package index."""
    assert (install(peers.OPEN_MYTHOS) / "open_mythos" / "main.py").is_file()


@pytest.mark.parametrize("page", ["performance", "engine"])
def test_pages_are_what_the_recorded_figures_make(page: str, repo_root: Path) -> None:
    folder = repo_root / "docs" / "results" / page
    machines = {path.stem: Results(path).data for path in sorted(folder.glob("*.json"))}

    def written(path: Path) -> str:
        return path.read_text().partition(BEGIN)[2].partition(END)[0].strip()

    assert machines and written(folder.with_suffix(".md")) == overview(machines, page).strip()
    names = {case.name for case in CASES.values() if case.page == page}
    for stem, data in machines.items():
        text = written(folder / f"{stem}.md")
        assert text == render(data, page, stem).strip()
        assert set(data["cases"]) <= names
        # Every recorded value of a row stands in the page.
        for case in data["cases"].values():
            assert case["error"] is None
            for row in case["rows"]:
                assert f"{row['value']:.2f}" in text or f"{row['value']:.3g}" in text or f"{row['value']:.0%}" in text
