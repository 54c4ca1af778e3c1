"""A finished captioner as a stage: copied whole, and asked for a caption of each training image.

A student can learn from those captions alone (sequence-level distillation: Kim and Rush, EMNLP 2016): it needs neither the word pieces nor
the layers nor the image encoder of its teacher.
"""

from __future__ import annotations

import os
import shutil

from compress import evaluate, foreign
from compress.artifact import PICKLES, Artifact, write_json
from compress.config import Pretrained
from compress.context import Context
from compress.data import CaptionSet
from compress.models import resolve
from teachers.layouts import WRITTEN


def run(parent: Artifact | None, config: Pretrained, context: Context) -> Artifact:
    """Writes the captioner's files and what it says."""
    source = resolve(os.path.expanduser(config.model))
    for file in source.files():
        if file.suffix in PICKLES:
            foreign.rewrite(source, context.output)
        else:
            shutil.copyfile(file, context.output / file.name)
    data = context.data.split("train")
    pairs = zip(data.examples, said(source, data, context), strict=True)
    write_json(context.output / WRITTEN, [{"image": example.image_id, "caption": text} for example, text in pairs])
    return Artifact(context.output)


def said(source: Artifact, data: CaptionSet, context: Context) -> list[str]:
    """Its caption of each image, by beam search of width 5."""
    if source.foreign:
        return foreign.written(source, data, context.cache, context.progress)
    with context.progress.task("captions of train", len(data)) as task:
        return [text for text, _ in evaluate.captions(source, data, evaluate.BEAM, context.cache, context.progress, task.advance)]
