"""What the commands draw in a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# From one loop (pale) to the most (dark red); readable on light and dark backgrounds.
LOOP_COLORS = ("#9ecae1", "#6baed6", "#74c476", "#a1d99b", "#fed976", "#fd8d3c", "#fc4e2a", "#e31a1c")


def write(console: Console, text: str, style: str = "") -> None:
    """Write text as it is, in a colour where the console has colours."""
    if style and console.is_terminal:
        console.print(Text(text, style), end="")
    else:
        # Unchanged, which rich would not leave it: it expands tabs.
        console.file.write(text)
        console.file.flush()


def loop_style(loops: int, most: int) -> str:
    """The colour of a token that took `loops` of at most `most` loops."""
    place = max(0, loops - 1) / max(1, most - 1)
    return f"bold {LOOP_COLORS[min(len(LOOP_COLORS) - 1, int(place * len(LOOP_COLORS)))]}"


def shaded(pieces: Sequence[tuple[str, int]], most: int) -> Text:
    """Pieces of text, each coloured by the loops it took."""
    text = Text()
    for piece, loops in pieces:
        text.append(piece, style=loop_style(loops, most))
    return text


def loop_legend(most: int) -> Text:
    """The colours of 1 to `most` loops."""
    legend = Text("loops: ", style="dim")
    for loops in range(1, most + 1) if most <= 16 else sorted({1 + i * (most - 1) // 7 for i in range(8)}):
        legend.append(f" {loops} ", style=f"{loop_style(loops, most)} reverse")
    return legend


def accuracy_table(
    title: str, distances: Sequence[int], loops: Sequence[int], accuracy: Sequence[Sequence[float]]
) -> Table:
    """Accuracy by distance (rows) and loops (columns), coloured from red (0) to green (1)."""
    table = Table(title=title, title_style="bold")
    table.add_column("hops \\ loops", justify="right", style="bold")
    for n_loops in loops:
        table.add_column(str(n_loops), justify="right")
    for distance, row in zip(distances, accuracy, strict=True):
        table.add_row(str(distance), *[Text(f"{value:.2f}", style=_accuracy_style(value)) for value in row])
    return table


def _accuracy_style(value: float) -> str:
    red, green = int(220 * (1 - value)) + 20, int(160 * value) + 40
    return f"bold white on rgb({red},{green},50)"


class ProgressLine:
    """A bar with steps, the latest numbers and the time left; only its last state where the output is no terminal."""

    def __init__(self, n_steps: int, label: str, enabled: bool = True, done: int = 0, stderr: bool = False) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(stderr=stderr),
            disable=not enabled,
        )
        self._task = self._progress.add_task(label, total=n_steps, completed=done, numbers="")

    def advance(self, numbers: dict[str, float] | None = None, n_steps: int = 1) -> None:
        """So many steps are done; `numbers` replaces what the line shows."""
        self._progress.advance(self._task, n_steps)
        if numbers is not None:
            shown = " ".join(
                f"{label} {value:,.0f}" if value >= 1000 else f"{label} {value:.4g}" for label, value in numbers.items()
            )
            self._progress.update(self._task, numbers=shown)

    def __enter__(self) -> "ProgressLine":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
