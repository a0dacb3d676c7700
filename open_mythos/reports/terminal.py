"""Output of the commands in a terminal: progress, tables, and text coloured by loops."""

import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

# From one loop (pale) to the most loops (dark red); readable on light and dark backgrounds.
LOOP_COLORS = ("#9ecae1", "#6baed6", "#74c476", "#a1d99b", "#fed976", "#fd8d3c", "#fc4e2a", "#e31a1c")
PLAIN_LINE_S = 5.0
"""Seconds between two plain lines of progress."""


def write(console: Console, text: str, style: str = "") -> None:
    """Write text unchanged, in a colour where the console has colours."""
    if style and console.is_terminal:
        console.print(Text(text, style), end="")
    else:
        # Not written by rich, which would expand tabs.
        console.file.write(text)
        console.file.flush()


def loop_style(loops: int, most: int) -> str:
    """Choose the colour of a token that took `loops` of at most `most` loops."""
    place = max(0, loops - 1) / max(1, most - 1)
    return f"bold {LOOP_COLORS[min(len(LOOP_COLORS) - 1, int(place * len(LOOP_COLORS)))]}"


def loop_legend(most: int) -> Text:
    """Show the colours of 1 to `most` loops."""
    legend = Text("loops: ", style="dim")
    for loops in range(1, most + 1) if most <= 16 else sorted({1 + i * (most - 1) // 7 for i in range(8)}):
        legend.append(f" {loops} ", style=f"{loop_style(loops, most)} reverse")
    return legend


def loop_summary(console: Console, loops: Sequence[int], most: int) -> str | Text:
    """Write the mean loops of the tokens, with the meaning of the colours if the console has colours."""
    mean = f"{sum(loops) / len(loops):.2f} loops per token on average"
    if console.is_terminal:
        return loop_legend(most).append(f"   {mean}", style="not bold")
    return f"{mean} (in a terminal each token has the colour of its loops)"


def table(head: Sequence[str], rows: Iterable[Sequence[str | Text]], title: str | None = None) -> Table:
    """Build a rich table with right-aligned columns, whose `str` headings and cells are shown literally.

    Pass a `Text` for a styled cell. `title` may contain rich markup. Long cells wrap.
    """
    made = Table(*(Column(Text(name), justify="right", overflow="fold") for name in head), title=title)
    for row in rows:
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def accuracy_table(
    title: str, distances: Sequence[int], loops: Sequence[int], accuracy: Sequence[Sequence[float]]
) -> Table:
    """Make a table of accuracy by distance (rows) and loops (columns), coloured from red (0) to green (1)."""

    def cell(value: float) -> Text:
        red, green = int(220 * (1 - value)) + 20, int(160 * value) + 40
        return Text(f"{value:.2f}", style=f"bold white on rgb({red},{green},50)")

    each = zip(distances, accuracy, strict=True)
    rows = [[Text(str(distance), style="bold"), *map(cell, row)] for distance, row in each]
    return table(["hops \\ loops", *map(str, loops)], rows, title)


class ProgressLine:
    """Shows how far a command is: a bar in a terminal, and in a log file a plain line every few seconds.

    A plain line is "khop: step 120/1,000  loss 2.31  12,345 tokens/s  3 min left"; the first and the last step always
    have one.

    Args:
        total: number of steps, or the amount of work in any other unit.
        label: name of the work that is under way.
        enabled: False shows nothing.
        done: steps of an earlier part of the same run.
        unit: name of a step; "" shows the share in percent, for work whose steps mean nothing to a user.
        clock: seconds since any start.
    """

    def __init__(
        self,
        total: float,
        label: str,
        enabled: bool = True,
        done: int = 0,
        *,
        stderr: bool = False,
        unit: str = "step",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = Console(stderr=stderr, highlight=False)
        self._plain = enabled and not self._console.is_terminal
        self._unit, self._clock, self._first = unit, clock, done
        self._began, self._printed_s, self._printed = clock(), -math.inf, float(done)
        count = MofNCompleteColumn() if unit else TaskProgressColumn()
        columns = ("{task.description}", BarColumn(), count, "{task.fields[numbers]}", TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, disable=not enabled or self._plain)
        self._total = total
        self._bar.add_task(label, total=total, completed=done, numbers="")
        (self._task,) = self._bar.tasks

    def advance(self, numbers: Mapping[str, float] | None = None, steps: float = 1, label: str | None = None) -> None:
        """Count `steps` as done; `numbers` and `label` replace what the line shows."""
        shown = self._task.fields["numbers"]
        if numbers is not None:
            shown = "  ".join(_number(name, value) for name, value in numbers.items())
        self._bar.update(self._task.id, advance=steps, description=label, numbers=shown)
        if self._clock() - self._printed_s >= PLAIN_LINE_S or self._task.completed >= self._total:
            self._print()

    def _print(self) -> None:
        done, total = self._task.completed, self._total
        if not self._plain or done == self._printed:
            return
        now = self._clock()
        place = f"{self._unit} {int(done):,}/{int(total):,}" if self._unit else f"{done / total:.0%}"
        left_s = (now - self._began) / (done - self._first) * (total - done)
        left = f"{duration(left_s)} left" if done < total else ""
        parts = [f"{self._task.description}: {place}", self._task.fields["numbers"], left]
        # Not printed by rich, which would break the line at 80 columns.
        print("  ".join(filter(None, parts)), file=self._console.file, flush=True)
        self._printed, self._printed_s = done, now

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._print()
        self._bar.stop()


def _number(name: str, value: float) -> str:
    shown = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{shown} {name}" if name.endswith("/s") else f"{name} {shown}"


def program() -> str:
    """Name the command as this shell calls it: `mythos` if it is on PATH, else by its path, as in .venv/bin/mythos."""
    if shutil.which("mythos") is not None:
        return "mythos"
    script = Path(sys.executable).with_name("mythos")
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m open_mythos"
    here = Path.cwd()
    return shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))


def duration(seconds: float) -> str:
    """Write a time for people: 40 s, 3 min, 2 h 10 min, 5 days."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes and hours < 10 else f"{hours} h"
    return f"{round(hours / 24)} days"
