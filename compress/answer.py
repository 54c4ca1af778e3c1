"""A command's result on standard output: one JSON document, or what is drawn of it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

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


def speaks() -> bool:
    """Whether this process says anything: of several that a launcher started, the first does."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def command_of(arguments: Sequence[str]) -> str:
    return next((word for word in arguments if not word.startswith("-")), "")


def failed(arguments: Sequence[str], error: str) -> None:
    """Under --json, the document of a command that came to nothing; that of `run` has all its keys."""
    if "--json" in arguments and speaks():
        print_json({"ok": False, **({"run": None, "ledger": []} if command_of(arguments) == "run" else {}), "error": error})


def unread() -> None:
    """Who reads the result, such as `head`, has read enough: the rest of it goes nowhere, and the command ends as it would have."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What libraries print goes to standard error: standard output is the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
