"""Embeddings of short texts, for the concept extractor to align regions with: CLIP's text encoder, or MiniLM's sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import ModelError
from students.lightcap.bert import minilm_folder
from students.lightcap.checkpoint import CLIP_NAMES, checkpoint_file, unlogged

BATCH = 128
WORDS = ("minilm", "openai")


def embed_texts(texts: Sequence[str], encoder: str) -> Tensor:
    """(n, text) of length one. `encoder`: `minilm` (384 wide), or CLIP RN50's (1,024 wide): `openai`, or its weights as open_clip reads
    them: a file, a folder or OWNER/NAME of the hub. ModelError, in one line, where it is not to be had."""
    try:
        found = minilm(texts) if encoder == "minilm" else clip(texts, encoder)
    except FileNotFoundError as error:
        raise ModelError(str(error)) from None
    return F.normalize(found.float(), dim=-1)


def text_file(encoder: str) -> Path | None:
    """The file of CLIP RN50's weights that `text_encoder` names; None of a word, whose weights a package fetches or carries.
    FileNotFoundError, in one line."""
    if encoder in WORDS:
        return None
    return checkpoint_file(encoder, "CLIP RN50's text encoder", "text_encoder", WORDS, CLIP_NAMES)


@torch.inference_mode()
def minilm(texts: Sequence[str]) -> Tensor:
    """The mean of the last layer's states over a text's pieces, as sentence-transformers pools them."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # it would list what the weights hold and this model does not need
    logging.disable_progress_bar()
    folder = minilm_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    for start in range(0, len(texts), BATCH):
        pieces = tokenizer(list(texts[start : start + BATCH]), padding=True, return_tensors="pt")
        real = pieces["attention_mask"].unsqueeze(-1)
        rows.append((model(**pieces).last_hidden_state * real).sum(1) / real.sum(1))
    return torch.cat(rows)


@torch.inference_mode()
def clip(texts: Sequence[str], weights: str) -> Tensor:
    import open_clip

    file = text_file(weights)
    try:
        # OpenAI's weights were trained with QuickGELU; by itself open_clip only warns of another activation.
        with unlogged():
            model = open_clip.create_model("RN50", pretrained=weights if file is None else str(file), force_quick_gelu=True).eval()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"CLIP RN50's text encoder '{weights}' could not be loaded ({reason}); download its safetensors once and set text_encoder=FILE,"
            " or text_encoder: minilm"
        ) from None
    tokenize = open_clip.get_tokenizer("RN50")
    return torch.cat([model.encode_text(tokenize(list(texts[i : i + BATCH]))) for i in range(0, len(texts), BATCH)])
