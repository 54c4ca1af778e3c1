"""What each stage will make, known before it runs: the sizes of artifacts, and settings that do not fit them."""

import re

import pytest

from compress import pipeline
from compress.architectures import architectures
from compress.context import Progress
from compress.errors import RecipeError
from compress.recipe import read_recipe

RECIPE = """\
student: {{preset: tiny, heads: 2}}
stages:
  - train: {{as: teacher, preset: tiny, objective: masked}}
{}"""
CONCEPTS = """\
student: {preset: lightcap, hidden: 768, encoder: resnet-small}
stages:
  - train: {as: plain, preset: teacher}
  - distill: {as: pupil, teachers: plain}
  - concepts: {as: extractor, preset: lightcap, pieces: 6, inner: 32}
  - train: {as: knowing, preset: teacher, extractor: extractor}
  - train: {as: other, preset: teacher, extractor: extractor, modulator: 4}
  - distill: {as: student, teachers: other}
  - distill: {as: steered, teachers: knowing, modulator: 8, ffn_share: 0.83}
  - concepts: {as: away, from: student, pieces: 0}
  - train: {as: blind, preset: lightcap, extractor: away}
"""


def models(tmp_path, text: str):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return architectures(read_recipe(path), 100)[0]


def test_a_student_has_its_teachers_objective(tmp_path):
    found = models(tmp_path, RECIPE.format("  - distill: {as: student}\n  - train: {as: onward}\n"))
    assert [found[name].heads for name in ("teacher", "student", "onward")] == [2, 2, 2]
    assert all(model.mask_piece is not None and model.vocabulary == 100 for model in found.values())


@pytest.mark.parametrize(
    ("section", "settings", "said"),
    [
        ("student: {preset: tiny,\n  attention_heads: 5}", (), r"x.yaml:2: key 'attention_heads', stage 'train': hidden \(32\) must be"),
        ("student: {preset: tiny}", ("student.hidden=33",), "--set student.hidden=33: key 'hidden', stage 'train': hidden"),
        ("student: {preset: tiny}", ("student.image_size=70",), "--set student.image_size=70: key 'image_size', stage 'train': image_size"),
        ("data: {image_size: 70}\nstudent: {preset: tiny}", (), "x.yaml:1: key 'image_size', stage 'train': image_size"),
    ],
)
def test_sizes_that_cannot_be_name_their_key(tmp_path, section, settings, said):
    (tmp_path / "x.yaml").write_text(f"{section}\nstages:\n  - train: {{}}\n")
    with pytest.raises(RecipeError, match=said):
        architectures(read_recipe(tmp_path / "x.yaml", settings), 100)
    wanted = read_recipe(tmp_path / "x.yaml", (*settings, "data.train_images=4", "data.val_images=2"))
    result = pipeline.run(wanted, tmp_path / "runs" / "x", Progress(quiet=True))
    assert re.match(said if "--set" in said else f".*{said}", result.error.message) and result.error.exit_code == 2


def test_concepts_are_read_where_a_stage_finds_them(tmp_path):
    """DESIGN's example trains the preset `teacher` without a concepts stage: it reads none then, and neither does its student."""
    found = models(tmp_path, CONCEPTS)
    assert [(m.concepts, m.modulator) for m in map(found.get, ("plain", "pupil"))] == [(0, None), (0, None)]
    assert [(m.concepts, m.modulator) for m in map(found.get, ("knowing", "other", "student"))] == [(6, 39), (6, 4), (6, 4)]
    assert (found["steered"].modulator, found["blind"].modulator, found["blind"].concepts) == (8, None, 0)
    assert (found["knowing"].ffn, found["steered"].ffn, found["pupil"].ffn) == (3072, 2552, 1200)
    named = CONCEPTS.replace("encoder: resnet-small}", "encoder: resnet-small, ffn: 600}")
    assert models(tmp_path, named)["steered"].ffn == 600
    assert found["extractor"].alignment == found["student"].alignment == (32, 384)
    assert found["pupil"].prefix == 25 and found["student"].prefix == 31


@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ("preset: scenes-student", "hidden size 96 cannot start from a teacher of 32"),
        ("preset: scenes-student, hidden: 32, attention_heads: 2, ffn: 128", "feed-forward width 128 cannot start from a teacher of 64"),
        ("preset: scenes-student, hidden: 32, attention_heads: 2, ffn: 64", ""),
        ("preset: scenes-student, hidden: 32, attention_heads: 4, ffn: 64", "number of attention heads 4 cannot start from a teacher of 2"),
        ("preset: lightcap, hidden: 32, attention_heads: 2, ffn: 64", "number of positions 512 cannot start from a teacher of 128"),
    ],
)
def test_a_student_that_cannot_take_its_teachers_layers_is_refused_before_the_teacher_is_trained(tmp_path, sizes, what):
    text = f"student: {{{sizes}}}\nstages:\n  - train: {{as: teacher, preset: tiny}}\n  - distill: {{as: student, teachers: teacher%s}}\n"
    assert models(tmp_path, text % ", init: weights")
    if what:
        with pytest.raises(RecipeError, match=rf"x.yaml:4: stage 'student': a student of {what}; set init: weights"):
            models(tmp_path, text % "")
    else:
        assert models(tmp_path, text % "")


def test_a_head_that_cannot_take_its_teachers_is_refused_before_the_teachers_are_trained(tmp_path):
    text = ("student: {preset: tiny, heads: 2}\nstages:\n  - train: {as: one, preset: tiny}\n"
            "  - train: {as: two, preset: scenes-student, extractor: one}\n"
            "  - distill: {as: student, teachers: [one, two]%s}\n")
    assert models(tmp_path, text % ", init: weights")
    with pytest.raises(RecipeError, match=r"a head of hidden size 32 cannot start from that of 'two', of 96; set"):
        models(tmp_path, text % "")


@pytest.mark.parametrize(
    ("stages", "what"),
    [
        ("  - train: {as: onward, objective: causal}\n", "stage 'onward': the captioner that this stage goes on from is masked; a new one"),
        ("  - train: {as: onward, matching_weight: 0.1}\n", "stage 'onward': matching_weight is of concepts"),
        ("  - train: {as: onward, encoder: tuned, concept_weight: 0.1}\n", "stage 'onward': concept_weight is of concepts"),
        ("  - train: {as: x, preset: tiny, extractor: teacher, matching_weight: 1}\n", "stage 'x': matching_weight is of concepts, but"),
        ("  - train: {as: x, preset: tiny, extractor: teacher, modulator: 8}\n", "stage 'x': modulator is of concepts, but this"),
        ("  - train: {as: x, preset: tiny, zero_layers: 3}\n", "stage 'x': zero_layers: 3 of 2; name no more than there are"),
        ("  - distill: {heads: 1}\n  - distill: {as: x, from: distill, teachers: teacher, heads: 2}\n", "stage 'x': heads: 2 copies of"),
        ("  - distill: {as: x, from: teacher, teachers: teacher, heads: 3}\n", "stage 'x': heads: 3 asked of a captioner that has 2; only"),
        ("  - distill: {as: x, modulator: 8}\n", "stage 'x': a modulator is steered by concepts, but the teacher reads none"),
        ("  - distill: {as: x, heads: 1, ensemble: running}\n", "stage 'x': ensemble: running is of several heads; leave it out"),
        ("  - distill: {heads: 1}\n  - distill: {as: x, from: distill, teachers: [teacher, teacher], heads: 2, match: hidden}\n",
         "stage 'x': heads: 2 copies of one head, which match no tokens"),
        ("  - distill: {heads: 1}\n  - distill: {as: x, from: distill, teachers: [teacher, teacher], heads: 2}\n",
         "stage 'x': heads: 2 copies of one head, taught by one teacher, stay equal"),
        ("  - train: {as: other, seed: 2, preset: tiny, objective: masked}\n  - distill: {heads: 1, teachers: teacher}\n"
         "  - distill: {as: x, from: distill, teachers: [teacher, other], heads: 2, ensemble: all}\n",
         "stage 'x': heads: 2 copies of one head, taught by all teachers, stay equal; start anew, or leave out ensemble"),
        ("  - distill: {as: x, from: teacher, teachers: [teacher, teacher, teacher]}\n", "stage 'x': 3 teachers for 2 heads; name one"),
        ("  - prune: {as: x, macs: 0.5, layers: 2}\n", "stage 'x': layers: 2 shall stay of 2; name less, or leave it out"),
        ("  - train: {as: next, preset: tiny}\n  - distill: {as: x, from: next, teachers: teacher, match: [tokens, hidden]}\n",
         "stage 'x': match: hidden states and attention of a causal student and a masked teacher are of other places; match tokens"),
        ("  - concepts: {as: e, preset: tiny, pieces: 6}\n  - train: {as: reads, preset: tiny, extractor: e, objective: masked}\n"
         "  - distill: {as: x, from: reads, teachers: teacher, match: [tokens, attention]}\n",
         "stage 'x': match: attention is over prefixes of 31 tokens here and of 25 in the first teacher"),
        ("  - concepts: {as: e, preset: tiny, pieces: 6}\n  - vocabulary: {}\n  - train: {as: x, preset: tiny, extractor: vocabulary}\n",
         "stage 'x': the word pieces of 'vocabulary' are cut by a 'vocabulary' stage, and its own are not; name a stage on the same side"),
        ("  - distill: {heads: 1}\n  - average: {as: x, from: teacher, others: distill}\n",
         "stage 'x': 'distill' is not built as 'teacher' is: a mean of their weights would mean nothing"),
        ("  - vocabulary: {}\n  - distill: {as: x, from: vocabulary, teachers: teacher}\n",
         "stage 'x': the word pieces of 'teacher' are whole, and its own are cut"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, stages, what):
    with pytest.raises(RecipeError) as raised:
        models(tmp_path, RECIPE.format(stages))
    last = 3 + stages.count("\n")
    assert raised.value.message.startswith(f"{tmp_path / 'x.yaml'}:{last}: {what}") and "\n" not in raised.value.message


@pytest.mark.parametrize(
    "stages",
    ["  - concepts: {as: x, from: teacher}\n", "  - concepts: {as: e, preset: lightcap}\n  - train: {as: x, preset: tiny, extractor: e}\n"],
)
def test_concepts_that_exceed_the_positions_are_one_line(tmp_path, stages):
    text = RECIPE.format(stages).replace("heads: 2", "image_size: 112, encoder: resnet-small")
    with pytest.raises(RecipeError, match="stage 'x': 20 pieces of concepts need 133 positions, and there are 128: 15 fit"):
        models(tmp_path, text)
    fewer = text.replace("from: teacher", "from: teacher, pieces: 15").replace("preset: lightcap", "preset: lightcap, pieces: 15")
    assert models(tmp_path, fewer)["x"].concepts == 15


def test_an_encoder_behind_a_vocabulary_is_taken_where_it_finds_no_concepts(tmp_path):
    text = "  - vocabulary: {}\n  - train: {as: x, preset: tiny, extractor: vocabulary}\n"
    assert models(tmp_path, RECIPE.format(text))["x"].concepts == 0


def test_sizes_that_no_captioner_has(tmp_path):
    with pytest.raises(RecipeError, match="stage 'teacher': hidden .33. must be a multiple of attention_heads"):
        models(tmp_path, RECIPE.format("").replace("heads: 2", "hidden: 33"))


ENCODERS = """\
student: {{preset: tiny, heads: 2, encoder: clip-rn50, encoder_weights: openai}}
stages:
  - train: {{as: teacher, preset: tiny}}
  - train: {{as: teacher-2, seed: 18, preset: tiny}}
  - distill: {{as: student, teachers: [teacher, teacher-2]}}
  - train: {{as: tuned, from: teacher, encoder: tuned}}
  - scst: {{as: end, epochs: 1}}
  - train: {{as: end-2, from: tuned, epochs: 1}}
  - average: {{as: mean, from: end, others: [end-2]}}
  - prune: {{as: cut, macs: 0.5, parts: fusion}}
  - prune: {{as: pruned, macs: 0.5}}
  - concepts: {{as: words, preset: tiny, encoder: tuned, pieces: 8}}
  - train: {{as: worded, preset: tiny, extractor: words}}
  - train: {{as: worded-2, preset: tiny, extractor: words, seed: 18}}
{}"""


@pytest.mark.parametrize(("teachers", "blind"), [("[worded, tuned]", "teacher 'tuned'"), ("[tuned, worded]", "the student")])
def test_concepts_are_learned_from_who_finds_some(tmp_path, teachers, blind):
    text = ENCODERS.format(f"  - distill: {{as: last, teachers: {teachers}, encoder: tuned, concept_weight: 0.1}}\n")
    with pytest.raises(RecipeError, match=f"'last': concept_weight is of finding concepts, but {blind} finds none: leave it out"):
        models(tmp_path, text)


@pytest.mark.parametrize(
    ("distill", "what"),
    [
        ("teachers: [end, mean]", None),
        ("from: cut, teachers: [tuned, end-2]", None),
        ("teachers: [worded, worded-2]", None),
        ("teachers: [teacher, tuned], crop: 0.2", None),
        ("teachers: [tuned, teacher], encoder: tuned", None),
        ("teachers: [teacher, worded]", "'worded' would read grids of another encoder, the pretrained one, than its own, that of 'words'"),
        ("teachers: [teacher, tuned]", "'tuned' would read grids of another encoder, the pretrained one, than its own, that of 'tuned'"),
        ("from: pruned, teachers: mean", "'mean' would read grids of another encoder, that of 'pruned', than its own, that of 'tuned'"),
    ],
)
def test_teachers_read_their_students_grid_unless_they_see_for_themselves(tmp_path, distill, what):
    text = ENCODERS.format(f"  - distill: {{as: last, {distill}}}\n")
    if what is None:
        assert "last" in models(tmp_path, text)
    else:
        with pytest.raises(RecipeError, match=f"x.yaml.*stage 'last': teacher {what}"):
            models(tmp_path, text)
