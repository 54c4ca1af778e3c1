"""Milliseconds of a caption: decoded pixels in, text out, beside its parent in one runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from compress import cost, runtime
from compress.artifact import Artifact
from compress.training.start import read_captioner
from students.lightcap.tokenizer import decode_caption

TIMED_IMAGES = 20


def latency(artifact: Artifact, parent: Artifact | None, pictures: np.ndarray, tokens: int = cost.TOKENS) -> dict:
    """One decoded image in, a text of exactly `tokens` pieces out, beam 1, one thread; each picture once, artifact and parent in turn, in
    one runtime."""
    with tempfile.TemporaryDirectory() as folder:
        pair = [artifact] if parent is None else [artifact, parent]
        name = "onnxruntime" if artifact.graphs else "torch"
        if artifact.graphs and parent is not None and not parent.graphs:
            from compress.stages.export import export

            export(parent, Path(folder) / "parent")
            pair[1] = Artifact(Path(folder) / "parent")
        with cost.one_thread():
            works = [timed_graphs(item, tokens) if name == "onnxruntime" else timed_torch(item, tokens) for item in pair]
            rounds = [lambda turn, work=work: work(pictures[turn]) for work in works]
            times = cost.interleaved(rounds, len(pictures))
    found = [{**cost.quantiles(ms), "threads": 1, "beam": 1, "runtime": name} for ms in times]
    return {"latency_ms": found[0], "parent_latency_ms": found[1] if parent is not None else None}


def timed_graphs(artifact: Artifact, tokens: int) -> Callable[[np.ndarray], str]:
    captioner = runtime.Captioner(artifact.path, threads=1)

    def work(picture: np.ndarray) -> str:
        past = captioner.prefill(captioner.encode(runtime.pixels(picture, captioner.settings)[None]))
        pieces = [captioner.start]
        for position in range(tokens):
            logits, past = captioner.step(pieces[-1:], position, past)
            pieces.append(int(logits[0].argmax()))
        return captioner.tokenizer.decode(pieces, skip_special_tokens=True)

    return work


def timed_torch(artifact: Artifact, tokens: int) -> Callable[[np.ndarray], str]:
    model, tokenizer, settings = read_captioner(artifact.path)
    start = tokenizer.token_to_id("[CLS]")

    def work(picture: np.ndarray) -> str:
        pixels = torch.from_numpy(runtime.pixels(picture, settings)[None])
        return decode_caption(tokenizer, cost.generate(model, pixels, start, tokens))

    return work
