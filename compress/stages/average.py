"""One captioner whose weights are the mean of several's: ends of one training lie in one valley of the loss, and their mean nearer to its
floor than any of them ("model soups", Wortsman et al., ICML 2022)."""

from __future__ import annotations

import dataclasses

import torch

from compress.artifact import Artifact
from compress.config import Average
from compress.context import Context
from compress.errors import StageError
from compress.training.start import read_captioner, write_captioner

STEPS = "num_batches_tracked"  # a batch norm's, which nothing reads


def run(parent: Artifact, config: Average, context: Context) -> Artifact:
    """Writes the mean of `parent` and of the stages `config.others`. StageError where one has other sizes, word pieces or concepts."""
    model, tokenizer, settings = read_captioner(parent.path)
    mean = model.state_dict()
    for count, name in enumerate(config.others, start=2):
        its, pieces, _ = read_captioner(context.artifacts[name].path)
        other, config_of_it = its.state_dict(), dataclasses.replace(its.config, dropout=model.config.dropout)
        alike = config_of_it == model.config and pieces.to_str() == tokenizer.to_str()
        whole = {key: tensor for key, tensor in other.items() if not tensor.is_floating_point() and not key.endswith(STEPS)}
        if not alike or any(not torch.equal(mean[key], tensor) for key, tensor in whole.items()):
            raise StageError(f"average: '{name}' is not built as '{context.stage.parent}' is: a mean of their weights would mean nothing")
        for key, tensor in other.items():
            if tensor.is_floating_point():
                mean[key] += (tensor - mean[key]) / count  # exactly itself where all are equal: an encoder that they share stays shared
    write_captioner(context.output, model, tokenizer, settings)
    return Artifact(context.output)
