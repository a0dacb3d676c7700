"""What is said where transformers is not installed."""

import sys

import pytest


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("open_mythos.hf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"open_mythos.hf: the package transformers is missing; run: pip install "):
        import open_mythos.hf  # noqa: F401
