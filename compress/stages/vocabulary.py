"""Keeps the word pieces that training captions use: the embedding and the output projection, which are one matrix, shrink together."""

from __future__ import annotations

from collections import Counter

import torch

from compress.artifact import Artifact, write_json
from compress.config import Vocabulary
from compress.context import Context
from compress.training.corpus import learnable, learned
from compress.training.start import read_captioner, write_captioner
from students.lightcap.tokenizer import encode_captions, keep_pieces, narrowed

KEPT = "vocabulary.json"  # piece i of this artifact was piece kept[i] of its parent's


def run(parent: Artifact, config: Vocabulary, context: Context) -> Artifact:
    """Writes the parent over the pieces that occur `min_count` times in training captions, those that it was trained to say although none
    has them, as by a teacher's captions, and every single character, so that any word can still be spelled. The kept pieces keep their
    order: vocabulary.json lists their ids in the parent's vocabulary."""
    model, tokenizer, settings = read_captioner(parent.path)
    captions = [caption for example in context.data.split("train").examples for caption in example.captions]
    counts = Counter(piece for ids in encode_captions(tokenizer, captions, model.config.max_tokens) for piece in ids)
    seen = [piece for piece, count in counts.items() if count >= config.min_count]
    taught = [piece for piece in learned(model) if piece not in counts]
    keep = keep_pieces(tokenizer, [*seen, *taught, *model.own_pieces()])
    context.progress.log(f"{context.stage.name}: {len(keep)} of {model.config.vocabulary} word pieces kept")
    before = model.config.vocabulary
    model.narrow(torch.tensor(keep))
    smaller = narrowed(tokenizer, keep)
    # Some words are spelled now, by pieces that no caption held before.
    learnable(model, {piece for ids in encode_captions(smaller, captions, model.config.max_tokens) for piece in ids})
    write_json(context.output / KEPT, {"pieces_before": before, "kept": keep})
    write_captioner(context.output, model, smaller, settings)
    return Artifact(context.output)
