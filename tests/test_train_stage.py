"""The train stage on a few scenes: what each of its keys does, and which of them go together."""

import contextlib
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from stage_context import context
from torch import nn

from compress import data
from compress.artifact import Artifact
from compress.config import Concepts, Data, Student, Train
from compress.context import Progress
from compress.errors import ModelError
from compress.stages import concepts, train
from compress.training import loop, start
from compress.training.batches import IGNORED
from compress.training.corpus import Corpus, disturbed
from compress.training.features import grids
from compress.training.matching import Matching, replace
from compress.training.start import read_captioner, ready, write_captioner
from compress.training.words import Words
from students.lightcap import LightCap, preset
from students.lightcap.concepts import NONE
from students.lightcap.tokenizer import load_tokenizer

STUDENT = Student(preset="tiny", heads=2)


@pytest.fixture(scope="module")
def scenes():
    return data.load(Data(train_images=16, val_images=2))


@pytest.fixture
def run(tmp_path, scenes):
    """Runs one stage and gives its artifact."""

    def go(name: str, parent: Artifact | None = None, artifacts: dict | None = None, data=scenes, **keys) -> Artifact:
        config = Train(**({"epochs": 0.5, "batch_images": 8, "warmup": 0.0} | keys))
        cache, made = tmp_path / "cache", artifacts or {}
        here = context(tmp_path / name, data, "train", config, STUDENT, name, cache=cache, artifacts=made)
        train.run(parent, config, here)
        return Artifact(here.output)

    return go


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    return read_captioner(artifact.path)[0].state_dict()


# ---- pictures


def test_half_of_the_pictures_are_mirrored():
    torch.manual_seed(0)
    pictures = torch.rand(200, 3, 8, 8)
    found = disturbed(pictures, flip=True, crop=0.0)
    mirrored = torch.tensor([torch.allclose(a.flip(2), b, atol=1e-5) for a, b in zip(pictures, found, strict=True)])
    same = torch.tensor([torch.allclose(a, b, atol=1e-5) for a, b in zip(pictures, found, strict=True)])
    assert (mirrored ^ same).all() and 70 < int(mirrored.sum()) < 130
    assert disturbed(pictures, flip=False, crop=0.0) is pictures


def test_crops_are_squares_inside_the_picture():
    """On a picture that tells its own coordinates, -1 to 1: as wide as high, of no less than 1 - crop of the side, anywhere."""
    torch.manual_seed(0)
    axis = (2 * torch.arange(32) + 1) / 32 - 1
    x, y = axis.expand(32, 32), axis.unsqueeze(1).expand(32, 32)
    found = disturbed(torch.stack([x, y, x]).expand(300, 3, 32, 32), flip=False, crop=0.4)
    step_across, step_down = (found[:, 0, 16, 16] - found[:, 0, 16, 15]) * 16, (found[:, 1, 16, 16] - found[:, 1, 15, 16]) * 16
    torch.testing.assert_close(step_across, step_down)
    assert step_across.min() > 0.599 and step_across.max() < 1.001 and step_across.std() > 0.08
    assert found.abs().max() <= 1 and (found[:, 0].mean((1, 2)).abs() <= 1 - step_across + 1e-4).all()
    assert found[:, 0].mean((1, 2)).std() > 0.05 and abs(float(found[:, 0].mean())) < 0.03


def test_a_tuned_encoder_learns_from_disturbed_pictures(run, monkeypatch):
    seen = []
    real = LightCap.encode
    monkeypatch.setattr(LightCap, "encode", lambda self, pixels: seen.append(pixels.detach().clone()) or real(self, pixels))
    plain, other = run("plain", encoder="tuned"), run("other", encoder="tuned", flip=True, crop=0.3)
    assert len(seen) == 2 and not torch.allclose(seen[0], seen[1], atol=1e-2)
    names = [name for name in weights(plain) if name.startswith("encoder.") and name.endswith("weight")]
    assert any(not torch.equal(weights(plain)[name], weights(other)[name]) for name in names)


def test_grid_dropout_drops_features_in_training_alone(run, monkeypatch):
    shares = []
    real = LightCap.states

    def states(self, grid, *rest, **more):
        shares.append(float((grid == 0).float().mean()))
        return real(self, grid, *rest, **more)

    monkeypatch.setattr(LightCap, "states", states)
    run("none")
    run("half", grid_dropout=0.5)
    assert abs(shares[1] - shares[0] * 0.5 - 0.5) < 0.05 and shares[0] < 0.9


# ---- weights that it begins with


def test_the_sections_weights_begin_every_captioner_of_its_preset(monkeypatch, tmp_path, scenes):
    """Also where a stage names that preset, to start anew, and where a captioner goes on from a `concepts` stage; none of another."""
    taken = []
    monkeypatch.setattr(start, "load_bert", lambda fusion, weights: taken.append(weights))
    student = dataclasses.replace(STUDENT, fusion_weights="bert")
    for number, config in enumerate((Train(), Train(preset="tiny"), Train(preset="scenes-student"), Train(fusion_weights="own"),
                                     Concepts(preset="tiny"), Concepts(preset="scenes-student"))):
        kind, config = "train" if isinstance(config, Train) else "concepts", dataclasses.replace(config, epochs=0.01)
        here = context(tmp_path / str(number), scenes, kind, config, student, cache=tmp_path / "cache")
        taken.append(config.preset)
        with contextlib.suppress(ModelError):  # MiniLM, which concepts are embedded by, may not be here
            (train if kind == "train" else concepts).run(None, config, here)
    assert taken == [None, "bert", "tiny", "bert", "scenes-student", None, "own", "tiny", "bert", "scenes-student"]


def test_zeroed_layers_start_as_if_they_were_not_there():
    """Behind a norm that scales nothing; another's scale they take away."""
    torch.manual_seed(0)
    model = LightCap(preset("tiny", vocabulary=30, dropout=0.0)).eval()
    with torch.no_grad():
        for name, weight in model.fusion.named_parameters():
            weight.normal_(0, 1 if weight.dim() == 1 else weight.shape[1] ** -0.5) if name.startswith("layers.") else None
    x, mask = F.layer_norm(torch.randn(2, 9, 32), (32,)), torch.ones(9, 9).tril().bool().view(1, 1, 9, 9)
    with torch.no_grad():
        whole = model.fusion(x, 4, mask=mask)[0]
        train.silence(model.fusion.layers[:1])
        found = model.fusion(x, 4, mask=mask)[0]
        model.fusion.layers = model.fusion.layers[1:]
        wanted = model.fusion(x, 4, mask=mask)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert (whole - wanted).abs().max() > 0.5


def test_zeroed_layers_learn(run):
    still, learned = (weights(run(f"{rate}", zero_layers=1, learning_rate=rate)) for rate in (1e-12, 1e-2))
    for branch in ("output", "down"):
        first, second = (f"fusion.layers.{layer}.{branch}.weight" for layer in range(2))
        assert still[first].abs().max() < 1e-9 < 1e-2 < still[second].abs().max()
        assert learned[first].abs().max() > 1e-3


# ---- learning rates


def test_new_parts_learn_at_their_own_rate(run):
    before, after = weights(run("before", learning_rate=1e-12)), weights(run("after", learning_rate=1e-12, new_learning_rate=1e-2))
    moved = {name for name in before if (before[name] - after[name]).abs().max() > 1e-6}
    assert moved and all(name.startswith(train.NEW) for name in moved)


# ---- matching


def test_replaced_concepts_are_the_next_picture_s():
    torch.manual_seed(0)
    concepts = torch.arange(400).view(200, 2)
    mixed, replaced = replace(concepts)
    assert torch.equal(mixed[replaced], concepts.roll(1, 0)[replaced]) and torch.equal(mixed[~replaced], concepts[~replaced])
    assert 70 < int(replaced.sum()) < 130
    same = torch.ones(50, 3, dtype=torch.long)
    assert not replace(same)[1].any()  # what both pictures show belongs to either
    few = [replace(concepts[:2])[1].tolist() for _ in range(60)]
    assert [True, True] not in few and [False, True] in few  # some captions stand by their own picture's concepts


def test_matching_is_binary_cross_entropy():
    matching = Matching(3)
    with torch.no_grad():
        matching.classify.weight.copy_(torch.tensor([[1.0, 2.0, 0.0]]))
        matching.classify.bias.fill_(0.5)
    states = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, 9]])
    logits = torch.tensor([1.5, -1.5, 0.5])
    wanted = -(F.logsigmoid(logits[0]) + F.logsigmoid(-logits[1]) + F.logsigmoid(logits[2])) / 3
    torch.testing.assert_close(matching.loss(states, torch.tensor([True, False, True])), wanted)


@pytest.fixture
def extractor(run, scenes, tmp_path) -> Artifact:
    """A captioner whose random concept extractor looks at what differs between pictures, and so says something else of each."""
    model, tokenizer, settings = read_captioner(run("plain").path)
    model.config = dataclasses.replace(model.config, concepts=4)
    torch.manual_seed(3)
    pieces = torch.tensor([[piece, NONE] for piece in range(5, 29)])
    model.start_concepts(F.normalize(torch.randn(24, 16), dim=1), pieces, torch.zeros(24), 16, 4)
    grid = torch.tensor(grids(model, scenes.split("train"), settings, tmp_path / "cache", Progress(quiet=True))).float().flatten(0, 1)
    with torch.no_grad():
        model.alignment.first.weight.div_(grid.std(0) + 1e-6)
        model.alignment.first.bias.copy_(-model.alignment.first.weight @ grid.mean(0))
    (tmp_path / "extractor").mkdir()
    write_captioner(tmp_path / "extractor", model, tokenizer, settings)
    return Artifact(tmp_path / "extractor")


def test_captions_of_replaced_concepts_are_not_learned(run, extractor, monkeypatch):
    seen = []
    match, logits, pack = Matching.loss, train.logits_at, Corpus.batches

    def batches(self, *keys):
        make = pack(self, *keys)
        return lambda step: seen.append([make(step)]) or seen[-1][0]

    monkeypatch.setattr(Corpus, "batches", batches)
    monkeypatch.setattr(Matching, "loss", lambda self, states, replaced: seen[-1].append(replaced) or match(self, states, replaced))
    monkeypatch.setattr(train, "logits_at", lambda states, *rest: seen[-1].append(len(states)) or logits(states, *rest))
    run("matched", artifacts={"extractor": extractor}, extractor="extractor", matching_weight=1.0, epochs=4)
    assert len(seen) == 8
    for batch, learned, replaced in seen:
        assert learned == int((batch.targets[~replaced] != IGNORED).sum())
    assert {bool(flag) for *_, replaced in seen for flag in replaced} == {True, False}


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_captions_that_others_agree_with_weigh_more(run, scenes, monkeypatch, objective):
    """Of each image's captions but one are equal: by consensus alone that one has no weight, piece by piece as batches have them."""
    said = itertools.cycle((("a red ring", "a zebra"), ("one blue cross", "the violin"), ("two small stars", "some carpet")))
    examples = tuple(
        dataclasses.replace(example, captions=(usual, usual, f"{usual} here", odd))
        for example, (usual, odd) in zip(scenes.examples, said, strict=False)
    )
    odd = dataclasses.replace(scenes, examples=examples)
    asked, ids, kept, real = [], [], [], train.caption_loss
    real_logits, real_corpus = train.logits_at, train.corpus
    monkeypatch.setattr(train, "logits_at", lambda mean, word, bias, picked: ids.append(picked) or real_logits(mean, word, bias, picked))
    monkeypatch.setattr(train, "corpus", lambda *given: kept.append(real_corpus(*given)) or kept[-1])
    monkeypatch.setattr(train, "caption_loss", lambda logits, smoothing, weights: asked.append(weights) or real(logits, smoothing, weights))
    run("plain", preset="tiny", objective=objective, data=odd)
    made = [run(f"by {share}", preset="tiny", objective=objective, consensus=share, data=odd) for share in (0.5, 1.0)]
    assert asked[0] is None
    assert made[0].digest() != made[1].digest()
    half, whole = asked[1:]
    torch.testing.assert_close(half, 0.5 + 0.5 * whole)
    words, never = load_tokenizer("english"), {"zebra", "violin", "carpet"}
    said = [words.id_to_token(piece) for piece in kept[-1].keep[ids[-1].flatten()].tolist()]
    weighs = {word: [float(weight) for weight, other in zip(whole, said, strict=True) if other == word] for word in said}
    assert all(set(weighs[word]) == {0.0} for word in never & weighs.keys()) and never & weighs.keys()
    assert all(min(weighs[word]) > 0 for word in {"ring", "cross", "stars", "here"} & weighs.keys()) and float(whole.max()) > 1


# ---- the encoder's words and norms


@pytest.mark.parametrize(("tuned", "weights", "learns"), [(True, None, True), (True, "none", True), (True, "imagenet", False),
                                                          (False, None, False)])
def test_norms_of_a_pretrained_encoder_stay(tuned, weights, learns):
    encoder = LightCap(preset("tiny", vocabulary=9)).encoder
    ready(encoder, tuned, Student(encoder_weights=weights))
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.training == learns for norm in norms)


def test_an_untrained_word_classifier_answers_the_shares(run):
    shares, said = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([[0, 2, IGNORED], [1, 1, 0]])
    words = Words(4, 6, shares)
    nn.init.zeros_(words.classify.weight)
    present = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    wanted = F.binary_cross_entropy(shares.expand(2, 3), present, reduction="sum") / 2
    torch.testing.assert_close(words.loss(torch.randn(2, 6, 4), said), wanted)
    assert run("plain", encoder="tuned").digest() != run("words", encoder="tuned", word_weight=1.0).digest()


def test_the_classifier_of_words_is_in_the_state(run, monkeypatch):
    """It is no part of the captioner; a stage that was stopped goes on with it all the same."""
    found, real = [], loop.save_state
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(loop, "save_state", lambda modules, *rest: found.append([*modules.state_dict()]) or real(modules, *rest))
    run("words", encoder="tuned", word_weight=1.0)
    assert any("classify" in name for name in found[0])
