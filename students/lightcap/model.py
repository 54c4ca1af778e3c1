"""LightCap: image encoder, concept extractor, modulator, fusion and heads as one module, with its file format."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from students.lightcap.concepts import NONE, Alignment, ConceptVocabulary, windows
from students.lightcap.config import LightCapConfig
from students.lightcap.encoder import ENCODERS
from students.lightcap.fusion import Fusion, Past
from students.lightcap.heads import Heads
from students.lightcap.modulator import Modulator
from students.lightcap.shapes import changed_shapes, reshape


class LightCap(nn.Module):
    """A captioner of any size (Wang et al., AAAI 2023). Teachers are the same class with a heavier fusion.

    Token layout: [CLS] caption [SEP] at positions 0.., the prefix (concepts, then the grid row by row) from `PREFIX_POSITION` on.
    """

    def __init__(self, config: LightCapConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ENCODERS[config.encoder].build(config.image_size)
        self.alignment = Alignment(config.channels, *config.alignment) if config.alignment else None
        known = config.concept_vocabulary
        self.concepts = ConceptVocabulary(known[0], config.alignment[1], known[1]) if known else None
        self.register_buffer("windows", windows(config.grid) if known else None, persistent=False)
        self.modulator = Modulator(config.hidden, config.modulator, config.channels) if config.modulator else None
        self.fusion = Fusion(
            config.vocabulary, config.positions, config.hidden, config.layers, config.attention_heads, config.ffn, config.channels,
            config.dropout,
        )
        self.heads = Heads(config.hidden, config.heads, config.vocabulary)
        reshape(self, config.shapes)

    @property
    def word(self) -> Tensor:
        """The word embedding (V, hidden), which is the output projection too."""
        return self.fusion.word.weight

    def encode(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, 3, S, S) -> grid tokens (B, grid * grid, channels), row by row."""
        return self.encoder(pixels).flatten(2).transpose(1, 2)

    def start_concepts(self, matrix: Tensor, pieces: Tensor, prior: Tensor, inner: int, most: int) -> None:
        """Gives the model an untrained extractor of the concepts with text embeddings `matrix` (count, text), word pieces `pieces`
        (count, longest) and log-odds `prior` (count,), of which it puts `most` word pieces into the prefix."""
        (count, text), longest = matrix.shape, pieces.shape[1]
        self.config = dataclasses.replace(self.config, concepts=most, alignment=(inner, text), concept_vocabulary=(count, longest))
        self.alignment = Alignment(self.config.channels, inner, text)
        self.concepts = ConceptVocabulary(count, text, longest)
        self.concepts.load_state_dict({"matrix": matrix, "pieces": pieces, "prior": prior})
        self.windows = windows(self.config.grid)

    def concept_scores(self, grid: Tensor, regions: Tensor | None = None) -> Tensor:
        """grid (B, G, channels) -> log-odds (B, count) that each concept is there. `regions` (R, G) or (B, R, G): pooling weights of what
        is looked at, by default the windows of every size."""
        return self.concepts.scores(self.alignment(grid, self.windows if regions is None else regions))

    @torch.no_grad()
    def find_concepts(self, grid: Tensor) -> Tensor | None:
        """grid (B, G, channels) -> word pieces (B, K) of the concepts found; None where the model has no concepts. ValueError where it has
        them, but not what they are."""
        if not self.config.concepts:
            return None
        if self.concepts is None:
            raise ValueError("the model's concepts were never trained: begin with a 'concepts' stage, or set concepts to 0")
        with torch.autocast(grid.device.type, enabled=False):  # near ties would fall otherwise in bf16 than on the device
            return self.concepts.choose(self.concept_scores(grid.float()), self.config.concepts)

    def embed_prefix(self, grid: Tensor, concepts: Tensor | None = None) -> Tensor:
        """grid (B, G, channels) -> prefix embeddings (B, K + G, hidden). `concepts` (B, K): other word pieces than the model would find."""
        if concepts is None:
            concepts = self.find_concepts(grid)
        if concepts is None:
            return self.fusion.embed_prefix(grid)
        words = self.fusion.word(concepts)
        return self.fusion.embed_prefix(grid if self.modulator is None else self.modulator(grid, words), words)

    def prefill(self, grid: Tensor, concepts: Tensor | None = None) -> Past:
        """The prefix's keys and values, computed once per image."""
        prefix = self.embed_prefix(grid, concepts)
        return self.fusion(prefix, first=prefix.shape[1])[1]

    def step(self, tokens: Tensor, position: int, past: Past) -> tuple[Tensor, Past]:
        """tokens (N, 1) at `position` of N / B captions for each of the B images of `past`, keys and values so far -> logits (N, V) and all
        keys and values.

        A model of masked pieces reads [MASK] behind the token; what is kept of it is nothing, since the next piece takes its place.
        """
        places = torch.full_like(tokens, position)
        if self.config.mask_piece is None:
            states, present = self.fusion(self.fusion.embed_caption(tokens, places), first=0, past=past)
            return self.heads(states[:, -1], self.word), present
        pair = torch.cat([tokens, torch.full_like(tokens, self.config.mask_piece)], 1)
        sees = torch.ones(1, 1, 2, past[0].own_length + 2, dtype=torch.bool, device=tokens.device)
        sees[:, :, 0, -1] = False
        x = self.fusion.embed_caption(pair, torch.cat([places, places + 1], 1))
        states, present = self.fusion(x, first=0, past=past, mask=sees)
        kept = [seen._replace(own_keys=seen.own_keys[:, :, :-1], own_values=seen.own_values[:, :, :-1]) for seen in present]
        return self.heads(states[:, -1], self.word), kept

    def states(
        self, grid: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, probe: list | None = None, concepts: Tensor | None = None
    ) -> Tensor:
        """Teacher forcing. grid (B, G, channels); tokens, positions (B, T): an image's captions one after the other; mask
        (B, 1, P + T, P + T) bool, P = `config.prefix`. Returns the caption states (B, T, hidden), to be read by `heads`."""
        prefix = self.embed_prefix(grid, concepts)
        x = torch.cat([prefix, self.fusion.embed_caption(tokens, positions)], 1)
        return self.fusion(x, first=prefix.shape[1], mask=mask, probe=probe)[0]

    def own_pieces(self) -> list[int]:
        """The word pieces that the model itself puts into its input, those of concepts and [MASK]: they stay when a vocabulary shrinks."""
        concepts = [] if self.concepts is None else [piece for piece in self.concepts.pieces.unique().tolist() if piece != NONE]
        return concepts if self.config.mask_piece is None else [*concepts, self.config.mask_piece]

    def narrow(self, keep: Tensor) -> None:
        """Keeps the word pieces `keep` (ids), in that order: embedding, output projection and bias shrink together. ValueError where a
        concept needs another."""
        if self.concepts is not None:
            place = torch.full((self.config.vocabulary + 1,), NONE)  # its last entry is NONE's own
            place[keep] = torch.arange(len(keep))
            pieces = place[self.concepts.pieces]
            if (pieces.eq(NONE) & self.concepts.pieces.ne(NONE)).any():
                raise ValueError("the kept word pieces do not spell every concept")
            self.concepts.pieces = pieces
        mask = self.config.mask_piece
        if mask is not None:
            mask = keep.tolist().index(mask)
        self.fusion.word = nn.Embedding.from_pretrained(self.word.detach()[keep].clone(), freeze=False)
        self.heads.bias = nn.Parameter(self.heads.bias.detach()[keep].clone())
        self.config = dataclasses.replace(self.config, vocabulary=len(keep), mask_piece=mask)

    def widen(self, keep: Tensor, word: Tensor, unseen_bias: float) -> None:
        """Undoes `narrow`: rows that were not kept come from `word` (V, hidden), with `unseen_bias` as their logit bias."""
        full, bias = word.detach().clone(), torch.full((len(word),), unseen_bias)
        full[keep], bias[keep] = self.word.detach().cpu(), self.heads.bias.detach().cpu()
        if self.concepts is not None:
            pieces = self.concepts.pieces.cpu()
            self.concepts.pieces = torch.where(pieces == NONE, NONE, keep[pieces])
        self.fusion.word = nn.Embedding.from_pretrained(full, freeze=False)
        self.heads.bias = nn.Parameter(bias)
        mask = self.config.mask_piece
        self.config = dataclasses.replace(self.config, vocabulary=len(full), mask_piece=None if mask is None else int(keep[mask]))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json (pruned shapes included) and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with torch.device("meta"):
            plain = LightCap(dataclasses.replace(self.config, shapes={}))
        config = dataclasses.replace(self.config, shapes=changed_shapes(self, plain))
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n")
        save_model(copy.deepcopy(self).float().cpu().contiguous_(), str(folder / "model.safetensors"), metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # which safetensors makes for its owner alone

    def contiguous_(self) -> LightCap:
        """Plain row-major memory for every tensor: safetensors stores no strides (channels-last training changes them)."""
        for tensor in [*self.parameters(), *self.buffers()]:
            tensor.data = tensor.data.contiguous()
        return self

    @staticmethod
    def from_pretrained(folder: str | Path) -> LightCap:
        """Reads what `save_pretrained` wrote, strictly. FileNotFoundError or ValueError, in one line, for anything else."""
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder}: no {name} there, so it is not a captioner that lightcap wrote")
        try:
            values = json.loads((folder / "config.json").read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder / 'config.json'}: not JSON (line {error.lineno}: {error.msg})") from None
        model = LightCap(LightCapConfig.from_dict(values))
        try:
            load_model(model, str(folder / "model.safetensors"))
        except SafetensorError as error:
            raise ValueError(f"{folder / 'model.safetensors'}: not a whole safetensors file ({error}); copy it again") from None
        except RuntimeError as error:
            raise ValueError(f"{folder / 'model.safetensors'}: does not fit config.json ({str(error).splitlines()[-1].strip()})") from None
        return model.eval()


