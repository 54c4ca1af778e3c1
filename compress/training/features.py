"""Frozen features: each picture is decoded once, and encoded once per encoder."""

from __future__ import annotations

import hashlib
import inspect
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from compress.context import Progress
from compress.data import CaptionSet
from compress.parallel import on_cpu
from compress.process import cores
from compress.sources import made_by
from compress.training.store import found, stored
from students.lightcap import LightCap
from students.lightcap.norms import folded

ROWS = 256
BATCH = 32


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not on_cpu() else "cpu")


def pixels(data: CaptionSet, settings: dict, cache: Path, progress: Progress) -> np.ndarray:
    """Every picture of `data`, decoded and squashed to (N, S, S, 3) uint8."""
    size = settings["image_size"]
    how = size, settings["resize"], settings["interpolation"], made_by("compress.data.photos"), inspect.getsource(squash)
    key = digest("pixels", *how, data.fingerprint, [e.image_id for e in data.examples])
    if (whole := found(cache / "pixels", key)) is not None:
        return whole

    def fill(start: int, stop: int) -> np.ndarray:
        with ThreadPoolExecutor(cores()) as pool:
            pictures = pool.map(lambda example: squash(data.image(example), settings), data.examples[start:stop])
            return np.stack(list(pictures))

    count = len(data.examples)
    with progress.task("pictures", count) as task:
        return stored(cache / "pixels", key, (count, size, size, 3), "uint8", ROWS, fill, task)


def grids(model: LightCap, data: CaptionSet, settings: dict, cache: Path, progress: Progress) -> np.ndarray:
    """The encoder's grid for every picture of `data`, (N, G, channels) float16."""
    config, key = model.config, grids_key(model, data, settings)
    shape = (len(data.examples), config.grid**2, config.channels)
    if (whole := found(cache / "grids", key)) is not None:
        return whole
    pictures = pixels(data, settings, cache, progress)
    where = device()
    model.encoder.to(where, memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def fill(start: int, stop: int) -> np.ndarray:
        blocks = []
        for first in range(start, stop, BATCH):
            grid = model.encode(normalised(pictures[first : min(first + BATCH, stop)], settings, where))
            blocks.append(grid.to("cpu", torch.float16).numpy())
        return np.concatenate(blocks)

    with folded(model.encoder, settings["image_size"]), progress.task("features", len(data.examples)) as task:
        return stored(cache / "grids", key, shape, "float16", ROWS, fill, task)


def variance(grids: np.ndarray) -> float:
    """Of the first pictures' grids: what the squared error of a grid is measured by."""
    return float(np.asarray(grids[:ROWS], np.float32).var())


def grids_key(model: LightCap, data: CaptionSet, settings: dict) -> str:
    """The digest under which `grids` are kept: of the encoder's weights, the preprocessor, the pictures and the code that reads them."""
    how = encoder_digest(model.encoder), settings, made_by(__name__)
    return digest("grids", *how, data.fingerprint, [e.image_id for e in data.examples])


def squash(picture: np.ndarray, settings: dict) -> np.ndarray:
    """(H, W, 3) uint8 -> (S, S, 3) uint8, as `compress.runtime.squash` does on the device (a test holds the two together; importing it
    here would train everything anew whenever the device's program changes)."""
    size = settings["image_size"]
    if picture.shape[:2] == (size, size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))


def normalised(pictures: np.ndarray, settings: dict, where: torch.device) -> Tensor:
    """uint8 pictures (B, S, S, 3) -> (B, 3, S, S) float32, normalised, channels last: the arithmetic of `runtime.pixels`."""
    x = torch.from_numpy(np.array(pictures)).to(where).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(settings[name], device=where).view(3, 1, 1) for name in ("mean", "std"))
    return x.sub_(mean).div_(std)


def encoder_digest(encoder: nn.Module) -> str:
    whole = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        whole.update(f"{name} {tuple(tensor.shape)}".encode())
        whole.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return whole.hexdigest()


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
