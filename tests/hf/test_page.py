"""The page about transformers: its blocks run, in order."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")


def test_blocks_run(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (repo_root / "docs/transformers.md").read_text("utf-8")
    found = re.findall(r"^```py\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(found) == 3
    namespace: dict[str, Any] = {"__name__": "docs"}
    for source in found:
        exec(compile(source, "docs/transformers.md", "exec"), namespace)
    drafted, ids = namespace["drafted"], namespace["ids"]
    assert drafted.tolist() == namespace["same"].generate(ids, 8, 8, temperature=0).tolist()
