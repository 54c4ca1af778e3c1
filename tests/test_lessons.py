"""Teachers that look at what their student looks at, and say of it what their stored targets would hold."""

import dataclasses

import numpy as np
import pytest
import torch
from stage_context import context

from compress import data
from compress.artifact import Artifact
from compress.config import Data, Distill, Student
from compress.stages import distill
from compress.training import lessons
from compress.training.corpus import corpus
from compress.training.start import new_captioner, read_captioner, write_captioner
from students.lightcap import LightCap
from teachers.lightcap import LightCapTeacher

STUDENT = Student(preset="tiny", heads=2)


@pytest.fixture(scope="module")
def scenes():
    return data.load(Data(train_images=12, val_images=2))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Artifact]:
    """Two captioners with encoders of their own."""
    found = {}
    for seed, name in enumerate(("one", "two")):
        model, tokenizer, settings = new_captioner(dataclasses.replace(STUDENT, heads=1), "tiny", None, None, 0.0, seed)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if weight.dim() == 2 and not key.startswith("encoder."):
                    weight.normal_(0, weight.shape[1] ** -0.5)
        folder = tmp_path_factory.mktemp(name)
        write_captioner(folder, model.eval(), tokenizer, settings)
        found[name] = Artifact(folder)
    return found


@pytest.fixture
def lesson(tmp_path, scenes, teachers):
    """A student that starts as the first teacher, its data, and its lessons."""

    def go(config: Distill, masked: bool = False):
        model, tokenizer, settings = read_captioner(teachers["one"].path)
        if masked:
            model.config = dataclasses.replace(model.config, mask_piece=tokenizer.token_to_id("[MASK]"))
        here = context(tmp_path, scenes, "distill", config, STUDENT, "student", cache=tmp_path / "cache", artifacts=teachers)
        own = [LightCapTeacher(source.path) for source in teachers.values()]
        given = corpus(model, tokenizer, settings, here, config.anew, config.flip, config.crop)
        for teacher in own:
            teacher.narrow(given.keep)
        model.narrow(given.keep)
        return model, given, own, here, lessons.asked(model, given, own, settings, config, "hidden" in config.match, here)

    return go


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - other).norm() / other.norm()).detach())


@pytest.mark.parametrize("masked", [False, True])
def test_of_pictures_as_they_are_teachers_say_what_their_targets_hold(lesson, teachers, tmp_path, masked):
    """Also to a student of masked pieces, which is shown fewer of them."""
    config = Distill(teachers=("one", "two"), encoder="tuned", top_k=8, temperature=1.5)
    model, given, own, here, found = lesson(config, masked)
    model.encoder.eval()
    batch = given.batches(5, 3, model.config.mask_piece)(1)
    with torch.no_grad():
        grid, grids = found.look(batch.images)
        ids, best = found.told(batch, grids)
    assert len(batch.rows) == ids.shape[1] == int((batch.targets > -1).sum()) and ids.shape == best.shape == (2, len(batch.rows), 8)
    for number, (name, teacher) in enumerate(zip(teachers, own, strict=True)):
        still = corpus(*read_captioner(teachers[name].path), here, beside=given.keep.tolist())  # by its own encoder, computed once
        assert torch.equal(still.keep, given.keep)
        taught = lessons.teach([teacher], [teachers[name]], still, 8, 1.5, "fp32", [name], here)
        wanted_ids, wanted = (x[0].numpy() for x in lessons.taught_at(taught, batch, torch.device("cpu")))
        np.testing.assert_allclose(best[number].numpy(), wanted, atol=4e-3)
        assert (ids[number].numpy() == wanted_ids).mean() > 0.98  # near ties apart
    assert (best[0] - best[1]).abs().max() > 0.02


def test_each_teacher_sees_the_student_s_picture_by_its_own_encoder(lesson):
    for config, tuned in ((Distill(encoder="tuned", flip=True, crop=0.3), True), (Distill(crop=0.3), False)):
        model, _, own, _, found = lesson(config)
        model.encoder.requires_grad_(tuned)
        torch.manual_seed(4)
        grid, grids = found.look(np.array([0, 3, 7]))
        assert grid.requires_grad == tuned and not grids[1].requires_grad
        assert (grids[0] is grid) == (not tuned)  # an encoder that is the student's, and stays so, is asked once
        assert len(found.encoders) == 1 + tuned and distance(grids[0], grids[1]) > 0.5
        torch.testing.assert_close(grids[0], grid.detach(), rtol=1e-4, atol=1e-4)  # not tuned yet: the same picture looks the same
        torch.manual_seed(5)
        assert distance(found.look(np.array([0, 3, 7]))[0], grid) > 0.1


def test_a_tuned_student_moves_its_encoder_towards_what_its_teachers_say(tmp_path, scenes, teachers):
    """A frozen one does not, though its pictures are disturbed."""
    made = {}
    for name, more in (("tuned", {"encoder": "tuned", "encoder_learning_rate": 1e-2}), ("disturbed", {"flip": True, "crop": 0.2})):
        config = Distill(teachers=("two", "one"), match=("tokens", "hidden"), epochs=2, batch_images=6, **more)
        here = context(tmp_path / name, scenes, "distill", config, STUDENT, "student", cache=tmp_path / "cache", artifacts=teachers)
        distill.run(None, config, here)
        made[name] = LightCap.from_pretrained(here.output).encoder.state_dict()
    first = LightCap.from_pretrained(teachers["two"].path).encoder.state_dict()
    assert all(torch.equal(first[key], made["disturbed"][key]) for key in first)
    assert max((first[key] - made["tuned"][key]).abs().max() for key in first if key.endswith("weight")) > 1e-2


def test_a_tuned_encoder_s_concepts_stay_those_of_its_teachers(monkeypatch, lesson):
    """The odds that it learns from are the mean of theirs, each by its own grid."""
    monkeypatch.setattr(LightCapTeacher, "concept_scores", lambda self, grid: grid.mean(1)[:, :6])
    model, _, own, _, found = lesson(Distill(encoder="tuned", concept_weight=0.1))
    grids = found.look(np.array([1, 2]))[1]
    wanted = (grids[0].mean(1)[:, :6].sigmoid() + grids[1].mean(1)[:, :6].sigmoid()) / 2
    torch.testing.assert_close(found.odds(grids), wanted)
    assert lesson(Distill(encoder="tuned"))[-1].odds is None
