"""Shared set-up: one thread, a fixed seed, and where the reference files outside the repository are."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.models import restored_tables

ROOT = Path(__file__).resolve().parent.parent

# Two OpenMP threads are slower than one on a shared machine, and one makes the order of float sums repeatable.
torch.set_num_threads(1)

# The same examples in every run, and no time limit per example: the machine may be busy.
hypothesis.settings.register_profile("repo", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repo")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch's global generator before every test."""
    torch.manual_seed(0)
    return 0


@pytest.fixture
def tables() -> Iterator[None]:
    """Take out of the tables of parts what a test has added."""
    with restored_tables():
        yield


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the checkout under test."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the golden files: $OPEN_MYTHOS_SHARED, else `shared` beside the checkout.

    A checkout without that folder skips; a folder that is named or there but lacks a file makes the test fail.
    """
    named = os.environ.get("OPEN_MYTHOS_SHARED")
    folder = Path(named) if named else ROOT.parent / "shared"
    if not named and not folder.is_dir():
        pytest.skip(f"no folder {folder.name}/ beside the checkout; set OPEN_MYTHOS_SHARED to the golden files' folder")
    return folder
