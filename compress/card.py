"""The model card of an artifact: what made it, and what was measured. Every number comes from its ledger row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from compress.config import Data, Recipe, Stage
from compress.lock import FILES
from compress.recipe import entry

MADE = {
    "pretrained": "a finished captioner as it is, with what it says of the training images",
    "concepts": "a concept extractor; its captions were not trained",
    "train": "trained with cross-entropy on captions",
    "distill": "distilled from its teachers",
    "scst": "tuned for CIDEr",
    "average": "the mean of several captioners' weights",
    "vocabulary": "its parent with the word pieces that training captions use",
    "prune": "its parent with channels removed, then recovered",
    "quantize": "its parent as static INT8 ONNX graphs",
    "export": "its parent as ONNX graphs, with `caption.py` to run them",
    "baseline": "the caption of the nearest training image by encoder features; no captioner at all",
}


def text(recipe: Recipe, stage: Stage, row: Mapping, warning: str | None = None) -> str:
    """README.md of the artifact that `stage` made and `row` measured; `warning`: `Artifact.warning`."""
    lines = [
        "---",
        "library_name: lightcap",
        "pipeline_tag: image-to-text",
        "---",
        "",
        f"# {stage.name}",
        "",
        f"Stage `{stage.kind}` of the lightcap recipe `{recipe.name}`: {MADE.get(stage.kind, stage.kind)}.",
        "",
        "| measured | |",
        "| --- | --- |",
    ]
    lines += [f"| {what} | {value} |" for what, value in _numbers(row) if value]
    if stage.config is not None:
        lines += ["", "## Settings", "", "```yaml", yaml.safe_dump(_settings(stage), sort_keys=False, width=100).rstrip(), "```"]
        trained = f"Trained and measured on {_named(recipe.data)}; what those pictures do not show, it does not know."
        lines += ["", f"Measured on {_named(recipe.data)}." if stage.kind == "pretrained" else trained]
    if stage.kind not in ("concepts", "baseline"):
        by_itself = ["python FOLDER/caption.py PHOTO"] if stage.kind == "export" else []
        lines += ["", "## Use", "", "```", *by_itself, "lightcap caption FOLDER PHOTO", "```"]
        if warning:
            lines += ["", f"Note: {warning}."]
    lines += ["", f"Lock: `{row['lock']}`", ""]
    return "\n".join(lines)


def _settings(stage: Stage) -> dict:
    """The stage as a recipe has it; of its files only their names, since a card goes where the folders of who made it are nobody's
    business."""
    [(kind, settings)] = entry(stage).items()

    def name(value: str) -> str:
        return Path(value).name if value.startswith(("/", "~")) else value

    named = {key: value for key, value in settings.items() if key in FILES and value}
    inside = {key: name(value) if isinstance(value, str) else [name(path) for path in value] for key, value in named.items()}
    return {kind: settings | inside}


def _named(data: Data) -> str:
    """The data in words, with its files' names."""
    if data.source == "scenes":
        return "generated scenes"
    files = (data.images if data.source == "datasets" else data.captions) or ""
    return f"captioned photos, `{', '.join(Path(name).name for name in files.split(','))}`"


def _numbers(row: Mapping) -> list[tuple[str, str]]:
    def number(key: str, form: str, scale: float = 1.0) -> str:
        return "" if row.get(key) is None else format(row[key] / scale, form)

    cider = number("cider", ".1f")
    if cider and row.get("cider_ci95"):
        cider += f" (95 % interval {row['cider_ci95'][0]:.1f} to {row['cider_ci95'][1]:.1f})"
    delta = number("delta_cider", "+.2f")
    if delta and row.get("p_value") is not None:
        delta += f" (p = {row['p_value']:.3g}, paired bootstrap)"
    latency = row.get("latency_ms") or {}
    milliseconds = ""
    if latency.get("p50") is not None:
        how = f"{latency.get('runtime', '')}, threads: {latency.get('threads', '?')}, beam {latency.get('beam', '?')}".strip(", ")
        milliseconds = f"{latency['p50']:.1f} ({how})"
    return [
        (f"CIDEr-D x100, {row.get('images') or '?'} images of {row.get('split') or '?'}", cider),
        (f"CIDEr less that of '{row.get('against')}'", delta),
        ("BLEU-4 x100", number("bleu4", ".1f")),
        ("ROUGE-L x100", number("rouge_l", ".1f")),
        ("precision of the concepts found", number("concept_precision", ".1%")),
        (f"recall of the concepts in {row.get('split') or '?'}'s captions", number("concept_recall", ".1%")),
        ("parameters", number("params", ",.0f")),
        ("GMACs per caption", number("gmacs_caption", ".3f")),
        ("MB on disk needed to caption", number("bytes", ".2f", 1e6)),
        ("ms per caption, median", milliseconds),
        ("seconds to make and measure", number("seconds", ".0f")),
        ("peak MB in memory", number("peak_mb", ".0f")),
    ]
