"""A browser for tests, if this machine has one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW = "see 'Tests' in CONTRIBUTING.md"


@contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium: the one on PATH, else the one that Playwright has installed; the test is skipped without."""
    api = pytest.importorskip("playwright.sync_api", reason=f"Playwright is not installed; {HOW}")
    with api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = next(filter(None, map(shutil.which, NAMES)), own)
        if not Path(found).exists():
            pytest.skip(f"there is no Chromium; {HOW}")
        # Chromium's sandbox refuses to run for root, as which containers often run.
        args = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=found, args=args)
        yield chromium
        chromium.close()
