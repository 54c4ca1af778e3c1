"""Runs a recipe: each stage once, under its lock, kept in `runs/.cache/LOCK`; a run's folder holds the ledger that names them.

    runs/.cache/LOCK/           a finished artifact
    runs/.cache/LOCK.work/      a stage under way: `state` (its own resume files), then `model` (made, not yet measured)
    runs/NAME/ledger.jsonl      one row per finished stage; recipe.yaml, the resolved recipe; error.txt, the trace of a failed stage

A kill leaves nothing half-written under a finished name, and the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import resource
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from compress import artifact, card, ledger, lock, recipe
from compress.artifact import Artifact
from compress.cache import cache_of, finished, noted, rates_of
from compress.config import Recipe, Stage
from compress.context import Context, Progress
from compress.errors import GateError, LightcapError, StageError, UsageError, expected
from compress.memory import bounded
from compress.pages import huge_pages
from compress.parallel import ALONE, Share, until
from compress.process import only_writer

BASELINE = "nearest"
JOINT = ("concepts", "train", "distill", "scst")  # stages that several processes train together


@dataclass(frozen=True)
class Result:
    """`rows` are those of this run, in the recipe's order; `error` is what stopped it, if anything did."""

    folder: Path
    rows: tuple[dict, ...]
    error: LightcapError | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    def check(self) -> Result:
        """Itself; raises `error` if there is one."""
        if self.error is not None:
            raise self.error
        return self

    def json(self) -> dict:
        error = None if self.error is None else self.error.message
        return {"ok": self.ok, "run": str(self.folder), "ledger": list(self.rows), "error": error}


def plan(wanted: Recipe, out: Path, data=None, *, imagine: bool = False) -> dict:
    """What `run` would do: each stage with its lock, whether it is cached, the 1e12 multiply-accumulates it takes to make and evaluate
    (None: not written down), and the seconds it took, or may take as stages of its kind did here (None: none has run).

    Nothing is written but what reading the captions caches; torch is imported only to count what is not cached. With `imagine`, captions
    that are not there are counted as COCO's: locks are None then, and `imagined` says so.
    """
    cache, said = cache_of(out), {}
    if data is None and imagine and wanted.data.captions and not Path(wanted.data.captions).expanduser().exists():
        said["imagined"] = f"there is no {wanted.data.captions} here (--set data.captions=FILE), so this is counted as for COCO"
    elif data is None:
        data = _load(wanted, cache)
    locks, stages, rates, counted = {}, [], rates_of(cache), None
    for stage in wanted.stages:
        name = None if data is None else lock.digest(lock.parts(wanted, stage, locks, data.fingerprint, thread_count()))
        locks[stage.name] = name
        cached = name is not None and finished(cache / name)
        if cached:
            seconds, tmacs = Artifact(cache / name).row()["seconds"], noted(cache / name).get("tmacs")
        else:
            counted = counted or importlib.import_module("compress.estimate").tmacs(wanted, data)
            tmacs = counted[stage.name]
            seconds = round(rates[stage.kind] * tmacs, 1) if stage.kind in rates else None
        stages.append({"stage": stage.kind, "name": stage.name, "cached": cached, "lock": name, "tmacs": tmacs, "seconds": seconds})
    return {"recipe": wanted.name, "digest": recipe.digest(wanted), "stages": stages} | said


def run(
    wanted: Recipe,
    out: Path,
    progress: Progress | None = None,
    *,
    data=None,
    stages: Mapping[str, Callable] | None = None,
    evaluation=None,
    share: Share = ALONE,
) -> Result:
    """Makes every artifact of the recipe that the cache beside `out` does not hold, and writes the ledger into `out`.

    Of several processes with a `share` each, the first does so, and the others train with it; their result has no rows.

    `stages` (kind to function) and `evaluation` (with `measure`, `baseline`, `ciders` and `tmacs`) default to `compress.stages`, and to
    `compress.evaluate` and `compress.estimate`, which are imported only when something is not cached.
    """
    cache = cache_of(out)
    try:
        data = _load(wanted, cache) if data is None else data
        made = [*artifact.make_folders(out), *artifact.make_folders(cache)]
        run_ = _Run(wanted, out, cache, data, progress or Progress(), stages, evaluation, share)
        try:
            with bounded(), huge_pages():
                if share.rank:
                    return _trained_with(run_)
                with only_writer(out / ".writer", _refuse):
                    return _stage_by_stage(run_)
        finally:
            if share.size > 1 and share.rank == 0:
                shutil.rmtree(run_.told, ignore_errors=True)
            artifact.remove_empty([cache, *made])
    except LightcapError as error:
        return Result(out, (), error)


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    out: Path
    cache: Path
    data: object
    progress: Progress
    stages: Mapping[str, Callable] | None
    evaluation: object
    share: Share

    @functools.cached_property
    def tmacs(self) -> Mapping[str, float]:
        return (self.evaluation or importlib.import_module("compress.estimate")).tmacs(self.recipe, self.data)

    @property
    def told(self) -> Path:
        """Where the first process of several tells the others, stage by stage, whether it trains."""
        return self.out / f".told-{self.share.launch}"

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

    def evaluator(self):
        return self.evaluation if self.evaluation is not None else importlib.import_module("compress.evaluate")


def _stage_by_stage(run_: _Run) -> Result:
    rows: list[dict] = []
    locks: dict[str, str] = {}
    artifacts: dict[str, Artifact] = {}
    threads = thread_count()
    unreadable = getattr(run_.data, "unreadable", ())
    if unreadable:
        some = ", ".join(unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
        run_.progress.log(f"{len(unreadable)} images are missing or unreadable and left out: {some}")
    stage = None
    try:
        for number, stage in enumerate(run_.recipe.stages, start=1):
            lock_parts = lock.parts(run_.recipe, stage, locks, run_.data.fingerprint, threads, processes=run_.share.size)
            locks[stage.name] = lock.digest(lock_parts)
            label = f"[{number}/{len(run_.recipe.stages)}] {stage.name}"
            row, built = _stage_row(run_, stage, label, lock_parts, artifacts)
            artifacts[stage.name] = Artifact(run_.cache / locks[stage.name]).check()
            if number == 1:
                first = lock.baseline_parts(locks[stage.name], run_.data.fingerprint, threads)
                baseline = Stage(kind="baseline", name=BASELINE, parent=stage.name, config=None)
                nearest_row, _ = _stage_row(run_, baseline, BASELINE, first, artifacts)
                rows.append(nearest_row)
            _gate(stage, row)
            rows.append(row)
            if built:
                _save(run_, rows)
        _save(run_, rows)
    except LightcapError as error:
        if rows:
            _save(run_, rows)
        return Result(run_.out, tuple(rows), _explained(error, stage, artifacts, rows))
    (run_.out / "error.txt").unlink(missing_ok=True)
    return Result(run_.out, tuple(rows))


def _trained_with(run_: _Run) -> Result:
    """What another process than the first does: it trains in the stages that many train, and waits for each artifact."""
    locks: dict[str, str] = {}
    artifacts: dict[str, Artifact] = {}
    for stage in run_.recipe.stages:
        parts = lock.parts(run_.recipe, stage, locks, run_.data.fingerprint, thread_count(), processes=run_.share.size)
        target, told = run_.cache / lock.digest(parts), run_.told / stage.name
        locks[stage.name] = target.name
        until(lambda target=target, told=told: told.exists() or finished(target))
        if stage.kind in JOINT and told.exists() and told.read_text() == "train":
            with tempfile.TemporaryDirectory() as output:
                context = _context(run_, stage, artifacts, Path(output), target.with_name(f"{target.name}.work") / "state")
                run_.stage_function(stage.kind)(artifacts[stage.parent] if stage.parent else None, stage.config, context)
        until(functools.partial(finished, target))
        artifacts[stage.name] = Artifact(target)
    return Result(run_.out, ())


def _context(run_: _Run, stage: Stage, artifacts: Mapping, output: Path, work: Path) -> Context:
    seed = getattr(stage.config, "seed", None)
    return Context(
        recipe=run_.recipe,
        stage=stage,
        data=run_.data,
        seed=run_.recipe.seed if seed is None else seed,
        threads=thread_count(),
        output=output,
        work=work,
        cache=run_.cache,
        artifacts=MappingProxyType(dict(artifacts)),
        progress=run_.progress if run_.share.rank == 0 else Progress(quiet=True),
        share=run_.share if stage.kind in JOINT else ALONE,
        ciders=lambda artifact: run_.evaluator().ciders(artifact, run_.data.split(run_.recipe.data.val_split), run_.cache, run_.progress),
    )


def _save(run_: _Run, rows: list[dict]) -> None:
    artifact.write_text(run_.out / "recipe.yaml", recipe.as_yaml(run_.recipe))
    ledger.write(run_.out / "ledger.jsonl", rows)


def _stage_row(run_: _Run, stage: Stage, label: str, lock_parts: dict, artifacts: Mapping) -> tuple[dict, bool]:
    """The ledger row of a stage, and whether it was made now. Two runs that want the same artifact at once make it once."""
    name = lock.digest(lock_parts)
    target = run_.cache / name

    def wait(process: str) -> None:
        run_.progress.log(f"{label}: process {process} is making it; waiting")

    built = False
    wanted = _measuring(run_, stage, artifacts)
    if not finished(target, wanted):
        with only_writer(run_.cache / f"{name}.writer", wait):
            if not finished(target, wanted):
                run_.progress.log(f"{label}: {stage.kind}" + (", measured anew" if finished(target) else ""))
                _build(run_, stage, lock_parts, target, artifacts, wanted)
                built = True
    if not built:
        run_.progress.log(f"{label}: cached")
    run_.tell(stage, False)
    measured = Artifact(target).row()
    place = os.path.relpath(target, run_.out)
    return ledger.row(measured | {"stage": stage.kind, "name": stage.name, "artifact": place, "lock": name}), built


def _measuring(run_: _Run, stage: Stage, artifacts: Mapping) -> str:
    """The digest of how this stage's row is measured, and against which artifact."""
    against = [artifacts[stage.against].path.name] if stage.against else []
    return lock.digest(lock.measure_parts(run_.recipe, against, run_.data.fingerprint, thread_count()))


def _build(run_: _Run, stage: Stage, lock_parts: dict, target: Path, artifacts: Mapping, measuring: str) -> None:
    """Makes, measures and describes one artifact, then gives it its name: `target` is whole or absent. A finished one whose numbers
    were measured otherwise than by `measuring` is only measured again, where it stands."""
    began = time.time()
    earlier = Artifact(target).row() if finished(target) else None
    if earlier is None and target.exists():  # without metrics.json it was never finished under this name
        shutil.rmtree(target)
    work = target.with_name(f"{target.name}.work")
    state, model = work / "state", target if earlier else work / "model"
    if earlier is None:
        state.mkdir(parents=True, exist_ok=True)
        before = _seconds_before(work, began)
    context = _context(run_, stage, artifacts, model, state)
    tmacs = None if stage.kind == "baseline" else run_.tmacs[stage.name]  # before anything is made: it finds sizes that cannot be
    parent = artifacts[stage.parent] if stage.parent else None
    with _failing_as(stage, run_.out, work):
        if not model.is_dir():
            with artifact.writing(model) as output:
                if stage.kind != "baseline":
                    make = run_.stage_function(stage.kind)
                    run_.tell(stage, True)
                    make(parent, stage.config, dataclasses.replace(context, output=output))
                    Artifact(output).check()
        if stage.kind == "baseline":
            measured = run_.evaluator().baseline(parent, context)
        else:
            against = artifacts[stage.against] if stage.against else None
            measured = run_.evaluator().measure(Artifact(model), against, context)
        if earlier:
            cost = {key: earlier[key] for key in ("peak_mb", "seconds")}
        else:
            # ru_maxrss is the most that this process has held since it began (KiB on Linux): an upper bound for the stage.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            cost = {"peak_mb": round(peak, 1), "seconds": round(before + time.time() - began, 2)}
        row = ledger.row(
            dict(measured) | {"stage": stage.kind, "name": stage.name, "artifact": f"../.cache/{target.name}", "lock": target.name} | cost
        )
        artifact.write_text(model / "README.md", card.text(run_.recipe, stage, row))
        artifact.write_json(model / "metrics.json", row)
        artifact.write_json(model / "lock.json", {"lock": target.name, "measured": measuring, "tmacs": tmacs, "parts": lock_parts})
        if earlier is None:
            os.rename(model, target)
    shutil.rmtree(work, ignore_errors=True)


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
    except LightcapError as error:
        if isinstance(error, UsageError):  # nothing can go on from here: another input is another lock
            shutil.rmtree(work, ignore_errors=True)
        raise type(error)(f"stage '{stage.name}': {error.message}") from error
    except Exception as error:
        known = expected(error)
        if known is not None:
            shutil.rmtree(work, ignore_errors=True)
            raise type(known)(f"stage '{stage.name}': {known.message}") from error
        artifact.write_text(out / "error.txt", traceback.format_exc())
        what = f"{type(error).__name__}: {error}"
        raise StageError(f"stage '{stage.name}' failed: {what} (trace: {out / 'error.txt'})") from error


def _gate(stage: Stage, row: Mapping) -> None:
    most = getattr(stage.config, "max_drop_cider", None)
    delta = row["delta_cider"]
    if most is not None and delta is not None and -delta > most:
        raise GateError(
            f"stage '{stage.name}' missed its gate: CIDEr fell by {-delta:.2f}, max_drop_cider is {most:g}"
            f" (its artifact: {row['artifact']})"
        )


def _explained(error: LightcapError, stage: Stage | None, artifacts: Mapping, rows: list[dict]) -> LightcapError:
    """A stage's error with the last artifact that is good: of the last row in the ledger."""
    if isinstance(error, UsageError) and not rows:
        return error
    good = [row["name"] for row in rows if row["name"] in artifacts]
    kept = f"the last good artifact is '{good[-1]}': {artifacts[good[-1]].path}" if good else "no artifact was finished before it"
    return type(error)(f"{error.message}; {kept}")


# ---- surroundings


def thread_count() -> int:
    """OMP_NUM_THREADS if it is set, else the cores that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse(process: str) -> None:
    raise StageError(f"process {process} is writing this run now; wait for it, or run elsewhere with --out DIR")


def _load(wanted: Recipe, cache: Path):
    from compress import data

    return data.load(wanted.data, cache)
