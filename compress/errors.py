"""The errors that lightcap raises on purpose.

    LightcapError                one line: what, where, how to mend it
    ├── UsageError      exit 2   what the user gave cannot be used; nothing was written
    │   ├── RecipeError          a recipe's file, line, key or value
    │   ├── DataError            captions, images, splits
    │   └── ModelError           an artifact, a checkpoint, a preset
    └── StageError      exit 1   a stage failed; the last good artifact is kept
        ├── GateError            a stage ran, and its result missed a gate
        └── TargetError          nothing that may be removed brings a model to a target
"""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

import click


class LightcapError(click.ClickException):
    """An expected failure. `str(error)` is one line; `exit_code` is the status the command ends with."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))

    def show(self, file=None) -> None:
        """The line, behind where it came from if LIGHTCAP_TRACE is set."""
        if os.environ.get("LIGHTCAP_TRACE"):
            traceback.print_exception(self, file=file or sys.stderr)
        click.echo(f"lightcap: {self.message}", file=file or sys.stderr)


class UsageError(LightcapError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class DataError(UsageError):
    pass


class ModelError(UsageError):
    pass


class StageError(LightcapError):
    pass


class GateError(StageError):
    pass


class TargetError(StageError):
    pass


ROOT = Path(__file__).resolve().parent.parent
ALONE = (f"{ROOT / 'students'}{os.sep}", f"{ROOT / 'teachers'}{os.sep}", str(ROOT / "compress" / "runtime.py"))


def expected(error: BaseException) -> LightcapError | None:
    """`error` as a LightcapError if it is one of those that lightcap raises on purpose, else None (a bug, or the machine's trouble).

    students/, teachers/ and runtime.py stand alone and raise plain ValueError or FileNotFoundError about what they were given; such an
    error, raised by a line of theirs and not by a library below, is a wrong model.
    """
    if isinstance(error, LightcapError):
        return error
    if isinstance(error, ValueError | FileNotFoundError):
        frames = list(traceback.walk_tb(error.__traceback__))
        if frames and frames[-1][0].f_code.co_filename.startswith(ALONE):
            return ModelError(str(error))
    return None


def beside(path: Path) -> list[str]:
    """The names in the folder of `path`, for `nearest`; none where it is not there or may not be read."""
    try:
        return os.listdir(path.parent)
    except OSError:
        return []


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the allowed name closest to `word`, or an empty string where none is close."""
    close = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
