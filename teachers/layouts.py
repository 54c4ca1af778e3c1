"""Which captioner that others made a folder holds, and in what files, without torch: BLIP and GIT in transformers' layout, CoCa in
open_clip's."""

from __future__ import annotations

import json
from pathlib import Path

WRITTEN = "written.json"  # beside those files in a teacher's artifact: {"image", "caption"} of each training image
CONFIGS = {"blip": "config.json", "git": "config.json", "coca": "open_clip_config.json"}  # by kind
WEIGHTS = {  # the first that is there; the other one is a pickle, of which nothing but tensors is read
    "blip": ("model.safetensors", "pytorch_model.bin"),
    "git": ("model.safetensors", "pytorch_model.bin"),
    "coca": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}
# How pictures are prepared: the newer file, where it says so, before the older one.
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
ALL = sorted({*CONFIGS.values(), *PROCESSORS, "tokenizer.json", *(safe for safe, _ in WEIGHTS.values())})  # but pickles


def kind_of(folder: Path) -> str | None:
    """The kind whose config is in `folder`; None of something else."""
    if isinstance(found := read(folder / CONFIGS["coca"]).get("model_cfg"), dict) and "multimodal_cfg" in found:
        return "coca"
    kind = read(folder / "config.json").get("model_type")
    return kind if isinstance(kind, str) and CONFIGS.get(kind) == "config.json" else None


def read(file: Path) -> dict:
    """The JSON object in a file; an empty one where there is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def files_of(folder: Path, kind: str) -> list[Path]:
    """All that it is read from, its weights last, whether it is there or not."""
    weights = next((name for name in WEIGHTS[kind] if (folder / name).is_file()), WEIGHTS[kind][0])
    if kind == "coca":
        return [folder / CONFIGS[kind], folder / weights]
    newer, older = PROCESSORS
    prepares = newer if "image_processor" in read(folder / newer) else older
    return [folder / name for name in (CONFIGS[kind], prepares, "tokenizer.json", weights)]
