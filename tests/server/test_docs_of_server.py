"""docs/server.md against the code: options, fields, routes, metrics and the example."""

import ast
import contextlib
import dataclasses
import io
import re
from pathlib import Path

from open_mythos.cli.options import flags
from open_mythos.cli.serve import Serve
from open_mythos.server.app import make_app
from open_mythos.server.fields import EFFORTS, UNSEEN
from open_mythos.server.protocol import ChatRequest, CompletionRequest
from open_mythos.server.responses_api import ResponseRequest
from tests.server.served import MODEL, serving
from tests.server.test_middleware import routes

TEXT = (Path(__file__).resolve().parents[2] / "docs/server.md").read_text("utf-8")
ROWS = [[cell.strip() for cell in line[1:-1].split("|")] for line in TEXT.splitlines() if line.startswith("| `")]
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
IGNORED |= {"prompt_cache_retention"}


def test_options() -> None:
    table = {cells[0]: cells[1] for cells in ROWS if cells[0].startswith("`--")}
    fields = [field for field in dataclasses.fields(Serve) if field.name != "folder"]
    assert table == {f"`{flags(Serve)[field.name]}`": f"`{field.default}`" for field in fields}


def test_fields() -> None:
    table = {cells[0].strip("`"): cells[1].strip("`") for cells in ROWS if len(cells) == 3 and cells[0][1] != "-"}
    known = {**ChatRequest.model_fields, **CompletionRequest.model_fields}
    assert set(table) == set(known) - IGNORED
    for name, told in table.items():
        field = known[name]
        assert told == "required" if field.is_required() else ast.literal_eval(told) == field.default, name
    newer = ResponseRequest.model_fields.keys() | ResponseRequest.unsupported.keys()
    assert all(f"`{name}`" in TEXT for name in IGNORED | ChatRequest.unsupported.keys() | newer - {"reasoning"})


def test_efforts_and_messages() -> None:
    table = {cells[0].strip("`"): cells[1] for cells in ROWS if cells[0].strip("`") in EFFORTS}
    told = {name: "1" if not scale else f"{scale:g} x `max_loop_iters`" for name, scale in EFFORTS.items()}
    assert {name: cell.removesuffix(", the default") for name, cell in table.items()} == told
    assert all(f"`{name}`" in TEXT for name in UNSEEN)


def test_routes_metrics_and_the_example() -> None:
    with serving() as served:
        told = {cells[0].strip("`") for cells in ROWS if re.match(r"`(GET|POST) ", cells[0])}
        paths = {re.sub(":path", "", route.path) for route in make_app(served.service).routes}
        assert {line.split()[1] for line in told} == paths and len(told) <= len(routes(served))
        (example,) = re.findall(r"^```py\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
        shown = io.StringIO()
        source = example.replace("http://127.0.0.1:8000", served.url).replace('"final"', f'"{MODEL}"')
        with contextlib.redirect_stdout(shown):
            exec(compile(source, "docs/server.md", "exec"), {})
        assert "'mean'" in shown.getvalue()
        with served.http() as http:
            families = re.findall(r"^# TYPE (mythos_\w+) (?:counter|gauge|histogram)", http.get("/metrics").text, re.M)
    named = {name for cells in ROWS for name in re.findall(r"`(mythos_\w+)`", cells[0])}
    assert named == {name for name in families if not name.endswith("_created")}
