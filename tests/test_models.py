"""A name on the hub, fetched from its cache: no test needs a network."""

import pytest
from test_artifact import make

from compress import evaluate
from compress.artifact import Artifact
from compress.errors import ModelError
from compress.models import resolve


def test_a_model_of_the_hub(hub):
    made = make(hub("someone/captioner"))
    assert resolve("someone/captioner").digest() == made.digest()


def test_what_is_no_captioner_or_no_name_is_one_line(hub):
    hub("someone/words")
    for name in ("someone/words", "someone/a--b", "someone/" + "x" * 97):
        with pytest.raises(ModelError) as raised:
            resolve(name)
        assert raised.value.message.startswith(f"no model '{name}': there is no such folder here, and") and "\n" not in raised.value.message


def test_a_hub_that_cannot_be_reached_is_one_line(hub):
    with pytest.raises(ModelError) as raised:
        resolve("someone/nothing")
    message = raised.value.message
    assert message.startswith("no model 'someone/nothing': there is no such folder here, and the hub cannot be reached")
    assert "\n" not in message


def test_a_path_that_is_mistyped_asks_no_hub(hub, tmp_path):
    make(tmp_path / "runs" / "photos")
    with pytest.raises(ModelError, match="neither an artifact's folder nor a run's folder; did you mean 'runs/photos'"):
        resolve("runs/photso")


def test_a_float_artifact_without_its_preprocessor_is_one_line(tmp_path):
    with pytest.raises(ModelError, match="preprocessor_config.json, .* is absent or not whole; copy it again") as raised:
        evaluate.settings_of(Artifact(tmp_path))
    assert raised.value.exit_code == 2
