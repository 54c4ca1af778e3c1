"""The encoder's float graph, traced by torch.onnx."""

from __future__ import annotations

import contextlib
import logging
import warnings

import torch
from onnx import ModelProto
from torch import nn
from torch.export import Dim

from compress.stages.export.modules import Encoder
from compress.stages.export.writer import OPSET
from students.lightcap import LightCap


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
