"""The captions of a run's INT8 model by PyTorch's quantized graph and by ONNX Runtime, greedy: how many are equal, how near the others are.

    python benchmarks/equality.py runs/photos

The stage's calibration is run again, from the run's recipe, so the run must be where its data can be read. A difference is where the two
first choose another piece; its gap is by how much PyTorch's log-probability of its own choice exceeds that of ONNX Runtime's. The last line
is one JSON document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantized import quantized  # noqa: E402

from compress import runtime  # noqa: E402
from compress.context import Progress  # noqa: E402
from compress.decode import Special  # noqa: E402
from compress.errors import LightcapError, ModelError  # noqa: E402
from compress.process import thread_count  # noqa: E402
from compress.stages import quantize  # noqa: E402
from compress.stages.quantize import encoder, simulate  # noqa: E402
from students.lightcap.tokenizer import decode_caption  # noqa: E402

BATCH = 25
BEFORE = {"smoothing": 0.0, "rounding": "nearest"}  # of an artifact that does not say


def compare(run: Path) -> dict:
    """`images`, `equal` and its `share`, and the `differences`, each with both captions and the gap in nats."""
    progress, of = Progress(), quantized(run)
    if of.made is None:
        raise ModelError(f"{run}: '{of.stage.name}' is not finished")
    described = of.made.config["quantized"]
    if described.get("float_parts") or described.get("tune_epochs"):
        raise ModelError(f"{run}: '{of.stage.name}' was tuned or has float parts, and only calibration can be repeated")
    if of.made.config.get("mask_piece") is not None:
        raise ModelError(f"{run}: '{of.stage.name}' predicts masked pieces, which PyTorch's graph here does not")
    model, tokenizer, settings = of.model, of.tokenizer, of.settings
    config = dataclasses.replace(of.stage.config, **{key: described.get(key, kept) for key, kept in BEFORE.items()})
    found = quantize.calibrate(model, tokenizer, settings, config, of.data, of.recipe.seed, progress)
    graphs = encoder.fold(simulate.leave_float(found.encoder, ())), simulate.simulated(found.decoder)
    concepts = None if found.concepts is None else simulate.simulated(found.concepts)
    captioner, special = runtime.Captioner(of.made.path), Special.of(tokenizer)
    val = of.data.split(of.recipe.data.val_split)
    differences = []
    with progress.task("captions", len(val)) as task:
        for start in range(0, len(val), BATCH):
            examples = val.examples[start : start + BATCH]
            pixels = np.stack([runtime.pixels(val.image(example), settings) for example in examples])
            with torch.no_grad():
                said, logits = simulate.greedy(graphs[1], model, graphs[0](torch.from_numpy(pixels)), special, concepts)
            theirs = captioner.search(captioner.encode(pixels), 1, model.config.max_tokens)
            for example, mine, (other, _), chosen in zip(examples, said, theirs, logits.log_softmax(-1), strict=True):
                if mine != other:
                    texts = {name: decode_caption(tokenizer, ids) for name, ids in (("pytorch", mine), ("onnxruntime", other))}
                    gap = first_gap([*mine, special.end], [*other, special.end], chosen)
                    differences.append({"image": example.image_id, **texts, "gap": gap})
            task.advance(len(examples))
    equal = len(val) - len(differences)
    return {"images": len(val), "equal": equal, "share": equal / len(val), "differences": differences,
            "largest_gap": max((item["gap"] for item in differences), default=0.0)}


def first_gap(mine: list[int], theirs: list[int], logs: torch.Tensor) -> float:
    """Nats between two choices where they part; `logs` (T, V) made `mine`."""
    place = next(index for index, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
    return float(logs[place, mine[place]] - logs[place, theirs[place]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run with a quantize stage")
    arguments = parser.parse_args()
    torch.set_num_threads(thread_count())
    try:
        found = compare(arguments.run)
    except LightcapError as error:
        parser.exit(2, f"equality.py: {error.message}\n")
    for item in found["differences"]:
        print(f"{item['image']}: '{item['pytorch']}' and '{item['onnxruntime']}', {item['gap']:.4f} nats apart")
    print(f"{found['equal']} of {found['images']} captions are equal")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
