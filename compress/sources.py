"""What code something was made by: the text of the project's modules behind it, found by reading import statements (nothing is imported
here), and the versions of the libraries among them."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path

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
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "PIL": "pillow",
}

# What config declares reaches a stage as its resolved settings, which the lock holds; the package itself says its version, which computes
# nothing.
DECLARATIONS = ("compress", "compress.config")


@cache
def made_by(module: str) -> str:
    """One digest of `module`, of what it imports, and of the libraries' versions: part of the name of what it keeps on disk."""
    sources, libraries = imported((module,))
    return hashlib.sha256(json.dumps([sources, versions(libraries)]).encode()).hexdigest()


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
        if module in DECLARATIONS or file is None:  # None: a name inside a module, such as compress.errors.DataError
            continue
        text = (_seen if root == ROOT else Path.read_bytes)(file)
        sources[module] = hashlib.sha256(text).hexdigest()
        waiting.extend(_imports(text, module, file.name == "__init__.py"))
        if "." in module:
            waiting.append(module.rpartition(".")[0])  # importing a.b runs a/__init__.py too
    return dict(sorted(sources.items())), sorted(libraries)


@cache
def _seen(file: Path) -> bytes:
    """The file as this process saw it first: what it imported is that, whatever lies there later."""
    return file.read_bytes()


def changed_code(sources: Mapping[str, str], root: Path = ROOT) -> list[str]:
    """Those of `sources` ({module: SHA-256}) whose file is another now, or gone."""
    files = {module: _file(module, root) for module in sources}
    return [name for name, file in files.items() if file is None or hashlib.sha256(file.read_bytes()).hexdigest() != sources[name]]


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


def versions(libraries: Sequence[str], distributions: Mapping[str, str] = LIBRARIES) -> dict[str, str]:
    """The installed version of each, or "absent"."""
    found = {}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(distributions[name])
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found
