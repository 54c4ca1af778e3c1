"""What a captioner's graphs see of training images: the scales of activations, and how weights are rounded."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.fx import GraphModule

from compress import runtime
from compress.config import Quantize
from compress.context import Progress
from compress.data import CaptionSet, Example
from compress.stages.quantize import concepts, decoder, encoder
from compress.stages.quantize.gptq import IMAGES, gptq
from compress.stages.quantize.smoothquant import smoothed
from students.lightcap import LightCap
from students.lightcap.tokenizer import encode_captions

BATCH = 8


@dataclass(frozen=True)
class Calibrated:
    """The float model, smoothed; its graphs with observers that saw `examples`, whose `captions` are ids."""

    model: LightCap
    encoder: GraphModule
    decoder: GraphModule
    concepts: GraphModule | None
    examples: list[Example]
    captions: list[list[list[int]]]


def calibrate(
    model: LightCap, tokenizer: Tokenizer, settings: dict, config: Quantize, data: CaptionSet, seed: int, progress: Progress
) -> Calibrated:
    """Runs `config.calibration_images` training images of `data`, a function of the seed, through the model's graphs, and chooses how
    weights are rounded."""
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


def chosen(data: CaptionSet, count: int, seed: int) -> list[Example]:
    """`count` training images (or all, if there are fewer), the same for the same seed."""
    examples = list(data.examples)
    return random.Random(seed).sample(examples, min(count, len(examples)))


def pixel_batches(data: CaptionSet, examples: Sequence[Example], settings: dict) -> Iterator[np.ndarray]:
    """(up to BATCH, 3, S, S) float32, as the device makes them."""
    for start in range(0, len(examples), BATCH):
        yield np.stack([runtime.pixels(data.image(example), settings) for example in examples[start : start + BATCH]])
