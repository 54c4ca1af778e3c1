"""Captioners that others made: read from their makers' files, measured as our own, and taught from."""

import dataclasses
import json
import os
import shutil

import foreign_captioners as other
import numpy as np
import pytest
import tiny_captioner as tiny
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from stage_context import context

from compress import cli, cost, evaluate, foreign, foreign_row, metrics, models, pipeline
from compress.artifact import Artifact
from compress.config import Distill, Pretrained, Student, Train, Vocabulary
from compress.context import Progress
from compress.errors import ModelError, RecipeError
from compress.recipe import read_recipe
from compress.stages import distill, export, pretrained, train, vocabulary
from compress.training.corpus import UNSEEN_BIAS, corpus
from compress.training.start import read_captioner
from students.lightcap.tokenizer import encode_captions, pieces_of, read_tokenizer
from teachers.layouts import PROCESSORS, WEIGHTS

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders by kind, and `taught`, a GIT that knows the colours."""
    folder = tmp_path_factory.mktemp("others")
    return {name: make(folder / name) for name, make in (other.MAKERS | {"taught": other.taught_git}).items()}


def images(count=3):
    return [Image.fromarray(picture) for picture in tiny.pictures(count, seed=3)]


def next_logits(captioner, kind, pixels, pieces):
    """(n, V) of the piece behind each of `pieces` (1, n), by one pass over all of them, without any cache."""
    if kind == "blip":
        seen = captioner.model.vision_model(pixel_values=pixels).last_hidden_state
        return captioner.model.text_decoder(input_ids=pieces, encoder_hidden_states=seen).logits[0]
    if kind == "git":
        return captioner.model(input_ids=pieces, pixel_values=pixels).logits[0, -pieces.shape[1] :]
    latent, seen = captioner.model._encode_image(pixels)
    return captioner.model(None, pieces, image_latent=latent, image_embs=seen, output_labels=False)["logits"][0]


@pytest.mark.parametrize("kind", ["blip", "git", "coca"])
def test_captions_are_the_most_probable_pieces_and_have_their_probability(made, kind):
    """Against one pass over the whole caption: in no cache, and in no beam of another picture, does anything get lost."""
    captioner = foreign.read(Artifact(made["taught" if kind == "git" else kind]))
    start = captioner.start if kind == "coca" else captioner.writer.generation_config.bos_token_id
    pixels = captioner.pixels(images())
    assert pixels.shape == (3, 3, other.SIDE, other.SIDE)
    for beam in (1, 3):
        said = captioner.captions(pixels, beam, foreign.TOKENS)
        if kind == "coca":  # whose pieces, spelled and read again, are others
            grid = captioner.encode(pixels)
            pieces = [list(ids) for ids, _ in foreign.search(captioner, grid, start, captioner.end, beam, foreign.TOKENS)]
            assert [captioner.tokenizer.decode(ids).strip() for ids in pieces] == [text for text, _ in said]
        else:
            pieces = [captioner.tokenizer.encode(text, add_special_tokens=False).ids for text, _ in said]
        for picture, ids, (_, logprob) in zip(pixels, pieces, said, strict=True):
            ids += [captioner.end] if len(ids) < foreign.TOKENS else []
            assert 1 < len(ids) <= foreign.TOKENS
            with torch.no_grad():
                logs = next_logits(captioner, kind, picture[None], torch.tensor([[start, *ids[:-1]]])).log_softmax(-1)
            assert logprob == pytest.approx(float(logs[range(len(ids)), ids].sum()), abs=2e-3)
            if beam == 1:
                assert logs.argmax(-1).tolist() == ids
    [(text, _)] = captioner.captions(pixels[:1], 1, 3, exactly=True)
    [(longer, _)] = captioner.captions(pixels[:1], 1, 4, exactly=True)
    assert longer.startswith(text) and len(longer) > len(text)


def test_pictures_are_prepared_as_their_makers_do(made):
    """A colour of its own in each corner: BLIP squashes a wide picture, GIT and CoCa cut its sides off."""
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, :32], wide[:, 96:] = (255, 0, 0), (0, 255, 0)
    found = {kind: foreign.read(Artifact(made[kind])).pixels([Image.fromarray(wide)])[0] for kind in other.MAKERS}
    black = -torch.tensor(other.MEAN) / torch.tensor(other.STD)
    for kind in ("git", "coca"):
        assert torch.allclose(found[kind][:, 32, 0], black, atol=0.05) and torch.allclose(found[kind][:, 32, -1], black, atol=0.05)
    assert found["blip"][0, 32, 0] > 1.5 and found["blip"][1, 32, -1] > 1.5


def test_what_they_cost_is_counted_as_they_run(made):
    """BLIP's closed form: a caption of T pieces at beam 1, with keys and values kept."""
    found = foreign_row.costs(foreign.read(Artifact(made["blip"])))
    text, t, pieces, h, f = 17, cost.TOKENS, tiny.tokenizer().get_vocab_size() + 2, 32, 64  # 17: the grid, and [CLS]
    block = 4 * h * h + 2 * h * f
    encoder = 16 * 3 * 16 * 16 * h + 2 * (text * block + 2 * text * text * h)
    crossing = 2 * 2 * text * h * h + t * 2 * (2 * h * h + 2 * text * h)  # keys and values of the grid once, then each piece's own
    itself = t * 2 * block + 2 * 2 * h * t * (t + 1) // 2
    heads = t * (h * h + h * pieces)
    assert found["gmacs_encoder"] == encoder / 1e9
    assert found["gmacs_caption"] == pytest.approx((encoder + crossing + itself + heads) / 1e9, rel=1e-6)
    assert found["gflops_caption"] == 2 * found["gmacs_caption"] and found["gbops_caption"] == 1024 * found["gmacs_caption"]
    for kind in other.MAKERS:
        costs = foreign_row.costs(foreign.read(Artifact(made[kind])))
        assert costs["params"] == sum(costs["params_by_part"].values()) and costs["gmacs_caption"] > costs["gmacs_encoder"] > 0
        assert Artifact(made[kind]).bytes() == sum(file.stat().st_size for file in Artifact(made[kind]).files()) > 4 * costs["params"]
    assert torch.backends.mha.get_fastpath_enabled()


def invoke(*arguments):
    return CliRunner().invoke(cli.cli, [str(argument) for argument in arguments])


def test_the_commands_take_them(made, tmp_path):
    names = [f"{number}.png" for number in range(8)]
    listed = []
    for number, (name, picture) in enumerate(zip(names, tiny.pictures(8, seed=3), strict=True)):
        Image.fromarray(picture).save(tmp_path / name)
        listed.append({"filename": name, "split": "val", "sentences": [{"raw": tiny.caption(number)}]})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": listed}))
    found = invoke("caption", made["taught"], tmp_path / names[0], tmp_path / names[1], "--json")
    assert found.exit_code == 0
    assert [item["caption"] for item in json.loads(found.stdout)] == [tiny.caption(0), tiny.caption(1)]
    found = invoke("eval", made["taught"], "--captions", tmp_path / "dataset.json", "--images", tmp_path, "--json")
    assert found.exit_code == 0 and json.loads(found.stdout)["images"] == 8
    right = metrics.score([tiny.caption(i) for i in range(8)], [[tiny.caption(i)] for i in range(8)])
    assert json.loads(found.stdout)["cider"] == pytest.approx(right.cider, abs=1e-6)
    found = invoke("profile", made["coca"], "--json", "--tokens", 3)
    row = json.loads(found.stdout)
    assert found.exit_code == 0 and row["latency_ms"]["runtime"] == "torch" and row["params"] > 0 and row["cider"] is None
    found = invoke("profile", made["git"])
    assert found.exit_code == 0 and "GMACs, caption" in found.stdout and "None" not in found.stdout
    found = invoke("eval", made["git"], "--captions", tmp_path / "dataset.json", "--images", tmp_path)
    assert found.exit_code == 0 and "CIDEr" in found.stdout
    found = invoke("export", made["blip"], "--out", tmp_path / "out")
    assert found.exit_code == 2 and "is a blip, and lightcap exports its own captioners alone: distil one from it" in found.stderr
    assert not (tmp_path / "out").exists()


def test_one_of_the_hub(made, hub):
    there = hub("someone/blip")
    for file in Artifact(made["blip"]).files():
        (there / file.name).write_bytes(file.read_bytes())
    assert models.resolve("someone/blip").digest() == Artifact(made["blip"]).digest()


@pytest.mark.parametrize("kind", list(other.MAKERS))
def test_of_the_hub_no_more_is_fetched_than_is_read(made, tmp_path, monkeypatch, kind):
    """Pickles only where there is nothing else."""
    import huggingface_hub

    theirs, here = copied(tmp_path / "theirs", made[kind]), tmp_path / "here"
    (safe, pickled), asked = WEIGHTS[kind], []
    for name in (pickled, "tf_model.h5"):
        (theirs / name).write_bytes(b"large")

    def download(name, allow_patterns):
        asked.append(name)
        here.mkdir(exist_ok=True)
        for file in theirs.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                (here / file.name).write_bytes(file.read_bytes())
        return str(here)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = models.resolve("someone/captioner")
    assert {path.name for path in here.iterdir()} == {path.name for path in found.files()} and len(asked) == 1
    shutil.rmtree(here)
    (theirs / safe).unlink()
    found = models.resolve("someone/captioner")
    assert {path.name for path in here.iterdir()} == {path.name for path in found.files()} and found.files()[-1].exists()
    assert pickled in {path.name for path in found.files()} and len(asked) == 3


def test_pictures_are_prepared_as_the_newer_file_says(made, tmp_path):
    """transformers 5 writes how into processor_config.json, and reads it there first."""
    folder = copied(tmp_path / "blip", made["blip"])
    older = json.loads((folder / "preprocessor_config.json").read_text())
    newer = older | {"size": {"height": 32, "width": 32}}
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "BlipProcessor", "image_processor": newer}))
    assert foreign.read(Artifact(folder)).pixels(images(1)).shape[-1] == 32
    assert {"processor_config.json"} == {path.name for path in Artifact(folder).files()} & {*PROCESSORS}
    (folder / "preprocessor_config.json").unlink()
    assert foreign.read(Artifact(folder).check()).pixels(images(1)).shape[-1] == 32


def copied(folder, source):
    folder.mkdir()
    for file in Artifact(source).files():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


class Code:
    """What a pickle can do where more than tensors is read: make a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", list(other.MAKERS))
def test_no_code_of_a_pickle_runs(made, tmp_path, kind):
    folder, (safe, pickled) = copied(tmp_path / kind, made[kind]), WEIGHTS[kind]
    (folder / safe).unlink()
    torch.save({"weight": Code(tmp_path / "ran")}, folder / pickled)
    with pytest.raises(ModelError) as raised:
        foreign.read(models.resolve(folder))
    why = "its weights are a pickle that holds more than tensors; give safetensors instead"
    assert raised.value.message == f"{folder} is no whole {kind}: {why}"
    assert not (tmp_path / "ran").exists()
    torch.load(folder / pickled, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", list(other.MAKERS))
def test_weights_that_are_a_pickle_of_tensors_are_read_and_kept_as_safetensors(made, tmp_path, kind):
    folder, (safe, pickled) = copied(tmp_path / kind, made[kind]), WEIGHTS[kind]
    torch.save(load_file(folder / safe), folder / pickled)
    (folder / safe).unlink()
    data = dataclasses.replace(tiny.captioned("train"), examples=tiny.captioned("train").examples[:2])
    settings = context(tmp_path, data, "pretrained", Pretrained(model=str(folder)))
    stored = pretrained.run(None, settings.stage.config, settings)
    assert {path.name for path in stored.files()} == {path.name for path in Artifact(made[kind]).files()}
    said = [item["caption"] for item in json.loads((stored.path / "written.json").read_text())]
    captioner = foreign.read(stored)
    pixels = captioner.pixels([Image.fromarray(data.image(example)) for example in data.examples])
    assert said == [text for text, _ in captioner.captions(pixels, foreign.BEAM, foreign.TOKENS)]


def test_what_is_not_whole_is_one_line(made, tmp_path):
    def said(folder):
        with pytest.raises(ModelError) as raised:
            foreign.read(models.resolve(folder))
        assert "\n" not in raised.value.message
        return raised.value.message

    parts = copied(tmp_path / "parts", made["blip"])
    (parts / "model.safetensors").rename(parts / "model-00001-of-00002.safetensors")
    assert "is a blip without model.safetensors (weights in several files are not read); get it again" in said(parts)
    half = copied(tmp_path / "half", made["coca"])
    (half / "open_clip_model.safetensors").write_bytes((half / "open_clip_model.safetensors").read_bytes()[:-100])
    assert "is not a whole safetensors file" in said(half)
    lacking = copied(tmp_path / "lacking", made["git"])
    tensors = load_file(lacking / "model.safetensors")
    del tensors["output.bias"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    assert "is no whole git: its weights have no output.bias" in said(lacking)
    tensors["output.bias"] = torch.zeros(3)
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    assert "is no whole git: its weights do not fit its config.json in output.bias" in said(lacking)
    whole = copied(tmp_path / "whole", made["git"])
    (whole / "tokenizer.json").write_text("{")
    assert "not a tokenizer.json" in said(whole)
    answering = copied(tmp_path / "answering", made["blip"])
    config = json.loads((answering / "config.json").read_text())
    (answering / "config.json").write_text(json.dumps(config | {"architectures": ["BlipForQuestionAnswering"]}))
    assert "is a blip that does not caption (BlipForQuestionAnswering)" in said(answering)
    wider = copied(tmp_path / "wider", made["coca"])
    config = json.loads((wider / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 64
    (wider / "open_clip_config.json").write_text(json.dumps(config))
    assert "is no whole coca: Missing key(s) in state_dict: \"visual.attn_pool.attn.q_proj_weight\"" in said(wider)
    another = copied(tmp_path / "another", made["git"])
    (another / "config.json").write_text('{"model_type": "blip-2"}')
    line = "is a 'blip-2' (model_type of its config.json): lightcap runs its own captioners, and of others' blip, git, coca"
    assert line in said(another)


# ---- as teachers


TOKENS_TOO = Distill(teachers=("git",), match=("captions", "tokens"), token_weight=1.0, init="random", epochs=1, batch_images=16,
                     learning_rate=3e-3, dropout=0.0, precision="fp32")


@pytest.fixture(scope="module")
def taught(made, tmp_path_factory):
    """The stage `pretrained` on pictures of which people only say that they are something."""
    colours = tiny.captioned("train", "val")
    vague = tuple(dataclasses.replace(example, captions=("it is something",)) for example in colours.examples)
    people = dataclasses.replace(colours, examples=vague)
    settings = context(tmp_path_factory.mktemp("taught"), people, "pretrained", Pretrained(model=str(made["taught"])))
    return people, settings, pretrained.run(None, settings.stage.config, settings)


def test_the_stage_keeps_the_captioner_and_what_it_says(made, taught):
    _, settings, teacher = taught
    assert teacher.check().digest() == Artifact(made["taught"]).digest()
    written = json.loads((teacher.path / "written.json").read_text())
    assert [item["caption"] for item in written] == [tiny.caption(i) for i in range(16)]
    assert [item["image"] for item in written] == [str(i) for i in range(16)]
    assert len(list((settings.cache / "written").glob("*.npy"))) == 1


def test_a_student_says_what_its_teacher_wrote(taught, tmp_path):
    """Of other word pieces, with an encoder of its own, by captions alone; and later stages keep its words."""
    people, _, teacher = taught
    config = Distill(teachers=("git",), match=("captions",), init="random", epochs=200, batch_images=16, learning_rate=3e-3, dropout=0.0,
                     label_smoothing=0.0, precision="fp32")
    student = Student(preset="tiny", tokenizer="english", image_size=80)
    settings = context(tmp_path, people, "distill", config, student, artifacts={"git": teacher})
    found = distill.run(None, config, settings)
    said = evaluate.captions(found, people.split("train"), 1, tmp_path / "cache", QUIET)
    assert [text for text, _ in said] == [tiny.caption(i) for i in range(16)]
    model, tokenizer, _ = read_captioner(found.path)
    learned = {tokenizer.id_to_token(int(i)) for i in (model.heads.bias > UNSEEN_BIAS / 2).nonzero()}
    assert {"red", "house", "dog"} <= learned and "something" not in learned
    cut = context(tmp_path / "cut", people, "vocabulary", Vocabulary(), student)
    vocabulary.run(found, Vocabulary(), cut)
    smaller = read_captioner(cut.output)[1]
    assert {"red", "house", "dog", "something"} <= smaller.get_vocab().keys()
    more = Train(epochs=60, batch_images=16, learning_rate=3e-3, dropout=0.0, precision="fp32")
    onward = context(tmp_path / "onward", people, "train", more, student)
    said = evaluate.captions(train.run(found, more, onward), people.split("train"), 1, tmp_path / "cache", QUIET)
    assert {text for text, _ in said} == {"it is something"}  # words that its teacher never wrote


@pytest.mark.parametrize("change", [{"heads": 2}, {"heads": 2, "teachers": ("git", "again")}, {"heads": 2, "ensemble": "all"}])
def test_heads_of_finished_teachers(made, taught, tmp_path, change):
    """With tokens, copies of one head that have teachers of their own, too."""
    people, _, teacher = taught
    config = dataclasses.replace(TOKENS_TOO, epochs=2.0, **change)
    student = Student(preset="tiny", tokenizer=str(made["taught"] / "tokenizer.json"), image_size=80)
    artifacts = {"git": teacher, "again": teacher}
    settings = context(tmp_path, people, "distill", config, student, artifacts=artifacts)
    assert read_captioner(distill.run(None, config, settings).path)[0].config.heads == 2
    if len(config.teachers) == 2:
        one = context(tmp_path / "one", people, "distill", dataclasses.replace(TOKENS_TOO, heads=1), student, artifacts=artifacts)
        alone = distill.run(None, one.stage.config, one)
        more = context(tmp_path / "more", people, "distill", config, student, artifacts=artifacts)
        assert read_captioner(distill.run(alone, config, more).path)[0].config.heads == 2


@pytest.mark.parametrize("kind", ["blip", "git"])
def test_tokens_are_what_the_captioner_says_behind_each_piece(made, tmp_path, kind):
    """Of pictures with different numbers of captions of different lengths, over the pieces that the captions use."""
    folder = made["taught" if kind == "git" else kind]
    colours = tiny.captioned("train")
    texts = [("a red house", "the dog"), ("a blue tree on the street",), ("white",)]
    several = tuple(dataclasses.replace(one, captions=own) for one, own in zip(colours.examples[:3], texts, strict=True))
    data = dataclasses.replace(colours, examples=several)
    settings = context(tmp_path, data, "distill", Distill(teachers=("x",)), Student(preset="tiny"))
    model, tokenizer = tiny.build(), read_tokenizer(folder / "tokenizer.json")
    seen = corpus(model, tokenizer, tiny.SETTINGS, settings)
    ids, best = foreign.targets(Artifact(folder), pieces_of(tokenizer), data, seen, "fp32", 4, 2.0, tmp_path, "x", QUIET)
    captioner = foreign.read(Artifact(folder))
    begin, place, keep = captioner.start, 0, seen.keep
    for example, own in zip(several, texts, strict=True):
        pixels = captioner.pixels([Image.fromarray(data.image(example))])
        for pieces in encode_captions(tokenizer, own, 20):
            with torch.no_grad():
                logits = next_logits(captioner, kind, pixels, torch.tensor([[begin, *pieces[1:-1]]]))
            wanted, places = (logits[:, keep] / 2.0).softmax(-1).topk(4)
            stop = place + len(wanted)
            assert np.abs(best[place:stop] - wanted.numpy()).max() < 2e-3 and (ids[place:stop, 0] == places[:, 0].numpy()).all()
            place = stop
    assert place == len(ids) == seen.captions.predicted


def test_a_student_learns_tokens_of_captions_that_its_teacher_wrote(made, taught, tmp_path):
    people, _, teacher = taught
    config = dataclasses.replace(TOKENS_TOO, epochs=300)
    student = Student(preset="tiny", tokenizer=str(made["taught"] / "tokenizer.json"), image_size=80)
    settings = context(tmp_path, people, "distill", config, student, artifacts={"git": teacher})
    found = distill.run(None, config, settings)
    said = evaluate.captions(found, people.split("train"), 1, tmp_path / "cache", QUIET)
    assert [text for text, _ in said] == [tiny.caption(i) for i in range(16)]
    english = context(tmp_path / "english", people, "distill", config, dataclasses.replace(student, tokenizer="english"),
                      artifacts={"git": teacher})
    with pytest.raises(ModelError, match="teacher 'git' does not have the student's word pieces, such as .*: match: captions learns what"):
        distill.run(None, config, english)
    own = tmp_path / "own"
    shutil.copytree(found.path, own)
    shutil.copyfile(teacher.path / "written.json", own / "written.json")
    again = context(tmp_path / "again", people, "distill", config, student, artifacts={"git": Artifact(own)})
    with pytest.raises(ModelError, match="teacher 'git' is lightcap's own and reads grids of its own encoder: match: captions"):
        distill.run(None, config, again)


def test_a_recipe_with_such_a_teacher(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(f"""
name: small
data: {{source: scenes, train_images: 12, val_images: 4, image_size: 64}}
student: {{preset: tiny, tokenizer: english}}
stages:
  - pretrained: {{as: teacher, model: {made["git"]}}}
  - concepts: {{as: blind, pieces: 0, from: null}}
""")
    with pytest.raises(RecipeError, match="key 'pieces': 0 takes an extractor away"):
        read_recipe("small.yaml")
    text = (tmp_path / "small.yaml").read_text()
    (tmp_path / "small.yaml").write_text(text.replace("  - concepts: {as: blind, pieces: 0, from: null}\n", """
  - distill: {as: student, teachers: teacher, epochs: 1, batch_images: 6}
  - scst: {epochs: 1, batch_images: 6}
"""))
    wanted = read_recipe("small.yaml")
    assert wanted.stages[1].config.match == ("captions",) and wanted.stages[1].config.init == "random"
    rows = pipeline.run(wanted, tmp_path / "runs" / "small", QUIET).check().rows
    assert [row["name"] for row in rows] == ["nearest", "teacher", "student", "scst"]
    assert rows[1]["params"] == foreign_row.costs(foreign.read(Artifact(made["git"])))["params"] and rows[1]["latency_ms"]["p50"] > 0
    assert rows[1]["bytes"] == Artifact(made["git"]).bytes()
    assert rows[1]["cider"] is not None and rows[2]["against"] == "teacher" and rows[2]["delta_cider"] is not None
    assert rows[2]["parent_latency_ms"] is None
    planned = pipeline.plan(wanted, tmp_path / "runs" / "small")
    assert all(stage["cached"] and stage["measured"] for stage in planned["stages"])
    other_bytes = copied(tmp_path / "edited", made["git"])
    (other_bytes / "tokenizer.json").write_text((other_bytes / "tokenizer.json").read_text() + "\n")
    edited = read_recipe("small.yaml", [f"teacher.model={other_bytes}"])
    assert not any(stage["cached"] for stage in pipeline.plan(edited, tmp_path / "runs" / "small")["stages"])
    moved = read_recipe("small.yaml", [f"teacher.model={copied(tmp_path / 'moved', made['git'])}"])
    assert all(stage["cached"] for stage in pipeline.plan(moved, tmp_path / "runs" / "small")["stages"])
    absent = pipeline.run(read_recipe("small.yaml", ["teacher.model=someone/nothing"]), tmp_path / "runs" / "none", QUIET)
    assert "key 'model': no model 'someone/nothing'" in absent.error.message and absent.error.exit_code == 2
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    wrong = pipeline.run(read_recipe("small.yaml", [f"teacher.model={nowhere}"]), tmp_path / "runs" / "none", QUIET).error.message
    assert wrong.startswith("small.yaml:6: stage 'teacher', key 'model': ") and "is neither an artifact" in wrong
    lacks = "stage 'student', key 'match': teacher 'teacher' does not have the student's word pieces"
    for setting, said in (("student.match=tokens", lacks), ("student.tokenizer=nowhere", "no tokenizer at 'nowhere'")):
        early = pipeline.run(read_recipe("small.yaml", [setting, f"teacher.model={other_bytes}"]), tmp_path / "runs" / "none", QUIET)
        assert said in early.error.message and not (tmp_path / "runs" / "none").exists()
    exported = tmp_path / "exported"
    export.export(Artifact(tmp_path / "runs" / ".cache" / rows[2]["lock"]), exported)
    small = pipeline.run(read_recipe("small.yaml", [f"teacher.model={exported}"]), tmp_path / "runs" / "exported", QUIET).check().rows
    assert small[1]["latency_ms"]["runtime"] == "onnxruntime" and small[2]["parent_latency_ms"] is None
    student = tmp_path / "runs" / ".cache" / rows[2]["lock"]
    again = pipeline.run(read_recipe("small.yaml", [f"teacher.model={student}"]), tmp_path / "runs" / "own", QUIET).check().rows
    assert {key: again[1][key] for key in ("cider", "params", "bytes")} == {key: rows[2][key] for key in ("cider", "params", "bytes")}
    assert again[2]["against"] == "teacher" and again[2]["lock"] != rows[2]["lock"]


@pytest.mark.parametrize(("stages", "said"), [
    ("- scst: {from: git}", "key 'from': 'git' is a finished captioner (pretrained): it can teach"),
    ("- distill: {teachers: git, match: [tokens, hidden]}", "key 'match': of 'git' there are captions, and tokens of BLIP and GIT"),
    ("- distill: {teachers: own, match: captions}", "captions are what pretrained teachers wrote, and 'own' was trained here"),
    ("- distill: {teachers: [git, own], heads: 2}", "key 'teachers': 'own' was trained here and 'git' came finished (pretrained)"),
    ("- distill: {teachers: git, init: teacher}", "key 'init': of 'git' no layers are taken (pretrained)"),
    ("- distill: {teachers: own, extractor: own}", "key 'extractor': is of pretrained teachers"),
    ("- distill: {teachers: git, token_weight: 0.5}", "key 'token_weight': is of matching tokens"),
    ("- distill: {teachers: git, modulator: 8}", "a modulator is steered by concepts, but this student reads none"),
    ("- distill: {teachers: git, ffn_share: 0.5}", "key 'ffn_share': is of a teacher's layers, and of 'git' none are seen (pretrained)"),
    ("- distill: {teachers: git, encoder: tuned, concept_weight: 0.1}", "key 'concept_weight': is of a teacher's extractor, and of 'git'"),
    ("- distill: {teachers: git, match: tokens, crop: 0.1}", "key 'crop': disturbs pictures, and what 'git' says is of pictures as they"),
    ("- pretrained: {as: two, against: own, model: x}", "key 'against': 'pretrained' is compared with nothing"),
    ("- pretrained: {as: two, from: own, model: x}", "key 'from': a finished captioner is made of no stage"),
    ("- pretrained: {as: two}", "'pretrained' is a finished captioner: name its folder, or OWNER/NAME on the hub (model: NAME)"),
    ("- distill: {teachers: own, match: []}", "key 'match': nothing is learned"),
])
def test_what_a_recipe_cannot_ask(tmp_path, stages, said):
    from compress.estimate import tmacs

    path = tmp_path / "r.yaml"
    path.write_text(f"name: r\nstudent: {{preset: tiny, tokenizer: english}}\nstages:\n  - pretrained: {{as: git, model: x/y}}\n"
                    f"  - train: {{as: own}}\n  {stages}\n")
    with pytest.raises(RecipeError) as raised:
        tmacs(read_recipe(path), None)
    assert said in raised.value.message and raised.value.message.startswith(f"{path}:6: ") and "\n" not in raised.value.message
