"""The command `mythos exp`, on an experiment that is made up."""

import json
from pathlib import Path

import pytest

from open_mythos import experiments
from open_mythos.cli import main
from open_mythos.experiments import EXPERIMENTS
from open_mythos.experiments.study import Results, Run, Study, load
from open_mythos.train.trainer import Interrupted

Calls = list[tuple[int, bool, int]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the experiment `made_up` computed, as (seed, quick, threads)."""
    monkeypatch.chdir(tmp_path)
    done: Calls = []

    def measure(run: Run) -> dict:
        done.append((run.seed, run.lab.quick, run.lab.threads))
        if run.seed == 99:
            raise Interrupted(3, True)
        return {"x": run.seed}

    def fill(r: Results) -> dict:
        return {"sum": r["seed", "x"].values.sum()}

    page = "# Protocol\nAdding.\n# Finding\nThe sum is {sum:.0f}.\n# Report\nText."
    cost, arms = ("1 s", "5 s"), {"seed": None}
    made_up = Study("Sums", "What is the sum?", page, cost, lambda _: arms, measure, fill)
    monkeypatch.setattr(experiments, "EXPERIMENTS", {"made_up": made_up})
    return done


def test_a_run_writes_its_report_and_is_not_repeated(calls: Calls, capsys: pytest.CaptureFixture) -> None:
    assert main(["exp", "made_up"]) == 0
    assert calls == [(seed, False, 1) for seed in range(5)]
    folder = Path("runs/exp/made_up/report")
    assert "The sum is 10." in (out := capsys.readouterr().out) and str(folder / "report.html") in out
    read = json.loads((folder / "report.json").read_text())
    assert (read["name"], read["finding"], read["seeds"]) == ("made_up", "The sum is 10.", [0, 1, 2, 3, 4])
    assert read["command"] == "mythos exp made_up" and read["quick"] is False
    assert main(["exp", "made_up", "--seeds", "0", "4", "5"]) == 0
    assert calls[5:] == [(5, False, 1)]
    assert json.loads((folder / "report.json").read_text())["finding"] == "The sum is 9."


def test_the_quick_form_has_one_seed_and_folders_of_its_own(calls: Calls) -> None:
    assert main(["exp", "made_up", "--quick", "--threads", "2"]) == 0
    assert calls == [(0, True, 2)]
    assert not Path("runs/exp/made_up").exists()
    assert "This is the quick form" in Path("runs/exp/made_up-quick/report/report.html").read_text()
    assert main(["exp", "made_up", "--quick", "--seeds", "3", "4", "--out", "there", "--runs", "others"]) == 0
    assert calls[1:] == [(3, True, 1), (4, True, 1)]
    assert Path("there/report.md").exists() and Path("others/seed-3/result.json").exists()


def test_list_says_what_was_found_last(calls: Calls, capsys: pytest.CaptureFixture) -> None:
    def listed() -> str:
        assert main(["exp", "list"]) == 0
        return " ".join(capsys.readouterr().out.replace(chr(0x2502), " ").split())

    assert "What is the sum?" in (text := listed()) and "1 s / 5 s" in text and "not run yet" in text
    assert main(["exp", "made_up", "--quick"]) == 0
    assert "The sum is 0." in listed()
    # The whole counts for more than the quick form.
    assert main(["exp", "made_up"]) == 0
    assert "The sum is 10." in listed()
    assert calls == [(0, True, 1), *((seed, False, 1) for seed in range(5))]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["made-up"], "use made_up"),
        (["made_up", "--seeds", "1", "2", "1"], "names a seed twice"),
        (["made_up", "--threads", "0"], "--threads 0"),
    ],
)
def test_bad_options_are_refused_before_work(
    calls: Calls, args: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["exp", *args]) == 2
    assert said in capsys.readouterr().err
    assert not calls and not Path("runs").exists()


def test_what_a_signal_ends_goes_on(calls: Calls, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["exp", "made_up", "--seeds", "7", "99"])
    assert ended.value.code == 75 and "the same command goes on" in capsys.readouterr().err
    assert main(["exp", "made_up", "--seeds", "7", "8"]) == 0
    assert [seed for seed, *_ in calls] == [7, 99, 8]


def test_list_has_a_line_for_each_experiment(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (80, 300):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["exp", "list"]) == 0
        *lines, blank, legend, more = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == [*EXPERIMENTS] and blank == "" and "quick form" in legend
        assert max(map(len, lines)) <= width and "mythos exp show NAME" in more
        assert width == 80 or all("?" in line for line in lines)


def test_show_tells_all_of_one(capsys: pytest.CaptureFixture) -> None:
    assert main(["exp", "show", "khop"]) == 0
    out, experiment = " ".join(capsys.readouterr().out.split()), load("khop")
    assert experiment.question in out and " ".join(experiment.text("Protocol").split()) in out
    assert "plain-depth (plain, equal depth)" in out and "docs/results/khop" in out
    assert "2 min in the quick form, 65 min in all" in out and "mythos exp khop --quick" in out


def test_an_experiment_of_a_users_file_runs(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The file that docs/experiments.md shows, with runs of two steps."""
    page = (repo_root / "docs" / "experiments.md").read_text(encoding="utf-8")
    source = page.partition("```python\n")[2].partition("```")[0]
    assert len(source.splitlines()) <= 80
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "EXPERIMENTS", dict(EXPERIMENTS))
    exec(compile(source.replace("100 if quick", "2 if quick"), "experiments.md", "exec"), {"__name__": "mine"})
    assert main(["exp", "ramp", "--quick", "--seeds", "0", "1"]) == 0
    assert "A ramp " in capsys.readouterr().out and Path("runs/exp/ramp-quick/report/loops.svg").exists()
    assert main(["exp", "list"]) == 0
    assert "Does it help to begin" in capsys.readouterr().out
