"""The peers: each installed from the package index into a folder of its own, and run as it is."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / ".peers"


@dataclass(frozen=True)
class Peer:
    """A distribution to install."""

    name: str
    requirement: str
    dependencies: bool
    """Whether to install what it requires, too."""

    @property
    def folder(self) -> Path:
        return FOLDER / self.requirement.replace(self.name, self.name + "-", 1).replace("=", "")


# Without its requirements: it asks for a torch of its own, and peers run on the torch that we run on.
OPEN_MYTHOS = Peer("open-mythos", "open-mythos==0.5.0", dependencies=False)
TRANSFORMERS = Peer("transformers", "transformers==5.23.0", dependencies=True)


def install(peer: Peer) -> Path:
    """The peer's folder, filled by pip first if it is not there. pip reads PIP_* from the environment.

    Raises:
        RuntimeError: pip failed; or it brought a torch along, which would not be the one measured.
    """
    if peer.folder.is_dir():
        return peer.folder
    # Renamed only when complete, so that a crash leaves no half of it under the final name.
    partial = peer.folder.with_name(f"{peer.folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(partial)]
    done = subprocess.run(
        [*command, *([] if peer.dependencies else ["--no-deps"]), peer.requirement], capture_output=True, text=True
    )
    try:
        if done.returncode:
            raise RuntimeError(
                f"{peer.requirement} could not be installed: {done.stderr.strip()[-500:]}; give pip a package index"
            )
        if (partial / "torch").exists():
            raise RuntimeError(f"{peer.requirement} installs torch; peers have to run on the torch of this environment")
        if not peer.folder.is_dir():
            partial.rename(peer.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return peer.folder


def installed(peer: Peer) -> Path:
    """The folder of a peer that the coordinator has installed."""
    if not peer.folder.is_dir():
        raise FileNotFoundError(f"{peer.requirement} is not in {peer.folder}; start the worker through the coordinator")
    return peer.folder
