"""Which finished captioner a folder holds, and in what files, without torch: BLIP and GIT in transformers' layout, CoCa in open_clip's."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

WRITTEN = "written.json"  # beside those files in a teacher's artifact: {"image", "caption"} of each training image
OF_TRANSFORMERS = ("config.json", "preprocessor_config.json", "tokenizer.json")
FILES = {"blip": OF_TRANSFORMERS, "git": OF_TRANSFORMERS, "coca": ("open_clip_config.json",)}  # by kind, its config first
WEIGHTS = {  # the first that is there; the other one is a pickle, of which nothing but tensors is read
    "blip": ("model.safetensors", "pytorch_model.bin"),
    "git": ("model.safetensors", "pytorch_model.bin"),
    "coca": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}


def kind_of(folder: Path) -> str | None:
    """The kind whose config is in `folder`; None of something else."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if "multimodal_cfg" in json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]:
            return "coca"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        return kind if FILES.get(kind) == OF_TRANSFORMERS else None
    return None


def files_of(folder: Path, kind: str) -> list[Path]:
    """All that it is read from, its weights last, whether it is there or not."""
    weights = next((name for name in WEIGHTS[kind] if (folder / name).is_file()), WEIGHTS[kind][0])
    return [folder / name for name in (*FILES[kind], weights)]
