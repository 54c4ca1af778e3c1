"""Many processes train one captioner: each takes its share of every batch, and their gradients are averaged.

    OMP_NUM_THREADS=8 accelerate launch --num_processes 4 -m compress run lightcap-coco

`batch_images` stays that of the whole batch. Shares weigh the same however long their captions are, and batch norms see their own share,
so the result is not that of one process to the last digit. The first process writes artifacts and the cache; the others wait for its
files where it works alone, so all must see one folder.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.errors import StageError, UsageError

if TYPE_CHECKING:
    from torch import nn

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Share:
    """Process `rank` of `size`, which `launch` started together."""

    rank: int = 0
    size: int = 1
    launch: str = ""

    def of(self, images: Sequence[int]) -> np.ndarray:
        """This process's images of a batch. One that is smaller than the number of processes is given whole to each."""
        images = np.asarray(images)
        return images[self.rank :: self.size] if len(images) >= self.size else images

    def weight(self, images: Sequence[int], count: Callable[[int], int]) -> float:
        """What the mean over this share's items, `count(image)` of each image, is multiplied by, so that the average over the processes is
        the mean over those of the whole batch; 0 where the share has none."""
        counts = [sum(count(int(image)) for image in Share(rank, self.size).of(images)) for rank in range(self.size)]
        return self.size * counts[self.rank] / max(1, sum(counts))

    def agrees(self, what: str) -> bool:
        """Whether the first process says the same, ASCII as long as this. All have to ask; StageError where one has stopped before."""
        if self.size == 1:
            return True
        try:
            first = first_says(what)
        except RuntimeError:
            raise StageError("another process stopped before the run began; its own message says why") from None
        return first == what

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes each gradient the mean over the processes. Where a share did not touch a parameter it counts as zero; one that none touched
        has no gradient still, and so is not decayed."""
        if self.size == 1:
            return
        import torch
        from torch.distributed import ReduceOp, all_reduce

        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        touched = gradients[0].new_tensor([p.grad is not None for p in parameters])
        flat = torch.cat([touched, *(gradient.flatten() for gradient in gradients)]).div_(self.size)
        all_reduce(flat, ReduceOp.SUM)
        touched, *means = flat.split([len(parameters), *(p.numel() for p in parameters)])
        for parameter, mean, any_touched in zip(parameters, means, touched.tolist(), strict=True):
            # The fused kernel walks memory: a gradient must lie as its parameter does (channels last, for convolutions).
            parameter.grad = torch.empty_like(parameter).copy_(mean.view_as(parameter)) if any_touched else None


ALONE = Share()


def first_says(text: str) -> str:
    """The first process's `text`, ASCII and as long in each. It goes as bytes: an object would be pickled."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast

    sent = torch.tensor(list(text.encode("ascii")), dtype=torch.uint8, device=PartialState().device)
    return bytes(broadcast(sent).tolist()).decode("ascii")


def until(done: Callable[[], bool]) -> None:
    """Returns when `done()`."""
    while not done():
        time.sleep(POLL_SECONDS)


def on_cpu() -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")


def refuse_several(command: str) -> None:
    """UsageError where a launcher started several processes for a command that is not divided among them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"'{command}' runs in one process: start it without a launcher, or launch 'run' for each recipe")


def share() -> Share:
    """This process's, as the launcher's environment says. StageError where accelerate is not installed."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    try:
        from accelerate import PartialState
    except ImportError:
        raise StageError("several processes need accelerate: pip install 'lightcap[parallel]'") from None
    state = PartialState(cpu=on_cpu())
    return Share(state.process_index, state.num_processes, first_says(uuid.uuid4().hex))
