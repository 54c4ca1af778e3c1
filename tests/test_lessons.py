"""Teachers that look at what their student looks at, and say of it what their stored targets would hold."""

import dataclasses

import numpy as np
import pytest
import torch
from stage_context import context

from compress import data
from compress.artifact import Artifact
from compress.config import Data, Distill, Student
from compress.errors import RecipeError
from compress.stages import distill
from compress.training import lessons
from compress.training.corpus import corpus
from compress.training.losses import token_loss
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
        return model, given, own, here, lessons.asked(model, given, own, settings, config, here)

    return go


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - other).norm() / other.norm()).detach())


@pytest.mark.parametrize("masked", [False, True])
def test_of_pictures_as_they_are_teachers_say_what_their_targets_hold(lesson, teachers, masked):
    """Also to a student of masked pieces, which is asked for fewer of them."""
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
    both = ("one", "two")
    for config, tuned in ((Distill(teachers=both, encoder="tuned", flip=True, crop=0.3), True), (Distill(teachers=both, crop=0.3), False)):
        model, *_, found = lesson(config)
        model.encoder.requires_grad_(tuned)
        torch.manual_seed(4)
        grid, grids = found.look(np.array([0, 3, 7]))
        assert grid.requires_grad == tuned and not grids[1].requires_grad
        assert (grids[0] is grid) == (not tuned)  # an encoder that is the student's, and stays so, is asked once
        assert len(found.encoders) == 1 + tuned and distance(grids[0], grids[1]) > 0.5
        torch.testing.assert_close(grids[0], grid.detach(), rtol=1e-4, atol=1e-4)  # not tuned yet: the same picture looks the same
        torch.manual_seed(5)
        assert distance(found.look(np.array([0, 3, 7]))[0], grid) > 0.1


@pytest.fixture
def run(tmp_path, scenes, teachers):
    def go(name: str, config: Distill, sources=teachers) -> LightCap:
        here = context(tmp_path / name, scenes, "distill", config, STUDENT, "student", cache=tmp_path / "cache", artifacts=sources)
        distill.run(None, config, here)
        return LightCap.from_pretrained(here.output)

    return go


def test_a_tuned_encoder_is_trained_and_a_frozen_one_is_not(run, teachers):
    """Though the frozen one's pictures are disturbed."""
    made = {}
    for name, more in (("tuned", {"encoder": "tuned", "encoder_learning_rate": 1e-2}), ("disturbed", {"flip": True, "crop": 0.2})):
        made[name] = run(name, Distill(teachers=("two", "one"), match=("tokens", "hidden"), epochs=2, batch_images=6, **more))
    first, moved, same = (model.encoder.state_dict() for model in (LightCap.from_pretrained(teachers["two"].path), *made.values()))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert max((first[key] - moved[key]).abs().max() for key in first if key.endswith("weight")) > 1e-2


def test_what_teachers_say_of_disturbed_pictures_is_learned(lesson, run):
    """Each head comes nearer to its own teacher, of whose words captions say nothing."""
    config = Distill(teachers=("one", "two"), match=("tokens",), epochs=60, batch_images=12, learning_rate=1e-2, dropout=0.0,
                     token_weight=1.0, encoder="tuned", encoder_learning_rate=1e-3, flip=True, top_k=8)
    _, given, _, _, found = lesson(dataclasses.replace(config, flip=False))
    batch = given.batches(12, 3)(0)
    far = {}
    for name, epochs in (("before", 0.01), ("after", 60)):
        student = run(name, dataclasses.replace(config, epochs=epochs))
        student.narrow(given.keep)
        with torch.no_grad():
            ids, best = found.told(batch, found.look(batch.images)[1])
            states = student.states(given.grid_of(student, batch.images), batch.tokens, batch.positions, batch.mask(25))
            states = student.heads.branch_states(states[batch.targets > -1])
            logs = (states @ student.word.T + student.heads.bias).log_softmax(-1)
        far[name] = [float(token_loss(logs[head].gather(-1, ids[head]), best[head], 1.0)) for head in range(2)]
    assert all(after < 0.5 * before for before, after in zip(far["before"], far["after"], strict=True)), far


def test_concepts_are_found_as_the_teachers_find_them(run, tmp_path, teachers):
    """The extractor learns with a tuned encoder, where that is asked; of a teacher with other concepts nothing is learned."""
    sources = {}
    for name, pieces in (("one", 3), ("two", 3), ("other", 4)):
        model, tokenizer, settings = read_captioner(teachers[name if name != "other" else "two"].path)
        torch.manual_seed(7)
        matrix = torch.randn(5, 16)
        model.start_concepts(matrix, torch.arange(10, 15).view(5, 1) + pieces, torch.zeros(5), 8, 4)
        (tmp_path / f"with-{name}").mkdir()
        write_captioner(tmp_path / f"with-{name}", model.eval(), tokenizer, settings)
        sources[name] = Artifact(tmp_path / f"with-{name}")
    config = Distill(teachers=("one", "two"), match=("tokens",), epochs=2, batch_images=6, encoder="tuned", encoder_learning_rate=1e-2)
    first = LightCap.from_pretrained(sources["one"].path).alignment.state_dict()
    for weight in (0.0, 0.1):
        found = run(f"{weight}", dataclasses.replace(config, concept_weight=weight), sources).alignment.state_dict()
        assert all(torch.equal(first[key], found[key]) for key in first) == (weight == 0.0)
    with pytest.raises(RecipeError, match="teacher 'other': it finds other concepts than its student; leave out concept_weight"):
        run("other", dataclasses.replace(config, teachers=("one", "other"), concept_weight=0.1), sources)


def test_a_tuned_encoder_s_concepts_stay_those_of_its_teachers(monkeypatch, lesson):
    """The odds that it learns from are the mean of theirs, each by its own grid."""
    monkeypatch.setattr(LightCapTeacher, "concept_scores", lambda self, grid: grid.mean(1)[:, :6])
    *_, found = lesson(Distill(teachers=("one", "two"), encoder="tuned", concept_weight=0.1))
    grids = found.look(np.array([1, 2]))[1]
    wanted = (grids[0].mean(1)[:, :6].sigmoid() + grids[1].mean(1)[:, :6].sigmoid()) / 2
    torch.testing.assert_close(found.odds(grids), wanted)
    assert lesson(Distill(teachers=("one", "two"), encoder="tuned"))[-1].odds is None
