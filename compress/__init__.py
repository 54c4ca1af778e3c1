"""lightcap trains an image captioner, makes it small for an edge CPU, and says what every step cost in CIDEr.

The public names below are loaded when they are first used, so that `import compress` and `lightcap --help` answer at once.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "compress.artifact",
    "Captioner": "compress.runtime",
    "LightcapError": "compress.errors",
    "Recipe": "compress.config",
    "plan": "compress.pipeline",
    "read_run": "compress.ledger",
    "read_recipe": "compress.recipe",
    "resolve": "compress.models",
    "run": "compress.pipeline",
    "score": "compress.metrics",
}

__all__ = [
    "Artifact",
    "Captioner",
    "LightcapError",
    "Recipe",
    "__version__",
    "plan",
    "read_recipe",
    "read_run",
    "resolve",
    "run",
    "score",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'compress' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
