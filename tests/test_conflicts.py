"""Keys of a stage that contradict each other: one line with file, line and key, before anything runs."""

import pytest

from compress.errors import RecipeError
from compress.recipe import read_recipe

RECIPE = """\
student: {{preset: tiny, heads: 2}}
stages:
  - train: {{as: teacher, preset: tiny}}
  - {}
"""


def read(tmp_path, stage: str):
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE.format(stage))
    return read_recipe(path)


@pytest.mark.parametrize(
    ("stage", "key", "what"),
    [
        ("concepts: {boxes: found.json}", "boxes", "are in pixels: give the pictures' sizes, too"),
        ("concepts: {boxes: found.json, image_sizes: x.json, encoder: tuned, crop: 0.1}", "boxes", "are places in pictures as they are"),
        ("concepts: {image_sizes: x.json}", "image_sizes", "are of pictures with regions or boxes"),
        ("concepts: {region_weight: 2}", "region_weight", "is of labelled regions: name their file"),
        ("concepts: {regions: x.json, encoder: tuned, flip: true}", "regions", "are places in pictures as they are"),
        ("concepts: {from: teacher, pieces: 0, encoder: tuned}", "encoder", "is not trained where the extractor is taken away"),
        ("concepts: {flip: true}", "flip", "disturbs pictures while the encoder is trained"),
        ("concepts: {encoder_learning_rate: 0.1}", "encoder_learning_rate", "is of a tuned encoder: set encoder: tuned"),
        ("concepts: {preset: tiny, pieces: 0}", "pieces", "0 takes an extractor away, and a new captioner has none"),
        ("distill: {from: teacher, modulator: 8}", "modulator", "is of a new student, but this stage goes on from 'teacher'"),
        ("distill: {from: teacher, ffn_share: 0.5}", "ffn_share", "is of a new student, but this stage goes on from 'teacher'"),
        ("distill: {ffn_share: 0.5, init: weights}", "ffn_share", "narrows the first teacher's layers, but this student starts otherwise"),
        ("distill: {ffn_share: 0.5, init: random}", "ffn_share", "narrows the first teacher's layers, but this student starts otherwise"),
        ("train: {fusion_weights: minilm}", "fusion_weights", "is of a new captioner, but this stage goes on from 'teacher'"),
        ("train: {zero_layers: 1}", "zero_layers", "are of a new captioner, but this stage goes on from 'teacher'"),
        ("train: {modulator: 8}", "modulator", "is of a new captioner, but this stage goes on from 'teacher'"),
        ("train: {as: new, preset: tiny, modulator: 8}", "modulator", "is steered by concepts, but this captioner reads none"),
        ("train: {as: new, preset: tiny, matching_weight: 0.1}", "matching_weight", "is of replaced concepts, but this captioner"),
        ("train: {as: new, preset: tiny, encoder: tuned, concept_weight: 0.1}", "concept_weight", "is of finding concepts, but this"),
        ("train: {concept_weight: 0.1}", "concept_weight", "is of an extractor that is trained with the encoder: set encoder: tuned"),
        ("train: {word_weight: 0.1}", "word_weight", "is of a classifier that trains the encoder: set encoder: tuned"),
        ("train: {flip: true}", "flip", "disturbs pictures while the encoder is trained"),
        ("train: {crop: 0.1}", "crop", "disturbs pictures while the encoder is trained"),
        ("train: {encoder_learning_rate: 0.1}", "encoder_learning_rate", "is of a tuned encoder: set encoder: tuned"),
        ("distill: {ensemble: all}", "ensemble", "all is of several teachers"),
        ("distill: {ensemble: running, match: hidden}", "ensemble", "running is of heads that match tokens"),
        ("distill: {concept_weight: 0.1}", "concept_weight", "is of an extractor that is trained with the encoder: set encoder: tuned"),
        ("distill: {encoder_learning_rate: 0.1}", "encoder_learning_rate", "is of a tuned encoder: set encoder: tuned"),
        ("distill: {match_epochs: 2}", "match_epochs", "is of hidden states and attention"),
        ("distill: {hidden_weight: 2}", "hidden_weight", "is of matching hidden; add hidden to 'match'"),
        ("distill: {match: hidden, attention_weight: 2}", "attention_weight", "is of matching attention"),
        ("distill: {match: hidden, token_weight: 0.5}", "token_weight", "is of matching tokens; add tokens to 'match', or leave it out"),
        ("scst: {draw: beams, temperature: 0.5}", "temperature", "is of captions drawn by chance; draw: beams takes"),
        ("prune: {macs: null, steps: 2}", "macs", "'prune' needs a target"),
        ("prune: {macs: 0.5, flip: true, parts: [fusion]}", "flip", "disturbs pictures while the encoder recovers"),
        ("prune: {macs: 0.5, crop: 0.2, recover_encoder_epochs: 0}", "crop", "disturbs pictures while the encoder recovers"),
        ("prune: {macs: 0.5, epochs: 2}", "epochs", "are of training; say how long the pruned model recovers"),
        ("prune: {macs: 0.5, layers: 1, parts: [encoder]}", "layers", "are of the fusion; add fusion to 'parts'"),
        ("prune: {layers: 1, crop: 0.1}", "crop", "disturbs pictures while the encoder recovers; here it does not"),
        ("prune: {layers: 1, steps: 2}", "steps", "lead to a target (macs, params, mb, ms); layers leave at once"),
        ("quantize: {trials: 2}", "trials", "there is nothing to try for without 'max_drop_cider'"),
        ("quantize: {tune_learning_rate: 0.1}", "tune_learning_rate", "nothing is tuned without 'tune_epochs'"),
    ],
)
def test_a_conflict_is_one_line(tmp_path, stage, key, what):
    with pytest.raises(RecipeError) as raised:
        read(tmp_path, stage)
    message = raised.value.message
    assert f"x.yaml:4: key '{key}': {what}" in message and "\n" not in message


@pytest.mark.parametrize(
    "stage",
    [
        "concepts: {encoder: tuned, flip: true, crop: 0.1, encoder_learning_rate: 0.1}",
        "train: {encoder: tuned, flip: true, crop: 0.1, word_weight: 0.1, encoder_learning_rate: 0.1}",
        "concepts: {regions: x.json, image_sizes: y.json, region_weight: 2}",
        "distill: {match: [tokens, hidden], match_epochs: 2, hidden_weight: 2, token_weight: 0.5}",
        "distill: {ensemble: all, teachers: [teacher, teacher]}",
        "distill: {ensemble: running}",
        "scst: {temperature: 0.5}",
        "prune: {macs: 0.5, flip: true, crop: 0.1}",
        "prune: {macs: 0.5, recover_encoder_epochs: 2, encoder_learning_rate: 0.1, parts: [fusion]}",
        "prune: {layers: 1}",
        "quantize: {trials: 2, max_drop_cider: 1}",
        "quantize: {tune_epochs: 1, tune_learning_rate: 0.1}",
    ],
)
def test_what_fits_is_read(tmp_path, stage):
    assert len(read(tmp_path, stage).stages) == 2
