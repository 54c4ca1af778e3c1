"""Static INT8: calibrated by neural-compressor on training images, run by ONNX Runtime on integer kernels, no compiler on the device."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from compress import graphs
from compress.artifact import write_json
from compress.errors import ModelError, StageError
from students.lightcap import LightCap

BATCH = 8
SENSITIVITY = "sensitivity.json"  # part: KL divergence, nats a token, where it was measured
SENSITIVITY_IMAGES = 32


def run(parent, config, context) -> None:
    """Writes the graphs of `compress.stages.export`, the parent's settings, and "quantized" in config.json, into `context.output`.

    `config`: `compress.config.Quantize`. With `trials`, CIDEr on val is held to `max_drop_cider` by `search`. StageError where the weights
    do not shrink to `config.max_weight_ratio` of the parent's, naming the tensors still in float.
    """
    from compress.stages.quantize.search import TRIAL, search
    from compress.stages.quantize.sensitivity import ALL, sensitivity
    from compress.stages.quantize.tune import tune
    from compress.training.start import read_captioner

    if not (parent.path / "model.safetensors").is_file():
        raise ModelError(f"quantize needs a float model: {parent.path} has no model.safetensors")
    model, tokenizer, settings = read_captioner(parent.path)
    found = calibrate(model, tokenizer, settings, config, context.data, context.seed, context.progress)

    @functools.cache
    def state(tuned: bool) -> Calibrated:
        return tune(found, tokenizer, settings, config, context) if tuned else found

    @functools.cache
    def measured(tuned: bool) -> dict[str, float]:
        seen, few = state(tuned), slice(SENSITIVITY_IMAGES)
        pictures = [picture for batch in pixel_batches(context.data, seen.examples[few], settings) for picture in batch]
        lost = sensitivity(seen.model, seen.encoder, seen.decoder, seen.concepts, pictures, seen.captions[few], context.progress)
        context.progress.log("KL divergence by part, nats a token: " + ", ".join(f"{part} {value:.2g}" for part, value in lost.items()))
        return lost

    def worst(tuned: bool) -> list[str]:
        return [part for part in measured(tuned) if part != ALL]

    def make(tuned: bool, floating: Sequence[str], folder: Path) -> None:
        write(folder, parent, state(tuned), config, floating, config.tune_epochs if tuned else 0.0, context.progress)

    tunes = config.tune_epochs > 0
    if config.trials and config.max_drop_cider is not None:
        best = search(make, tunes, worst, parent, context)
        shutil.copytree(best, context.output, dirs_exist_ok=True, ignore=shutil.ignore_patterns(TRIAL))
    else:
        make(tunes, (), context.output)
    if config.sensitivity:
        made = json.loads((context.output / "config.json").read_text())["quantized"]
        write_json(context.output / SENSITIVITY, measured(made["tune_epochs"] > 0))


def write(folder: Path, parent, found: Calibrated, config, floating: Sequence[str], tune_epochs: float, progress) -> None:
    """The INT8 artifact of what was `found`, with the parts `floating` in float."""
    from compress.stages.export import write_decoder
    from compress.stages.quantize import concepts, decoder, encoder

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


@dataclass(frozen=True)
class Calibrated:
    """The float model, smoothed; its graphs with observers that saw `examples`, whose `captions` are ids."""

    model: LightCap
    encoder: torch.fx.GraphModule
    decoder: torch.fx.GraphModule
    concepts: torch.fx.GraphModule | None
    examples: list
    captions: list[list[list[int]]]


def calibrate(model, tokenizer, settings: dict, config, data, seed: int, progress) -> Calibrated:
    """Runs `config.calibration_images` training images of `data`, a function of the seed, through the model's graphs, and chooses how
    weights are rounded."""
    from compress.stages.quantize import concepts, decoder, encoder
    from compress.stages.quantize.gptq import IMAGES, gptq
    from compress.stages.quantize.smoothquant import smoothed
    from students.lightcap.tokenizer import encode_captions

    examples = chosen(data.split("train"), config.calibration_images, seed)
    grids: list[torch.Tensor] = []
    first: list[tuple[torch.Tensor]] = []  # pixels of the images that weights are rounded for
    with progress.task("calibrate", len(examples)) as task:

        def watched() -> Iterator[np.ndarray]:
            """The pixels, batch by batch; on the way the float model's grids are kept, one by one."""
            for batch in pixel_batches(data, examples, settings):
                pictures = torch.from_numpy(batch)
                with torch.no_grad():
                    grids.extend(model.encode(pictures).split(1))
                if len(first) * BATCH < IMAGES:
                    first.append((pictures,))
                yield batch
                task.advance(len(batch))

        encoding = encoder.calibrated(model, watched(), config.reduce_range)
    captions = [encode_captions(tokenizer, example.captions, model.config.max_tokens) for example in examples]
    forced = [decoder.teacher_forced(model, *sample) for sample in zip(grids, captions, strict=True)]
    if config.smoothing:
        model = smoothed(model, forced, config.smoothing)
    decoding = decoder.calibrated(model, forced, config.reduce_range)
    if config.rounding == "gptq":
        gptq(encoding, first, progress)
        gptq(decoding, forced[:IMAGES], progress)  # over the float encoder's grids, as its calibration
    finding = concepts.calibrated(model, grids, config, progress) if model.config.concepts else None
    return Calibrated(model, encoding, decoding, finding, examples, captions)


def chosen(data, count: int, seed: int) -> list:
    """`count` training images (or all, if there are fewer), the same for the same seed."""
    examples = list(data.examples)
    return random.Random(seed).sample(examples, min(count, len(examples)))


def pixel_batches(data, examples: list, settings: dict) -> Iterator[np.ndarray]:
    from compress import runtime

    for start in range(0, len(examples), BATCH):
        yield np.stack([runtime.pixels(data.image(example), settings) for example in examples[start : start + BATCH]])


def describe(folder: Path, parent, model, quantized: dict) -> None:
    """Writes the parent's settings, and config.json with what was done."""
    from compress.stages import export

    for name in export.SETTINGS[1:]:
        shutil.copyfile(parent.path / name, folder / name)
    values = model.config.to_dict() | {"quantized": quantized}
    (folder / "config.json").write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def check(folder: Path, model, most: float, large: Sequence[str], progress) -> None:
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


def float_bytes(model) -> int:
    """Bytes of the float model's weights."""
    return 4 * (sum(p.numel() for p in model.parameters()) + (0 if model.concepts is None else model.concepts.matrix.numel()))


def check_ratio(kept: dict[str, int], whole: int, most: float, large: Sequence[str]) -> None:
    """StageError where integer and float weights together exceed `most` of `whole` bytes."""
    ratio = (kept["integer"] + kept["float"]) / whole
    if ratio > most:
        named = "; ".join(large[:8]) or "none of 4 KB or more"
        raise StageError(f"quantized weights take {ratio:.2f} of the parent's bytes, more than {most}; still fp32: {named}")
