"""The encoders' weights, against the libraries that they come from: CLIP's ResNet, EfficientNet-Lite0."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from compress import runtime
from compress.errors import ModelError
from compress.training.text import embed_texts
from students.lightcap import LightCap, preset
from students.lightcap.encoder import clip_rn50, lite0_file, load_encoder, preprocessor, read_tensors

DATA = Path(os.environ.get("LIGHTCAP_DATA", Path(__file__).parents[1].parent / "shared" / "data"))


@pytest.fixture(scope="module")
def clip():
    """A random CLIP RN50 image tower, attention pooling included, whose batch norms do something."""
    from open_clip.modified_resnet import ModifiedResNet

    torch.manual_seed(4)
    tower = ModifiedResNet(layers=(3, 4, 6, 3), output_dim=1024, heads=32, image_size=224, width=64).eval()
    with torch.no_grad():
        for module in tower.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.4, 0.8)
                module.bias.uniform_(-0.2, 0.2)
    return tower


def test_clip_s_trunk(clip, tmp_path):
    towers = {key: value for key, value in clip.state_dict().items()}
    assert "attnpool.positional_embedding" in towers
    whole = {f"visual.{key}": value for key, value in towers.items()} | {"logit_scale": torch.zeros(()), "ln_final.weight": torch.ones(3)}
    own = clip_rn50(224)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted = clip.layer4(clip.layer3(clip.layer2(clip.layer1(clip.stem(x)))))
        assert wanted.std() > 0.05
        for state in (whole, towers):
            save_file(state, tmp_path / "clip.safetensors")
            for tensor in own.state_dict().values():
                tensor.zero_()
            load_encoder(own, "clip-rn50", str(tmp_path / "clip.safetensors"))
            assert all(torch.equal(value, towers[name]) for name, value in own.state_dict().items())
        found = own.eval()(x)
    assert found.shape == (1, 2048, 7, 7)
    assert torch.equal(found, wanted)
    save_file({"visual.conv1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not CLIP RN50's visual trunk") as raised:
        load_encoder(own, "clip-rn50", str(tmp_path / "other.safetensors"))
    assert "\n" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match="no weights for clip-rn50 at 'nowhere'"):
        load_encoder(own, "clip-rn50", "nowhere")


@pytest.mark.slow
def test_clip_by_its_hub_name(hub):
    """RN50 `openai`, in the file that open_clip fetches: its whole model, whose trunk sees images and whose text encoder reads concepts."""
    import open_clip

    torch.manual_seed(4)
    with warnings.catch_warnings(action="ignore"):
        whole = open_clip.create_model("RN50-quickgelu").eval()
    state = {key: value.contiguous() for key, value in whole.state_dict().items()}
    save_file(state, hub("timm/resnet50_clip.openai") / "open_clip_model.safetensors")
    torch.manual_seed(5)
    trunk = clip_rn50(224)
    load_encoder(trunk, "clip-rn50", "openai")
    for key, value in trunk.state_dict().items():
        torch.testing.assert_close(value, state[f"visual.{key}"], msg=key)
    words = ["a photo of a dog", "a photo of a red car"]
    with torch.no_grad():
        wanted = F.normalize(whole.encode_text(open_clip.get_tokenizer("RN50")(words)), dim=-1)
    torch.testing.assert_close(embed_texts(words, "openai"), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_clip_that_cannot_be_fetched_is_one_line(hub, caplog):
    """What open_clip logs of it besides would be a second one."""
    with pytest.raises(FileNotFoundError, match="CLIP RN50 'openai' could not be fetched .* set student.encoder_weights=") as of_encoder:
        load_encoder(clip_rn50(224), "clip-rn50", "openai")
    with pytest.raises(ModelError, match="text encoder 'openai' could not be loaded .* or text_encoder: minilm") as of_text:
        embed_texts(["a photo of a dog"], "openai")
    assert not any("\n" in str(raised.value) for raised in (of_encoder, of_text)) and not caplog.records


def test_an_encoder_s_own_file(tmp_path):
    first, second = (LightCap(preset("tiny", vocabulary=9)).encoder for _ in range(2))
    save_file(first.state_dict(), tmp_path / "encoder.safetensors")
    load_encoder(second, "resnet-small", str(tmp_path / "encoder.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not fit resnet-small"):
        load_encoder(second, "resnet-small", str(tmp_path / "other.safetensors"))


def classifier() -> nn.Module:
    """EfficientNet-Lite0 with its classifier, filled by the order of the original tensors."""
    import timm

    net = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    own, original = net.state_dict(), read_tensors(lite0_file())
    assert len(own) == len(original) == 296  # 247, and 49 counters of batch norm that carry no weight
    assert [value.shape for value in own.values()] == [value.shape for value in original.values()]
    net.load_state_dict(dict(zip(own, original.values(), strict=True)))
    return net.eval()


@pytest.fixture(scope="module")
def lite0():
    model = LightCap(preset("tiny", encoder="efficientnet-lite0", vocabulary=9))
    load_encoder(model.encoder, "efficientnet-lite0", "imagenet")
    return model.encoder.eval()


def test_lite0_s_features(lite0):
    """Against the original's own names: a plain network written down here, run with the tensors by name."""
    state = read_tensors(lite0_file())
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = lite0(x)
        reference = classifier().forward_features(x)
        original = plain_lite0(state, x)
    assert found.shape == (1, 1280, 7, 7)
    assert torch.equal(found, reference)
    torch.testing.assert_close(found, original, atol=1e-3, rtol=1e-3)


def plain_lite0(state: dict, x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 as its paper's table has it, over convolutions and norms in the order of the file."""
    tensors = iter([(key, value) for key, value in state.items() if "num_batches_tracked" not in key])

    def conv_norm(x, stride, act=True, depthwise=False):
        (_, weight), (_, scale), (_, shift), (_, mean), (_, var) = (next(tensors) for _ in range(5))
        size = weight.shape[2]
        if stride == 2:  # TensorFlow's `same`: what is odd goes to the right and below
            total = max((-(-x.shape[2] // 2) - 1) * 2 + size - x.shape[2], 0)
            x = nn.functional.pad(x, (total // 2, total - total // 2) * 2)
            pad = 0
        else:
            pad = size // 2
        x = nn.functional.conv2d(x, weight, stride=stride, padding=pad, groups=x.shape[1] if depthwise else 1)
        x = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-3).sqrt() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        return x.clamp(0, 6) if act else x

    x = conv_norm(x, 2)
    stages = [(1, 1, 1), (6, 2, 2), (6, 2, 2), (6, 3, 2), (6, 3, 1), (6, 4, 2), (6, 1, 1)]  # expansion, blocks, first stride
    for expansion, blocks, first in stages:
        for block in range(blocks):
            stride, y = first if block == 0 else 1, x
            if expansion > 1:
                y = conv_norm(y, 1)
            y = conv_norm(y, stride, depthwise=True)
            y = conv_norm(y, 1, act=False)
            x = x + y if block > 0 else y
    return conv_norm(x, 1)


def test_lite0_knows_a_dog():
    """Where Flickr8k is at hand: of photos whose captions all speak of a dog, most are of one of ImageNet's 118 breeds."""
    source = DATA / "flickr8k" / "dataset_flickr8k.json"
    if source.is_file():
        images = json.loads(source.read_text())["images"]
        dogs = [item for item in images if all({"dog", "dogs"} & set(sentence["tokens"]) for sentence in item["sentences"])]
        photos = [runtime.open_photo(DATA / "flickr8k" / "images" / item["filename"]) for item in dogs[:30]]
        least = 21
    else:  # no photo at hand: noise is of no breed
        photos = [np.random.default_rng(i).integers(0, 255, (224, 224, 3), dtype=np.uint8) for i in range(4)]
        least = 0
    settings = preprocessor("efficientnet-lite0", 224)
    net, found = classifier(), 0
    with torch.no_grad():
        for start in range(0, len(photos), 10):
            batch = torch.from_numpy(np.stack([runtime.pixels(photo, settings) for photo in photos[start : start + 10]]))
            found += sum(151 <= best <= 268 for best in net(batch).argmax(1).tolist())
    assert least <= found <= (30 if least else 0)


def test_lite0_refuses_another_network(tmp_path):
    state = read_tensors(lite0_file())
    save_file({key: value.contiguous() for key, value in list(state.items())[:-20]}, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match="does not fill EfficientNet-Lite0"):
        load_encoder(LightCap(preset("tiny", encoder="efficientnet-lite0", vocabulary=9)).encoder, "efficientnet-lite0",
                     str(tmp_path / "short.safetensors"))


def test_the_preprocessor_is_the_encoder_s(tmp_path):
    settings = preprocessor("efficientnet-lite0", 224)
    black, white = (runtime.pixels(Image.new("RGB", (50, 30), colour), settings) for colour in ("black", "white"))
    assert black.shape == (3, 224, 224)
    np.testing.assert_allclose(black, -127 / 128, atol=1e-6)  # (x - 127) / 128, as the Lite models were trained
    np.testing.assert_allclose(white, 1.0, atol=1e-6)
