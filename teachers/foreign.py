"""Captioners that others made and trained, read from a folder in the layout that their hub repositories have: BLIP (Li et al., 2022) and
GIT (Wang et al., 2022) by transformers, CoCa (Yu et al., 2022) by open_clip."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from students.lightcap.tokenizer import read_tokenizer
from teachers.layouts import WEIGHTS, files_of, kind_of

CLASSES = {"blip": "BlipForConditionalGeneration", "git": "GitForCausalLM"}  # of transformers


class Foreign(Protocol):
    """`encoder` is the image encoder of `model`, `image_size` the side in pixels of what it takes."""

    model: nn.Module
    encoder: nn.Module
    image_size: int

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images of any size -> (B, 3, S, S), as its makers prepare them."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> what the image encoder gives (B, N, width)."""
        ...

    def captions(self, pixels: Tensor, beam: int, tokens: int, exactly: bool = False) -> list[tuple[str, float]]:
        """(caption, log-probability) of each image, of at most `tokens` word pieces with the end; or, at beam 1, of `exactly` so many."""
        ...


def load(folder: Path, search) -> Foreign:
    """The captioner in `folder`. `search(model, grid, start, end, beam, tokens)` is the beam search for one that brings none: for each
    image the pieces and their log-probability. Raises ValueError or FileNotFoundError, in one line."""
    kind = kind_of(folder)
    if kind is None:
        raise ValueError(f"{folder} holds none of {', '.join(WEIGHTS)}")
    if missing := [file.name for file in files_of(folder, kind) if not file.is_file()]:
        raise FileNotFoundError(f"{folder} is no whole {kind}: it has no {missing[0]}")
    return CoCa(folder, search) if kind == "coca" else Transformers(folder, kind)


class Transformers:
    """BLIP or GIT, as transformers generates. `vocabulary` are its word pieces by id, as BERT writes them."""

    def __init__(self, folder: Path, kind: str) -> None:
        import transformers

        with silent(transformers):
            try:
                self.model, found = getattr(transformers, CLASSES[kind]).from_pretrained(
                    folder, weights_only=True, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
                    dtype=torch.float32,
                )
                self.processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            except Exception as error:  # of broken files and of pickles that hold more than tensors both libraries raise anything
                raise ValueError(f"{folder} is no whole {kind}: {cause(error)}") from None
        if CLASSES[kind] not in (said := self.model.config.architectures or [CLASSES[kind]]):
            raise ValueError(f"{folder} is a {kind} that does not caption ({', '.join(said)}); {CLASSES[kind]} does")
        for what, key in (("have no", "missing_keys"), ("do not fit its config.json in", "mismatched_keys")):
            if names := sorted(name if isinstance(name, str) else name[0] for name in found[key]):
                more = f", and {len(names) - 1} more" * (len(names) > 1)
                raise ValueError(f"{folder} is no whole {kind}: its weights {what} {names[0]}{more}")
        self.model.eval()
        self.tokenizer, self.blip = read_tokenizer(folder / "tokenizer.json"), kind == "blip"
        text = self.model.config.text_config if self.blip else self.model.config
        self.encoder = self.model.vision_model if self.blip else self.model.git.image_encoder
        self.writer = self.model.text_decoder if self.blip else self.model
        self.start, self.end = text.bos_token_id, text.sep_token_id if self.blip else text.eos_token_id
        self.writer.generation_config = transformers.GenerationConfig(  # what a checkpoint's own says of lengths and beams is left out
            bos_token_id=self.start, eos_token_id=self.end, pad_token_id=text.pad_token_id
        )
        self.image_size = self.model.config.vision_config.image_size

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        return self.processor(images=list(images), return_tensors="pt")["pixel_values"]

    def encode(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixel_values=pixels).last_hidden_state

    @torch.no_grad()
    def captions(self, pixels: Tensor, beam: int, tokens: int, exactly: bool = False) -> list[tuple[str, float]]:
        # A hypothesis counts by the mean of its pieces, and an image is done when so many are finished: as our own beam search.
        found = self.model.generate(
            pixel_values=pixels, num_beams=beam, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens if exactly else None,
            length_penalty=1.0, early_stopping=beam > 1, return_dict_in_generate=True, output_scores=True,
        )
        said = found.sequences[:, 1:]  # behind the start
        each = self.writer.compute_transition_scores(found.sequences, found.scores, getattr(found, "beam_indices", None), beam == 1)
        over = (said == self.end).long().cumsum(1) - (said == self.end).long() > 0  # behind the end
        total = each[:, : said.shape[1]].masked_fill(over, 0.0).sum(1)
        texts = self.tokenizer.decode_batch(said.masked_fill(over, self.end).tolist(), skip_special_tokens=True)
        return list(zip(texts, total.tolist(), strict=True))

    @torch.no_grad()
    def logits(self, pixels: Tensor, captions: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """pixels of B images, and the captions of each as ids from [CLS] on -> (n, V), what is said behind each piece but a caption's
        last, image by image."""
        most, longest = max(map(len, captions)), max(len(ids) for own in captions for ids in own) - 1
        pieces = torch.zeros(most, len(captions), longest, dtype=torch.long)  # first all images' first captions: GIT repeats grids so
        for image, own in enumerate(captions):
            for number, ids in enumerate(own):
                pieces[number, image, : len(ids) - 1] = torch.tensor(ids[:-1])
        pieces[..., 0] = self.start  # which is not [CLS] in BLIP
        flat = pieces.flatten(0, 1).to(pixels.device)
        if self.blip:
            found = self.model.text_decoder(input_ids=flat, encoder_hidden_states=self.encode(pixels).repeat(most, 1, 1)).logits
        else:
            found = self.model(input_ids=flat, pixel_values=pixels).logits[:, -longest:]
        places = [(number, image, at) for image, own in enumerate(captions) for number, ids in enumerate(own) for at in range(len(ids) - 1)]
        return found.unflatten(0, (most, len(captions)))[tuple(torch.tensor(places, device=pixels.device).T)]


class CoCa:
    """CoCa. What open_clip itself generates with is gone from transformers 5; here each step reads the whole caption so far, as there."""

    def __init__(self, folder: Path, search) -> None:
        import open_clip

        try:
            self.model, self.processor = open_clip.create_model_from_pretrained(f"local-dir:{folder}", precision="fp32", weights_only=True)
            self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
            self.start, self.end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        except Exception as error:
            raise ValueError(f"{folder} is no whole coca: {cause(error)}") from None
        self.model.eval()
        self.search, self.encoder = search, self.model.visual
        self.image_size = open_clip.get_model_preprocess_cfg(self.model)["size"][0]

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        return torch.stack([self.processor(image) for image in images])

    def encode(self, pixels: Tensor) -> Tensor:
        return self.model._encode_image(pixels)[1]

    @torch.no_grad()
    def captions(self, pixels: Tensor, beam: int, tokens: int, exactly: bool = False) -> list[tuple[str, float]]:
        grid = self.encode(pixels)
        found = self.greedy(grid, tokens) if exactly else self.search(self, grid, self.start, self.end, beam, tokens)
        return [(self.tokenizer.decode(pieces).strip(), logprob) for pieces, logprob in found]

    def greedy(self, grid: Tensor, tokens: int) -> list[tuple[list[int], float]]:
        """The most probable next piece, `tokens` times, whatever it is."""
        past, last, total = self.prefill(grid), torch.full((len(grid), 1), self.start, device=grid.device), 0.0
        for position in range(tokens):
            logits, past = self.step(last, position, past)
            best = logits.float().log_softmax(-1).max(-1)
            total, last = total + best.values, best.indices.unsqueeze(1)
        pieces = torch.cat([past[0].pieces[:, 1:], last], 1)
        return list(zip(pieces.tolist(), total.tolist(), strict=True))

    def prefill(self, grid: Tensor) -> list[Said]:
        return [Said(grid, torch.empty(len(grid), 0, dtype=torch.long, device=grid.device))]

    def step(self, last: Tensor, position: int, past: list[Said]) -> tuple[Tensor, list[Said]]:
        """last (R, 1), the pieces at `position` of R captions, as many of each image -> logits (R, V) of the next, and what was said."""
        [said] = past
        before = said.pieces if position else said.pieces.new_empty(len(last), 0)
        said = Said(said.images, torch.cat([before, last], 1))
        images = said.images.repeat_interleave(len(last) // len(said.images), 0)
        text = self.model._encode_text(said.pieces)[1]
        return self.model.text_decoder(images, text)[:, -1], [said]


@dataclass(frozen=True)
class Said:
    """images (B, N, width); pieces (R, t) of the captions so far."""

    images: Tensor
    pieces: Tensor

    def rows(self, rows: Tensor, images: Tensor | None) -> Said:
        """The captions `rows`; of the images those, or all."""
        return Said(self.images if images is None else self.images[images], self.pieces[rows])


@contextlib.contextmanager
def silent(transformers) -> Iterator[None]:
    """No bars and no remarks, while weights are read."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def cause(error: Exception) -> str:
    """The line of a library's error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if any("weights_only" in line or "Weights only" in line for line in lines):
        return "its weights are a pickle that holds more than tensors; give safetensors instead"
    return lines[1] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else lines[0]
