"""Where training starts: a new captioner as the recipe describes it, or an artifact; and how it is written down."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from compress.config import Student
from compress.errors import ModelError
from students.lightcap import LightCap, LightCapConfig, preset
from students.lightcap.bert import load_bert
from students.lightcap.dropout import set_dropout
from students.lightcap.encoder import load_encoder, preprocessor
from students.lightcap.tokenizer import load_tokenizer, pieces_of, read_tokenizer


def captioner_config(
    student: Student, name: str, image_size: int | None, dropout: float, vocabulary: int, like: LightCapConfig | None = None,
    modulator: int | None = None, extracts: bool = False,
) -> LightCapConfig:
    """The sizes of `new_captioner`. Raises ValueError for those that no captioner can have."""
    own = name == student.preset
    sizes = {key: getattr(student, key) if own else None for key in ("layers", "hidden", "attention_heads", "ffn", "heads")}
    side = student.image_size or image_size
    config = preset(name, dropout=dropout, encoder=student.encoder, image_size=side, vocabulary=vocabulary, **sizes)
    if like is not None:
        known = ("concepts", "alignment", "concept_vocabulary")
        shapes = {name: shape for name, shape in like.shapes.items() if name.startswith(("encoder.", "alignment."))}  # pruned ones
        config = dataclasses.replace(config, shapes=shapes, **{key: getattr(like, key) for key in known})
    elif not extracts:
        config = dataclasses.replace(config, concepts=0, alignment=None)
    if modulator is not None or not config.concepts:
        config = dataclasses.replace(config, modulator=modulator if modulator and config.concepts else None)
    return config


def new_captioner(
    student: Student, name: str, fusion_weights: str | None, image_size: int | None, dropout: float, seed: int,
    like: LightCap | None = None, modulator: int | None = None, extracts: bool = False,
) -> tuple[LightCap, Tokenizer, dict]:
    """The preset `name` with the recipe's encoder and tokenizer: model, tokenizer, preprocessor settings.

    Sizes set in the `student` section change the student's own preset alone. Encoder and concept extractor are those of `like`, if it is
    given; a captioner without it reads no concepts, whatever its preset, but for one that an extractor is to be trained for (`extracts`).
    `modulator` (0: none) takes the place of the preset's. ModelError for weights that are absent or do not fit.
    """
    try:
        tokenizer = load_tokenizer(student.tokenizer or "english")
        torch.manual_seed(seed)
        known = None if like is None else like.config
        config = captioner_config(student, name, image_size, dropout, len(pieces_of(tokenizer)), known, modulator, extracts)
        model = LightCap(config)
        if like is None:
            load_encoder(model.encoder, config.encoder, student.encoder_weights)
        else:
            take_encoder(model, like)
        if fusion_weights:
            load_bert(model.fusion, fusion_weights)
    except (ValueError, FileNotFoundError) as error:
        raise ModelError(str(error)) from None
    return model, tokenizer, preprocessor(config.encoder, config.image_size)


def take_encoder(model: LightCap, like: LightCap) -> None:
    """Image encoder and concept extractor of `like`. ModelError where they are of other shapes."""
    for part in ("encoder", *(("alignment", "concepts") if model.config.concepts else ())):
        try:
            getattr(model, part).load_state_dict(getattr(like, part).state_dict())
        except RuntimeError as error:
            raise ModelError(f"the recipe's encoder is not the one it starts from: {str(error).splitlines()[-1].strip()}") from None


def read_captioner(folder: Path) -> tuple[LightCap, Tokenizer, dict]:
    """Model, tokenizer and preprocessor settings of a float artifact. ModelError, in one line, where it is not whole."""
    try:
        model = LightCap.from_pretrained(folder)
        tokenizer = read_tokenizer(folder / "tokenizer.json")
        settings = json.loads((folder / "preprocessor_config.json").read_text())
    except (ValueError, FileNotFoundError) as error:
        raise ModelError(str(error)) from None
    return model, tokenizer, settings


def continued(folder: Path, dropout: float) -> tuple[LightCap, Tokenizer, dict]:
    """`read_captioner`, to be trained on with a stage's dropout."""
    model, tokenizer, settings = read_captioner(folder)
    set_dropout(model, dropout)
    return model, tokenizer, settings


def write_captioner(folder: Path, model: LightCap, tokenizer: Tokenizer, settings: dict) -> None:
    """What `read_captioner` reads, into a folder that is there."""
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")


def ready(encoder: nn.Module, tuned: bool, student: Student) -> None:
    """Puts an encoder into the state that it is trained in, or read in where it is not tuned."""
    # Batches of a few images say too little to renew a pretrained encoder's norms.
    pretrained = student.encoder_weights not in (None, "none")
    encoder.to(memory_format=torch.channels_last).train(tuned and not pretrained)


def language(model: LightCap) -> nn.ModuleDict:
    """What is trained behind the image encoder and the concept extractor; all else is frozen."""
    parts = nn.ModuleDict({"fusion": model.fusion, "heads": model.heads})
    if model.modulator is not None:
        parts["modulator"] = model.modulator
    model.requires_grad_(False)
    return parts.requires_grad_(True)
