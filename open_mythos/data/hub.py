"""Datasets of the Hugging Face hub: the parquet files of a subset at one commit, read remotely or downloaded.

A remote file goes by its address, `hf://datasets/OWNER/NAME@COMMIT/PATH`, wherever a local one goes by its path.
"""

import json
import os
import re
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from open_mythos.checks import check_int
from open_mythos.extras import load
from open_mythos.files import read_json, write_text

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_SUBSET = "sample-10BT"
PREFIX = "hf://datasets/"
CONNECTIONS = 16


@dataclass(frozen=True)
class HubDataset:
    """A subset of a dataset: the parquet files that the dataset's card lists for its training split."""

    name: str
    """OWNER/NAME."""
    subset: str | None = None
    """As the card names it, or a folder where the card names none; None: the card's default, or its only one."""
    revision: str | None = None
    """Branch, tag or commit; None: what the hub has now."""
    limit_files: int | None = None
    """Take only the first files, in order of their names."""

    def __post_init__(self) -> None:
        if not looks_like_a_dataset(self.name):
            raise ValueError(f"dataset {self.name!r} must be OWNER/NAME; use {FINEWEB_EDU!r}")
        if self.limit_files is not None:
            check_int("limit_files", self.limit_files, 1)

    def pinned(self) -> "HubDataset":
        """Return this dataset at the commit that the revision currently names."""
        return replace(self, revision=self._info().sha)

    def files(self) -> list[str]:
        """Addresses of the parquet files at the pinned commit, in order of their names.

        Raises:
            OSError: the hub does not give the dataset.
            ValueError: it has no such subset, or no parquet files.
        """
        info = self._info()
        configs = (info.card_data or {}).get("configs") or []
        root = f"{PREFIX.removeprefix('hf://')}{self.name}@{info.sha}"
        system, patterns = _hub().HfFileSystem(), _patterns(configs, self)
        with _explained(f"the hub does not list the files of {self.name}", "check the connection"):
            names = {name for pattern in patterns for name in system.glob(f"{root}/{pattern}")}
        found = sorted(name for name in names if name.endswith(".parquet"))
        if not configs:
            # No card says what is for training, but by custom the names do.
            found = [name for name in found if "train" in name.removeprefix(root)] or found
        if not found:
            kinds = ", ".join(sorted({Path(name).suffix for name in names})) or "no files"
            fault = f"dataset {self.name} has no parquet files in subset {self.subset or 'default'} ({kinds})"
            raise ValueError(f"{fault}; use another subset, or get its files yourself and name them")
        return [f"hf://{name}" for name in found[: self.limit_files]]

    def _info(self) -> Any:
        look_up = _hub().HfApi().dataset_info
        at = f" at revision {self.revision!r}" if self.revision else ""
        what = f"{self.name!r} is no local path, and the Hugging Face hub does not give a dataset of that name{at}"
        remedy = "check the name and the connection, and call `hf auth login` where a dataset asks for consent"
        with _explained(what, remedy):
            return look_up(self.name, revision=self.revision)


def looks_like_a_dataset(name: str) -> bool:
    """Return whether a name can only be a dataset's: OWNER/NAME, and no local path."""
    return re.fullmatch(r"[\w.-]*\w/\w[\w.-]*", name) is not None and not Path(name).exists()


def is_remote(path: str) -> bool:
    return path.startswith(PREFIX)


def open_remote(address: str) -> Any:
    """Return a file object that asks the hub for what is read of it and nothing more."""
    return _hub().HfFileSystem().open(address, "rb", cache_type="none")


def fetch(address: str) -> Path:
    """Return a local copy, in the cache of huggingface_hub; downloaded unless it is there.

    Raises:
        OSError: the hub does not give the file.
    """
    name, commit, path = _parts(address)
    download = _hub().hf_hub_download
    with _explained(f"{address} cannot be downloaded", "repeat the command to go on"):
        return Path(download(name, path, repo_type="dataset", revision=commit))


def remember(addresses: list[str], look_up: Callable[[str], list[int]], progress: bool) -> list[list[int]]:
    """Return `look_up` of each address, computed concurrently and cached on disk, since a commit never changes."""
    place = {address: _index(address) for address in addresses}
    known = {path: read_json(path) if path.exists() else {} for path in set(place.values())}
    missing = [address for address, path in place.items() if address not in known[path]]
    try:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            found = track(
                pool.map(look_up, missing), "reading footers", len(missing), console=Console(stderr=True),
                transient=True, disable=not (progress and missing),
            )  # fmt: skip
            for address, value in zip(missing, found, strict=True):
                known[place[address]][address] = value
    finally:
        for path in {place[address] for address in missing}:
            own = path.with_name(f"{os.getpid()}-{path.name}")  # several processes may be at this
            write_text(own, json.dumps(known[path]))
            os.replace(own, path)
    return [known[place[address]][address] for address in addresses]


def _index(address: str) -> Path:
    name, commit, _ = _parts(address)
    folder = _hub().cached_assets_path("open_mythos", name.replace("/", "--"), commit)
    return Path(folder) / "row_groups.json"


def _parts(address: str) -> tuple[str, str, str]:
    """Name of the dataset, commit, and path in it."""
    name, _, rest = address.removeprefix(PREFIX).partition("@")
    commit, _, path = rest.partition("/")
    return name, commit, path


def _patterns(configs: list[dict[str, Any]], dataset: HubDataset) -> list[str]:
    """Patterns of the training files, from what the card says."""
    subset = dataset.subset
    if not configs:
        return ["**" if subset is None else f"{subset}/**"]
    by_name = {config["config_name"]: config for config in configs}
    if subset is None:
        default = [name for name, config in by_name.items() if name == "default" or config.get("default")]
        subset = default[0] if default else next(iter(by_name)) if len(by_name) == 1 else "none given"
    if subset not in by_name:
        raise ValueError(f"dataset {dataset.name} has no subset {subset!r}; use one of {', '.join(by_name)}")
    config = by_name[subset]
    files = config.get("data_files") or f"{config.get('data_dir', '.')}/**"
    named = [{"path": file, "split": "train"} if isinstance(file, str) else file for file in _listed(files)]
    return [pattern for file in named if file.get("split") == "train" for pattern in _listed(file["path"])]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _hub() -> Any:
    return load("huggingface_hub", "data", "datasets of the hub")


@contextmanager
def _explained(what: str, remedy: str) -> Generator[None]:
    """Turn any error of the library into an OSError with the fault, its reason and the remedy."""
    try:
        yield
    except Exception as error:  # the library's HTTP client raises its own kinds, which differ by version
        raise OSError(f"{what} ({first_line(error)}); {remedy}") from error


def first_line(error: Exception) -> str:
    """Return what an error says, without the pages that the hub adds to it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
