"""The documents against the code: blocks run, commands work, tables and numbers are what the code says."""

import ast
import contextlib
import dataclasses
import inspect
import io
import json
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import open_mythos
import open_mythos.tasks
from open_mythos import VARIANTS, MythosConfig, OpenMythos
from open_mythos.accounting import count_parameters, kv_bytes_per_token, n_layers
from open_mythos.cli import main
from open_mythos.costs import make_plan
from open_mythos.costs.gpus import CARDS
from open_mythos.engine.engine import EngineConfig
from open_mythos.experiments import EXPERIMENTS
from open_mythos.generation.sampling import _filtered
from open_mythos.generation.sampling_params import SamplingParams
from open_mythos.nn.halting import HALTING_RULES
from open_mythos.recipes import CPU_SECONDS, RECIPES, load_recipe
from open_mythos.reports.terminal import duration
from open_mythos.tasks import TASKS
from open_mythos.train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
README, REFERENCE, TRAINING = ROOT / "README.md", ROOT / "docs/open_mythos.md", ROOT / "docs/training.md"
ENGINE = ROOT / "docs/engine.md"
GUIDES = [README, *sorted((ROOT / "docs").glob("*.md"))]
"""What is executed."""
PAGES = [*GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
"""What may link."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[tuple[int, str]]:
    """(line number, text) of the fenced blocks of a language, in order."""
    text = path.read_text("utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start()].count("\n") + 2, match[2]) for match in found if match[1] == language]


def rows(path: Path) -> Iterator[list[str]]:
    """The cells of every table row whose first cell is `code`."""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("| `"):
            yield [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def code(cell: str) -> str:
    """The text of a cell that is nothing but `code`."""
    assert cell.startswith("`") and cell.endswith("`"), f"{cell} is no code"
    return cell[1:-1]


def defaults(path: Path, columns: int) -> dict[str, str]:
    """Field -> default, of the tables of that many columns with a default in the second; "required" for none."""
    found = (cells for cells in rows(path) if len(cells) == columns)
    return {
        cells[0].strip("`"): cells[1].strip("`") for cells in found if cells[1][:1] == "`" or cells[1] == "required"
    }


@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: None) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "docs"}
    found = blocks(path, "python")
    assert found or path.name not in ("README.md", "open_mythos.md", "training.md")
    for line, source in found:
        # The line numbers of a traceback are then those of the document.
        exec(compile("\n" * (line - 1) + source, name_of(path), "exec"), namespace)


def commands(path: Path) -> list[list[str]]:
    lines = [line for _, block in blocks(path, "console") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_mythos_commands_work(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each document's commands, one after the other in an empty folder; training is cut to two steps."""
    monkeypatch.chdir(tmp_path)
    # The files of a reader's own that commands name.
    Path("text.txt").write_text("She had been forced into prudence in her youth. " * 50)
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}] for i in range(99)]
    Path("chat.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in turns))
    # What a reader types.
    monkeypatch.setattr("sys.stdin", io.StringIO("/max 4\nHello.\n/quit\n"))
    for program, *args in commands(path):
        if program != "mythos":
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            if args[0] in ("demo", "serve") or (args[0] == "exp" and args[1] not in ("list", "show")):
                # They take minutes, or do not end; all have tests of their own.
                with pytest.raises(SystemExit, match="0"):
                    main([*args, "--help"])
                continue
            if args[0] == "train":
                args += ["--steps", "2", "--eval.rows", "8", "--device", "cpu", "--threads", "1"]
            status = main(args)
        assert status == 0, f"mythos {shlex.join(args)}\n{out.getvalue()}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for program, *args in commands(path):
        if program == "make":
            assert {arg for arg in args if "=" not in arg} <= targets


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(there), f"{target} names no heading"


def anchors(path: Path) -> set[str]:
    """Headings as the hosts of repositories make them into anchors."""
    headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_named_files_exist(path: Path) -> None:
    """Every `path/like/this` whose first part is a folder of the repository or of the package, and every `name.py`."""
    tops = {p.name for base in (ROOT, ROOT / "open_mythos") for p in base.iterdir() if p.is_dir()} - {"demo"}
    modules = {p.name for p in ROOT.glob("**/*.py")}
    for named in re.findall(r"`([\w./-]+)`", path.read_text("utf-8")):
        is_path = named.endswith("/") or "." in named.split("/")[-1]
        if is_path and named.split("/")[0] in tops:
            assert (ROOT / named).exists() or (ROOT / "open_mythos" / named).exists(), f"{named} does not exist"
        elif re.fullmatch(r"\w+\.py", named) and named != "utils.py":
            assert named in modules, f"{named} does not exist"


def test_the_command_can_be_called_where_it_is_first_shown() -> None:
    """A new shell does not find what is in .venv."""
    lines = [line for _, block in blocks(README, "console") for line in block.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("mythos "))
    assert any(line.startswith("source .venv/bin/activate") for line in lines[:first])


def test_prompts_of_tasks_have_the_answers_that_are_told() -> None:
    """Worked out here by hand, without the tasks' own code."""
    table = [[code(cell) for cell in cells[:3]] + cells[3:] for cells in rows(ROOT / "docs/tasks.md")]
    assert {name for name, *_ in table} == {name for name, task in TASKS.items() if not task.on_disk} - {"text"}
    for _, prompt, answer, n_tokens in table:
        if "+" in prompt:
            a, b = prompt.removesuffix("=").split("+")
            right = str(int(a) + int(b))[::-1]
        elif prompt[0] == "^":
            right = str(prompt.count("1") % 2)
        elif prompt[-1] == "=":
            stack: list[str] = []
            places = []
            for place, bracket in enumerate(prompt[:-1]):
                if bracket in "([{":
                    stack.append(bracket)
                elif not stack or stack.pop() + bracket not in ("()", "[]", "{}"):
                    places.append(place)
                    break
            place = places[0] if places else len(prompt) - 1 if stack else None
            right = "--" if place is None else f"{place:02d}"
        else:
            *successor, right = prompt
            while successor[ord(right) - ord("a")] != right:
                right = successor[ord(right) - ord("a")]
        assert answer == right, prompt
        # Where the answer has more than one symbol it has an end mark too.
        assert int(n_tokens) == (len(answer) + 1 if len(answer) > 1 else 1)


def test_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) < 250


def test_the_page_of_modules_is_current() -> None:
    names = runpy.run_path(str(ROOT / "docs/make_modules.py"))
    assert names["PAGE"].read_text("utf-8") == names["page"](), "run: python docs/make_modules.py"


def test_every_public_name_is_documented() -> None:
    text = REFERENCE.read_text("utf-8")
    assert not [name for name in open_mythos.__all__ if not re.search(rf"\b{name}\b", text)]


def test_configuration_table_has_every_field_and_default() -> None:
    table = defaults(REFERENCE, 4)
    fields = {field.name: field.default for field in dataclasses.fields(MythosConfig)}
    assert list(fields) == [name for name in table if name in fields]
    for name, default in fields.items():
        told = ast.literal_eval(table[name])
        assert (told, type(told)) == (default, type(default)), name


@pytest.mark.parametrize("cls", [SamplingParams, EngineConfig])
def test_engine_tables_have_every_field_and_default(cls: Any) -> None:
    table = {code(cells[0]): ast.literal_eval(code(cells[1])) for cells in rows(ENGINE) if len(cells) == 3}
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    assert fields.items() <= table.items()
    others = {field.name for field in dataclasses.fields(SamplingParams if cls is EngineConfig else EngineConfig)}
    assert set(table) == set(fields) | others


def test_bytes_of_a_token_are_those_of_accounting() -> None:
    cfg, text = VARIANTS["1b"](), ENGINE.read_text("utf-8")
    outside, at_4, at_16 = (kv_bytes_per_token(cfg, n) for n in (0, 4, 16))
    told = f"{kv_bytes_per_token(cfg, 1) - outside} bytes per loop and {outside:,} outside it: {at_16:,} at 16 loops"
    assert f"{told}, {at_4:,} at 4." in text
    page = 16 * at_16 // n_layers(cfg, 16)
    tokens = [16 * (10**9 // page // n_layers(cfg, n)) for n in (16, 4)]
    assert f"holds {tokens[0]:,} tokens at 16 loops and {tokens[1]:,} at 4" in text


def training_fields(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a TrainConfig but those of the model, with its default; `...` where it has none."""
    for field in dataclasses.fields(value):
        name = prefix + field.name
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default):
            yield from training_fields(default, name + ".")
        elif name not in ("model", "data"):
            yield name, ... if default is dataclasses.MISSING else default


def test_training_table_has_every_field_and_default() -> None:
    table = defaults(TRAINING, 3)
    for name, default in training_fields(TrainConfig):
        assert name in table, f"{name} is not documented"
        told = ... if table[name] == "required" else ast.literal_eval(table[name])
        assert told == default, f"{name} is {default!r}"


def test_task_tables_have_every_field_and_default() -> None:
    from open_mythos.tasks import TASKS

    table = defaults(TRAINING, 3)
    for task in TASKS.values():
        for field in dataclasses.fields(task):
            cell = table[f"{task.__name__}.{field.name}"]
            told = dataclasses.MISSING if cell == "required" else ast.literal_eval(cell)
            assert told == field.default, field.name


def test_recipe_table_is_what_the_recipes_say() -> None:
    table = {code(cells[0]): cells for cells in rows(TRAINING) if len(cells) == 7}
    assert set(table) == set(RECIPES)
    for name, (_, task, steps, rows_per_step, parameters, _, time) in table.items():
        assert time == (duration(CPU_SECONDS[name]) if name in CPU_SECONDS else "")
        cfg = load_recipe(name)
        assert code(task) == cfg.data.name
        assert [int(cell.replace(",", "")) for cell in (steps, rows_per_step, parameters)] == [
            cfg.steps, cfg.batch_size, count_parameters(cfg.model).total,
        ]  # fmt: skip


def test_costs_are_those_of_the_plan() -> None:
    table = [cells for cells in rows(ROOT / "docs/scaling.md") if len(cells) == 9]
    on_shards = {name for name in RECIPES if load_recipe(name).data.name == "shards"}
    assert {code(cells[0]) for cells in table} == on_shards - {"small-text"}  # which a CPU trains
    for recipe, where, *told in table:
        gpus, gpu = where.split(" x ")
        plan = make_plan(load_recipe(code(recipe)), int(gpus), gpu)
        tokens = plan.steps * plan.tokens_per_step / 1e9
        memory = f"{plan.memory.total / 1e9:.1f} GB" + ("" if plan.fits else ", does not fit")
        assert told == [
            f"{plan.parameters.total:,}", f"{tokens:,.1f}", f"{plan.flops_per_token / 1e9:,.1f}", memory,
            f"{plan.tokens_per_s:,.0f}", f"{plan.days:,.2f}", f"{plan.gpu_hours:,.1f}",
        ]  # fmt: skip


def test_cards_are_those_of_the_plan() -> None:
    table = {code(cells[0]): cells[1:] for cells in rows(ROOT / "docs/scaling.md") if len(cells) == 5}
    assert table == {
        name: [f"{card.memory_gb:g} GB", f"{card.bf16_tflops:g}", f"{card.float32_tflops:g}", f"{card.link_gb_s:g}"]
        for name, card in CARDS.items()
    }


@pytest.mark.parametrize("path", [README, REFERENCE], ids=name_of)
def test_variant_numbers_are_those_of_accounting(path: Path) -> None:
    table = {code(cells[0]).removeprefix("mythos_"): cells for cells in rows(path) if cells[0].startswith("`mythos_")}
    assert list(table) == list(VARIANTS)
    for name, cells in table.items():
        cfg = VARIANTS[name]()
        counts = count_parameters(cfg)
        assert cells[1] == f"{counts.total:,}"
        assert f"{100 * counts.active_share:.1f} %" in cells
        if path == REFERENCE:
            assert cells[2] == f"{counts.active:,}" and cells[4] == f"{counts.unrolled(cfg.max_loop_iters):,}"
            shared = f"{cfg.n_experts}, {cfg.n_experts_per_tok} + {cfg.n_shared_experts} shared"
            sizes = [cfg.dim, shared, cfg.expert_dim, cfg.max_loop_iters, f"{cfg.max_seq_len:,}"]
            assert cells[5:] == [*map(str, sizes), f"{cfg.max_output_tokens:,}"]
        else:
            assert cells[3:] == [str(cfg.max_loop_iters), f"{cfg.max_seq_len:,}"]


@pytest.mark.parametrize("path", [README, REFERENCE], ids=name_of)
def test_range_of_active_shares_is_told_right(path: Path) -> None:
    published = ("1b", "3b", "10b", "50b", "100b", "500b", "1t")
    shares = [100 * count_parameters(VARIANTS[name]()).active_share for name in published]
    assert f"{min(shares):.1f} to {max(shares):.1f} %" in path.read_text("utf-8")


def told_signature(path: Path, start: str) -> inspect.Signature:
    """The signature written as a call in a fenced block that begins with `start(`."""
    source = next(block for _, block in blocks(path, "") if block.startswith(start + "("))
    return inspect.signature(eval(f"lambda {source.strip()[len(start) + 1 : -1]}: None".replace("\n", " ")))


@pytest.mark.parametrize(
    ("start", "function", "own"),
    [("model", OpenMythos.forward, ["self", "removed"]), ("model.generate", OpenMythos.generate, ["self"])],
)
def test_signatures_are_those_of_the_code(start: str, function: Callable, own: list[str]) -> None:
    """Names, order, defaults and what is keyword-only; and each argument is explained in a table."""

    def shape(signature: inspect.Signature) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in signature.parameters.values() if p.name not in own]

    assert shape(told_signature(REFERENCE, start)) == shape(inspect.signature(function))
    explained = {name for cells in rows(REFERENCE) for name in re.findall(r"`(\w+)`", cells[0])}
    assert {name for name, _, _ in shape(inspect.signature(function))} <= explained


def test_thresholds_are_those_of_the_code() -> None:
    table = {cells[0].strip("`").removeprefix('"').removesuffix('"'): cells for cells in rows(REFERENCE)}
    for name in HALTING_RULES.keys() - {"fixed", "act"}:
        assert float(table[name][2]) == HALTING_RULES[name].default_threshold


def test_sampling_is_told_as_it_runs() -> None:
    """The table lists the filters in the order in which `sample` applies them."""
    names = [code(cells[0]) for cells in rows(REFERENCE) if cells[0].strip("`") in ("temperature", "top_k", "top_p")]
    source = inspect.getsource(_filtered)
    assert names == sorted(names, key=lambda name: source.index(f"params.{name}"))


def test_every_experiment_is_in_the_table() -> None:
    assert [
        cells[0].strip("`") for cells in rows(ROOT / "docs" / "experiments.md") if cells[0].strip("`") in EXPERIMENTS
    ] == [*EXPERIMENTS]


def test_front_page_leads_to_every_record() -> None:
    page = (ROOT / "docs" / "results" / "README.md").read_text(encoding="utf-8")
    records = [path.parent.name for path in (ROOT / "docs" / "results").glob("*/report.json")]
    assert records and all(f"({name}/report.md)" in page for name in records)


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    tests = list((ROOT / "tests").rglob("*.py"))
    known = {path.stem for path in tests} | {
        name for path in tests for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert set(re.findall(r"\btest_\w+", page.read_text())) <= known
