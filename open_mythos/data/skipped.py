"""Files and records that yield no document: each with its place, the reason and the remedy."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from open_mythos.checks import printable

PLACES = 5
"""Places that are shown for one file and reason."""
SHOWN = 20
"""Files that are shown for one reason."""
FORMATS = {
    "turn it into JSON lines, one object with the field text in each line": ".csv .tsv .xml .yaml .yml",
    "extract its text into a .txt file": ".html .htm .pdf .doc .docx .odt .rtf .epub .png .jpg .jpeg",
    "unpack it first": ".zst .xz .bz2 .zip .7z .tar .tgz .gz",
}
"""Remedies for files of other kinds, by their ending."""


@dataclass(frozen=True)
class Skipped:
    """A file or record that yields no document. Two are equal if their reasons are equal."""

    reason: str
    """In a few words, to count by: "empty", "not UTF-8", "too long", "no text in the record", "ids out of range",
    "damaged" or "unknown kind of file"; of conversations those of `BadMessages`."""
    why: str = field(default="", compare=False)
    """The reason in detail."""
    remedy: str = field(default="", compare=False)
    place: str = field(default="", compare=False)
    """Where it is in the file, such as "line 3"; empty: the whole file."""
    file: str = field(default="", compare=False)

    def __str__(self) -> str:
        where = f"{self.file}, {self.place}" if self.place else self.file
        return f"{where}: {self.reason}{f' ({self.why})' if self.why else ''}"


def unknown_kind(path: str, ending: str) -> Skipped:
    """Return a file whose ending says that it is none of those that are read."""
    remedy = next((remedy for remedy, endings in FORMATS.items() if ending in endings.split()), "")
    why = f"it ends in {ending}" if ending else "its name has no ending"
    return Skipped("unknown kind of file", why, remedy or "rename it to end in .txt if it is text", file=path)


@dataclass
class _Group:
    """The skipped records of one file with one reason and one remedy."""

    first: Skipped
    n: int = 0
    places: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = [place.partition(" ") for place in self.places]
        several = "s" if len(where) > 1 else ""
        numbers = ", ".join(number for _, _, number in where)
        place = f", {where[0][0]}{several} {numbers}" if where else ""
        rest = self.n - max(1, len(where))
        more = f" and {rest:,} more" if rest else ""
        return f"{self.first.file}{place}{more}{f': {self.first.why}' if self.first.why else ''}"


class SkipLog:
    """Counts of what was skipped, by reason, and for each file the first places."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """Files and records, by reason."""
        self._groups: dict[tuple[str, str, str], _Group] = {}

    def add(self, skipped: Skipped, n: int = 1) -> None:
        """Count `skipped`, which stands for `n` records of its file."""
        self.counts[skipped.reason] += n
        key = (skipped.reason, skipped.file, skipped.remedy or skipped.why)
        group = self._groups.setdefault(key, _Group(skipped))
        group.n += n
        if skipped.place and len(group.places) < PLACES:
            group.places.append(skipped.place)

    def __len__(self) -> int:
        return self.counts.total()

    def lines(self) -> Iterator[str]:
        """Yield a table: the first places for each file and reason, the remedy, and a count of the rest."""
        for reason, n in self.counts.most_common():
            groups = [group for key, group in self._groups.items() if key[0] == reason]
            n_files = len({group.first.file for group in groups})
            yield f"Skipped, {reason}: {n:,} in {n_files:,} file{'s' * (n_files > 1)}"
            for group in groups[:SHOWN]:
                yield printable(f"  {group}")
                if group.first.remedy:
                    yield printable(f"      -> {group.first.remedy}")
            if len(groups) > SHOWN:
                yield f"  and {sum(group.n for group in groups[SHOWN:]):,} more"
