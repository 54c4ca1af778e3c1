"""Static INT8: calibrated by neural-compressor on training images, run by ONNX Runtime on integer kernels, no compiler on the device."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from compress import graphs
from compress.errors import ModelError, StageError

BATCH = 8


def run(parent, config, context) -> None:
    """Writes encoder.onnx and decoder.onnx, the parent's settings, and "quantized" in config.json, into `context.output`.

    `config`: `compress.config.Quantize`. StageError where the weights do not shrink to `config.max_weight_ratio` of the parent's, naming
    the tensors still in float.
    """
    from compress.stages import export
    from compress.stages.quantize.concepts import quantized_concepts
    from compress.stages.quantize.decoder import quantized_decoder
    from compress.stages.quantize.encoder import quantized_encoder
    from students.lightcap import LightCap
    from students.lightcap.tokenizer import encode_captions, read_tokenizer

    try:
        model = LightCap.from_pretrained(parent.path)
        tokenizer = read_tokenizer(parent.path / "tokenizer.json")
    except (FileNotFoundError, ValueError) as error:
        raise ModelError(f"quantize needs a float model: {error}") from None
    settings = json.loads((parent.path / "preprocessor_config.json").read_text())
    examples = chosen(context.data.split("train"), config.calibration_images, context.seed)
    grids: list[torch.Tensor] = []
    with context.progress.task("calibrate", len(examples)) as task:
        batches = watched(model, pixel_batches(context.data, examples, settings), grids, task)
        encoder = quantized_encoder(model, batches, config.reduce_range)
    captions = [encode_captions(tokenizer, example.captions, model.config.max_tokens) for example in examples]
    decoder = quantized_decoder(model, zip(grids, captions, strict=True), config.reduce_range)
    made = {"encoder.onnx": encoder, "decoder.onnx": decoder}
    if model.config.concepts:
        made["concepts.onnx"] = quantized_concepts(model, grids, config.reduce_range)
    for name, proto in made.items():
        graphs.write(graphs.clean(proto), context.output / name)
    context.progress.log(summary(graphs.kernels(context.output / "encoder.onnx"), graphs.kernels(context.output / "decoder.onnx")))
    kept, whole = graphs.weight_bytes(context.output), float_bytes(model)
    share = sum(kept.values()) / whole
    context.progress.log(f"int8 weights: {kept['integer']} integer and {kept['float']} float bytes, {share:.3f} of the parent's {whole}")
    check_ratio(kept, whole, config.max_weight_ratio, context.output)
    for name in export.SETTINGS[1:]:
        shutil.copyfile(parent.path / name, context.output / name)
    described = {"scheme": config.scheme, "weights": "int8", "activations": "uint8", "calibration_images": len(examples),
                 "calibrated_by": "neural-compressor", "reduce_range": config.reduce_range}
    values = model.config.to_dict() | {"quantized": described}
    (context.output / "config.json").write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def chosen(data, count: int, seed: int) -> list:
    """`count` training images (or all, if there are fewer), the same for the same seed."""
    examples = list(data.examples)
    return random.Random(seed).sample(examples, min(count, len(examples)))


def pixel_batches(data, examples: list, settings: dict) -> Iterator[np.ndarray]:
    from compress import runtime

    for start in range(0, len(examples), BATCH):
        yield np.stack([runtime.pixels(data.image(example), settings) for example in examples[start : start + BATCH]])


def watched(model, batches: Iterator[np.ndarray], grids: list[torch.Tensor], task) -> Iterator[np.ndarray]:
    """The same batches; on the way the float model's grids, one by one, are kept for the decoder's calibration."""
    for batch in batches:
        with torch.no_grad():
            grids += model.encode(torch.from_numpy(batch)).split(1)
        yield batch
        task.advance(len(batch))


def summary(encoder: Counter[str], decoder: Counter[str]) -> str:
    """What ONNX Runtime runs as integers: a pattern that its fusions miss costs tens of times, and shows nowhere else."""
    whole = encoder["QLinearConv"] + encoder["Conv"] + encoder["FusedConv"]
    products = decoder["MatMulInteger"] + decoder["MatMulIntegerToFloat"]
    return f"int8 kernels: {encoder['QLinearConv']} of {whole} convolutions, {products} of {products + decoder['Gemm']} linear layers"


def float_bytes(model) -> int:
    """Bytes of the same weights in fp32."""
    return 4 * (sum(p.numel() for p in model.parameters()) + (0 if model.concepts is None else model.concepts.matrix.numel()))


def check_ratio(kept: dict[str, int], whole: int, most: float, folder) -> None:
    """StageError where integer and float weights together exceed `most` of `whole` bytes."""
    ratio = (kept["integer"] + kept["float"]) / whole
    if ratio > most:
        large = "; ".join(graphs.float_weights(folder)[:8]) or "none of 4 KB or more"
        raise StageError(f"quantized weights take {ratio:.2f} of the parent's bytes, more than {most}; still fp32: {large}")
