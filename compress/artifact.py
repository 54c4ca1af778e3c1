"""An artifact: a folder that holds one model, written whole or not at all.

    config.json tokenizer.json preprocessor_config.json     what it is, how it spells, what it does to a picture
    model.safetensors     a float model's weights
    encoder.onnx prefix.onnx decoder.onnx decoder.onnx.data     or graphs: quantized, or exported; concepts.onnx where it reads them
    lock.json metrics.json README.md     what made it, its ledger row, its model card
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from compress.errors import ModelError
from teachers.layouts import CONFIGS, files_of, kind_of

WEIGHTS = "model.safetensors"
MODEL_FILES = ("config.json", "tokenizer.json", "preprocessor_config.json", WEIGHTS)
GRAPHS = ("encoder.onnx", "prefix.onnx", "decoder.onnx", "decoder.onnx.data")  # as in `compress.runtime`, which runs them alone
GRAPH_PATTERNS = ("*.onnx", "*.onnx.data", "*.onnx_data")
SATURATION = (
    "on x86 processors without VNNI the fast sums of these INT8 products can saturate, so that caption.py takes slower ones there, which "
    "cannot; for such devices quantize with reduce_range: true"
)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Artifact:
    path: Path

    @cached_property
    def config(self) -> dict:
        return read_json(self.path / CONFIGS.get(self.foreign, "config.json"))

    @cached_property
    def foreign(self) -> str | None:
        """Of a captioner that others made its kind, such as blip (`teachers.layouts`); None of lightcap's own."""
        return kind_of(self.path)

    @property
    def quantized(self) -> bool:
        return "quantized" in self.config

    @property
    def warning(self) -> str | None:
        """What is to be known of the devices that its graphs may run on."""
        quantized = self.config.get("quantized") if self.graphs else None
        return SATURATION if quantized and not quantized.get("reduce_range", False) else None

    @property
    def graphs(self) -> bool:
        """Whether `compress.runtime` can run it, without torch."""
        return self.foreign is None and (self.path / "encoder.onnx").is_file()

    def files(self) -> list[Path]:
        """The files needed to caption, in order of name: what the digest is over, and what `bytes` in the ledger counts."""
        if self.foreign:
            return sorted(filter(Path.is_file, files_of(self.path, self.foreign)))
        found = {self.path / name for name in MODEL_FILES if (self.path / name).is_file()}
        for pattern in GRAPH_PATTERNS:
            found.update(self.path.glob(pattern))
        return sorted(found, key=lambda path: path.name)

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files())

    def digest(self) -> str:
        """SHA-256 over config, weights, tokenizer, preprocessor and graphs: names, sizes and contents."""
        total = hashlib.sha256()
        for path in self.files():
            total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    total.update(block)
        return total.hexdigest()

    def row(self) -> dict:
        """Its ledger row, as measured when it was made."""
        return read_json(self.path / "metrics.json")

    @property
    def _anew(self) -> str:
        """The end of an error line. A run takes a folder of its own for finished, and makes it anew where it is not there."""
        ours = (self.path / "lock.json").is_file()
        return "; remove the folder, and the run that made it makes it anew" if ours else "; copy it again, or make it anew"

    def check(self) -> Artifact:
        """Itself, if it looks complete; ModelError naming the file that is missing, cut short, or a pickle."""
        if self.foreign:
            return self._check_foreign(files_of(self.path, self.foreign))
        if not (self.path / "config.json").is_file():
            raise ModelError(f"{self.path} is not an artifact: it has no config.json{pickles(self.path)}")
        if (kind := self.config.get("model_type", "lightcap")) != "lightcap":
            raise ModelError(f"{self.path} is a '{kind}' (model_type of its config.json): lightcap runs its own captioners, and of others' "
                             f"{', '.join(CONFIGS)}")
        if missing := [name for name in MODEL_FILES[1:3] if not (self.path / name).is_file()]:
            raise ModelError(f"{self.path} has no {missing[0]}{self._anew}")
        weights = self.path / WEIGHTS
        if weights.is_file():
            check_safetensors(weights)
        elif not self.graphs:
            raise ModelError(f"{self.path} has neither {WEIGHTS} nor encoder.onnx{pickles(self.path) or self._anew}")
        needed = () if weights.is_file() else (*GRAPHS, *(["concepts.onnx"] if self.config.get("concepts") else []))
        if missing := [name for name in needed if not (self.path / name).is_file()]:
            raise ModelError(f"{self.path} has encoder.onnx but no {missing[0]}{self._anew}")
        return self

    def _check_foreign(self, needed: Sequence[Path]) -> Artifact:
        if missing := [path.name for path in needed if not path.is_file()]:
            raise ModelError(f"{self.path} is a {self.foreign} without {missing[0]} (weights in several files are not read); get it again")
        if needed[-1].suffix == ".safetensors":
            check_safetensors(needed[-1])
        return self


def refuse_pickle(path: Path) -> None:
    """ModelError for a file whose name says pickle: reading one can run any code."""
    if path.suffix.lower() in PICKLES:
        raise ModelError(f"{path} is a pickle, which can run code when it is read; give safetensors instead")


def check_safetensors(path: Path) -> None:
    """ModelError if the file is shorter or longer than its own header says, or has none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "np"):
            pass
    except SafetensorError as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); it was half downloaded, get it again") from None


@contextlib.contextmanager
def writing(target: str | Path) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes `target` at the end: flushed to disk, then renamed.

    An error inside removes it; a kill leaves only the temporary folder, which the next `writing` of the same target removes.
    ModelError if `target` is there already and not an empty folder that a rename can replace.
    """
    target = Path(target)
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    if os.path.ismount(target) or os.path.realpath(target) == os.getcwd():
        raise ModelError(f"{target} is the current folder or a mount point, which no other can replace; name a new folder inside it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} is there already; remove it or name another folder")
    made = make_folders(target.parent)
    remove_left(target.parent, f".{target.name}.writing-")
    folder = target.parent / f".{target.name}.writing-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
    except OSError as error:
        raise ModelError(f"cannot write into the folder {target.parent} ({error.strerror}); name another one") from None
    try:
        yield folder
        for path in sorted(folder.rglob("*")):
            _flush(path)
        _flush(folder)
        os.rename(folder, target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        remove_empty(made)
        raise


def remove_left(parent: Path, name: str) -> None:
    """Removes the folders `name`PID in `parent` whose processes are gone."""
    for folder in parent.glob(f"{name}*"):
        process = folder.name.removeprefix(name)
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader, or a kill, sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def write_json(path: Path, value) -> None:
    write_text(path, json_text(value) + "\n")


def json_text(value) -> str:
    """JSON in letters, or in ASCII where a file's name is no UTF-8: such a name has no other form that can be written. ValueError for a
    number that is not finite, which JSON does not have."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return json.dumps(value, indent=2) if any("\ud800" <= letter <= "\udfff" for letter in text) else text


def make_folders(path: Path) -> list[Path]:
    """Makes `path` and its parents; the folders that were not there, innermost first."""
    missing = []
    while not os.path.exists(path):
        missing.append(path)
        path = path.parent
    if not path.is_dir():
        raise ModelError(f"{path} is a file, not a folder")
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot make the folder {missing[0]} ({error.strerror})") from None
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Removes those of `make_folders` that are still empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def read_json(path: Path, kind: type = dict):
    """The JSON object, or the list (`kind`), in a file. ModelError, with its name, where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, kind):
        raise ModelError(f"{path}: is not a JSON {'object' if kind is dict else 'list'}")
    return value


def pickles(folder: Path) -> str:
    """The end of an error line that names a pickle in `folder`, if there is one."""
    inside = folder.iterdir() if folder.is_dir() else ()
    found = sorted(path.name for path in inside if path.suffix.lower() in PICKLES)
    return f"; {found[0]} is a pickle and is not read, give safetensors instead" if found else ""
