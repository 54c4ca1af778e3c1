"""Captioners of random weights to be pruned, what they say, and what silences their channels."""

import re
from pathlib import Path

import stage_context
import torch
import torch.nn.functional as F
from torch import nn

from compress.artifact import Artifact
from compress.config import Prune
from compress.context import Context
from compress.data import CaptionSet
from compress.stages import prune
from compress.stages.prune import channels, prices
from compress.training.batches import Captions, pack
from compress.training.start import write_captioner
from students.lightcap import LightCap, preset
from students.lightcap.encoder import preprocessor
from students.lightcap.tokenizer import load_tokenizer


def small_clip(size: int) -> nn.Module:
    from open_clip.modified_resnet import ModifiedResNet

    trunk = ModifiedResNet(layers=(1, 1, 1, 1), output_dim=32, heads=4, image_size=size, width=16)
    trunk.attnpool = nn.Identity()
    return trunk


def build(encoder: str = "resnet-small", vocabulary: int = 40, **sizes) -> LightCap:
    """Random weights, and batch norms that do something."""
    torch.manual_seed(1)
    model = LightCap(preset("tiny", encoder=encoder, vocabulary=vocabulary, dropout=0.0, **sizes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
            elif name.startswith("fusion.layers") and name.endswith("bias"):
                weight.normal_(0, 0.3)
        for module in model.encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.6, 1.4)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def outputs(model: LightCap) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid of two pictures, and the logits of their captions."""
    size = model.config.image_size
    batch = pack(Captions.of([[[2, 7, 9, 3], [2, 30, 3]], [[2, 5, 6, 3]]]), [0, 1])
    with torch.no_grad():
        grid = model.encode(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3)))
        states = model.states(grid / grid.std(), batch.tokens, batch.positions, batch.mask(grid.shape[1]))
        return grid / grid.std(), model.heads(states[batch.segments > 0], model.word)


def norms_of(encoder: str, name: str) -> list[str]:
    """The batch norms behind a convolution's channels, its depthwise reader's too, as the architecture's paper draws it."""
    name = name.removeprefix("encoder.")
    if encoder == "resnet-small":
        return [{"stem.0": "stem.1", "stem.3": "stem.4"}.get(name, name.replace("conv", "bn").replace("shortcut.0", "shortcut.1"))]
    if encoder == "clip-small":
        return [name.replace("conv", "bn").replace("downsample.0", "downsample.1")]
    if name == "net.conv_stem":
        return ["net.bn1", "net.blocks.0.0.bn1"]
    if name == "net.blocks.0.0.conv_pw":
        return ["net.blocks.0.0.bn2"]
    block, kind = re.fullmatch(r"(net\.blocks\.\d\.\d)\.conv_(pw|pwl)", name).groups()
    return [f"{block}.bn1", f"{block}.bn2"] if kind == "pw" else [f"{block}.bn3"]


def norms_behind(model: LightCap, unit: channels.Unit) -> list[nn.Module]:
    names = [name for writer in unit.writers for name in norms_of(model.config.encoder, writer)]
    return [model.encoder.get_submodule(name) for name in names]


def silence(model: LightCap, chosen: list[channels.Block]) -> None:
    """Sets what the removed channels give to zero, at full width."""
    with torch.no_grad():
        for block in chosen:
            gone = list(block.channels)
            if block.unit.kind == "conv":
                for norm in norms_behind(model, block.unit):
                    norm = norm[0] if isinstance(norm, torch.nn.Sequential) else norm
                    norm.weight[gone], norm.bias[gone] = 0.0, 0.0
                continue
            layer = model.get_submodule(block.unit.name)
            if block.unit.kind == "ffn":
                layer.down.weight[:, gone] = 0.0
            else:
                for head in gone:
                    layer.output.weight[:, head * layer.head_dim : (head + 1) * layer.head_dim] = 0.0


def ranked(model: LightCap, round_to: int = 8, parts=("encoder", "fusion"), seed: int = 5) -> list[channels.Block]:
    source = torch.Generator().manual_seed(seed)
    scores = {unit: torch.rand(unit.width, generator=source) for unit in channels.units(model, parts)}
    return channels.blocks(scores, round_to, prices.savings(model, prices.PRICES["macs"]))


def with_concepts(model: LightCap, inner: int = 16) -> LightCap:
    """An extractor of random weights, but that the inner channels 8.. repeat the first ones: half of them say nothing new."""
    source = torch.Generator().manual_seed(4)
    matrix = F.normalize(torch.randn(12, 8, generator=source), dim=1)
    model.start_concepts(matrix, torch.arange(10, 22).unsqueeze(1), torch.zeros(12), inner, 3)
    with torch.no_grad():
        model.alignment.first.weight[inner // 2 :] = model.alignment.first.weight[: inner // 2]
        model.alignment.first.bias[inner // 2 :] = model.alignment.first.bias[: inner // 2]
        model.alignment.second.weight.mul_(torch.linspace(3.0, 1.0, inner))
    return model.eval()


def idle(model: LightCap, index: int) -> None:
    """Makes a layer of the fusion pass on what it reads: what it adds is nothing, and what is normalised already stays the same."""
    with torch.no_grad():
        for linear in (model.fusion.layers[index].output, model.fusion.layers[index].down):
            linear.weight.zero_()
            linear.bias.zero_()
        for layer in model.fusion.layers:
            layer.norm1.bias.zero_()
            layer.norm2.bias.zero_()


def cut(parent: Artifact, config: Prune, here: Context) -> LightCap:
    prune.run(parent, config, here)
    return LightCap.from_pretrained(here.output)


def world(scenes: CaptionSet, folder: Path) -> tuple:
    """A captioner on scenes: itself, its tokenizer, its preprocessing, its artifact; and the context in which a stage is called, where no
    split but that of training can be read."""
    tokenizer = load_tokenizer("english")
    model = build(vocabulary=tokenizer.get_vocab_size())
    preprocessing = preprocessor("resnet-small", 80)
    (folder / "parent").mkdir()
    write_captioner(folder / "parent", model, tokenizer, preprocessing)

    def context(name: str) -> Context:
        return stage_context.context(folder / name, scenes.split("train"), "prune", Prune(macs=0.7), cache=folder / "cache")

    return model, tokenizer, preprocessing, Artifact(folder / "parent"), context
