"""What LightCap is measured against: its own image encoder in other people's INT8, and larger captioners as transformers runs them.

Each is (what it is, a generator function over a picture, (H, W, 3) uint8, that gives the name of a phase behind each; None: not timed).
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import models
import numpy as np
import torch

from compress import runtime
from compress.cost import TOKENS

NAMES = ("ort-static", "openvino", "blip-base", "git-base")
# Means and deviations do not change the time; sizes are those of Salesforce/blip-image-captioning-base and microsoft/git-base-coco.
CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


def build(onnx: Path, images: int, without: set[str]) -> dict[str, tuple[str, Callable[[np.ndarray], Iterator[str | None]]]]:
    """By name, all of NAMES but those `without`. `onnx`: the fp32 export whose encoder is quantized, into a file
    beside it, or found there; `images`: calibration pictures."""
    found = {}
    encoder, settings = onnx.parent / f"{onnx.name}-ort-static.onnx", runtime.read_json(onnx / "preprocessor_config.json")
    if not {"ort-static", "openvino"} <= without and not encoder.is_file():
        print("building ort-static", file=sys.stderr)
        quantize_by_onnxruntime(onnx / "encoder.onnx", encoder, models.pixels(models.scenes(images), settings))
    if "ort-static" not in without:
        found["ort-static"] = "the image encoder by ONNX Runtime's static quantizer (QDQ, per channel)", ort_encoder(encoder, settings)
    if "openvino" not in without:
        found["openvino"] = "the same INT8 graph in OpenVINO", openvino_encoder(encoder, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations
        how = f"PyTorch fp32, transformers' generate, {TOKENS} tokens"
        if "blip-base" not in without:
            found["blip-base"] = f"BLIP-base at 384 x 384, {how}", generating(blip_base(), 384)
        if "git-base" not in without:
            found["git-base"] = f"GIT-base at 224 x 224, {how}", generating(git_base(), 224)
    return found


# ---- the image encoder in INT8


def quantize_by_onnxruntime(source: Path, out: Path, batch: np.ndarray) -> None:
    """ONNX Runtime's own tool as its documentation uses it: preprocessed, then QDQ with uint8 activations and int8 weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Pictures(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(batch)

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.rows, None)
            return None if row is None else {"pixels": row[None]}

    logging.disable(logging.WARNING)
    prepared, begun = out.with_suffix(".prepared.onnx"), out.with_suffix(".begun.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(
        str(prepared), str(begun), Pictures(), quant_format=QuantFormat.QDQ, per_channel=True, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    logging.disable(logging.NOTSET)
    prepared.unlink()
    begun.rename(out)  # what is kept is whole


def ort_encoder(path: Path, settings: dict):
    session = runtime.open_session(path, runtime.session_options(1))

    def work(picture: np.ndarray) -> Iterator[str | None]:
        batch = runtime.pixels(picture, settings)[None]
        yield None
        session.run(None, {"pixels": batch})
        yield "encoder"

    return work


def openvino_encoder(path: Path, settings: dict):
    import openvino

    model = openvino.Core().read_model(str(path))
    size = settings["image_size"]
    model.reshape([1, 3, size, size])
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def work(picture: np.ndarray) -> Iterator[str | None]:
        batch = runtime.pixels(picture, settings)[None]
        yield None
        request.infer([batch])
        yield "encoder"

    return work


# ---- larger captioners


def blip_base() -> torch.nn.Module:
    """BLIP with a ViT-B/16 at 384 and a BERT-base decoder: 224M parameters without its tied output projection."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 30524}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 384,
              "patch_size": 16}
    torch.manual_seed(models.SEED)
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()


def git_base() -> torch.nn.Module:
    """GIT with CLIP's ViT-B/16 at 224 and a decoder of six layers: the defaults of its config class are the published base model."""
    from transformers import GitConfig, GitForCausalLM

    torch.manual_seed(models.SEED)
    return GitForCausalLM(GitConfig()).eval()


def generating(model: torch.nn.Module, size: int):
    """Greedy, with the model's own cache and exactly TOKENS new tokens. Resizing the picture and spelling the text are not timed."""
    settings = CLIP | {"image_size": size}
    tokens = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "num_beams": 1, "do_sample": False, "use_cache": True}

    def work(picture: np.ndarray) -> Iterator[str | None]:
        batch = torch.from_numpy(runtime.pixels(picture, settings)[None])
        yield None
        model.generate(pixel_values=batch, **tokens)
        yield "caption"

    return work
