"""The peers: each installed from the package index into a folder of its own, and run as it is."""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / ".peers"


@dataclass(frozen=True)
class Peer:
    """A distribution to install."""

    requirement: str
    dependencies: bool
    """Whether to install its requirements, too."""

    @property
    def folder(self) -> Path:
        return FOLDER / self.requirement.replace("==", "-")


# Without its requirements: it asks for a torch of its own, and peers run on the torch that we run on.
OPEN_MYTHOS = Peer("open-mythos==0.5.0", dependencies=False)
TRANSFORMERS = Peer("transformers==5.23.0", dependencies=True)


def install(peer: Peer) -> Path:
    """Return the peer's folder, filled by pip (or uv, in an environment that uv made) first if it is not there.

    Both read their settings, such as the index, from the environment.

    Raises:
        RuntimeError: it failed, or brought a torch along, which would not be the one measured.
    """
    if peer.folder.is_dir():
        return peer.folder
    FOLDER.mkdir(exist_ok=True)
    # Renamed only when complete, so that a crash leaves no half of it under the final name.
    with tempfile.TemporaryDirectory(suffix=".partial", dir=FOLDER) as folder:
        partial = Path(folder) / "packages"
        options = ["--quiet", "--target", str(partial), *([] if peer.dependencies else ["--no-deps"])]
        done = subprocess.run([*_installer(), *options, peer.requirement], capture_output=True, text=True)
        if done.returncode:
            said = done.stderr.strip()[-500:]
            raise RuntimeError(f"{peer.requirement} could not be installed, which takes a package index: {said}")
        if (partial / "torch").exists():
            raise RuntimeError(f"{peer.requirement} installs torch; peers have to run on the torch of this environment")
        if not peer.folder.is_dir():
            partial.rename(peer.folder)
    return peer.folder


def installed(peer: Peer) -> Path:
    """Return the folder of a peer that the coordinator has installed."""
    if not peer.folder.is_dir():
        raise FileNotFoundError(f"{peer.requirement} is not in {peer.folder}; start the worker through the coordinator")
    return peer.folder


def _installer() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip", "install"]
    if shutil.which("uv"):
        return ["uv", "pip", "install", "--python", sys.executable]
    raise RuntimeError("there is neither pip nor uv to install peers with; run: python -m ensurepip")
