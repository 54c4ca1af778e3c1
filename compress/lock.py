"""The lock of a stage: SHA-256 over everything that its artifact depends on, so that a lock names a finished artifact.

Settings, what the stage reads of the student section, seed, the files that they name, the locks of parent and teachers, the data's
fingerprint, the project's modules that the stage imports (their text, found by reading import statements, nothing is imported here),
library versions, and the number of threads. The name (`as`) of a stage is no part of it, nor is a module that the stage does not import.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from compress.config import Recipe, Stage, Student, references
from compress.data.concepts import SHIPPED
from compress.recipe import resolved

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("compress", "students", "teachers")
LIBRARIES = {  # top-level import name: distribution
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "open_clip": "open_clip_torch",
    "timm": "timm",
    "torch_pruning": "torch-pruning",
    "transformers": "transformers",
    "neural_compressor": "neural-compressor",
    "torchao": "torchao",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxscript",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "PIL": "pillow",
}


# Settings that may name a file or a folder.
FILES = ("vocabulary", "regions", "boxes", "image_sizes", "text_encoder", "encoder_weights", "fusion_weights", "tokenizer")
DECLARATIONS = "compress.config"  # what it declares reaches a stage as its resolved settings, which the lock holds


def parts(
    recipe: Recipe, stage: Stage, locks: Mapping[str, str], fingerprint: str, threads: int, root: Path = ROOT, processes: int = 1
) -> dict:
    """What the lock of `stage` is over. `locks` holds those of the earlier stages by name."""
    whole = resolved(recipe)
    settings = next(dict(entry[stage.kind]) for entry in whole["stages"] if _is(entry, stage))
    chooses = settings.get("max_drop_cider") is not None and (settings.get("steps", 1) > 1 or settings.get("trials", 0) > 0)
    for key in ("as", "from", "against", "teachers", "others", "extractor", *(() if chooses else ("max_drop_cider",))):
        settings.pop(key, None)  # a gate judges an artifact, it does not make it, but where the stage itself looks at val
    modules = (f"compress.stages.{stage.kind}", *(("compress.evaluate",) if chooses else ()))
    sources, libraries = imported(modules, root)
    several = {"processes": processes} if processes > 1 else {}
    student = {key: value for key, value in whole["student"].items() if key in read_of_student(stage, recipe.student)}
    files = digests(settings | student)
    if stage.kind == "concepts" and "vocabulary" not in files:
        files["vocabulary"] = file_digest(SHIPPED)
    looked = {"split": recipe.data.val_split, "against": locks.get(stage.against)} if chooses else {}
    return several | looked | ({"files": files} if files else {}) | {
        "kind": stage.kind,
        "settings": settings,
        "student": student,
        "seed": recipe.seed,
        "parent": locks[stage.parent] if stage.parent else None,
        "teachers": [locks[name] for name in references(stage.config)],
        "data": fingerprint,
        "sources": sources,
        "versions": versions(libraries),
        "threads": threads,
    }


def read_of_student(stage: Stage, student: Student) -> Sequence[str]:
    """The keys of the student section that a stage reads: another student does not train its teacher anew."""
    if stage.parent is None:
        own = getattr(stage.config, "preset", None) in (None, student.preset)
        return [field.name for field in dataclasses.fields(student)] if own else ("encoder", "encoder_weights", "tokenizer", "image_size")
    return ("encoder_weights",) if stage.kind == "train" else ()


def digests(settings: Mapping) -> dict[str, str]:
    """SHA-256 of the file, or of all files of the folder, that a setting names: another one at the same place is another input."""
    found = {}
    for key in FILES:
        value = settings.get(key)
        path = Path(value).expanduser() if isinstance(value, str) else None
        if path is not None and path.is_file():
            found[key] = file_digest(path)
        elif path is not None and path.is_dir():
            inside = [f"{child.relative_to(path)} {file_digest(child)}" for child in sorted(path.rglob("*")) if child.is_file()]
            found[key] = hashlib.sha256("\n".join(inside).encode()).hexdigest()
    return found


def file_digest(path: Path) -> str:
    state = path.stat()
    return _file_digest(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=256)
def _file_digest(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def baseline_parts(first: str, fingerprint: str, threads: int, root: Path = ROOT) -> dict:
    """What the lock of the `nearest` row is over: the first stage's lock names the encoder."""
    sources, libraries = imported(("compress.evaluate",), root)
    named = {"kind": "baseline", "first": first, "data": fingerprint}
    return named | {"sources": sources, "versions": versions(libraries), "threads": threads}


def measure_parts(recipe: Recipe, against: Sequence[str], fingerprint: str, threads: int, root: Path = ROOT) -> dict:
    """What a ledger row's numbers are over, beside the artifact itself: another way of measuring measures again and trains nothing."""
    sources, libraries = imported(("compress.evaluate",), root)
    named = {"split": recipe.data.val_split, "against": list(against), "data": fingerprint}
    return named | {"sources": sources, "versions": versions(libraries), "threads": threads}


def digest(lock_parts: Mapping) -> str:
    return hashlib.sha256(json.dumps(lock_parts, sort_keys=True).encode()).hexdigest()


def _is(entry: Mapping, stage: Stage) -> bool:
    return stage.kind in entry and entry[stage.kind]["as"] == stage.name


def versions(libraries: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(LIBRARIES[name])
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def imported(starts: Sequence[str], root: Path = ROOT) -> tuple[dict[str, str], list[str]]:
    """Project modules that `starts` import, directly or not, with the SHA-256 of each one's text; and the libraries among them."""
    waiting, sources, libraries = list(starts), {}, set()
    while waiting:
        module = waiting.pop()
        top = module.partition(".")[0]
        if top in LIBRARIES:
            libraries.add(top)
        if module in sources or top not in PACKAGES:
            continue
        file = _file(module, root)
        if module == DECLARATIONS:
            continue
        if file is None:  # a name inside a module, such as compress.errors.DataError
            continue
        text = file.read_bytes()
        sources[module] = hashlib.sha256(text).hexdigest()
        waiting.extend(_imports(text, module, file.name == "__init__.py"))
        if "." in module:
            waiting.append(module.rpartition(".")[0])  # importing a.b runs a/__init__.py too
    return dict(sorted(sources.items())), sorted(libraries)


def _file(module: str, root: Path) -> Path | None:
    base = root.joinpath(*module.split("."))
    for file in (base / "__init__.py", base.with_suffix(".py")):
        if file.is_file():
            return file
    return None


@lru_cache(maxsize=512)
def _imports(text: bytes, module: str, is_package: bool) -> tuple[str, ...]:
    """Absolute names of what a module's text imports anywhere, inside functions and by `import_module("name")` too; `from a import b`
    gives a and a.b."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                steps = alias.name.split(".")
                names.extend(".".join(steps[: count + 1]) for count in range(len(steps)))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            names.append(base)
            names.extend(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names.extend(text.value for text in node.args[:1] if isinstance(text, ast.Constant))
    return tuple(names)
