"""What a stage is called with, on folders of a test."""

from __future__ import annotations

from pathlib import Path

from compress.config import Data, Recipe, Stage, Student
from compress.context import Context, Progress
from compress.data import CaptionSet

TINY = Student(preset="tiny")


def context(
    folder: Path, data: CaptionSet | None = None, kind: str = "train", config=None, student: Student = TINY, name: str | None = None,
    parent: str | None = None, **given,
) -> Context:
    """Of the only stage of a recipe, called as its kind where it has no name; its output and work are made in `folder`, where its cache is,
    too. `given` stands in the place of what a test says nothing of."""
    stage = given.get("stage", Stage(kind, name or kind, parent, config))
    recipe = Recipe("x", 17, Data(), student, (stage,), folder / "x.yaml")
    seed = getattr(config, "seed", None)
    output, work = folder / "out", folder / "work"
    for made in (output, work):
        made.mkdir(parents=True, exist_ok=True)
    usual = {"recipe": recipe, "stage": stage, "data": data, "seed": recipe.seed if seed is None else seed, "output": output,
             "work": work, "cache": folder / "cache", "artifacts": {}, "progress": Progress(quiet=True)}
    return Context(**usual | given)
