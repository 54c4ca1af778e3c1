"""One small captioner for the tests of graphs: eight colours, a caption for each, a decoder trained until it tells them apart."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from compress import runtime
from compress.artifact import Artifact
from compress.data import CaptionSet, Example
from compress.stages import export
from students.lightcap import LightCap, preset
from students.lightcap.encoder import preprocessor
from students.lightcap.tokenizer import encode_captions, keep_pieces, load_tokenizer, narrowed

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240), "black": (10, 10, 10),
           "yellow": (230, 220, 30), "pink": (240, 150, 190), "brown": (120, 70, 20)}
SHAPES = ("house", "dog", "tree", "street")
SETTINGS = preprocessor("resnet-small", 80)
# A pruned first layer: one head of two, and three quarters of the feed-forward width.
PRUNED = {"fusion.layers.0.query": (16, 32), "fusion.layers.0.key": (16, 32), "fusion.layers.0.value": (16, 32),
          "fusion.layers.0.output": (32, 16), "fusion.layers.0.up": (48, 32), "fusion.layers.0.down": (32, 48)}


def tokenizer():
    whole = load_tokenizer("english")
    words = ["a", "on", "the", *COLOURS, *SHAPES]
    return narrowed(whole, keep_pieces(whole, [whole.token_to_id(word) for word in words]))


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """(80, 80, 3) uint8, one colour after the other, with noise."""
    random = np.random.default_rng(seed)
    colours = list(COLOURS.values())
    plain = [np.array(colours[i % len(colours)]) + random.normal(0, 12, (80, 80, 3)) for i in range(count)]
    return [picture.clip(0, 255).astype(np.uint8) for picture in plain]


def caption(index: int) -> str:
    colour = index % len(COLOURS)
    return f"a {list(COLOURS)[colour]} {SHAPES[colour % 4]} on the {SHAPES[colour % 3]}"


def captioned(*splits: str) -> CaptionSet:
    """Sixteen pictures of each split, "train" or "val", with a caption of each."""
    shown = {"train": pictures(16), "val": pictures(16, seed=5)}
    examples = tuple(Example(str(i), split, (caption(i),)) for split in splits for i in range(16))
    return CaptionSet(examples, "0" * 64, "colours", reader=lambda example: shown[example.split][int(example.image_id)])


def pixels(images: list[np.ndarray]) -> np.ndarray:
    return np.stack([runtime.pixels(image, SETTINGS) for image in images])


def build(shapes: dict | None = None, steps: int = 0, seed: int = 0) -> LightCap:
    """A tiny LightCap whose batch norms have seen the pictures and whose weights are large enough to matter; `steps` of training. Seeds
    what is drawn behind it, too."""
    torch.manual_seed(seed)
    return copy.deepcopy(built(tuple((shapes or {}).items()), steps, seed))


@functools.cache
def built(shapes: tuple, steps: int, seed: int) -> LightCap:
    """Made once for all tests of a process."""
    torch.manual_seed(seed)
    words = tokenizer()
    config = dataclasses.replace(preset("tiny", vocabulary=words.get_vocab_size()), shapes=dict(shapes), dropout=0.0)
    model = LightCap(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and not name.startswith("encoder."):
                weight.normal_(0, weight.shape[1] ** -0.5)
            elif name.endswith("bias"):
                weight.normal_(0, 0.2)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.weight.uniform_(0.5, 1.0)
        batch = torch.from_numpy(pixels(pictures(16, seed)))
        model.encoder.train()(batch)
        model.eval()
        grid = model.encode(batch)
    if steps:
        train(model, grid, torch.tensor(encode_captions(words, [caption(i) for i in range(16)], 20)), steps)
    return model


def train(model: LightCap, grid: torch.Tensor, captions: torch.Tensor, steps: int) -> None:
    """Teacher forcing on captions of one length, (16, 1 + words + 1)."""
    tokens, targets = captions[:, :-1], captions[:, 1:]
    length, first = tokens.shape[1], grid.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    mask = torch.ones(first + length, first + length, dtype=torch.bool).tril()
    mask[:, :first] = True
    mask = mask.expand(len(tokens), 1, -1, -1)
    parameters = [*model.fusion.parameters(), *model.heads.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(steps):
        logits = model.heads(model.states(grid, tokens, positions, mask), model.word)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def artifact(model: LightCap, folder: Path) -> Artifact:
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return Artifact(folder)


@functools.cache
def exported(base: Path) -> tuple[LightCap, Path]:
    """An untrained model with a pruned layer, and the folder `base`/out of its float export; made once for all tests."""
    model = build(PRUNED)
    export.export(artifact(model, base / "float"), base / "out")
    return model, base / "out"
