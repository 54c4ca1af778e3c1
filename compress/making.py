"""Makes one artifact of a run: trained, measured, described, and only then given its name.

    runs/.cache/LOCK/           a finished artifact
    runs/.cache/LOCK.work/      a stage under way: `state` (its own resume files), then `model` (made, not yet measured)
    runs/NAME/error.txt         the trace of a failed stage
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from compress import artifact, card, ledger, lock, recipe, sources
from compress.artifact import Artifact
from compress.cache import finished, noted
from compress.config import Recipe, Stage
from compress.context import Context, Progress
from compress.errors import RecipeError, StageError, UsageError, expected
from compress.parallel import ALONE, Share
from compress.process import forget_peak, peak, thread_count

PLACED = re.compile(r"--set \S|\S.*:\d+: ")  # an error that says the file and line of the recipe, or the setting
JOINT = ("concepts", "train", "distill", "scst")  # stages that several processes train together


@dataclass(frozen=True)
class Run:
    """A recipe, where its artifacts go, and what may stand in for the real stages and the real evaluation."""

    recipe: Recipe
    out: Path
    cache: Path
    data: object
    progress: Progress
    stages: Mapping[str, Callable] | None
    evaluation: object
    share: Share
    sizes_only: frozenset[str] = frozenset()  # stages whose captions nobody asks for

    @functools.cached_property
    def tmacs(self) -> Mapping[str, float | None]:
        return (self.evaluation or importlib.import_module("compress.estimate")).tmacs(self.recipe, self.data)

    @functools.cached_property
    def written(self) -> str:
        """The resolved recipe as a file has it."""
        return recipe.as_yaml(self.recipe)

    @property
    def told(self) -> Path:
        """Where the first process of several tells the others, stage by stage, whether it trains."""
        return self.out / f".told-{self.share.launch}"

    @functools.cached_property
    def images(self) -> str:
        """The digest of the images that rows are measured on."""
        return lock.measured_on(self.data.split(self.recipe.data.val_split).examples)

    @functools.cached_property
    def measured(self) -> str:
        """The fingerprint of the split that is measured on: what is in others changes no row."""
        return self.data.split(self.recipe.data.val_split).fingerprint

    def tell(self, stage: Stage, trains: bool) -> None:
        if self.share.size > 1 and not (self.told / stage.name).exists():
            self.told.mkdir(parents=True, exist_ok=True)
            artifact.write_text(self.told / stage.name, "train" if trains else "skip")

    def stage_function(self, kind: str) -> Callable:
        if self.stages is not None:
            return self.stages[kind]
        import torch

        torch.set_num_threads(thread_count())
        return importlib.import_module(f"compress.stages.{kind}").run

    def evaluator(self, kind: str = ""):
        return self.evaluation if self.evaluation is not None else importlib.import_module(measured_by(kind))


def context_of(run: Run, stage: Stage, artifacts: Mapping, output: Path, work: Path) -> Context:
    """What the stage's function and its measurement are given."""
    seed = getattr(stage.config, "seed", None)
    return Context(
        recipe=run.recipe,
        stage=stage,
        data=run.data,
        seed=run.recipe.seed if seed is None else seed,
        output=output,
        work=work,
        cache=run.cache,
        artifacts=MappingProxyType(dict(artifacts)),
        progress=run.progress if run.share.rank == 0 else Progress(quiet=True),
        share=run.share if stage.kind in JOINT else ALONE,
        ciders=lambda artifact: run.evaluator().ciders(artifact, run.data.split(run.recipe.data.val_split), run.cache, run.progress),
    )


def measured_by(kind: str) -> str:
    """The module whose `measure` makes the row of a stage of that kind."""
    return "compress.foreign_row" if kind == "pretrained" else "compress.evaluate"


def measuring(recipe: Recipe, kind: str, against: Sequence[str], fingerprint: str, sizes_only: bool = False) -> str:
    """The digest of how the row of a stage of that kind is measured, and against which artifact, by its lock."""
    parts = lock.measure_parts(recipe, against, fingerprint, thread_count(), by=measured_by(kind))
    return lock.digest(parts | {"sizes_only": True} if sizes_only else parts)


def build(run: Run, stage: Stage, lock_parts: dict, target: Path, artifacts: Mapping, how: str) -> None:
    """Makes, measures and describes one artifact, then gives it its name: `target` is whole or absent. A finished one whose numbers
    were measured otherwise than by `how` is only measured again, where it stands."""
    began = time.time()
    forget_peak()
    earlier = Artifact(target).row() if finished(target) else None
    if earlier is None and target.exists():  # without metrics.json it was never finished under this name
        shutil.rmtree(target)
    work = target.with_name(f"{target.name}.work")
    state, model = work / "state", target if earlier else work / "model"
    with _failing_as(stage, run.out, work):  # before anything is made: it finds sizes that cannot be
        tmacs = None if stage.kind == "baseline" else run.tmacs[stage.name]
        if earlier is None:
            _refuse(lock.changed(run.recipe, stage, lock_parts))
    if earlier is None:
        state.mkdir(parents=True, exist_ok=True)
        before = _seconds_before(work, began)
    context = context_of(run, stage, artifacts, model, state)
    parent = artifacts[stage.parent] if stage.parent else None
    with _failing_as(stage, run.out, work):
        if not model.is_dir():
            with artifact.writing(model) as output:
                if stage.kind != "baseline":
                    make = run.stage_function(stage.kind)
                    run.tell(stage, True)
                    make(parent, stage.config, dataclasses.replace(context, output=output))
                    Artifact(output).check()
        _refuse(sources.changed_code(sources.imported((measured_by(stage.kind),))[0]))
        if stage.kind == "baseline":
            measured = run.evaluator().baseline(parent, context)
        elif stage.name in run.sizes_only:
            measured = run.evaluator(stage.kind).sizes(Artifact(model), context)
        else:
            against = artifacts[stage.against] if stage.against else None
            measured = run.evaluator(stage.kind).measure(Artifact(model), against, context)
        if earlier:
            cost = {key: earlier[key] for key in ("peak_mb", "seconds")}
        else:
            cost = {"peak_mb": round(peak() / 1e6, 1), "seconds": round(before + time.time() - began, 2)}
        named = {"stage": stage.kind, "name": stage.name, "artifact": f"../.cache/{target.name}", "lock": target.name}
        row = ledger.row(dict(measured) | named | cost | {"against": ledger.against(stage, measured)})
        of_splits = noted(target).get("images") if earlier else None  # rows of other runs may be of another split
        images = (of_splits if isinstance(of_splits, dict) else {}) | {run.recipe.data.val_split: run.images}
        known = {"lock": target.name, "measured": how, "images": images, "tmacs": tmacs, "parts": lock_parts}
        if earlier:  # a stop between the files below leaves numbers that no recipe takes for its own
            artifact.write_json(model / "lock.json", known | {"measured": None})
        artifact.write_text(model / "README.md", card.text(run.recipe, stage, row, Artifact(model).warning))
        artifact.write_json(model / "metrics.json", row)
        artifact.write_json(model / "lock.json", known)
        if earlier is None:
            os.rename(model, target)
    shutil.rmtree(work, ignore_errors=True)


def _refuse(changed: Sequence[str]) -> None:
    """StageError where something `changed` since this process began: what it makes would stand under a lock that names something else."""
    if changed:
        raise StageError(f"{changed[0]} is not what this run began with; run the same command again")


def _seconds_before(work: Path, now: float) -> float:
    """Seconds that killed attempts at this stage took, up to the last thing they wrote; notes that a new one began."""
    note = work / "attempt.json"
    spent = 0.0
    if note.is_file():
        last = json.loads(note.read_text(encoding="utf-8"))
        wrote = max((path.stat().st_mtime for path in work.rglob("*") if path.is_file()), default=last["began"])
        spent = last["spent"] + max(0.0, wrote - last["began"])
    artifact.write_json(note, {"began": now, "spent": spent})
    return spent


@contextlib.contextmanager
def _failing_as(stage: Stage, out: Path, work: Path) -> Iterator[None]:
    """Turns what a stage raises into a LightcapError that names the stage; a surprise leaves its trace in error.txt."""
    try:
        yield
    except Exception as error:
        known = expected(error)
        if isinstance(known, UsageError):
            _forget(work)
        if isinstance(known, RecipeError) and PLACED.match(known.message):
            raise
        if known is not None:
            raise type(known)(f"stage '{stage.name}': {known.message}") from error
        trace = ""
        with contextlib.suppress(OSError):  # a full disk, which may be what failed
            artifact.write_text(out / "error.txt", traceback.format_exc())
            trace = f" (trace: {out / 'error.txt'})"
        raise StageError(f"stage '{stage.name}' failed: {type(error).__name__}: {error}{trace}") from error


def _forget(work: Path) -> None:
    """Removes the folder of a stage that was begun with what it cannot use, unless it trained: an input may be back tomorrow (a disk of the
    net, a photo), under the same lock."""
    if not any(path.is_file() for folder in ("state", "model") for path in (work / folder).rglob("*")):
        shutil.rmtree(work, ignore_errors=True)
