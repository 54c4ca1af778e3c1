"""What a stage is given, and the progress that it reports."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from compress.artifact import Artifact
from compress.config import Recipe, Stage
from compress.parallel import ALONE, Share

if TYPE_CHECKING:
    import numpy as np

    from compress.data import CaptionSet

SECONDS_BETWEEN_LINES = 10.0


class Task:
    """One piece of work of `total` units. Call `advance` as units are done, `resume` for those that were done before it began."""

    def __init__(self, label: str, total: float | None, show) -> None:
        self.label, self.total, self.done, self.before, self.note = label, total, 0.0, 0.0, ""
        self.started = time.monotonic()
        self._show = show

    def resume(self, units: float) -> None:
        """They count as done, and not in the rate."""
        self.before += units
        self.advance(units)

    @property
    def rate(self) -> float:
        """Units a second."""
        return (self.done - self.before) / max(time.monotonic() - self.started, 1e-9)

    def advance(self, units: float = 1, note: str = "") -> None:
        """`note`, such as a loss, stands at the end of the line until the next one."""
        self.done += units
        self.note = note or self.note
        self._show(self)

    def line(self) -> str:
        """`student: 1200/3000, 85.1/s, 21 s left`"""
        rate = self.rate
        note = f", {self.note}" if self.note else ""
        if self.total is None:
            return f"{self.label}: {_number(self.done)}, {_number(rate)}/s{note}"
        left = f", {_duration((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        return f"{self.label}: {_number(self.done)}/{_number(self.total)}, {_number(rate)}/s{left}{note}"


@dataclass(frozen=True)
class Progress:
    """Where progress goes: a bar with a rate and the time left on a terminal, a line at most every ten seconds elsewhere.

    `quiet` shows nothing, `brief` no line of what took less than those ten seconds; `stream` defaults to standard error, so that standard
    output stays the command's result.
    """

    stream: TextIO | None = None
    quiet: bool = False
    brief: bool = False
    _live: list = field(default_factory=list, repr=False)  # the rich display that is up, if any: nested tasks share it

    @property
    def _out(self) -> TextIO:
        return self.stream or sys.stderr

    def log(self, text: str) -> None:
        if self.quiet:
            return
        if self._live:
            self._live[-1].console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._out, flush=True)

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Task]:
        if self.quiet:
            yield Task(label, total, lambda task: None)
        elif self._out.isatty():
            with self._bar(label, total) as task:
                yield task
        else:
            with self._lines(label, total) as task:
                yield task

    @contextmanager
    def _lines(self, label: str, total: float | None) -> Iterator[Task]:
        last = [time.monotonic()]

        def show(task: Task) -> None:
            if time.monotonic() - last[0] >= SECONDS_BETWEEN_LINES:
                last[0] = time.monotonic()
                self.log(task.line())

        task = Task(label, total, show)
        yield task
        self._end(task)

    def _end(self, task: Task) -> None:
        seconds = time.monotonic() - task.started
        if not self.brief or seconds >= SECONDS_BETWEEN_LINES:
            self.log(f"{task.line()}, done in {_duration(seconds)}")

    @contextmanager
    def _bar(self, label: str, total: float | None) -> Iterator[Task]:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        bars = self._live[-1] if self._live else None
        if bars is None:
            rate = TextColumn("{task.fields[rate]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
            bars = Bars(*columns, console=Console(file=self._out), transient=True)
            bars.start()
            self._live.append(bars)
            mine = True
        else:
            mine = False
        number = bars.add_task(label, total=total, rate="")

        def show(task: Task) -> None:
            bars.update(number, completed=task.done, rate=f"{_number(task.rate)}/s {task.note}")

        task = Task(label, total, show)
        try:
            yield task
        finally:
            bars.remove_task(number)
            if mine:
                bars.stop()
                self._live.pop()
        self._end(task)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


@dataclass(frozen=True)
class Context:
    recipe: Recipe
    stage: Stage
    data: CaptionSet
    seed: int  # the stage's own, or the recipe's
    output: Path  # temporary folder that becomes the artifact; the stage writes its model files here
    work: Path  # survives a kill: the stage's resume state (safetensors and JSON); removed when the stage is done
    cache: Path  # runs/.cache: features and targets, each under its digest
    artifacts: Mapping[str, Artifact]  # earlier stages of this run, by name
    progress: Progress
    share: Share = ALONE  # of every batch, where several processes train
    ciders: Callable[[Artifact], np.ndarray] | None = None  # CIDEr-D x100 of each val image, for a stage that must know before it ends
