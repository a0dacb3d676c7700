"""The table of operators: shares of one whole, products among them, and refusals."""

import re
from pathlib import Path

import pytest

from benchmarks import profiles


def test_a_profile_accounts_for_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "RUNS", 1)
    monkeypatch.setattr(profiles, "WARM_UP", 1)
    monkeypatch.setattr(profiles, "SHOWN", 10_000)
    out = tmp_path / "profiles.md"
    profiles.main(["train_small_gqa", "--out", str(out)])
    text = out.read_text()
    shares = [float(share) for share in re.findall(r"\| ([\d.]+)% \|", text)]
    assert sum(shares) == pytest.approx(100, abs=5) and shares == sorted(shares, reverse=True)
    products = re.search(r"matrix products take (\d+)%", text)
    assert products is not None and 0 < int(products[1]) < 100
    assert "| `aten::mm` |" in text


@pytest.mark.parametrize("arguments", [[], ["scaling"]])
def test_refuses_what_has_no_profile(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="must name some of train_addition"):
        profiles.main(arguments)
