"""Runs a recipe: each stage once, under its lock, kept in `runs/.cache/LOCK`; a run's folder holds the ledger that names them.

    runs/.cache/LOCK/           a finished artifact (compress/making.py)
    runs/NAME/ledger.jsonl      one row per finished stage; recipe.yaml, the resolved recipe; error.txt, the trace of a failed stage

A kill leaves nothing half-written under a finished name, and the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress import artifact, ledger, lock, making, recipe
from compress.artifact import Artifact
from compress.cache import cache_of, durations, expected_seconds, finished, last_made, noted
from compress.config import Recipe, Stage
from compress.context import Progress
from compress.errors import DataError, GateError, LightcapError, ModelError, StageError, UsageError
from compress.memory import bounded
from compress.pages import huge_pages
from compress.parallel import ALONE, Share, until
from compress.process import only_writer, thread_count

BASELINE = "nearest"


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
    """What `run` would do: each stage with its lock, whether it is cached, whether its numbers are, too (another split, or what a change of
    the code reaches, is measured again), the 1e12 multiply-accumulates it takes to make and evaluate (None: not written down), the seconds
    it took, or may take as stages of its kind did here (None: none has run), and, of what is not cached, what is `changed` since the
    folder's ledger was written (as `lock.differences`).

    Nothing is written but what reading the captions caches; torch is imported only to count what is not cached. With `imagine`, captions
    that are not there are counted as COCO's: locks are None then, and `imagined` says so.
    """
    cache, said = cache_of(out), {}
    if data is None and imagine and wanted.data.captions and not Path(os.path.expanduser(wanted.data.captions)).exists():
        images = importlib.import_module("compress.estimate").COCO.images
        said["imagined"] = (f"there is no {wanted.data.captions} here (--set data.captions=FILE), so this is counted as for COCO, "
                            f"{images:,} training images")
    elif data is None:
        data = _load(wanted, cache, Progress())
    if data is not None:
        _check_files(wanted)
    stages, known, counted = [], durations(cache), None
    parts = {} if data is None else lock.of_stages(wanted, data, thread_count())
    names = {stage: lock.digest(of) for stage, of in parts.items()}
    changed = lock.differences(wanted, last_made(out, _last(out)), parts)
    for stage in wanted.stages:
        name = names.get(stage.name)
        cached = name is not None and finished(cache / name)
        against = [names[stage.against]] if cached and stage.against else []
        mark = data.split(wanted.data.val_split).fingerprint if cached else ""
        measured = cached and finished(cache / name, making.measuring(wanted, stage.kind, against, mark))
        if cached:
            seconds, tmacs = Artifact(cache / name).row()["seconds"], noted(cache / name).get("tmacs")
        else:
            counted = counted or importlib.import_module("compress.estimate").tmacs(wanted, data)
            tmacs = counted[stage.name]
            seconds = expected_seconds(known.get(stage.kind, ()), tmacs)
        known_now = {"cached": cached, "measured": measured, "lock": name, "tmacs": tmacs, "seconds": seconds}
        known_now["changed"] = [] if cached else changed.get(stage.name, [])
        stages.append({"stage": stage.kind, "name": stage.name} | known_now)
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
    gates: bool = True,
    sizes_only: Collection[str] = (),
) -> Result:
    """Makes every artifact of the recipe that the cache beside `out` does not hold, and writes the ledger into `out`.

    Of several processes with a `share` each, the first does so, and the others train with it; their result has no rows. Without `gates` a
    stage that loses more than its `max_drop_cider` does not stop the run. Rows of the stages `sizes_only` have no captions and no CIDEr.

    `stages` (kind to function) and `evaluation` (with `measure`, `sizes`, `baseline`, `ciders` and `tmacs`) default to `compress.stages`,
    and to `compress.evaluate` and `compress.estimate`, which are imported only when something is not cached.
    """
    progress = progress or Progress()
    try:
        cache = cache_of(out)
        if data is None:
            data = _load(wanted, cache, Progress(quiet=True) if share.rank else progress)
        _check_files(wanted)
        made_out = artifact.make_folders(out)
        made = [*artifact.make_folders(cache), *made_out]
        run_ = making.Run(wanted, out, cache, data, progress, stages, evaluation, share, frozenset(sizes_only))
        try:
            with bounded(), huge_pages():
                if share.rank:
                    return _trained_with(run_)
                with only_writer(out / ".writer", _refuse):
                    for left in out.glob(".told-*"):  # by processes that were killed
                        if left != run_.told:
                            shutil.rmtree(left, ignore_errors=True)
                    return _stage_by_stage(run_, gates)
        finally:
            if share.size > 1 and share.rank == 0:
                shutil.rmtree(run_.told, ignore_errors=True)
            if share.rank == 0:
                artifact.remove_empty(made)
    except LightcapError as error:
        return Result(out, (), error)


def _stage_by_stage(run_: making.Run, gates: bool) -> Result:
    rows: list[dict] = []
    artifacts: dict[str, Artifact] = {}
    seen, threads = False, thread_count()
    parts = lock.of_stages(run_.recipe, run_.data, threads, run_.share.size)
    run_.share.agrees(lock.digest(parts))
    if run_.data.left_out:
        run_.progress.log(run_.data.left_out)
    stage = run_.recipe.stages[0]
    last = _last(run_.out)
    earlier, changed = _earlier(last, parts), lock.differences(run_.recipe, last_made(run_.out, last), parts)
    (run_.out / "error.txt").unlink(missing_ok=True)  # of an earlier attempt
    try:
        if run_.stages is None:
            _find_weights(run_.recipe, [stage for stage in run_.recipe.stages if not finished(run_.cache / lock.digest(parts[stage.name]))])
        for number, stage in enumerate(run_.recipe.stages, start=1):
            label = f"[{number}/{len(run_.recipe.stages)}] {stage.name}"
            row, built = _stage_row(run_, stage, label, parts[stage.name], artifacts, "; ".join(changed.get(stage.name, ())))
            artifacts[stage.name] = Artifact(run_.cache / row["lock"]).check()
            if not seen and stage.kind != "pretrained":  # the first image encoder of our own
                seen = True
                first = lock.baseline_parts(row["lock"], run_.measured, threads)
                baseline = Stage(kind="baseline", name=BASELINE, parent=stage.name, config=None)
                nearest_row, _ = _stage_row(run_, baseline, BASELINE, first, artifacts)
                rows.insert(0, nearest_row)
            if gates:
                _gate(stage, row, artifacts[stage.name])
            rows.append(row)
            if built:
                _save(run_, _standing(run_, rows, earlier))
        _save(run_, rows)
    except (LightcapError, OSError) as problem:
        ours = isinstance(problem, LightcapError)
        error = problem if ours else StageError(f"stage '{stage.name}' failed: {type(problem).__name__}: {problem}")
        if rows:
            with contextlib.suppress(OSError):  # a full disk, which may be what failed
                _save(run_, rows if isinstance(error, GateError) else _standing(run_, rows, earlier))
        return Result(run_.out, tuple(rows), _explained(error, artifacts, rows))
    return Result(run_.out, tuple(rows))


def _last(out: Path) -> list[dict]:
    """The rows of the folder's ledger; none where it is absent or broken."""
    try:
        return ledger.read(out / "ledger.jsonl")
    except ModelError:
        return []


def _earlier(rows: Sequence[dict], parts: Mapping[str, dict]) -> dict[str, dict]:
    """Those of the folder's rows whose artifacts this recipe has, too, by name."""
    return {row["name"]: row for row in rows if row["name"] in parts and row.get("lock") == lock.digest(parts[row["name"]])}


def _standing(run_: making.Run, rows: Sequence[dict], earlier: Mapping[str, dict]) -> list[dict]:
    """`rows`, and those of later stages whose artifacts are finished: a stop, or a failure, while they are measured anew shall not hide
    them."""
    known = {row["name"] for row in rows}
    return [*rows, *(earlier[stage.name] for stage in run_.recipe.stages if stage.name in earlier and stage.name not in known)]


def _trained_with(run_: making.Run) -> Result:
    """What another process than the first does: it trains in the stages that many train, and waits for each artifact."""
    artifacts: dict[str, Artifact] = {}
    parts = lock.of_stages(run_.recipe, run_.data, thread_count(), run_.share.size)
    if not run_.share.agrees(lock.digest(parts)):
        raise StageError(f"process {run_.share.rank} would make other artifacts than the first one; all need the same files, package "
                         "versions and OMP_NUM_THREADS")
    for stage in run_.recipe.stages:
        target, told = run_.cache / lock.digest(parts[stage.name]), run_.told / stage.name
        until(lambda target=target, told=told: told.exists() or finished(target))
        if stage.kind in making.JOINT and _read(told) == "train":
            with tempfile.TemporaryDirectory() as output:
                context = making.context_of(run_, stage, artifacts, Path(output), target.with_name(f"{target.name}.work") / "state")
                run_.stage_function(stage.kind)(artifacts[stage.parent] if stage.parent else None, stage.config, context)
        until(functools.partial(finished, target))
        artifacts[stage.name] = Artifact(target)
    return Result(run_.out, ())


def _read(told: Path) -> str:
    """What the first process told, if it has not removed that at its end."""
    with contextlib.suppress(FileNotFoundError):
        return told.read_text()
    return ""


def _save(run_: making.Run, rows: list[dict]) -> None:
    artifact.write_text(run_.out / "recipe.yaml", run_.written)
    ledger.write(run_.out / "ledger.jsonl", rows)


def _stage_row(run_: making.Run, stage: Stage, label: str, lock_parts: dict, artifacts: Mapping, changed: str = "") -> tuple[dict, bool]:
    """The ledger row of a stage, and whether it was made now, since something is `changed`. Two runs that want the same artifact at once
    make it once."""
    name = lock.digest(lock_parts)
    target = run_.cache / name

    def wait(process: str) -> None:
        run_.progress.log(f"{label}: process {process} is making it; waiting")

    built = False
    against = [artifacts[stage.against].path.name] if stage.against else []
    wanted = making.measuring(run_.recipe, stage.kind, against, run_.measured, stage.name in run_.sizes_only)
    if not finished(target, wanted):
        with only_writer(run_.cache / f"{name}.writer", wait):
            if not finished(target, wanted):
                why = ", measured anew" if finished(target) else f", made anew ({changed})" if changed else ""
                run_.progress.log(f"{label}: {stage.kind}{why}")
                making.build(run_, stage, lock_parts, target, artifacts, wanted)
                built = True
    if not built:
        run_.progress.log(f"{label}: cached")
        if (work := run_.cache / f"{name}.work").exists():  # of a process that was killed at its end
            with only_writer(run_.cache / f"{name}.writer", wait):
                shutil.rmtree(work, ignore_errors=True)
    run_.tell(stage, False)
    measured = Artifact(target).row()
    place = os.path.relpath(os.path.realpath(target), os.path.realpath(run_.out))  # `run_.out` may be a link to a folder elsewhere
    named = {"stage": stage.kind, "name": stage.name, "artifact": place, "lock": name, "against": ledger.against(stage, measured)}
    return ledger.row(measured | named), built


def _gate(stage: Stage, row: Mapping, made: Artifact) -> None:
    most = getattr(stage.config, "max_drop_cider", None)
    delta = row["delta_cider"]
    if most is not None and delta is not None and -delta > most:
        raise GateError(
            f"stage '{stage.name}' missed its gate: CIDEr fell by {-delta:.2f}, max_drop_cider is {most:g}"
            f" (its artifact: {os.path.relpath(made.path)})"
        )


def _explained(error: LightcapError, artifacts: Mapping, rows: list[dict]) -> LightcapError:
    """A stage's error with the last artifact that is good: of the last of `rows`. Where there are rows, data and models that cannot be used
    are a run that failed; a wrong recipe stays one."""
    if isinstance(error, UsageError) and not rows:
        return error
    kind = StageError if isinstance(error, DataError | ModelError) else type(error)
    good = [row["name"] for row in rows if row["name"] in artifacts]
    kept = f"the last good artifact is '{good[-1]}': {artifacts[good[-1]].path}" if good else "no artifact was finished before it"
    explained = kind(f"{error.message}; {kept}")
    explained.__cause__ = error
    return explained


def _refuse(process: str) -> None:
    raise StageError(f"process {process} is writing this run now; wait for it, or run elsewhere with --out DIR")


def _check_files(wanted: Recipe) -> None:
    """DataError for a file that a stage will read and that is not there, before any stage has taken its time. Weights and tokenizers may
    be words or names on the hub, too: of them those are looked for that can only be paths."""
    named = [("student", "section 'student', ", wanted.student)]
    named += [(stage.name, f"{stage.place}stage '{stage.name}', ", stage.config) for stage in wanted.stages]
    for owner, place, settings in named:
        for key in lock.FILES:
            there = os.path.isfile if key in lock.READ else os.path.exists
            missing = next((path for path in _paths(key, getattr(settings, key, None)) if not there(os.path.expanduser(path))), None)
            if missing is not None:
                line = wanted.places.get(f"student.{key}", f"{wanted.name}: ") if settings is wanted.student else ""
                what = "file" if key in lock.READ else "file or folder"
                several = ", several as [A,B]" if key == "regions" and "," in missing else ""
                raise DataError(f"{line}{place}key '{key}': there is no {what} {missing}{several}; put it there, or name another "
                                f"with --set {owner}.{key}={'FILE' if key in lock.READ else 'PATH'}")


def _paths(key: str, value: str | Sequence[str] | None) -> list[str]:
    """What the setting `key` names, as far as it can be nothing but files or folders."""
    named = [value] if isinstance(value, str) else value or []
    return [path for path in named if path and (key in lock.READ or _only_a_path(path))]


def _find_weights(wanted: Recipe, stages: Sequence[Stage]) -> None:
    """ModelError for weights that one of `stages` will read and that are neither here nor on the hub, before any has taken its time; what
    the hub has is fetched. Encoder and tokenizer are not looked for, since the first stage reads them at once: but where that is a
    finished captioner, which is asked for captions for hours."""
    fusion, text = {}, {}  # {source: where it is named}
    for stage in stages:
        place = f"{stage.place}stage '{stage.name}', "
        if stage.kind == "pretrained":
            _check_teacher(wanted, stage)
        if getattr(stage.config, "text_encoder", None):
            text.setdefault(stage.config.text_encoder, f"{place}key 'text_encoder': ")
        if getattr(stage.config, "fusion_weights", None):
            fusion.setdefault(stage.config.fusion_weights, f"{place}key 'fusion_weights': ")
        elif getattr(stage.config, "init", "weights") == "weights" and "fusion_weights" in lock.read_of_student(stage, wanted.student):
            fusion.setdefault(wanted.student.fusion_weights, f"{wanted.places.get('student.fusion_weights', '')}key 'fusion_weights': ")
    fusion.pop(None, None)
    if not fusion and not text:
        return  # without torch
    from compress.training.text import text_file
    from students.lightcap.bert import bert_file

    for find, sources in ((bert_file, fusion), (text_file, text)):
        for source, place in sources.items():
            try:
                find(source)
            except FileNotFoundError as error:
                raise ModelError(f"{place}{error}") from None


def _check_teacher(wanted: Recipe, stage: Stage) -> None:
    """ModelError where the finished captioner of `stage` is none, or is matched in tokens that it does not have, or where the student's own
    encoder or tokenizer cannot be read. A captioner of the hub is fetched."""
    from compress import foreign, models
    from compress.training.start import new_captioner
    from students.lightcap.tokenizer import pieces_of

    place = f"{stage.place}stage '{stage.name}', key 'model': "
    try:
        found = models.resolve(os.path.expanduser(stage.config.model))
        place = ""
        _, tokenizer, _ = new_captioner(wanted.student, wanted.student.preset, None, wanted.data.image_size, 0.0, wanted.seed)
        for other in wanted.stages:
            if stage.name in getattr(other.config, "teachers", ()) and other.config.asks_tokens:
                place = f"{other.place}stage '{other.name}', key 'match': "
                foreign.places_of(found, pieces_of(tokenizer), stage.name)
    except ModelError as error:
        raise ModelError(f"{place}{error.message}") from None


def _only_a_path(value: str) -> bool:
    """Whether it can be no word of ours (`minilm`) and no OWNER/NAME of the hub."""
    inside = value.count("/") > 1 or value.startswith(("/", ".", "~"))
    return inside or value.endswith(("/", ".txt", ".json", ".safetensors", ".bin", ".pt", ".pth"))


def _load(wanted: Recipe, cache: Path, progress: Progress):
    """The captions. DataError also where the split that is trained on, or the one that is measured on, is not among them."""
    from compress import data

    try:
        found = data.load(wanted.data, cache, progress=progress)
    except DataError as error:
        named = re.match(r"data\.\w+", error.message)
        raise DataError(f"{wanted.places.get(named[0], '') if named else ''}{error.message}") from error
    val = wanted.data.val_split
    needed = {"train": ("", "give some images that split"),
              val: (wanted.places.get("data.val_split", ""), "choose one with --set data.val_split=SPLIT")}
    for split, (place, how) in needed.items():
        try:
            found.split(split)
        except DataError as error:
            raise DataError(f"{place}{error.message}; {how}") from error
    weighed = next((stage for stage in wanted.stages if getattr(stage.config, "consensus", 0)), None)
    if weighed is not None and max(len(example.captions) for example in found.split("train").examples) == 1:
        raise DataError(f"{weighed.place}stage '{weighed.name}', key 'consensus': weighs a caption by the others of its image, and here "
                        f"each is an only one; leave it out (--set {weighed.name}.consensus=0)")
    if len(found.split(val)) == 1:
        raise DataError(f"{found.name}: split '{val}' is one image, of which CIDEr is 0 whatever is said: word weights "
                        "come from several; give it more")
    return found
