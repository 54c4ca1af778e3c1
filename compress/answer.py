"""A command's result on standard output: one JSON document, or what is drawn of it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from compress.artifact import json_text


def answer(json_wanted: bool, value, draw: Callable[[], object]) -> None:
    if json_wanted:
        print_json(value)
    else:
        print_drawn(draw())


def print_json(value) -> None:
    say(json_text(value))


def print_drawn(drawn) -> None:
    """A rich table or text, as it is written, wide enough for a whole row where there is no terminal."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            unread()  # rich itself would end with status 1

    width = None if sys.stdout.isatty() else 160
    Plain(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False).print(drawn)


def say(text: str, stream=None) -> bool:
    """A line of a result, on standard output if no `stream` is named; whether somebody still reads."""
    try:
        print(text, file=stream or sys.stdout, flush=True)
        return True
    except BrokenPipeError:
        unread()
        return False


def unread() -> None:
    """Who reads the result, such as `head`, has read enough: the rest of it goes nowhere, and the command ends as it would have."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What libraries print goes to standard error: standard output is the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
