"""Weights from elsewhere: BERT, CLIP's ResNet, EfficientNet-Lite0, against the libraries they come from."""

import dataclasses
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
from tokenizers import decoders
from torch import nn

from compress import runtime
from compress.config import Student
from compress.errors import ModelError
from compress.training.start import new_captioner
from compress.training.text import embed_texts
from students.lightcap import LightCap, preset
from students.lightcap.bert import copy_layers, layer_map, load_bert
from students.lightcap.encoder import clip_rn50, lite0_file, load_encoder, preprocessor, read_tensors
from students.lightcap.fusion import Fusion
from students.lightcap.tokenizer import load_tokenizer

DATA = Path(os.environ.get("LIGHTCAP_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
HIDDEN, LAYERS, VOCABULARY = 32, 4, 50


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128, type_vocab_size=2, initializer_range=0.3,
    )  # fmt: skip
    model = BertModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.3)
            assert weight.std() > 0, name
    return model


def fusion(layers: int = LAYERS, positions: int = 128, vocabulary: int = VOCABULARY, hidden: int = HIDDEN, ffn: int = 48) -> Fusion:
    torch.manual_seed(0)
    return Fusion(vocabulary, positions, hidden, layers, 4, ffn, 16, 0.1).eval()


def old_names(state: dict) -> dict:
    """The names of the first TensorFlow conversions, as in bert-base-uncased's pytorch_model.bin."""
    return {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in state.items()
    }


LAYOUTS = {
    "safetensors": lambda state: state,
    "prefixed safetensors": lambda state: {f"bert.{key}": value for key, value in state.items()} | {"cls.predictions.bias": torch.zeros(3)},
    "bin": lambda state: state,
    "old bin": lambda state: {f"bert.{key}": value for key, value in old_names(state).items()},
    "half safetensors": lambda state: {key: value.half().float() for key, value in state.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("as_folder", [False, True])
def test_fusion_is_bert(bert, tmp_path, layout, as_folder):
    state = LAYOUTS[layout]({key: value.clone() for key, value in bert.state_dict().items() if "position_ids" not in key})
    file = tmp_path / ("pytorch_model.bin" if layout.endswith("bin") else "model.safetensors")
    if file.suffix == ".bin":
        torch.save(state, file)
    else:
        save_file({key: value.half() for key, value in state.items()} if layout.startswith("half") else state, file)
    own = fusion()
    load_bert(own, str(tmp_path if as_folder else file))
    tokens = torch.tensor([[2, 7, 9, 30, 3], [2, 4, 4, 11, 49]])
    with torch.no_grad():
        theirs = bert(tokens, output_hidden_states=True).hidden_states
        x = own.embed_caption(tokens, torch.arange(5).expand(2, 5))
        exact = 2e-2 if layout.startswith("half") else 1e-5
        torch.testing.assert_close(x, theirs[0], atol=exact, rtol=exact)
        for layer, wanted in zip(own.layers, theirs[1:], strict=True):
            x, _ = layer(x, None, torch.ones(1, 1, 5, 5, dtype=torch.bool), 0)
            torch.testing.assert_close(x, wanted, atol=exact, rtol=exact)
    grid = fusion().grid
    assert torch.equal(own.grid.weight, grid.weight)  # BERT knows nothing of it


@pytest.mark.parametrize(
    ("small", "large", "wanted"),
    [(1, 4, [4]), (2, 4, [2, 4]), (3, 4, [2, 3, 4]), (3, 6, [2, 4, 6]), (4, 12, [3, 6, 9, 12]), (4, 6, [2, 3, 5, 6]), (3, 3, [1, 2, 3])],
)
def test_layer_map(small, large, wanted):
    assert [index + 1 for index in layer_map(small, large)] == wanted


@pytest.fixture
def checkpoint(bert, tmp_path):
    """Writes BERT's state, changed, and gives its path."""

    def write(change=lambda state: state, name: str = "model.safetensors") -> str:
        state = change({key: value.clone() for key, value in bert.state_dict().items()})
        save_file({key: value for key, value in state.items() if "position_ids" not in key}, tmp_path / name)
        return str(tmp_path / name)

    return write


def test_a_shallower_fusion_takes_every_nth_layer(bert, checkpoint):
    own = fusion(layers=3)
    load_bert(own, checkpoint())
    for mine, theirs in zip(own.layers, (1, 2, 3), strict=True):
        assert torch.equal(mine.up.weight, bert.encoder.layer[theirs].intermediate.dense.weight)
    assert not torch.equal(bert.encoder.layer[0].intermediate.dense.weight, bert.encoder.layer[1].intermediate.dense.weight)


def test_fewer_positions_take_the_first(bert, checkpoint):
    own = fusion(positions=100)
    load_bert(own, checkpoint())
    assert torch.equal(own.position.weight, bert.embeddings.position_embeddings.weight[:100])


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


UNFIT = [
    (without("encoder.layer.1.output.dense.bias"), {}, "no tensor 'encoder.layer.1.output.dense.bias'"),
    (lambda state: {"x": torch.zeros(2)}, {}, "holds no BERT layers"),
    (lambda state: state, {"vocabulary": 51}, r"'embeddings.word_embeddings.weight' is \(50, 32\), this fusion needs \(51, 32\)"),
    (lambda state: state, {"positions": 200}, r"'embeddings.position_embeddings.weight' is \(128, 32\), this fusion needs \(200, 32\)"),
    (lambda state: state, {"hidden": 40}, r"'embeddings.word_embeddings.weight' is \(50, 32\), this fusion needs \(50, 40\)"),
]


@pytest.mark.parametrize(("change", "sizes", "message"), UNFIT)
def test_weights_that_do_not_fit_are_named(checkpoint, change, sizes, message):
    own = fusion(**sizes)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    with pytest.raises(ValueError, match=message) as raised:
        load_bert(own, checkpoint(change))
    assert "\n" not in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"encoder.layer.0.x": Trap(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="refused, it holds more than tensors") as raised:
        load_bert(fusion(), str(tmp_path))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_weights(tmp_path, checkpoint):
    (tmp_path / "model.bin").write_bytes(b"not a file of torch")
    (tmp_path / "model.h5").write_bytes(b"")
    half = Path(checkpoint(name="half.safetensors"))
    half.write_bytes(half.read_bytes()[:2000])
    torch.save({"a": {"b": torch.zeros(2)}}, tmp_path / "nested.pt")
    for name, message in (("model.bin", "refused"), ("model.h5", "must be .safetensors"), ("half.safetensors", "not a whole safetensors"),
                          ("nested.pt", "not a flat state dict")):  # fmt: skip
        with pytest.raises(ValueError, match=message) as raised:
            read_tensors(tmp_path / name)
        assert "\n" not in str(raised.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        load_bert(fusion(), str(tmp_path / "empty"))


def test_a_student_starts_as_its_teacher(bert):
    teacher, student = fusion(layers=4), fusion(layers=2)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn_like(parameter))
    copy_layers(student, teacher)
    assert torch.equal(student.layers[0].query.weight, teacher.layers[1].query.weight)
    assert torch.equal(student.layers[1].down.bias, teacher.layers[3].down.bias)
    for name in ("word", "position", "segment", "norm", "grid"):
        assert torch.equal(getattr(student, name).weight, getattr(teacher, name).weight)
    with pytest.raises(ValueError, match="hidden size 40 cannot start from a teacher of 32; set init: weights"):
        copy_layers(fusion(hidden=40), teacher)


def test_a_narrower_student_keeps_the_strongest_neurons(bert):
    """The FFN of a student that has the neurons 1 and 3 computes what the teacher's does once the others are silent."""
    teacher, student = fusion(layers=2), fusion(layers=1, ffn=2)
    last = teacher.layers[1]
    with torch.no_grad():
        last.down.weight[:, [1, 3]] *= 100
        copy_layers(student, teacher)
        silent = [i for i in range(len(last.up.weight)) if i not in (1, 3)]
        last.down.weight[:, silent] = 0
    x = torch.randn(4, 32)
    mine = student.layers[0]
    torch.testing.assert_close(mine.down(F.gelu(mine.up(x))), last.down(F.gelu(last.up(x))))


def test_minilm_is_a_bert():
    """The weights that a package carries: 6 layers of 384, on their own vocabulary, against transformers."""
    from transformers import AutoModel, logging

    from students.lightcap.bert import minilm_folder
    from students.lightcap.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("minilm")
    assert tokenizer.get_vocab_size() == 30522
    assert tokenizer.encode("Caf\u00e9", add_special_tokens=False).tokens == ["cafe"]
    torch.manual_seed(0)
    own = Fusion(30522, 512, 384, 6, 12, 1536, 8, 0.0).eval()
    load_bert(own, "minilm")
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModel.from_pretrained(minilm_folder()).eval()
    ids = torch.tensor([[101, *tokenizer.encode("two dogs run on a beach", add_special_tokens=False).ids, 102]])
    assert ids.shape[1] == 8
    with torch.no_grad():
        x = own.embed_caption(ids, torch.arange(8)[None])
        for layer in own.layers:
            x, _ = layer(x, None, None, 0)
        torch.testing.assert_close(x, theirs(ids).last_hidden_state, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["a man's t-shirt", "a black-and-white dog isn't here", "the boy , who 's six , jumps ."])
def test_words_that_bert_splits_are_joined_again(text):
    from students.lightcap.tokenizer import decode_caption, encode_captions, load_tokenizer

    tokenizer = load_tokenizer("minilm")
    ids = encode_captions(tokenizer, [text], 20)[0]
    assert decode_caption(tokenizer, ids) == text.replace(" ,", ",").replace(" 's", "'s").replace(" .", "")


def test_a_caption_that_was_cut_does_not_end():
    from students.lightcap.tokenizer import encode_captions, load_tokenizer

    tokenizer = load_tokenizer("english")
    start, end = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    fits, cut = encode_captions(tokenizer, ["a red dog .", "a red dog and a cat"], 3)
    assert [len(fits), len(cut)] == [5, 4]
    assert fits[:4] == cut and fits[0] == start and fits[-1] == end and end not in cut


# ---- encoders


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
        photos = [runtime.open_image(DATA / "flickr8k" / "images" / item["filename"]) for item in dogs[:30]]
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
                     str(tmp_path / "short.safetensors"))  # fmt: skip


# ---- a recipe's beginning


def test_new_captioner_reads_what_the_recipe_names(bert, checkpoint):
    source = checkpoint(lambda state: {k: v for k, v in state.items()})
    student = Student(preset="tiny", heads=3, ffn=48, layers=2, fusion_weights=source)
    with pytest.raises(ModelError, match="word_embeddings.weight' is") as raised:
        new_captioner(student, "tiny", source, None, 0.0, 17)
    assert raised.value.exit_code == 2
    model, tokenizer, settings = new_captioner(student, "tiny", None, 96, 0.0, 17)
    assert (model.config.heads, model.config.ffn, model.config.grid) == (3, 48, 6)
    assert settings["image_size"] == 96 and tokenizer.get_vocab_size() == model.config.vocabulary
    other, _, _ = new_captioner(student, "scenes-student", None, None, 0.0, 17)
    assert other.config.ffn == 256  # the section's sizes are its own preset's
    larger = dataclasses.replace(student, image_size=128)
    for name in ("tiny", "scenes-student"):  # teacher and student see pictures of one size
        assert new_captioner(larger, name, None, 96, 0.0, 17)[2]["image_size"] == 128
    with pytest.raises(ModelError, match="image_size .100. must be a multiple of 16"):
        new_captioner(dataclasses.replace(student, image_size=100), "tiny", None, None, 0.0, 17)
    again, _, _ = new_captioner(student, "tiny", None, 96, 0.0, 17)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(ModelError, match="no preset 'tinny'"):
        new_captioner(student, "tinny", None, None, 0.0, 17)


def test_the_preprocessor_is_the_encoder_s(tmp_path):
    settings = preprocessor("efficientnet-lite0", 224)
    black, white = (runtime.pixels(Image.new("RGB", (50, 30), colour), settings) for colour in ("black", "white"))
    assert black.shape == (3, 224, 224)
    np.testing.assert_allclose(black, -127 / 128, atol=1e-6)  # (x - 127) / 128, as the Lite models were trained
    np.testing.assert_allclose(white, 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "file", "layout"),
    [
        ("huawei-noah/TinyBERT_General_4L_312D", "pytorch_model.bin", "old bin"),
        ("bert-base-uncased", "model.safetensors", "prefixed safetensors"),
    ],
)
def test_bert_and_its_pieces_by_their_hub_name(bert, hub, name, file, layout):
    folder, state = hub(name), LAYOUTS[layout]({key: value.contiguous() for key, value in bert.state_dict().items()})
    torch.save(state, folder / file) if file.endswith(".bin") else save_file(state, folder / file)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s"]) + "\n")
    filled = fusion()
    load_bert(filled, name)
    torch.testing.assert_close(filled.word.weight, bert.embeddings.word_embeddings.weight)
    tokenizer = load_tokenizer(name)
    assert tokenizer.decode(tokenizer.encode("a dogs").ids) == "a dogs"
    with pytest.raises(FileNotFoundError, match="neither here nor on the hub; download them and set fusion_weights=FOLDER"):
        load_bert(fusion(), "someone/absent")
    with pytest.raises(FileNotFoundError, match="no tokenizer at 'someone/absent'"):
        load_tokenizer("someone/absent")


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


def test_a_tokenizer_that_pads_and_cuts_does_neither_here(tmp_path):
    from students.lightcap.tokenizer import encode_captions, load_tokenizer, pieces_of

    tokenizer = load_tokenizer("english")
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = load_tokenizer(str(tmp_path / "tokenizer.json"))
    captions = ["a dog runs over the green grass", "a dog"]
    said = [[pieces_of(read)[piece] for piece in ids] for ids in encode_captions(read, captions, 30)]
    assert said == [["[CLS]", *caption.split(), "[SEP]"] for caption in captions]


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    """As lock.py reads it: what a recipe names is one file for the lock and for who loads it."""
    from students.lightcap.bert import checkpoint_file
    from students.lightcap.encoder import existing
    from students.lightcap.tokenizer import load_tokenizer

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bert").mkdir()
    for name in ("bert/model.safetensors", "rn50.safetensors"):
        (tmp_path / name).write_bytes(b"")
    load_tokenizer("english").save(str(tmp_path / "bert" / "tokenizer.json"))
    assert checkpoint_file("~/bert") == tmp_path / "bert" / "model.safetensors"
    assert existing("~/rn50.safetensors", "clip-rn50") == tmp_path / "rn50.safetensors"
    assert load_tokenizer("~/bert").get_vocab_size() > 100


def test_vocabularies_of_other_languages(tmp_path):
    """A line separator is a piece of Chinese BERT's; capitals and accents stay where pieces have them, and are taken off where none has."""
    from students.lightcap.tokenizer import SPECIAL, decode_caption, encode_captions, load_tokenizer, pieces_of

    def said(name: str, pieces: list[str], text: str) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text("\n".join([*SPECIAL, *pieces]) + "\n", encoding="utf-8")
        tokenizer = load_tokenizer(str(tmp_path / name))
        assert pieces_of(tokenizer)[5:] == pieces
        return decode_caption(tokenizer, encode_captions(tokenizer, [text], 20)[0])

    assert said("chinese", ["\u2028", "\u72d7", "\u8dd1"], "\u72d7\u8dd1") == "\u72d7 \u8dd1"
    assert said("cased", ["Ein", "M\u00e4dchen", "ein"], "Ein M\u00e4dchen") == "Ein M\u00e4dchen"
    assert said("small", ["ein", "m\u00e4dchen"], "Ein M\u00e4dchen") == "ein m\u00e4dchen"
    assert said("plain", ["ein", "madchen"], "Ein M\u00e4dchen") == "ein madchen"
    with pytest.raises(ValueError, match="twice/vocab.txt: the word piece 'a' stands in the vocabulary more than once"):
        said("twice", ["a", "b", "a"], "a")


@pytest.mark.parametrize("special", [(), ("<S>", "<T>", "\u1112", "\u1161")])
def test_an_uncased_vocabulary_takes_capitals_and_accents_off(special):
    """Also beside the jamo that BERT's own holds, which stand beside each other and would make one syllable, and Chinese BERT's <S>."""
    from students.lightcap.tokenizer import SPECIAL, word_pieces

    tokenizer = word_pieces([*SPECIAL, *special, "cafe", "##s"])
    assert tokenizer.encode("CAF\u00c9s", add_special_tokens=False).tokens == ["cafe", "##s"]


def test_a_tokenizer_json_joins_words_as_references_have_them(tmp_path):
    from students.lightcap.tokenizer import decode_caption, encode_captions, load_tokenizer

    whole = load_tokenizer("english")
    text = "a dog's t-shirt, torn"
    whole.decoder = decoders.WordPiece()
    assert decode_caption(whole, encode_captions(whole, [text], 20)[0]) != text
    whole.save(str(tmp_path / "tokenizer.json"))
    read = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert decode_caption(read, encode_captions(read, [text], 20)[0]) == text
