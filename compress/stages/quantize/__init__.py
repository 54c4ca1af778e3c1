"""Static INT8: calibrated by neural-compressor on training images, run by ONNX Runtime on integer kernels, no compiler on the device."""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from compress import graphs
from compress.artifact import Artifact, write_json
from compress.config import Quantize
from compress.context import Context, Progress
from compress.errors import ModelError, StageError
from compress.runtime import SETTINGS
from compress.stages.export.decoder import write_decoder
from compress.stages.quantize import calibrate, concepts, decoder, encoder, search, sensitivity, tune
from compress.stages.quantize.calibrate import Calibrated
from compress.training.start import read_captioner
from students.lightcap import LightCap

SENSITIVITY = "sensitivity.json"  # part: KL divergence, nats a token, where it was measured
SENSITIVITY_IMAGES = 32


def run(parent: Artifact, config: Quantize, context: Context) -> Artifact:
    """Writes the graphs of `compress.stages.export`, the parent's settings, and "quantized" in config.json, into `context.output`.

    With `trials`, CIDEr on val is held to `max_drop_cider` by `search`, and "budget" there says "met" or "not met". StageError where the
    weights do not shrink to `config.max_weight_ratio` of the parent's, naming the tensors still in float.
    """
    if not (parent.path / "model.safetensors").is_file():
        raise ModelError(f"quantize needs a float model: {parent.path} has no model.safetensors")
    model, tokenizer, settings = read_captioner(parent.path)
    found = calibrate.calibrate(model, tokenizer, settings, config, context.data, context.seed, context.progress)

    @functools.cache
    def state(tuned: bool) -> Calibrated:
        return tune.tune(found, tokenizer, settings, config, context) if tuned else found

    @functools.cache
    def measured(tuned: bool) -> dict[str, float]:
        seen, few = state(tuned), slice(SENSITIVITY_IMAGES)
        pictures = [picture for batch in calibrate.pixel_batches(context.data, seen.examples[few], settings) for picture in batch]
        graphs_of = seen.encoder, seen.decoder, seen.concepts
        lost = sensitivity.sensitivity(seen.model, *graphs_of, pictures, seen.captions[few], context.progress)
        context.progress.log("KL divergence by part, nats a token: " + ", ".join(f"{part} {value:.2g}" for part, value in lost.items()))
        return lost

    def worst(tuned: bool) -> list[str]:
        return [part for part in measured(tuned) if part != sensitivity.ALL]

    def make(tuned: bool, floating: Sequence[str], folder: Path) -> None:
        write(folder, parent, state(tuned), config, floating, config.tune_epochs if tuned else 0.0, context.progress)

    tunes = config.tune_epochs > 0
    if config.trials and config.max_drop_cider is not None:
        best, met = search.search(make, tunes, worst, parent, context)
        shutil.copytree(best, context.output, dirs_exist_ok=True, ignore=shutil.ignore_patterns(search.TRIAL))
        note(context.output, {"max_drop_cider": config.max_drop_cider, "budget": "met" if met else "not met"})
    else:
        make(tunes, (), context.output)
    if config.sensitivity:
        made = json.loads((context.output / "config.json").read_text())["quantized"]
        write_json(context.output / SENSITIVITY, measured(made["tune_epochs"] > 0))
    return Artifact(context.output)


def write(
    folder: Path, parent: Artifact, found: Calibrated, config: Quantize, floating: Sequence[str], tune_epochs: float, progress: Progress
) -> None:
    """The INT8 artifact of what was `found`, with the parts `floating` in float."""
    model = found.model
    alone = {"encoder": encoder.quantized_encoder(model, found.encoder, floating)}
    if found.concepts is not None:
        alone["concepts"] = concepts.quantized_concepts(model, found.concepts, floating)
    prefix, step = decoder.quantized_decoder(model, found.decoder, floating)
    large = graphs.float_weights(alone | {"prefix": prefix, "decoder": step})  # before their names are cleaned away
    for name, proto in alone.items():
        graphs.write(graphs.clean(proto), folder / f"{name}.onnx")
    write_decoder(prefix, step, folder)
    described = {"scheme": config.scheme, "weights": "int8", "activations": "uint8", "calibration_images": len(found.examples),
                 "calibrated_by": "neural-compressor", "smoothing": config.smoothing, "rounding": config.rounding,
                 "reduce_range": config.reduce_range, "float_parts": list(floating), "tune_epochs": tune_epochs}
    describe(folder, parent, model, described)
    check(folder, model, config.max_weight_ratio, large, progress)


def describe(folder: Path, parent: Artifact, model: LightCap, quantized: dict) -> None:
    """Writes the parent's settings, and config.json with what was done."""
    for name in SETTINGS[1:]:
        shutil.copyfile(parent.path / name, folder / name)
    write_config(folder, model.config.to_dict() | {"quantized": quantized})


def write_config(folder: Path, values: dict) -> None:
    (folder / "config.json").write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def note(folder: Path, more: dict) -> None:
    """Adds to "quantized" in config.json."""
    values = json.loads((folder / "config.json").read_text())
    values["quantized"] |= more
    write_config(folder, values)


def check(folder: Path, model: LightCap, most: float, large: Sequence[str], progress: Progress) -> None:
    """Logs what runs as integers, and the bytes; StageError where the weights exceed `most` of the float model's, naming those that are
    `large` and still in float."""
    found = {path.name: graphs.kernels(path) for path in sorted(folder.glob("*.onnx"))}
    encoder = found.pop("encoder.onnx")
    progress.log(summary(encoder, sum(found.values(), Counter())))
    kept, whole = graphs.weight_bytes(folder), float_bytes(model)
    share = sum(kept.values()) / whole
    progress.log(f"int8 weights: {kept['integer']} integer and {kept['float']} float bytes, {share:.3f} of the parent's {whole}")
    check_ratio(kept, whole, most, large)


def summary(encoder: Counter[str], others: Counter[str]) -> str:
    """What ONNX Runtime runs as integers: a pattern that its fusions miss costs tens of times, and shows nowhere else."""
    whole = encoder["QLinearConv"] + encoder["Conv"] + encoder["FusedConv"]
    products = others["MatMulInteger"] + others["MatMulIntegerToFloat"]
    return f"int8 kernels: {encoder['QLinearConv']} of {whole} convolutions, {products} of {products + others['Gemm']} matrix products"


def float_bytes(model: LightCap) -> int:
    """Bytes of the float model's weights."""
    return 4 * (sum(p.numel() for p in model.parameters()) + (0 if model.concepts is None else model.concepts.matrix.numel()))


def check_ratio(kept: dict[str, int], whole: int, most: float, large: Sequence[str]) -> None:
    """StageError where integer and float weights together exceed `most` of `whole` bytes."""
    ratio = (kept["integer"] + kept["float"]) / whole
    if ratio > most:
        named = "; ".join(large[:8]) or "none of 4 KB or more"
        raise StageError(f"quantized weights take {ratio:.2f} of the parent's bytes, more than {most}; still fp32: {named}")
