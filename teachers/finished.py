"""Which finished captioner a folder holds, without torch: BLIP and GIT in transformers' layout, CoCa in open_clip's."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

WRITTEN = "written.json"  # beside those files in a teacher's artifact: {"image", "caption"} of each training image
OF_TRANSFORMERS = ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json")
FILES = {  # by kind: all that it is read from
    "blip": OF_TRANSFORMERS,
    "git": OF_TRANSFORMERS,
    "coca": ("open_clip_config.json", "open_clip_model.safetensors"),
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
