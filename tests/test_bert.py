"""BERT's weights in the fusion, against the library that they come from, and where a student begins."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from compress.config import Student
from compress.errors import ModelError
from compress.training.start import new_captioner
from students.lightcap.bert import copy_layers, layer_map, load_bert
from students.lightcap.encoder import read_tensors
from students.lightcap.fusion import Fusion
from students.lightcap.tokenizer import load_tokenizer

HIDDEN, LAYERS, VOCABULARY = 32, 4, 50


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=128, type_vocab_size=2, initializer_range=0.3,
    )
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


def test_another_number_of_heads_than_the_checkpoints_is_refused(checkpoint, tmp_path):
    """The shapes would fit."""
    file = checkpoint()
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4}')
    load_bert(fusion(), file)
    (tmp_path / "config.json").write_text('{"num_attention_heads": 8}')
    with pytest.raises(ValueError, match="has 8 attention heads, this fusion 4; set attention_heads: 8"):
        load_bert(fusion(), file)
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(ValueError, match="config.json: is not JSON; fetch it again"):
        load_bert(fusion(), file)


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
                          ("nested.pt", "not a flat state dict")):
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
    with pytest.raises(FileNotFoundError, match="neither here nor on the hub .*; set fusion_weights to a file, a folder"):
        load_bert(fusion(), "someone/absent")
    with pytest.raises(FileNotFoundError, match="no tokenizer at 'someone/absent'"):
        load_tokenizer("someone/absent")


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


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    """As lock.py reads it: what a recipe names is one file for the lock and for who loads it."""
    from students.lightcap.bert import bert_file
    from students.lightcap.checkpoint import checkpoint_file
    from students.lightcap.tokenizer import load_tokenizer

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bert").mkdir()
    for name in ("bert/model.safetensors", "rn50.safetensors"):
        (tmp_path / name).write_bytes(b"")
    load_tokenizer("english").save(str(tmp_path / "bert" / "tokenizer.json"))
    assert bert_file("~/bert") == tmp_path / "bert" / "model.safetensors"
    assert checkpoint_file("~/rn50.safetensors", "clip-rn50", "encoder_weights") == tmp_path / "rn50.safetensors"
    assert load_tokenizer("~/bert").get_vocab_size() > 100
