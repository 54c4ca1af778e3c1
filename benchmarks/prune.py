"""Multiply-accumulates against milliseconds: LightCap-40M pruned to several shares of its MACs, in fp32 and INT8, on one thread, beside
LightCap-40M in PyTorch.

    python benchmarks/prune.py [--shares 0.8 0.65 0.5 0.35] [--round-to 8] [--rounds 20] [--images 64] [--keep FOLDER]

Channels leave in the order of the stage `prune`, by importance on generated scenes; nothing is recovered, since time follows from shapes
alone (and weights are random: no checkpoint of LightCap can be had). All models run in turn, round after round. README.md says what each
number is. The last line is one JSON document; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import models
from latency import Subject, eager, graphs, measure, summary

from compress.artifact import Artifact, writing
from compress.config import Prune, Quantize
from compress.context import Progress
from compress.cost import TOKENS
from compress.runtime import positive
from compress.stages.export import export

PRECISIONS = ("fp32", "int8")
EAGER = "eager"  # `latency.py`'s row


def build(folder: Path, shares: list[float], roundings: list[int], images: int) -> list[Subject]:
    """LightCap-40M in PyTorch with all word pieces, then both precisions of the whole model and of each share with its widths rounded in
    each way, made in `folder` or found there."""
    progress, data = Progress(), models.scenes(images)
    full, whole = models.build("eager", folder, images), models.build("small", folder, images)
    found = [Subject(EAGER, "", eager(full), {"share": 1.0, "round_to": 1, "precision": EAGER} | models.row(full))]
    for share, rounding in [(1.0, 1), *((share, rounding) for share in shares for rounding in roundings)]:
        name = "1" if share == 1.0 else f"{share:g} by {rounding}"
        cut = folder / f"share-{name.replace(' ', '-')}-{images}"
        if share == 1.0:
            cut = whole.path
        elif not cut.is_dir():
            with writing(cut) as out:
                models.pruned(whole, out, data, progress, Prune(macs=share, round_to=rounding))
        for precision in PRECISIONS:
            made = folder / f"share-{name.replace(' ', '-')}-{images}-{precision}"
            if not made.is_dir():
                with writing(made) as out:
                    if precision == "fp32":
                        export(Artifact(cut), out)
                    else:
                        models.quantized(Artifact(cut), out, data, progress, Quantize(calibration_images=images))
                progress.log(f"{made.name} is built")
            costs = {"share": share, "round_to": rounding, "precision": precision} | models.row(Artifact(made))
            found.append(Subject(f"{name} {precision}", "", graphs(Artifact(made)), costs))
    return found


def ratios(rows: list[dict], unit: str) -> dict[str, float | None]:
    """Of each pruned model: the share of the whole model's milliseconds that was saved, over the share of its MACs that was saved (None
    where none were). 1: a saved MAC is a saved millisecond; for the encoder over its own MACs, for the caption over all. `..._vs_eager`:
    PyTorch's milliseconds over its own."""
    whole = {row["precision"]: row for row in rows if row["share"] == 1.0}
    found = {}
    for row in rows:
        if row["share"] != 1.0:
            before = whole[row["precision"]]
            for part in ("encoder", "caption"):
                macs = 1 - row[f"gmacs_{part}"] / before[f"gmacs_{part}"]
                time = 1 - row[f"{part}_{unit}"] / before[f"{part}_{unit}"]
                name = f"{part}_{row['precision']}_at_{row['share']:g}_by_{row['round_to']}"
                found[name] = round(time / macs, 3) if macs else None
                found[f"{name}_vs_eager"] = round(whole[EAGER][f"{part}_{unit}"] / row[f"{part}_{unit}"], 2)
    return found


def line(row: dict) -> str:
    times = "   ".join(f"{part} {row[f'gmacs_{part}']:5.2f} GMACs {row[f'{part}_ms']:7.2f} ms" for part in ("encoder", "caption"))
    return f"{row['name']:15} {times}   quartiles {row['caption_ms_q1']:.2f} to {row['caption_ms_q3']:.2f}   {row['bytes'] / 1e6:5.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65, 0.5, 0.35])
    parser.add_argument("--round-to", type=int, nargs="+", default=[8], help="widths of channels are multiples of this")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--images", type=positive, default=64, help="generated pictures for calibration and the importance of channels")
    parser.add_argument("--keep", type=Path, help="a folder where the models that are built stay, and are taken from next time")
    options = parser.parse_args()
    if not all(0 < share < 1 for share in options.shares) or options.rounds < 2 or min(options.round_to) < 1:
        parser.error("shares lie between 0 and 1, rounds are at least 2, and widths are multiples of at least 1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        subjects = build(options.keep or Path(scratch), sorted(set(options.shares), reverse=True), options.round_to, options.images)
        data = models.scenes(options.rounds)
        times = measure(subjects, [data.image(example) for example in data.examples], options.rounds)
    rows = [{"name": subject.name} | subject.costs | summary(times[subject.name]) for subject in subjects]
    for row in rows:
        print(line(row))
    document = {"tokens": TOKENS, "beam": 1, "threads": 1, "rounds": options.rounds, "rows": rows, "ratios": ratios(rows, "ms"),
                "ratios_cpu": ratios(rows, "cpu_ms")}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
