"""The ledger row of a finished captioner. Of one that others made: how good it is, what it costs and how long it takes, counted and timed
as lightcap's own are, which `compress.evaluate` measures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from compress import cost, evaluate, metrics
from compress.artifact import Artifact
from compress.context import Context
from compress.errors import StageError
from compress.evaluate import BEAM, accuracy, senseless, written_down
from compress.foreign import captions, read
from compress.latency import TIMED_IMAGES
from teachers.foreign import Foreign


def measure(artifact: Artifact, against: Artifact | None, context: Context) -> dict:
    """The ledger row, as `compress.evaluate.measure` gives it."""
    if not artifact.foreign:
        return evaluate.measure(artifact, None, context)
    captioner, split = read(artifact), context.recipe.data.val_split
    data = context.data.split(split)
    with context.progress.task(f"captions of {split}", len(data)) as task:
        said = captions(captioner, data, BEAM, task.advance)
    if broken := senseless(data, said):
        raise StageError(f"the log-probabilities of {len(broken)} captions, the first of {broken[0]}, are not finite: its weights are "
                         "damaged; get it again")
    scores = metrics.score([text for text, _ in said], [list(example.captions) for example in data.examples])
    written_down(artifact, data, said, scores)
    return accuracy(scores) | of_captioner(captioner, artifact, context)


def sizes(artifact: Artifact, context: Context) -> dict:
    """Of `measure` what has no captions."""
    return of_captioner(read(artifact), artifact, context) if artifact.foreign else evaluate.sizes(artifact, context)


def of_captioner(captioner: Foreign, artifact: Artifact, context: Context) -> dict:
    split = context.recipe.data.val_split
    data = context.data.split(split)
    pictures = [data.image(example) for example in data.examples[:TIMED_IMAGES]]
    return {"split": split, "bytes": artifact.bytes()} | costs(captioner) | latency(captioner, pictures)


def costs(captioner: Foreign, tokens: int = cost.TOKENS) -> dict:
    """As `compress.cost.costs`, but its bytes: counted while it writes a caption of `tokens` pieces, and what it computes twice is counted
    twice."""
    pixels = torch.zeros(1, 3, captioner.image_size, captioner.image_size)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator, whose products no counter sees
    try:
        encoder = sum(cost.counted(lambda: captioner.encode(pixels)))
        whole = sum(cost.counted(lambda: captioner.captions(pixels, 1, tokens, exactly=True)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    params, encoding = cost.count(captioner.model), cost.count(captioner.encoder)
    return {
        "params": params,
        "params_by_part": {"encoder": encoding, "text": params - encoding},
        "gmacs_encoder": encoder / 1e9,
        "gmacs_caption": whole / 1e9,
        "gflops_caption": 2 * whole / 1e9,
        "gbops_caption": 32 * 32 * whole / 1e9,
    }


def latency(captioner: Foreign, pictures: Sequence[np.ndarray], tokens: int = cost.TOKENS) -> dict:
    """As `compress.latency`, in PyTorch: a decoded image of the side that is looked at in, a text of exactly `tokens` pieces out, beam 1,
    one thread."""
    size = captioner.image_size, captioner.image_size
    images = [Image.fromarray(picture).resize(size) for picture in pictures]
    with cost.one_thread():
        [times] = cost.interleaved([lambda turn: captioner.captions(captioner.pixels([images[turn]]), 1, tokens, True)], len(images))
    return {"latency_ms": {**cost.quantiles(times), "threads": 1, "beam": 1, "runtime": "torch"}, "parent_latency_ms": None}
