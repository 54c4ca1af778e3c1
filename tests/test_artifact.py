"""Artifacts are whole or absent, and what is no artifact is refused in one line."""

import itertools
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from compress import artifact, runtime
from compress.artifact import Artifact, writing
from compress.errors import ModelError
from compress.models import resolve


def make(folder, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"layers": 1}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text("{}")
    save_file({"word": np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)}, folder / "model.safetensors")
    return Artifact(folder)


def test_digest_is_over_the_model_alone(tmp_path):
    one, same, other = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", seed=1)
    (same.path / "metrics.json").write_text("{}")
    (same.path / "README.md").write_text("card")
    assert one.digest() == same.digest() != other.digest()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        changed = make(tmp_path / f"changed-{name}")
        (changed.path / name).write_text('{"x": 1}')
        assert changed.digest() != one.digest()
    graph = make(tmp_path / "graph")
    (graph.path / "encoder.onnx").write_bytes(b"graph")
    assert graph.digest() != one.digest()
    assert graph.bytes() == one.bytes() + 5


def test_writing_is_all_or_nothing(tmp_path):
    target = tmp_path / "deep" / "model"
    with pytest.raises(RuntimeError), writing(target) as folder:
        (folder / "config.json").write_text("{}")
        assert not target.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with writing(target) as folder:
        (folder / "config.json").write_text("{}")
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    with pytest.raises(ModelError, match="is there already"), writing(target):
        pass


def test_a_folder_that_no_other_can_replace_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "mounted"))
    (tmp_path / "mounted").mkdir()
    for target in (".", tmp_path / "here", tmp_path / "mounted"):
        with pytest.raises(ModelError, match="which no other can replace; name a new folder inside it"), writing(target):
            raise AssertionError("the work began")
    assert not any((tmp_path / "here").iterdir())


def test_a_link_to_an_empty_folder_is_that_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with writing(tmp_path / "link") as folder:
        (folder / "config.json").write_text("{}")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()


def test_writing_removes_what_a_kill_left(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = gone.pid
    stale = tmp_path / f".model.writing-{dead}"
    stale.mkdir()
    with writing(tmp_path / "model"):
        pass
    assert not stale.exists()


def test_resolve_an_artifact_and_a_run(tmp_path):
    made = make(tmp_path / "runs" / ".cache" / "abc")
    run = tmp_path / "runs" / "photos"
    run.mkdir()
    rows = [
        {"stage": "baseline", "name": "nearest", "artifact": "../.cache/none"},
        {"stage": "train", "name": "teacher", "artifact": "../.cache/abc"},
    ]
    (run / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert resolve(made.path).digest() == resolve(run).digest() == made.digest()
    (run / "ledger.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ModelError, match="a run without a finished captioner"):
        resolve(run)


def test_resolve_names_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "photos")
    with pytest.raises(ModelError, match="no model 'photo': .*did you mean 'runs/photos'"):
        resolve("photo")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="neither an artifact .* nor a run"):
        resolve("empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="pytorch_model.bin is a pickle and is not read"):
        resolve("empty")
    with pytest.raises(ModelError, match="pytorch_model.bin is a pickle, which can run code"):
        resolve("empty/pytorch_model.bin")
    with pytest.raises(ModelError, match="is a file; name the folder"):
        resolve("runs/photos/config.json")
    (tmp_path / "runs" / "photos" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json: is not JSON"):
        resolve("runs/photos")


def test_a_run_whose_artifacts_are_gone_is_one_line(tmp_path):
    (tmp_path / "ledger.jsonl").write_text(json.dumps({"stage": "train", "name": "teacher", "artifact": "../.cache/abc"}) + "\n")
    gone = f"the artifact of 'teacher' is gone \\({tmp_path.parent / '.cache' / 'abc'} is not there\\); run the recipe again, or copy"
    with pytest.raises(ModelError, match=gone) as raised:
        resolve(tmp_path)
    assert raised.value.exit_code == 2
    for damaged, said in ((b"\xff\n", "is not UTF-8 text"), (b'{"stage": "train", "name": 3, "artifact": null}\n', "is not a ledger row")):
        (tmp_path / "ledger.jsonl").write_bytes(damaged)
        with pytest.raises(ModelError, match=said):
            resolve(tmp_path)


def test_half_downloads_are_named(tmp_path):
    made = make(tmp_path / "model")
    weights = made.path / "model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 5, 20, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="half downloaded"):
            resolve(made.path)
    weights.write_bytes(struct.pack("<Q", 4) + b"{bad" + whole)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        resolve(made.path)
    weights.write_bytes(struct.pack("<Q", 2**60) + whole)
    with pytest.raises(ModelError, match="half downloaded"):
        resolve(made.path)
    weights.write_bytes(whole)
    assert resolve(made.path).check()
    weights.unlink()
    with pytest.raises(ModelError, match="neither model.safetensors nor encoder.onnx"):
        resolve(made.path)
    assert artifact.GRAPHS == runtime.GRAPHS
    for present, missing in itertools.pairwise(artifact.GRAPHS):
        (made.path / present).write_bytes(b"x")
        with pytest.raises(ModelError, match=f"no {missing}; copy it again, or make it anew"):
            resolve(made.path)


def test_names_that_are_no_utf8_are_written(tmp_path):
    artifact.write_json(tmp_path / "captions.json", [{"image": "caf\udce9.jpg"}, {"image": "é.jpg"}])
    assert json.loads((tmp_path / "captions.json").read_text(encoding="utf-8")) == [{"image": "caf\udce9.jpg"}, {"image": "é.jpg"}]


def test_a_number_that_json_does_not_have_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifact.write_json(tmp_path / "metrics.json", {"cider": float("nan")})
    assert not (tmp_path / "metrics.json").exists()


def test_write_text_replaces_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    artifact.write_text(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError):
        artifact.write_text(path, "new")
    assert path.read_text() == "old"


def test_writing_leaves_what_another_process_writes(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        theirs = tmp_path / f".model.writing-{other.pid}"
        theirs.mkdir()
        with writing(tmp_path / "model"):
            pass
        assert theirs.is_dir()
        other.communicate(b"\n")
