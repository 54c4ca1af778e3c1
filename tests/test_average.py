"""The mean of several captioners' weights."""

import copy
import dataclasses
import re

import pytest
import stage_context
import tiny_captioner as tiny
import torch

from compress.artifact import Artifact
from compress.config import Average
from compress.context import Context
from compress.errors import RecipeError, StageError
from compress.recipe import read_recipe
from compress.stages import average
from compress.training.start import write_captioner
from students.lightcap import LightCap
from students.lightcap.tokenizer import pieces_of, word_pieces


def context(folder, made: dict[str, LightCap], others: tuple[str, ...]) -> Context:
    """Each of `made` as an artifact, and the place of the stage's own."""
    for name, model in made.items():
        (folder / name).mkdir()
        write_captioner(folder / name, model, tiny.tokenizer(), tiny.SETTINGS)
    artifacts = {name: Artifact(folder / name) for name in made}
    return stage_context.context(folder, None, "average", Average(others=others), name="mean", parent="first", artifacts=artifacts)


def test_weights_are_the_mean_of_all_and_the_rest_is_the_parents(tmp_path):
    made = {name: tiny.build(seed=seed) for seed, name in enumerate(("first", "second", "third"))}
    for model in made.values():
        model.encoder.load_state_dict(made["first"].encoder.state_dict())
    before = copy.deepcopy(made["first"].state_dict())
    here = context(tmp_path, made, ("second", "third"))
    average.run(here.artifacts["first"], here.stage.config, here)
    found = LightCap.from_pretrained(here.output).state_dict()
    assert not torch.equal(found["fusion.word.weight"], before["fusion.word.weight"])
    for key, tensor in found.items():
        parts = [model.state_dict()[key] for model in made.values()]
        wanted = torch.stack(parts).mean(0) if tensor.is_floating_point() else parts[0]
        torch.testing.assert_close(tensor, wanted)
        assert torch.equal(tensor, before[key]) or not key.startswith("encoder.")
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (here.output / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_counts_of_batches_are_no_weights(tmp_path):
    """Ends that trained an encoder from nothing for as many steps each have as many; others have not."""
    made = {name: tiny.build(seed=seed) for seed, name in enumerate(("first", "second"))}
    for module in made["second"].modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.num_batches_tracked += 5
    here = context(tmp_path, made, ("second",))
    average.run(here.artifacts["first"], here.stage.config, here)
    assert LightCap.from_pretrained(here.output).config == made["first"].config


def shorter(model: LightCap, folder) -> None:
    config = dataclasses.replace(model.config, layers=1)
    write_captioner(folder, LightCap(config), tiny.tokenizer(), tiny.SETTINGS)


def masked(model: LightCap, folder) -> None:
    model.config = dataclasses.replace(model.config, mask_piece=4)
    write_captioner(folder, model, tiny.tokenizer(), tiny.SETTINGS)


def of_other_pieces(model: LightCap, folder) -> None:
    pieces = pieces_of(tiny.tokenizer())
    write_captioner(folder, model, word_pieces([*pieces[:-2], pieces[-1], pieces[-2]]), tiny.SETTINGS)


@pytest.mark.parametrize("change", [shorter, masked, of_other_pieces])
def test_captioners_that_are_built_otherwise_have_no_mean(change, tmp_path):
    here = context(tmp_path, {"first": tiny.build(), "second": tiny.build(seed=1)}, ("second",))
    change(tiny.build(seed=1), tmp_path / "second")
    with pytest.raises(StageError, match="average: 'second' is not built as 'first' is: a mean of their weights would mean nothing"):
        average.run(here.artifacts["first"], here.stage.config, here)
    assert not list(here.output.iterdir())


CHAIN = "stages:\n  - train: {as: a, preset: tiny}\n  - train: {as: b, from: a, seed: 1}\n  - average: {as: mean, from: a, others: %s}\n"


@pytest.mark.parametrize(
    ("others", "said"),
    [("[c]", r"x.yaml:4: key 'others': 'c' is not a stage here; earlier stages: a, b"), ("[]", "key 'others': 'average' needs other"),
     ("[b, a]", r"x.yaml:4: key 'others': 'a' is the stage that this one works on, and would count twice"),
     ("[b, b]", "key 'others': 'b' stands there twice, and would count twice; name each once")],
)
def test_what_is_averaged_is_named(tmp_path, others, said):
    path = tmp_path / "x.yaml"
    path.write_text(CHAIN % "[b]")
    stage = read_recipe(path).stages[-1]
    assert (stage.parent, stage.against, stage.config.others) == ("a", "a", ("b",))
    path.write_text(CHAIN % others)
    with pytest.raises(RecipeError) as raised:
        read_recipe(path)
    assert re.search(said, raised.value.message) and "\n" not in raised.value.message
