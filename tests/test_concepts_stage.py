"""The concept stage on scenes, from captions alone and from labelled regions, and a captioner that reads what it found."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import stage_context
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from compress import data, evaluate
from compress.artifact import Artifact
from compress.config import Concepts, Data, Distill, Student, Train, vocabulary_of
from compress.context import Context
from compress.errors import DataError, ModelError, RecipeError
from compress.recipe import read_recipe
from compress.stages import concepts, distill, train
from compress.training import corpus, text
from compress.training.features import grids
from compress.training.mentions import best_concepts, concept_loss, mentioned, precision_recall
from compress.training.start import new_captioner, read_captioner
from students.lightcap.concepts import NONE

STUDENT = Student(preset="tiny", heads=2)
WORDS = ["circle", "square", "triangle", "star", "cross", "ring", "red", "blue", "green", "yellow", "large", "small", "striped"]


@pytest.fixture(scope="module")
def scenes():
    return data.load(Data(train_images=64, val_images=16))


@pytest.fixture(autouse=True)
def embeddings(monkeypatch):
    """Random, nearly orthogonal text embeddings: the real encoders are tested below where they are installed."""

    def embed(texts, encoder):
        return torch.nn.functional.normalize(torch.randn(len(texts), 32, generator=torch.Generator().manual_seed(7)), dim=1)

    monkeypatch.setattr(concepts, "embed_texts", embed)


@pytest.fixture
def features(monkeypatch):
    """Grids in which every mentioned concept is one cell's: what weak training must find out. The trained scenes encoder is for recipes."""

    def make(model, data, settings, cache, progress):
        random = np.random.default_rng(len(data))
        basis = np.random.default_rng(0).normal(size=(len(WORDS), 128)).astype(np.float32)
        grid = 0.3 * random.normal(size=(len(data), 25, 128)).astype(np.float32)
        for row, present in enumerate(mentioned(data, WORDS)):
            for concept in present.nonzero().flatten().tolist():
                grid[row, random.integers(25)] += basis[concept]
        return grid

    monkeypatch.setattr(corpus, "grids", make)
    monkeypatch.setattr(evaluate, "grids", make)
    return make


@pytest.fixture
def context(tmp_path, scenes):
    (tmp_path / "words.txt").write_text("# what scenes show\n" + "\n".join(WORDS))

    def make(kind: str, config, artifacts=None, name: str = "x") -> Context:
        cache, made = tmp_path / "cache", artifacts or {}
        return stage_context.context(tmp_path / name, scenes, kind, config, STUDENT, name, cache=cache, artifacts=made)

    return make


def settings(tmp_path, **changes) -> Concepts:
    return Concepts(vocabulary=str(tmp_path / "words.txt"), inner=32, pieces=6, batch_images=16, **changes)


def test_it_learns_what_captions_mention(context, scenes, tmp_path, features):
    """On pictures it was not trained on it finds more than the list's most common concepts, which an untrained one gives."""
    found = {}
    for name, epochs in (("short", 0.01), ("long", 40)):
        config = settings(tmp_path, epochs=epochs, dropout=0.0, learning_rate=3e-3)
        where = context("concepts", config, name=name)
        concepts.run(None, config, where)
        model = read_captioner(where.output)[0]
        row = evaluate.measure(Artifact(where.output), None, where)
        found[name] = row["concept_precision"], row["concept_recall"]
        assert model.config.concepts == 6 and model.config.alignment == (32, 32) and model.config.concept_vocabulary[0] == len(WORDS)
    assert found["long"][0] > found["short"][0] + 0.2 and found["long"][1] > found["short"][1] + 0.2


def test_it_learns_on_while_captions_tune_its_encoder(context, scenes, tmp_path):
    first = context("concepts", settings(tmp_path, epochs=4, dropout=0.0, learning_rate=3e-3), name="words")
    concepts.run(None, first.stage.config, first)
    wanted, losses, aligned = mentioned(scenes.split("train"), WORDS).float(), {}, {}
    for name, weight in (("alone", 0.0), ("both", 1.0)):
        config = Train(encoder="tuned", encoder_learning_rate=1e-2, epochs=8, batch_images=16, concept_weight=weight)
        where = context("train", config, name=name)
        stage = dataclasses.replace(where.stage, parent="words")
        recipe = dataclasses.replace(where.recipe, stages=(first.stage, stage))
        train.run(Artifact(first.output), config, dataclasses.replace(where, recipe=recipe, stage=stage))
        model, _, preprocessor = read_captioner(where.output)
        grid = torch.from_numpy(np.array(grids(model, scenes.split("train"), preprocessor, where.cache, where.progress))).float()
        losses[name] = concept_loss(model.concept_scores(grid), wanted).item()
        aligned[name] = model.alignment.first.weight
    assert torch.equal(aligned["alone"], read_captioner(first.output)[0].alignment.first.weight)
    assert not torch.equal(aligned["both"], aligned["alone"]) and losses["both"] < losses["alone"] - 0.3, losses


def test_the_list_that_a_captioner_was_taught(tmp_path):
    (tmp_path / "x.yaml").write_text("""\
student: {preset: tiny, heads: 2}
stages:
  - concepts: {as: ours, preset: tiny, vocabulary: ours.txt, pieces: 8}
  - concepts: {as: shipped, preset: tiny, pieces: 8}
  - train:    {as: first, preset: tiny, extractor: ours}
  - train:    {as: other, preset: tiny, extractor: shipped}
  - distill:  {as: student, teachers: [first]}
  - prune:    {as: pruned, macs: 0.5}
""")
    recipe = read_recipe(tmp_path / "x.yaml")
    found = {stage.name: vocabulary_of(recipe, stage) for stage in recipe.stages}
    assert found == {"ours": "ours.txt", "shipped": None, "first": "ours.txt", "other": None, "student": "ours.txt", "pruned": "ours.txt"}


def test_a_tuned_encoder_learns_with_it(context, scenes, tmp_path):
    """It fits the training pictures' concepts better than over the encoder as it was, which stays as it was."""
    losses, encoders = {}, {}
    wanted = mentioned(scenes.split("train"), WORDS).float()
    for name, changes in (("frozen", {}), ("tuned", {"encoder": "tuned", "flip": True, "crop": 0.1, "encoder_learning_rate": 1e-2})):
        config = settings(tmp_path, epochs=16, dropout=0.0, learning_rate=3e-3, **changes)
        where = context("concepts", config, name=name)
        concepts.run(None, config, where)
        model, _, preprocessor = read_captioner(where.output)
        grid = torch.from_numpy(np.array(grids(model, scenes.split("train"), preprocessor, where.cache, where.progress))).float()
        losses[name] = F.binary_cross_entropy_with_logits(model.concept_scores(grid), wanted).item()
        encoders[name] = model.encoder.state_dict()
    untrained = new_captioner(STUDENT, "tiny", None, None, 0.0, 17, extracts=True)[0].encoder.state_dict()
    assert all(torch.equal(encoders["frozen"][key], tensor) for key, tensor in untrained.items())
    assert not any(torch.equal(encoders["tuned"][key], tensor) for key, tensor in untrained.items() if key.endswith("weight"))
    assert losses["tuned"] < losses["frozen"] - 0.03


def test_its_row_says_precision_and_recall(context, tmp_path):
    config = settings(tmp_path, epochs=1)
    where = context("concepts", config)
    concepts.run(None, config, where)
    row = evaluate.measure(Artifact(where.output), None, where)
    assert 0 < row["concept_precision"] < 1 and 0 < row["concept_recall"] < 1 and row["params_by_part"]["alignment"] > 0
    assert "cider" not in row and row["images"] == 16


def test_labelled_regions(context, scenes, tmp_path, monkeypatch):
    """COCO's layout; what is labelled in the upper left corner is told there by what only that corner shows."""
    keys = [example.image_id for example in scenes.split("train").examples]
    images = [{"file_name": key, "id": number, "width": 80, "height": 80} for number, key in enumerate(keys)]
    boxes = [{"image_id": number, "category_id": 1 + number % 2, "bbox": [0, 0, 32, 32]} for number in range(len(keys))]
    categories = [{"id": 1, "name": "star"}, {"id": 2, "name": "ring"}]
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    grid = np.random.default_rng(1).normal(size=(64, 25, 128)).astype(np.float32)
    grid[0::2, [0, 1, 5, 6], :4] += 2
    grid[1::2, [0, 1, 5, 6], 4:8] += 2
    monkeypatch.setattr(corpus, "grids", lambda *_: grid)
    regions = (str(tmp_path / "instances.json"),)
    config = settings(tmp_path, epochs=30, dropout=0.0, learning_rate=3e-3, regions=regions, region_weight=20.0)
    where = context("concepts", config)
    concepts.run(None, config, where)
    model = read_captioner(where.output)[0]
    labels = concepts.labelled(config, scenes.split("train"), tuple(WORDS), 5)
    assert len(labels) == 64
    right = 0
    with torch.no_grad():
        for row, (weights, wanted) in labels.items():
            logits = model.alignment(torch.from_numpy(grid[row : row + 1]), weights)[0] @ model.concepts.matrix.t() + model.concepts.prior
            right += int((logits.argmax(1) == wanted).sum())
    assert right > 58  # the prior alone is right on half of 64
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"images": [images[0] | {"file_name": "elsewhere"}], "annotations": boxes[:1], "categories": categories}))
    with pytest.raises(DataError, match=r"other\.json: its regions are of no training picture"):
        concepts.labelled(dataclasses.replace(config, regions=(str(other),)), scenes.split("train"), tuple(WORDS), 5)


def test_a_detector_s_boxes_take_the_place_of_windows(context, scenes, tmp_path, monkeypatch):
    """Every concept is in one cell of its picture, and noise in the others: boxes around those cells are what it learns to tell."""
    train_split = scenes.split("train")
    keys = [example.image_id for example in train_split.examples]
    random, basis = np.random.default_rng(3), np.random.default_rng(0).normal(size=(len(WORDS), 128)).astype(np.float32)
    grid = random.normal(size=(len(keys), 25, 128)).astype(np.float32)
    boxes = []
    for row, present in enumerate(mentioned(train_split, WORDS)):
        for concept in present.nonzero().flatten().tolist():
            cell = int(random.integers(25))
            grid[row, cell] += basis[concept]
            corner = [cell % 5 * 16, cell // 5 * 16]
            boxes.append({"image_id": keys[row], "category_id": 1, "bbox": [*corner, 16, 16], "score": 0.9})
    monkeypatch.setattr(corpus, "grids", lambda *_: grid)
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    images = [{"file_name": key, "id": number, "width": 80, "height": 80} for number, key in enumerate(keys)]
    (tmp_path / "sizes.json").write_text(json.dumps({"images": images}))
    named = {"boxes": str(tmp_path / "boxes.json"), "image_sizes": str(tmp_path / "sizes.json")}
    losses = {}
    for name, more in (("windows", {}), ("boxes", named)):
        config = settings(tmp_path, epochs=10, dropout=0.0, learning_rate=3e-3, **more)
        where = context("concepts", config, name=name)
        concepts.run(None, config, where)
        model = read_captioner(where.output)[0]
        pooled = concepts.detected(dataclasses.replace(config, **named), train_split, 5)
        with torch.no_grad():
            scores = concepts.scores_of(model, torch.from_numpy(grid), [pooled.get(row) for row in range(len(keys))])
        losses[name] = float(F.binary_cross_entropy_with_logits(scores, mentioned(train_split, WORDS).float()))
    assert len(pooled) == 64 and losses["boxes"] < 0.9 * losses["windows"], losses
    mixed = concepts.scores_of(model, torch.from_numpy(grid[:2]), [None, pooled[1]])
    torch.testing.assert_close(mixed[:1], model.concept_scores(torch.from_numpy(grid[:1])))
    torch.testing.assert_close(mixed[1:], model.concept_scores(torch.from_numpy(grid[1:2]), pooled[1]))
    (tmp_path / "other.json").write_text(json.dumps({"images": [images[0] | {"file_name": "elsewhere"}]}))
    (tmp_path / "boxes.json").write_text(json.dumps([boxes[0] | {"image_id": "elsewhere"}]))
    with pytest.raises(DataError, match=r"boxes\.json: its boxes are of no training picture"):
        concepts.detected(dataclasses.replace(config, image_sizes=str(tmp_path / "other.json")), train_split, 5)


def test_teacher_and_student_read_the_same_concepts(context, tmp_path):
    """concepts -> train (extractor) -> distill: the extractor goes through unchanged, and the modulator is the teacher's size."""
    config = settings(tmp_path, epochs=2)
    first = context("concepts", config, name="concepts")
    concepts.run(None, config, first)
    made = {"concepts": Artifact(first.output)}
    config = Train(preset="tiny", extractor="concepts", modulator=4, epochs=2, batch_images=16)
    second = context("train", config, made, "teacher")
    train.run(None, config, second)
    made["teacher"] = Artifact(second.output)
    config = Distill(teachers=("teacher",), init="weights", match=("tokens", "hidden", "attention"), epochs=2, batch_images=16)
    third = context("distill", config, made, "student")
    distill.run(None, config, third)
    source, teacher, student = (read_captioner(where.output)[0] for where in (first, second, third))
    for model in (teacher, student):
        assert model.config.concepts == 6 and model.config.modulator == 4
        for part in ("alignment", "concepts", "encoder"):
            mine, theirs = getattr(model, part).state_dict(), getattr(source, part).state_dict()
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs), part


def test_an_extractor_is_taken_away(context, scenes, tmp_path):
    """What is left has the encoder alone, and a captioner that starts from it reads no concepts."""
    config = settings(tmp_path, epochs=1)
    first = context("concepts", config, name="extractor")
    concepts.run(None, config, first)
    away = dataclasses.replace(config, pieces=0)
    second = context("concepts", away, name="away")
    concepts.run(Artifact(first.output), away, second)
    row = evaluate.measure(Artifact(second.output), None, second)
    assert "alignment" not in row["params_by_part"] and row["bytes"] > 0
    plain = Train(preset="tiny", extractor="away", epochs=0.1, batch_images=16)
    third = context("train", plain, {"away": Artifact(second.output)}, name="plain")
    train.run(None, plain, third)
    before, model = (read_captioner(where.output)[0] for where in (first, third))
    assert before.config.concepts == 6 and model.config.concepts == 0 and model.concepts is None and model.alignment is None
    assert all(torch.equal(a, b) for a, b in zip(before.encoder.state_dict().values(), model.encoder.state_dict().values(), strict=True))
    teacher = Train(preset="tiny", extractor="extractor", epochs=0.1, batch_images=16)
    fourth = context("train", teacher, {"extractor": Artifact(first.output)}, name="teacher")
    train.run(None, teacher, fourth)
    student = Distill(teachers=("teacher",), init="weights", modulator=4, epochs=0.1, batch_images=16)
    fifth = context("distill", student, {"teacher": Artifact(fourth.output)}, name="student")
    distill.run(None, student, fifth)
    assert [read_captioner(where.output)[0].config.modulator for where in (fourth, fifth)] == [None, 4]


def test_refused_lists(context, scenes, tmp_path):
    (tmp_path / "none.txt").write_text("zeppelin\n")
    config = Concepts(vocabulary=str(tmp_path / "none.txt"), epochs=1)
    with pytest.raises(DataError, match="no training caption mentions a concept"):
        concepts.run(None, config, context("concepts", config, name="a"))
    (tmp_path / "few.txt").write_text("circle\nred\n")
    config = Concepts(vocabulary=str(tmp_path / "few.txt"), epochs=1)
    with pytest.raises(RecipeError, match="2 concepts do not fill 20 word pieces"):
        concepts.run(None, config, context("concepts", config, name="b"))


def test_best_concepts_fit_whole():
    pieces = torch.tensor([[10, NONE], [11, 12], [13, NONE]])
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0]])
    assert best_concepts(scores, pieces, 2).tolist() == [[True, False, False], [False, True, False]]
    assert best_concepts(scores, pieces, 3).tolist() == [[True, True, False], [False, True, True]]


def test_minilm_knows_what_is_alike():
    found = text.embed_texts(["a photo of a dog", "a photo of a puppy", "a photo of a bus", "someone's bus"], "minilm")
    assert found.shape == (4, 384)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    alike = found @ found.t()
    assert alike[0, 1] > alike[0, 2] and alike[2, 3] > alike[1, 3]


def test_clips_text_encoder_has_its_activation(tmp_path, monkeypatch):
    """A random checkpoint in open_clip's layout; OpenAI's weights mean QuickGELU, which open_clip's RN50 does not have by itself."""
    torch.manual_seed(0)
    model = open_clip.create_model("RN50-quickgelu").eval()
    save_file(model.state_dict(), tmp_path / "clip.safetensors")
    words = ["a photo of a dog", "a photo of someone running"]
    with torch.inference_mode():
        expected = F.normalize(model.encode_text(open_clip.get_tokenizer("RN50")(words)), dim=-1)
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.testing.assert_close(text.embed_texts(words, "~/clip.safetensors"), expected, atol=1e-6, rtol=0)


def test_an_absent_text_encoder():
    with pytest.raises(ModelError, match=r"no weights for CLIP RN50's text encoder at 'nowhere\.pt'; .*minilm, openai"):
        text.embed_texts(["a photo of a dog"], "nowhere.pt")


def test_precision_and_recall_by_hand():
    scores, pieces = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), torch.tensor([[10], [11], [12]])
    model = SimpleNamespace(concept_scores=lambda grid: scores, concepts=SimpleNamespace(pieces=pieces), config=SimpleNamespace(concepts=2))
    wanted = torch.tensor([[True, False, True], [False, False, True]])
    assert precision_recall(model, np.zeros((2, 1, 1)), wanted) == (0.5, pytest.approx(2 / 3))
