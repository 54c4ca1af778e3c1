"""Float graphs of a captioner, traced by torch.onnx."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path

import torch
from onnx import ModelProto
from torch import nn
from torch.export import Dim

from compress import graphs
from compress.stages.export.modules import Encoder, Extractor, Prefix, Step
from students.lightcap import LightCap

OPSET = 20
DECODER_WEIGHTS = "decoder.onnx.data"


def past_names(model: LightCap, kind: str) -> list[str]:
    """`past_key_0`, `past_value_0`, ...; kind `prefix` names those of the prefix, `present` what a step gives."""
    return [f"{kind}_{part}_{layer}" for layer in range(len(model.fusion.layers)) for part in ("key", "value")]


@contextlib.contextmanager
def quiet():
    """torch.onnx and what it calls speak of their own deprecations and of renamed axes; nothing of it concerns a captioner's user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for module in ("torch", "onnxscript", "onnx_ir", "copyreg"):
            warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def to_onnx(module: nn.Module, inputs: tuple, input_names: list[str], output_names: list[str], dynamic_shapes) -> ModelProto:
    """`torch.onnx.export(dynamo=True)`, with all sizes marked dynamic that `dynamic_shapes` names."""
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            module, inputs, dynamo=True, opset_version=OPSET, input_names=input_names, output_names=output_names,
            dynamic_shapes=dynamic_shapes, verbose=False, external_data=False, optimize=True,
        )
    return program.model_proto


def encoder_graph(model: LightCap) -> ModelProto:
    size = model.config.image_size
    batch = Dim("images", min=1, max=4096)
    proto = to_onnx(Encoder(model).eval(), (torch.randn(2, 3, size, size),), ["pixels"], ["grid"], ({0: batch},))
    return proto


def concepts_graph(model: LightCap) -> ModelProto:
    """The float extractor, its initializers named as the parameters of `Extractor`."""
    grid = torch.randn(2, model.config.grid**2, model.config.channels)
    return to_onnx(Extractor(model).eval(), (grid,), ["grid"], ["concepts"], ({0: Dim("n")},))


def prefix_graph(model: LightCap) -> ModelProto:
    """The float prefix, its initializers still named as the parameters of `Decoder` (`graphs.clean` renames them)."""
    config, n = model.config, {0: Dim("n")}
    inputs, names = (torch.randn(2, config.grid**2, config.channels),), ["grid"]
    if config.concepts:
        inputs, names = (*inputs, torch.ones(2, config.concepts, dtype=torch.int64)), [*names, "concepts"]
    return to_onnx(Prefix(model).eval(), inputs, names, past_names(model, "prefix"), (n,) * len(inputs))


def step_graph(model: LightCap) -> ModelProto:
    """The float step, its initializers still named as the parameters of `Decoder`: a token at a time, two for a model of masked pieces."""
    sizes = [(layer.query.out_features // layer.head_dim, layer.head_dim) for layer in model.fusion.layers for _ in range(2)]
    # Lengths are odd and unequal, so that no two dynamic sizes look alike.
    states = [[torch.randn(2, heads, length, width) for heads, width in sizes] for length in (7, 5)]
    shape = (2, 1 if model.config.mask_piece is None else 2)
    tokens, positions = torch.ones(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    n, prefix, past = (Dim(name) for name in ("n", "prefix_length", "past_length"))
    dynamic = ({0: n}, {0: n}, *([{0: n, 2: length} for _ in sizes] for length in (prefix, past)))
    names = ["tokens", "positions", *past_names(model, "prefix"), *past_names(model, "past")]
    return to_onnx(Step(model).eval(), (tokens, positions, *states), names, ["logits", *past_names(model, "present")], dynamic)


def write_decoder(prefix: ModelProto, step: ModelProto, folder: Path) -> None:
    """Both graphs and the file of their weights."""
    graphs.write_sharing({"prefix.onnx": graphs.clean(prefix), "decoder.onnx": graphs.clean(step)}, folder, DECODER_WEIGHTS)
