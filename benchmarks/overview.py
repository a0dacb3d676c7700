"""The first screen of a page of results: what a user gains, on each machine that was measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, reach_of
from benchmarks.page import table
from open_mythos.reports.figures import draw_ratios

Record = dict[str, Any]
Machines = Mapping[str, Record]
"""Results by the name of their file."""

HEADLINES: dict[str, dict[str, dict[str, str]]] = {
    "performance": {
        "over open-mythos 0.5.0": {
            "train_3m": "training step, mythos_3m",
            "train_30m": "training step, mythos_30m",
            "train_mid": "training step, (c)",
            "train_other_gqa": "training step, (d) gqa",
            "train_other_mla": "training step, (d) mla",
            "forward_mid": "forward pass, (c)",
            "forward_other_gqa": "forward pass, (d) gqa",
            "forward_other_mla": "forward pass, (d) mla",
            "prefill_1b": "prefill, mythos_1b",
            "generate_mid_b1": "generate, (c), batch 1",
            "generate_mid_b1_compiled": "generate, (c), batch 1, compiled",
            "generate_other_gqa_b1": "generate, (d) gqa, batch 1",
            "generate_other_gqa_b1_compiled": "generate, (d) gqa, batch 1, compiled",
            "generate_other_gqa_b3": "generate, (d) gqa, batch 3",
            "generate_other_mla_b1": "generate, (d) mla, batch 1",
            "generate_other_mla_b3": "generate, (d) mla, batch 3",
            "decode_512": "decode, (c), context 512",
            "decode_512_compiled": "decode, (c), context 512, compiled",
            "decode_1b": "decode, mythos_1b",
            "decode_1b_compiled": "decode, mythos_1b, compiled",
        },
        "over transformers, at equal FLOPs": {
            "decode_deepseek_v3_b1": "decode against DeepseekV3, batch 1",
            "decode_deepseek_v3_b1_compiled": "decode against DeepseekV3, batch 1, compiled",
            "decode_llama_b1": "decode against a plain Llama, batch 1",
            "decode_llama_b1_compiled": "decode against a plain Llama, batch 1, compiled",
            "decode_llama_prefill": "prefill against a plain Llama",
        },
    },
    "engine": {
        "over every token at full depth": {
            f"engine_{law}_{rows}": f"{rows} {'request' if rows == 1 else 'requests'}, {law} depths"
            for law in ("geometric", "uniform")
            for rows in (1, 8, 32)
        },
        "over others, geometric depths": {
            f"engine_others_{rows}.geometric.{peer}": f"{rows} {'request' if rows == 1 else 'requests'}: {label}"
            for rows in (1, 8, 32)
            for peer, label in {
                "`generate`": "our `generate`, one after another",
                "open-mythos 0.5.0 `generate`": "open-mythos 0.5.0, one batch",
                "transformers `generate`, plain Llama": "transformers, a plain Llama, one batch",
            }.items()
        },
    },
}
"""Rows of the overview by page and by whom they compare with: id of the recorded row -> what a reader sees."""


def overview(machines: Machines, page: str) -> str:
    """Write one table for each peer, with a column for each machine, the figure, and where the rest stands."""
    lines = []
    if any(case["made_by"]["quick"] for data in machines.values() for case in data["cases"].values()):
        lines = ["**Made with `--quick`: this shows that the harness runs. No figure here is to be quoted.**", ""]
    for peer, labels in HEADLINES.get(page, {}).items():
        rows = []
        for id, label in labels.items():
            cells = [_cell(_rows(data).get(id)) for data in machines.values()]
            rows += [(label, *cells)] if any(cells) else []
        names = [_name(data, stem) for stem, data in machines.items()]
        lines += [f"**Times as fast, {peer}** (median, quartiles)", "", *table(("", *names), rows), ""] if rows else []
    if lines and page in HEADLINES:
        lines += [f"![each figure by machine, with its quartiles]({page}/overview.svg)", ""]
    return "\n".join([*lines, *(_link(data, page, stem) for stem, data in machines.items())])


def draw_overview(machines: Machines, page: str, path: Path) -> None:
    """Draw the ratios of the overview, a panel for each peer, a mark for each machine."""
    panels: dict[str, dict[str, dict[str, tuple[float, float, float]]]] = {}
    for peer, labels in HEADLINES.get(page, {}).items():
        for id, label in labels.items():
            for stem, data in machines.items():
                if row := _rows(data).get(id):
                    low, middle, high = (row["spread"][which] for which in ("q1", "median", "q3"))
                    marks = panels.setdefault(f"times as fast, {peer}", {}).setdefault(label, {})
                    marks[_name(data, stem)] = low, middle, high
    if panels:
        draw_ratios(panels, path)


def _rows(data: Record) -> dict[str, Record]:
    return {row["id"]: row for case in data["cases"].values() for row in case.get("rows", ()) if row["spread"]}


def _cell(row: Record | None) -> str:
    if row is None:
        return ""
    return "**{median:.2f}** ({q1:.2f}-{q3:.2f})".format(**row["spread"])


def _name(data: Record, stem: str) -> str:
    return data["machine"].get("cpu", stem).replace("(R)", "")


def _link(data: Record, page: str, stem: str) -> str:
    """Say where a machine's tables are, from which code, and how many bounds are met."""
    cases = data["cases"]
    rows = [row for case in cases.values() for row in case.get("rows", ())]
    met = [reach.met(row["value"]) for row in rows if (reach := reach_of(row["id"])) is not None]
    dates, commits = ({case[name] for case in cases.values()} for name in ("date", "commit"))
    n_cases = sum(case.page == page for case in CASES.values())
    return (
        f"- [{_name(data, stem)}]({page}/{stem}.md): {len(cases)} of {n_cases} cases, {' to '.join(sorted(dates))}, "
        f"commit {', '.join(sorted(commits))}; {sum(met)} of {len(met)} bounds are met."
    )
