"""What the ways of rounding cost: a run's INT8 stage again, with its weights rounded to nearest or by GPTQ, its ranges smoothed or not.

    python benchmarks/int8.py runs/photos [--images 100]

Rows: the INT8 grid's squared error over the grid's variance and the KL divergence of the captions' token probabilities from the float
model's, in nats a token under teacher forcing, both in PyTorch's quantized graph on the first val images; and CIDEr of the ONNX graphs at
beam 5 on all of val, as its paired difference from the float model's. The last line is one JSON document. Nothing is written into the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantized import quantized

from compress import evaluate
from compress.artifact import Artifact
from compress.cache import cache_of
from compress.context import Progress
from compress.errors import LightcapError
from compress.metrics.bootstrap import paired
from compress.process import thread_count
from compress.runtime import positive
from compress.stages import quantize
from compress.stages.quantize import calibrate, simulate
from compress.stages.quantize.sensitivity import ALL, grids, sensitivity
from students.lightcap.tokenizer import encode_captions

WAYS = (("nearest", 0.0), ("nearest", None), ("gptq", 0.0), ("gptq", None))  # rounding, smoothing (None: the stage's)


def compare(run: Path, count: int) -> dict:
    """`rows`, in the order of `WAYS`, over one and the same float model and calibration images."""
    progress, of = Progress(), quantized(run)
    model, tokenizer, settings, val = of.model, of.tokenizer, of.settings, of.data.split(of.recipe.data.val_split)
    few = val.examples[:count]
    pixels = [picture for batch in calibrate.pixel_batches(val, few, settings) for picture in batch]
    captions = [encode_captions(tokenizer, example.captions, model.config.max_tokens) for example in few]
    batches = [torch.from_numpy(pixels[i][None]) for i in range(len(pixels))]
    with torch.no_grad():
        goal = grids(model.encode, batches)
    before, found = evaluate.ciders(of.parent, val, cache_of(run), progress), []
    for rounding, smoothing in WAYS:
        config = dataclasses.replace(of.stage.config, rounding=rounding, tune_epochs=0.0)
        config = config if smoothing is None else dataclasses.replace(config, smoothing=smoothing)
        seen = calibrate.calibrate(model, tokenizer, settings, config, of.data, of.recipe.seed, progress)
        with torch.no_grad():
            error = float((grids(simulate.simulated(seen.encoder), batches) - goal).square().mean() / goal.var())
        lost = sensitivity(seen.model, seen.encoder, seen.decoder, seen.concepts, pixels, captions, progress, names=())
        with tempfile.TemporaryDirectory() as folder:
            quantize.write(Path(folder), of.parent, seen, config, (), 0.0, progress)
            difference = paired(evaluate.ciders(Artifact(Path(folder)), val, cache_of(run), progress), before)
        row = {"rounding": rounding, "smoothing": config.smoothing, "grid_error": error, "kl": lost[ALL],
               "delta_cider": difference.delta, "delta_ci95": list(difference.ci95)}
        print(f"rounding {rounding}, smoothing {config.smoothing}: grid error {error:.4f} of its variance, {lost[ALL]:.5f} nats a token, "
              f"CIDEr {difference.delta:+.2f} [{difference.ci95[0]:+.2f}, {difference.ci95[1]:+.2f}]")
        found.append(row)
    return {"images": len(few), "images_cider": len(val), "rows": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run with a quantize stage")
    parser.add_argument("--images", type=positive, default=100, help="of val, for grid error and divergence")
    arguments = parser.parse_args()
    torch.set_num_threads(thread_count())
    try:
        found = compare(arguments.run, arguments.images)
    except LightcapError as error:
        parser.exit(2, f"int8.py: {error.message}\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
