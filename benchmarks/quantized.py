"""What the benchmarks of a finished run's INT8 stage begin with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokenizers import Tokenizer

from compress import data, ledger, recipe
from compress.artifact import Artifact
from compress.cache import cache_of
from compress.config import Recipe, Stage
from compress.data import CaptionSet
from compress.errors import ModelError
from compress.training.start import read_captioner
from students.lightcap import LightCap


class Quantized(NamedTuple):
    """A run's quantize stage, what it made (None: it missed its gate), and the float captioner that it works on."""

    recipe: Recipe
    stage: Stage
    made: Artifact | None
    parent: Artifact
    data: CaptionSet
    model: LightCap
    tokenizer: Tokenizer
    settings: dict


def quantized(run: Path) -> Quantized:
    """ModelError where the run has nothing that a quantize stage could work on."""
    rows, wanted = {row["name"]: row for row in ledger.read_run(run)}, recipe.read_recipe(run / "recipe.yaml")
    stage = next((stage for stage in wanted.stages if stage.kind == "quantize"), None)
    if stage is None or stage.parent not in rows:
        raise ModelError(f"{run}: no quantize stage with a finished float captioner before it")
    made, parent = (Artifact(run / rows[name]["artifact"]) if name in rows else None for name in (stage.name, stage.parent))
    return Quantized(wanted, stage, made, parent, data.load(wanted.data, cache_of(run)), *read_captioner(parent.path))
