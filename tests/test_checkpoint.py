"""The file that a setting of weights names: here, in a folder, or in the hub's cache; and a run that looks for it before it begins."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import save_file

from compress import pipeline
from compress.context import Progress
from compress.recipe import read_recipe
from compress.training.text import text_file
from students.lightcap.bert import bert_file
from students.lightcap.checkpoint import CLIP_NAMES, checkpoint_file
from students.lightcap.encoder import ENCODERS, load_encoder


def test_a_file_a_folder_and_a_name_of_the_hub(hub, tmp_path):
    there = hub("timm/resnet50_clip.openai")
    for name in reversed(CLIP_NAMES):  # each is preferred to those before it
        (there / name).write_bytes(b"weights")
        assert checkpoint_file("timm/resnet50_clip.openai", "CLIP", "encoder_weights", names=CLIP_NAMES) == there / name
        assert checkpoint_file(str(there), "CLIP", "encoder_weights", names=CLIP_NAMES) == there / name
    assert text_file("timm/resnet50_clip.openai") == there / CLIP_NAMES[0] and text_file("openai") is None
    assert checkpoint_file(str(there / CLIP_NAMES[1]), "CLIP", "encoder_weights") == there / CLIP_NAMES[1]
    alike = hub("someone/minilm") / "model.safetensors"
    alike.write_bytes(b"weights")
    assert bert_file("someone/minilm") == alike  # which is no slip of the word


def test_the_first_name_that_the_repository_has_is_fetched(hub, monkeypatch, tmp_path):
    """timm keeps a file of another layout in the cache, under a name that open_clip's repositories have, too."""
    class Absent(errors.RemoteEntryNotFoundError):
        def __init__(self) -> None:
            pass

    asked, there = [], {CLIP_NAMES[1]}

    def fetch(source: str, name: str) -> str:
        asked.append(name)
        if name not in there:
            raise Absent
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    cached = hub("someone/clip")
    (cached / CLIP_NAMES[2]).write_bytes(b"timm's")
    assert text_file("someone/clip") == tmp_path / CLIP_NAMES[1] and asked == list(CLIP_NAMES[:2])
    there.clear()
    assert text_file("someone/clip") == cached / CLIP_NAMES[2] and asked == [*CLIP_NAMES[:2]] * 2
    with pytest.raises(FileNotFoundError, match="at 'someone/bert': the hub's repository has neither model.safetensors nor pytorch_model"):
        bert_file("someone/bert")


@pytest.mark.parametrize(
    ("find", "source", "what"),
    [
        (bert_file, "minlim", "no weights for BERT at 'minlim'; set fusion_weights to a file, a folder, OWNER/NAME of the hub or minilm; "
         "did you mean 'minilm'"),
        (bert_file, "bert-base-uncased", r"BERT at 'bert-base-uncased', neither here nor on the hub \(LocalEntryNotFoundError\); set fus"),
        (bert_file, "a--b", r"BERT at 'a--b', neither here nor on the hub \(HFValidationError\); set fusion_weights to"),
        (text_file, "opnai", "CLIP RN50's text encoder at 'opnai'; set text_encoder to .* or minilm, openai; did you mean 'openai'"),
        (text_file, "someone/absent.pt", "at 'someone/absent.pt'; set text_encoder to"),  # which can only be a file
        (lambda source: load_encoder(None, "clip-rn50", source), "nowhere", "no weights for clip-rn50 at 'nowhere'; set student.encoder_w"),
        (lambda source: load_encoder(None, "resnet-small", source), ".", "neither open_clip_model.safetensors nor .* there; put one there"),
    ],
)
def test_what_is_not_there_is_one_line(hub, find, source, what):
    with pytest.raises(FileNotFoundError, match=what) as raised:
        find(source)
    assert "\n" not in str(raised.value)


def test_an_encoders_weights_from_the_hub(hub):
    torch.manual_seed(0)
    theirs, own = (ENCODERS["resnet-small"].build(80) for _ in range(2))
    save_file(theirs.state_dict(), hub("someone/encoder") / "model.safetensors")
    load_encoder(own, "resnet-small", "someone/encoder")
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in own.state_dict().items())


def test_weights_of_a_later_stage_are_looked_for_first(hub, tmp_path):
    (tmp_path / "x.yaml").write_text(
        "data: {train_images: 8, val_images: 2}\nstudent: {preset: tiny}\nstages:\n  - train: {as: first, epochs: 1}\n"
        "  - train: {as: second, preset: tiny, fusion_weights: someone/nothing}\n"
    )
    result = pipeline.run(read_recipe(Path("x.yaml")), tmp_path / "runs" / "x", Progress(quiet=True))
    assert result.rows == () and not result.ok
    assert result.error.message.startswith("x.yaml:5: stage 'second', key 'fusion_weights': no weights for BERT at 'someone/nothing'")
    assert not list((tmp_path / "runs" / ".cache").glob("*.work"))
    settings = ("student.fusion_weights=someone/else", "student.tokenizer=english")
    result = pipeline.run(read_recipe(Path("x.yaml"), settings), tmp_path / "runs" / "x", Progress(quiet=True))
    assert result.error.message.startswith(f"--set {settings[0]}: key 'fusion_weights': no weights for BERT at 'someone/else'")
