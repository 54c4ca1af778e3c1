"""A training split ready to be batched: captions in the ids of the pieces they use, and where the images' features come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from compress.context import Context
from compress.data import CaptionSet
from compress.errors import DataError, ModelError
from compress.parallel import ALONE, Share
from compress.training.batches import Batch, Captions, Masking, order, pack, pack_masked, steps_of
from compress.training.features import device, grids, grids_key, normalised, pixels
from students.lightcap import LightCap
from students.lightcap.tokenizer import check_narrows, encode_captions

UNSEEN_BIAS = -100.0  # the logit bias of a piece that no training caption holds: it was never learned, so it is never produced


@dataclass(frozen=True)
class Corpus:
    """`captions` speak in positions of `keep` (ids of the full vocabulary, ascending); `grid_of(model, images)` gives features, whose
    digest is `features` (empty where the encoder is trained)."""

    captions: Captions
    keep: Tensor
    grid_of: Callable[[LightCap, np.ndarray], Tensor]
    features: str

    def steps(self, epochs: float, batch_images: int) -> int:
        return steps_of(len(self.captions.images), epochs, batch_images)

    def batches(self, batch_images: int, seed: int, mask_piece: int | None = None, share: Share = ALONE) -> Callable[[int], Batch]:
        """Step number -> this process's share of the batch, the same for the same seed; of masked pieces where `mask_piece` (its place in
        `keep`) is given."""
        masking = None if mask_piece is None else Masking(mask_piece, len(self.keep))
        per_epoch = -(-len(self.captions.images) // batch_images)
        known: dict[int, list[np.ndarray]] = {}

        def batch(step: int) -> Batch:
            epoch, within = divmod(step, per_epoch)
            if epoch not in known:
                known.clear()
                known[epoch] = order(self.captions, batch_images, epoch, seed)
            images = share.of(known[epoch][within])
            if masking is None:
                return pack(self.captions, images).to(device())
            return pack_masked(self.captions, images, masking, np.random.default_rng([seed, step, share.rank])).to(device())

        return batch


def disturbed(pictures: Tensor, flip: bool, crop: float) -> Tensor:
    """`pictures` (N, 3, H, W), half of them mirrored with `flip`, each cut to a square of 1 - `crop` to 1 of its side, anywhere in it,
    and resized (bilinear) to H x W. In fp32 also within autocast: bf16 would move the places of an edge by half a pixel."""
    if not flip and not crop:
        return pictures
    draws = torch.rand(4, len(pictures), device=pictures.device)
    side = 1 - crop * draws[0]
    across, down = ((1 - side) * (2 * draw - 1) for draw in draws[1:3])
    none = torch.zeros_like(side)
    mirrored = torch.where(draws[3] < 0.5, -side, side) if flip else side
    theta = torch.stack([torch.stack([mirrored, none, across], 1), torch.stack([none, side, down], 1)], 1)
    with torch.autocast(pictures.device.type, enabled=False):
        places = F.affine_grid(theta, list(pictures.shape), align_corners=False)
        return F.grid_sample(pictures, places, padding_mode="border", align_corners=False)


def corpus(
    model: LightCap, tokenizer: Tokenizer, settings: dict, context: Context, tuned: bool = False, flip: bool = False, crop: float = 0.0,
    beside: Iterable[int] = (), said: Sequence[Sequence[str]] | None = None,
) -> Corpus:
    """The train split of `context.data` for `model`. `tuned`: pictures are encoded in every step, after `disturbed`, by the encoder
    as it then is; otherwise their grids are computed once. `beside`: word pieces that are kept for others, such as a teacher's own.
    `said`: captions of each picture, in place of people's."""
    data = context.data.split("train")
    texts = [example.captions for example in data.examples] if said is None else said
    encoded = [encode_captions(tokenizer, captions, model.config.max_tokens) for captions in texts]
    used = {piece for captions in encoded for caption in captions for piece in caption}
    if known := learned(model):
        learnable(model, used)
    used.update(known)
    end = tokenizer.token_to_id("[SEP]")  # which no caption has where all are cut off
    keep = torch.tensor(sorted(used.union(model.own_pieces(), beside, [end])))
    place = {int(piece): index for index, piece in enumerate(keep)}
    captions = Captions.of([[[place[piece] for piece in caption] for caption in captions] for captions in encoded])
    key = "" if tuned else grids_key(model, data, settings)
    return Corpus(captions, keep, grids_of(model, data, settings, context, tuned, flip, crop), key)


def learned(model: LightCap) -> list[int]:
    """The word pieces over which `model` was trained: of these captions or a teacher's, and of concepts; none where nothing has trained it
    yet."""
    can = model.heads.bias.detach() > UNSEEN_BIAS / 2
    return [] if can.all() else can.nonzero().flatten().tolist()


def learnable(model: LightCap, used: Iterable[int]) -> None:
    """Pieces `used` that no caption held before get the least bias of those that were learned: at UNSEEN_BIAS they would cost a hundred
    nats each in whatever is trained next, and never come back."""
    bias = model.heads.bias.data
    known = bias > UNSEEN_BIAS / 2
    new = [piece for piece in used if not known[piece]]
    bias[new] = bias[known].min()


def check_tokenizer(tokenizer: Tokenizer, context: Context) -> None:
    """ModelError for a tokenizer that a 'vocabulary' stage of the recipe cannot cut, DataError for one that does not know most of the
    training captions' pieces; a smaller share of them, which no captioner will say, is logged."""
    if any(stage.kind == "vocabulary" for stage in context.recipe.stages):
        try:
            check_narrows(tokenizer)
        except ValueError as error:
            raise ModelError(f"{error}: give a tokenizer with WordPiece (student.tokenizer), or leave out the 'vocabulary' stage") from None
    texts = (caption for example in context.data.split("train").examples for caption in example.captions)
    pieces = [piece for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False) for piece in encoding.ids]
    share = pieces.count(tokenizer.token_to_id("[UNK]")) / max(1, len(pieces))
    if share > 0.5:
        raise DataError(f"the tokenizer does not know {share:.0%} of the captions' word pieces: name one of their language, "
                        "--set student.tokenizer=PATH")
    if share > 0.001:
        context.progress.log(f"{share:.1%} of the captions' word pieces are unknown to the tokenizer, and will not be said")


def grids_of(
    model: LightCap, data: CaptionSet, settings: dict, context: Context, tuned: bool = False, flip: bool = False, crop: float = 0.0
) -> Callable[[LightCap, np.ndarray], Tensor]:
    """A function of a model and picture numbers (B,) of `data`: their grids (B, G, channels). `tuned`: by the encoder as it then is, after
    `disturbed`; otherwise `model`'s encoder computes them once, here."""
    where = device()
    if tuned:
        pictures = pixels(data, settings, context.cache, context.progress)
        return lambda model, images: model.encode(disturbed(normalised(pictures[images], settings, where), flip, crop))
    features = grids(model, data, settings, context.cache, context.progress)
    return lambda model, images: torch.from_numpy(features[images]).to(where, non_blocking=True).float()
