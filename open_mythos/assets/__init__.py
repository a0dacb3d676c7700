"""Files that ship inside the package; README.md beside this file names their sources and licences."""

import gzip
from importlib.resources import files

__all__ = ["novel"]


def novel() -> str:
    """Jane Austen's *Persuasion* (1818): 466,854 ASCII characters, lines wrapped at about 70 columns."""
    packed = files(__name__).joinpath("persuasion.txt.gz").read_bytes()
    return gzip.decompress(packed).decode("ascii")
