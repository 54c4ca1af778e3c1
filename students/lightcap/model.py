"""LightCap: image encoder, modulator, fusion and heads as one module, with its file format."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from students.lightcap.concepts import Alignment
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

    def embed_prefix(self, grid: Tensor, concepts: Tensor | None = None) -> Tensor:
        """grid (B, G, channels), concept word pieces (B, K) with 0 as padding -> prefix embeddings (B, K + G, hidden)."""
        if concepts is None or self.modulator is None:
            return self.fusion.embed_prefix(grid)
        words = self.fusion.word(concepts)
        return self.fusion.embed_prefix(self.modulator(grid, words, concepts != 0), words)

    def prefill(self, grid: Tensor, concepts: Tensor | None = None) -> Past:
        """The prefix's keys and values, computed once per image."""
        prefix = self.embed_prefix(grid, concepts)
        return self.fusion(prefix, first=prefix.shape[1])[1]

    def step(self, tokens: Tensor, position: int, past: Past) -> tuple[Tensor, Past]:
        """tokens (N, 1) at `position`, keys and values so far -> logits (N, V) and all keys and values."""
        places = torch.full_like(tokens, position)
        states, present = self.fusion(self.fusion.embed_caption(tokens, places), first=0, past=past)
        return self.heads(states[:, -1], self.word), present

    def states(self, grid: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, probe: list | None = None) -> Tensor:
        """Teacher forcing. grid (B, G, channels); tokens, positions (B, T): an image's captions one after the other; mask
        (B, 1, G + T, G + T) bool. Returns the caption states (B, T, hidden), to be read by `heads`."""
        prefix = self.embed_prefix(grid)
        x = torch.cat([prefix, self.fusion.embed_caption(tokens, positions)], 1)
        return self.fusion(x, first=prefix.shape[1], mask=mask, probe=probe)[0]

    def narrow(self, keep: Tensor) -> None:
        """Keeps the word pieces `keep` (ids), in that order: embedding, output projection and bias shrink together."""
        self.fusion.word = nn.Embedding.from_pretrained(self.word.detach()[keep].clone(), freeze=False)
        self.heads.bias = nn.Parameter(self.heads.bias.detach()[keep].clone())
        self.config = dataclasses.replace(self.config, vocabulary=len(keep))

    def widen(self, keep: Tensor, word: Tensor, unseen_bias: float) -> None:
        """Undoes `narrow`: rows that were not kept come from `word` (V, hidden), with `unseen_bias` as their logit bias."""
        full, bias = word.detach().clone(), torch.full((len(word),), unseen_bias)
        full[keep], bias[keep] = self.word.detach().cpu(), self.heads.bias.detach().cpu()
        self.fusion.word = nn.Embedding.from_pretrained(full, freeze=False)
        self.heads.bias = nn.Parameter(bias)
        self.config = dataclasses.replace(self.config, vocabulary=len(full))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json (pruned shapes included) and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with torch.device("meta"):
            plain = LightCap(dataclasses.replace(self.config, shapes={}))
        config = dataclasses.replace(self.config, shapes=changed_shapes(self, plain))
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n")
        save_model(copy.deepcopy(self).float().cpu().contiguous_(), str(folder / "model.safetensors"), metadata={"format": "pt"})

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


