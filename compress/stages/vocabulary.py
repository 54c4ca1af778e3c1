"""Keeps the word pieces that training captions use: the embedding and the output projection, which are one matrix, shrink together."""

from __future__ import annotations

from collections import Counter

import torch

from compress.artifact import Artifact
from compress.config import Vocabulary
from compress.context import Context
from compress.training.start import read_captioner, write_captioner
from students.lightcap.tokenizer import encode_captions, keep_pieces, narrowed


def run(parent: Artifact, config: Vocabulary, context: Context) -> None:
    """Writes the parent over the pieces that occur `min_count` times in training captions, and every single character, so that any word
    can still be spelled. The kept pieces keep their order."""
    model, tokenizer, settings = read_captioner(parent.path)
    captions = [caption for example in context.data.split("train").examples for caption in example.captions]
    counts = Counter(piece for ids in encode_captions(tokenizer, captions, model.config.max_tokens) for piece in ids)
    seen = [piece for piece, count in counts.items() if count >= config.min_count]
    keep = keep_pieces(tokenizer, [*seen, *model.own_pieces()])
    context.progress.log(f"{context.stage.name}: {len(keep)} of {model.config.vocabulary} word pieces kept")
    model.narrow(torch.tensor(keep))
    write_captioner(context.output, model, narrowed(tokenizer, keep), settings)
