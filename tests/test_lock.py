"""A lock changes with everything that an artifact depends on, and with nothing else."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from compress import lock, sources
from compress.data import CaptionSet
from compress.data.captions import Example
from compress.errors import DataError
from compress.recipe import read_recipe

RECIPE = """\
seed: 3
student: {preset: tiny, heads: 1}
stages:
  - train: {as: teacher, epochs: 2}
  - distill: {as: student, teachers: [teacher]}
  - vocabulary: {as: small}
"""


RINGS = CaptionSet((Example("a.jpg", "train", ("a ring",)), Example("b.jpg", "val", ("a ring",))), "f", "rings")


def locks_of(tmp_path: Path, text: str = RECIPE, fingerprint="f", threads=2, root=sources.ROOT) -> dict[str, str]:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    recipe, locks = read_recipe(path), {}
    for stage in recipe.stages:
        locks[stage.name] = lock.digest(lock.parts(recipe, stage, locks, fingerprint, threads, root))
    return locks


def test_what_is_in_the_lock(tmp_path):
    base = locks_of(tmp_path)
    assert locks_of(tmp_path) == base
    assert all(len(value) == 64 for value in base.values())
    for change in (
        {"text": RECIPE.replace("seed: 3", "seed: 4")},
        {"text": RECIPE.replace("heads: 1", "heads: 2")},
        {"text": RECIPE.replace("epochs: 2", "epochs: 3")},
        {"fingerprint": "g"},
        {"threads": 1},
    ):
        changed = locks_of(tmp_path, **change)
        assert not set(changed.values()) & set(base.values()), change  # a parent's and a teacher's lock is in its children's


def test_a_later_stage_does_not_touch_an_earlier_one(tmp_path):
    base = locks_of(tmp_path)
    changed = locks_of(tmp_path, RECIPE.replace("as: small", "as: small, min_count: 2"))
    assert changed["teacher"] == base["teacher"] and changed["student"] == base["student"]
    assert changed["small"] != base["small"]


def test_another_student_does_not_train_its_teacher_anew(tmp_path):
    text = """\
student: {preset: minilm-student, encoder: efficientnet-lite0, encoder_weights: none, heads: 3}
stages:
  - concepts: {as: extractor, preset: minilm-teacher}
  - train: {as: teacher, preset: minilm-teacher, extractor: extractor}
  - train: {as: onward, preset: minilm-student}
  - train: {as: further, from: teacher}
  - distill: {as: student, teachers: teacher}
  - vocabulary: {}
"""
    base = locks_of(tmp_path, text)
    other = locks_of(tmp_path, text.replace("heads: 3", "heads: 2, layers: 2"))
    assert {name for name in base if base[name] != other[name]} == {"onward", "student", "vocabulary"}
    for shared in ("encoder_weights: imagenet", "encoder_weights: none, image_size: 288"):
        assert not set(base.values()) & set(locks_of(tmp_path, text.replace("encoder_weights: none", shared)).values())


def test_names_are_not_in_the_lock(tmp_path):
    base = locks_of(tmp_path)
    renamed = locks_of(tmp_path, RECIPE.replace("teacher", "master").replace("masters:", "teachers:").replace("small", "tiny"))
    assert list(renamed.values()) == list(base.values())


def test_an_extractor_is_in_the_lock(tmp_path):
    text = "stages:\n  - concepts: {as: a}\n  - train: {as: teacher, preset: tiny, extractor: a}\n"
    base, other = locks_of(tmp_path, text), locks_of(tmp_path, text.replace("as: a", "as: a, pieces: 9"))
    assert base["a"] != other["a"] and base["teacher"] != other["teacher"]
    renamed = locks_of(tmp_path, text.replace("as: a", "as: b").replace("extractor: a", "extractor: b"))
    assert list(renamed.values()) == list(base.values())


def test_a_file_that_a_setting_names_is_in_the_lock(tmp_path):
    names = tmp_path / "names.txt"
    stages = f"stages:\n  - concepts: {{as: a, vocabulary: {names}}}\n  - train: {{as: b, from: a}}\n"
    text = f"student: {{preset: tiny, tokenizer: {tmp_path / 'bert'}}}\n" + stages
    (tmp_path / "bert").mkdir()
    for file, words in ((names, "dog\n"), (tmp_path / "bert" / "tokenizer.json", "{}")):
        file.write_text(words)
    seen = [locks_of(tmp_path, text)]
    for file, words in ((names, "cat\n"), (tmp_path / "bert" / "tokenizer.json", "[]"), (tmp_path / "bert" / "vocab.txt", "a")):
        file.write_text(words)
        seen.append(locks_of(tmp_path, text))
        assert all(seen[-1][stage] != seen[-2][stage] for stage in "ab")
    assert locks_of(tmp_path, text) == seen[-1]


def test_where_a_file_lies_is_not_in_the_lock(tmp_path):
    """Its bytes are; words of ours and names of the hub, which have none here, are themselves."""
    text = "student: {preset: tiny, tokenizer: %s, fusion_weights: %s}\nstages:\n  - concepts: {as: a, vocabulary: %s}\n"
    text += "  - train: {as: b, preset: tiny}\n"
    seen = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        for name in ("bert", "weights", "names.txt"):
            (tmp_path / folder / name).write_text(name)
        seen.append(locks_of(tmp_path, text % tuple(tmp_path / folder / name for name in ("bert", "weights", "names.txt"))))
    assert seen[0] == seen[1]
    words = [locks_of(tmp_path, text % (tokenizer, weights, tmp_path / "here" / "names.txt"))["b"]
             for tokenizer, weights in (("english", "minilm"), ("minilm", "minilm"), ("english", "owner/name"), ("english", "owner/other"))]
    assert len({*words, seen[0]["b"]}) == 5


def test_the_weights_that_a_stage_names_itself_are_in_its_lock(tmp_path):
    """And not those of the student section, which it does not load."""
    for name in ("own", "section"):
        (tmp_path / name).write_text("weights")
    text = f"student: {{preset: tiny, tokenizer: english, fusion_weights: {tmp_path / 'section'}}}\nstages:\n"
    text += f"  - train: {{as: a, fusion_weights: {tmp_path / 'own'}}}\n"
    base = locks_of(tmp_path, text)
    (tmp_path / "section").write_text("others")
    assert locks_of(tmp_path, text) == base
    (tmp_path / "own").write_text("others")
    assert locks_of(tmp_path, text)["a"] != base["a"]


@pytest.mark.parametrize("key", ["vocabulary", "regions", "boxes", "image_sizes", "text_encoder"])
def test_every_file_of_an_extractor_is_in_the_lock(tmp_path, key):
    named = {"regions": tmp_path / "objects.json", "image_sizes": tmp_path / "sizes.json"} | {key: tmp_path / "file"}
    text = "stages:\n  - concepts: {as: a, " + ", ".join(f"{name}: {path}" for name, path in named.items()) + "}\n"
    (tmp_path / "sizes.json").write_text("{}")
    (tmp_path / "file").write_text("dog")
    base = locks_of(tmp_path, text)
    (tmp_path / "file").write_text("cat")
    assert locks_of(tmp_path, text)["a"] != base["a"]


def test_each_of_several_files_of_regions_is_in_the_lock(tmp_path):
    """Also where a file goes."""
    text = f"stages:\n  - concepts: {{as: a, regions: [{tmp_path / 'train.json'}, {tmp_path / 'val.json'}]}}\n"
    seen = []
    for written in ("12", "32", "34"):
        for name, one in zip(("train.json", "val.json"), written, strict=True):
            (tmp_path / name).write_text(one)
        seen.append(locks_of(tmp_path, text)["a"])
    (tmp_path / "train.json").unlink()
    seen.append(locks_of(tmp_path, text)["a"])
    assert len(set(seen)) == 4


def test_the_list_of_concepts_that_a_tuned_encoder_is_taught_by_is_in_the_lock(tmp_path):
    """The stage `train` reads it anew, hours after the extractor was made of it; and what changed meanwhile is asked for."""
    text = "student: {preset: tiny}\nstages:\n  - concepts: {as: a, vocabulary: %s}\n  - train: {as: b, from: a, encoder: tuned%s}\n"
    (tmp_path / "list.txt").write_text("dog\n")
    (tmp_path / "r.yaml").write_text(text % (tmp_path / "list.txt", ", concept_weight: 0.1"))
    recipe = read_recipe(tmp_path / "r.yaml")
    known = lock.parts(recipe, recipe.stages[1], {"a": "x"}, "f", 2)
    assert lock.changed(recipe, recipe.stages[1], known) == []
    (tmp_path / "list.txt").write_text("cat\n")
    assert lock.changed(recipe, recipe.stages[1], known) == ["the file of 'vocabulary'"]
    (tmp_path / "r.yaml").write_text(text % (tmp_path / "list.txt", ""))
    recipe = read_recipe(tmp_path / "r.yaml")
    assert "files" not in lock.parts(recipe, recipe.stages[1], {"a": "x"}, "f", 2)


def test_the_text_encoder_of_a_silent_recipe_is_in_the_lock(tmp_path, monkeypatch):
    text = "stages:\n  - concepts: {as: a, vocabulary: %s}\n" % (tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("dog\n")
    base = locks_of(tmp_path, text)["a"]
    recipe = read_recipe(tmp_path / "r.yaml")
    assert set(lock.files_of(recipe, recipe.stages[0])) >= {"vocabulary", "text_encoder"}
    known = lock.versions
    monkeypatch.setattr(lock, "versions", lambda names, *of: {"minilm": "0"} if names == ["minilm"] else known(names, *of))
    assert locks_of(tmp_path, text)["a"] != base


def test_the_sizes_beside_visual_genomes_objects_are_in_the_lock(tmp_path):
    text = f"stages:\n  - concepts: {{as: a, regions: {tmp_path / 'objects.json'}}}\n"
    seen = [locks_of(tmp_path, text)["a"]]
    for sizes in ("[]", "[1]"):
        (tmp_path / "image_data.json").write_text(sizes)
        seen.append(locks_of(tmp_path, text)["a"])
    assert len(set(seen)) == 3


def test_the_shipped_concepts_are_in_the_lock(tmp_path, monkeypatch):
    text = "stages:\n  - concepts: {as: a}\n"
    base, without = locks_of(tmp_path, text), locks_of(tmp_path)
    other = tmp_path / "concepts.txt"
    other.write_text("dog\n")
    monkeypatch.setattr(lock, "SHIPPED", other)
    assert locks_of(tmp_path, text) != base and locks_of(tmp_path) == without


def test_defaults_written_out_are_the_same(tmp_path):
    written = RECIPE.replace("epochs: 2", "epochs: 2, weight_decay: 0.05")
    assert locks_of(tmp_path, written) == locks_of(tmp_path)


def project(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_sources_follow_imports(tmp_path):
    root = project(
        tmp_path / "project",
        compress__stages__train="from compress.training import loop\nimport torch.nn as nn\n",
        compress__stages__prune="import torch_pruning\n",
        compress__training__loop="def f():\n    from students.lightcap.model import M\n    importlib.import_module('compress.cost')\n",
        compress__training__unused="import onnx\n",
        compress__cost="import numpy as np\nfrom compress.errors import DataError\n",
        compress__errors="class DataError: pass\n",
        compress__evaluate="from PIL import Image\n",
        students__lightcap__model="from students.lightcap import parts\n",
        students__lightcap__parts="import safetensors.torch\nfrom . import model\n",
    )
    (root / "compress" / "__init__.py").write_text("")
    texts, libraries = sources.imported(("compress.stages.train", "compress.evaluate"), root)
    assert list(texts) == [  # not the package itself, whose version trains nothing anew
        "compress.cost",
        "compress.errors",
        "compress.evaluate",
        "compress.stages.train",
        "compress.training.loop",
        "students.lightcap.model",
        "students.lightcap.parts",
    ]
    assert libraries == ["PIL", "numpy", "safetensors", "torch"]
    before = locks_of(tmp_path, root=root)
    (root / "compress" / "stages" / "prune.py").write_text("import torch_pruning  # changed\n")
    assert locks_of(tmp_path, root=root) == before
    (root / "compress" / "cost.py").write_text("import numpy as np\n")
    after = locks_of(tmp_path, root=root)
    assert after["teacher"] != before["teacher"]


def test_the_real_stages_are_covered():
    texts, libraries = sources.imported(("compress.stages.train",))
    expected = {"compress.stages.train", "compress.training.loop", "compress.data.karpathy", "compress.artifact", "students.lightcap.model"}
    assert expected <= set(texts)
    others = {"cli", "pipeline", "stages.prune", "evaluate", "runtime", "config", "metrics.cider"}  # a change there trains nothing anew
    assert not {f"compress.{name}" for name in others} & set(texts)
    assert {"torch", "numpy"} <= set(libraries)
    versions = sources.versions(libraries)
    assert all(version != "absent" for version in versions.values()), versions


def test_the_libraries_of_quantize_and_prune():
    assert {"neural_compressor", "torchao", "onnx", "onnxruntime"} <= set(sources.imported(("compress.stages.quantize",))[1])
    assert "torch_pruning" in sources.imported(("compress.stages.prune",))[1]


def test_the_seed_of_a_stage_is_a_setting(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    recipe = read_recipe(path)
    stage = recipe.stages[0]
    seeded = replace(stage, config=replace(stage.config, seed=9))
    changed = replace(recipe, stages=(seeded, *recipe.stages[1:]))
    assert lock.parts(changed, seeded, {}, "f", 2)["settings"]["seed"] == 9
    assert "seed" not in lock.parts(recipe, stage, {}, "f", 2)["settings"]


def test_a_gate_is_in_the_lock_where_the_stage_itself_looks_at_val(tmp_path):
    """A gate alone judges what was made; a search, and steps that are taken back, make something else of another one."""

    def locks(prune: str, quantize: str, split: str = "val") -> tuple[str, str]:
        text = f"data: {{val_split: {split}}}\n{RECIPE}  - prune: {{as: p, macs: 0.7, {prune}}}\n  - quantize: {{as: q, {quantize}}}\n"
        found = locks_of(tmp_path, text)
        return found["p"], found["q"]

    gates = [locks("max_drop_cider: 3", "trials: 0, max_drop_cider: 2"), locks("max_drop_cider: 9", "trials: 0, max_drop_cider: 8"),
             locks("max_drop_cider: 9", "trials: 0, max_drop_cider: 8", "test")]
    assert len(set(gates)) == 1
    steps = [locks("steps: 2, max_drop_cider: 3", "trials: 0"), locks("steps: 2, max_drop_cider: 9", "trials: 0"),
             locks("steps: 2, max_drop_cider: 9", "trials: 0", "test")]
    assert len({pruned for pruned, _ in steps}) == 3
    trials = [locks("steps: 1", "trials: 2, max_drop_cider: 2"), locks("steps: 1", "trials: 2, max_drop_cider: 8"),
              locks("steps: 1", "trials: 2, max_drop_cider: 8", "test")]
    assert len({pruned for pruned, _ in trials}) == 1 and len({quantized for _, quantized in trials}) == 3


def test_other_libraries_make_anew_and_another_evaluation_measures_anew(tmp_path, monkeypatch):
    base = locks_of(tmp_path)
    recipe = read_recipe(tmp_path / "r.yaml")

    def measured(text: str, threads: int = 2, data: str = "f", against: tuple = ()) -> str:
        root = project(tmp_path / "project", compress__evaluate=text)
        return lock.digest(lock.measure_parts(recipe, against, data, threads, root))

    assert measured("x = 1\n") == measured("x = 1\n")
    others = [measured("x = 2\n"), measured("x = 1\n", threads=1), measured("x = 1\n", data="g"), measured("x = 1\n", against=("a",))]
    assert len({measured("x = 1\n"), *others}) == 5
    first = lock.digest(lock.baseline_parts("a", "f", 2))
    assert first != lock.digest(lock.baseline_parts("b", "f", 2)) and first != lock.digest(lock.baseline_parts("a", "g", 2))
    monkeypatch.setattr(lock, "versions", lambda names: dict.fromkeys(names, "other"))
    assert not set(locks_of(tmp_path).values()) & set(base.values()) and lock.digest(lock.baseline_parts("a", "f", 2)) != first


def test_what_changed_since(tmp_path):
    root = project(tmp_path / "project", compress__a="x = 1\n", compress__b="x = 1\n", compress__c="x = 1\n")
    known, _ = sources.imported(("compress.a", "compress.b", "compress.c"), root)
    assert sources.changed_code(known, root) == []
    (root / "compress" / "a.py").write_text("x = 2\n")
    (root / "compress" / "c.py").unlink()
    assert sources.changed_code(known, root) == ["compress.a", "compress.c"]


def test_a_file_that_changed_since(tmp_path):
    (tmp_path / "words.txt").write_text("dog\n")
    path = tmp_path / "r.yaml"
    path.write_text(f"stages:\n  - concepts: {{as: a, vocabulary: {tmp_path / 'words.txt'}}}\n")
    recipe = read_recipe(path)
    known = lock.of_stages(recipe, RINGS, 2)["a"]
    assert lock.changed(recipe, recipe.stages[0], known) == []
    (tmp_path / "words.txt").write_text("cat\n")
    assert lock.changed(recipe, recipe.stages[0], known) == ["the file of 'vocabulary'"]
    (tmp_path / "words.txt").unlink()
    (tmp_path / "words.txt").symlink_to(tmp_path / "words.txt")  # what is there and cannot be read
    with pytest.raises(DataError, match="words.txt cannot be read"):
        lock.file_digest(tmp_path / "words.txt")


def test_a_folder_that_is_called_as_weights_are_is_not_in_the_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = RECIPE.replace("preset: tiny, heads: 1", "preset: tiny, heads: 1, encoder_weights: imagenet, tokenizer: minilm")
    before = locks_of(tmp_path, text)
    for name in ("imagenet", "minilm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_bytes(b"x")
    assert locks_of(tmp_path, text) == before


def test_names_of_files_that_are_no_utf8_are_in_the_lock(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).write_bytes(b"x")
    assert lock.digests({"encoder_weights": str(folder)}) and not lock.digests({"encoder_weights": "~nobody-of-that-name/x"})


def test_the_version_of_a_package_with_weights_is_in_the_lock(tmp_path, monkeypatch):
    text = RECIPE.replace("preset: tiny, heads: 1", "preset: tiny, heads: 1, encoder_weights: imagenet, tokenizer: minilm")
    base, without = locks_of(tmp_path, text), locks_of(tmp_path)
    real = sources.importlib.metadata.version
    for package in lock.CARRIED.values():
        with monkeypatch.context() as patch:
            patch.setattr(sources.importlib.metadata, "version", lambda name, package=package: "9.9" if name == package else real(name))
            assert not set(locks_of(tmp_path, text).values()) & set(base.values())
            assert locks_of(tmp_path) == without


def test_what_two_locks_differ_in_is_said(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = read_recipe(tmp_path / "r.yaml")
    before = lock.of_stages(recipe, RINGS, 2)

    def said(**parts) -> list[str]:
        now = before | {"teacher": before["teacher"] | parts}
        found = lock.differences(recipe, before, now)
        assert set(found) == {"teacher", "student", "small"} and found["student"] == found["small"] == []
        return found["teacher"]

    teacher = before["teacher"]
    assert said() == []
    assert said(versions=teacher["versions"] | {"numpy": "0.1"}) == [f"numpy {teacher['versions']['numpy']} -> 0.1"]
    assert said(student=teacher["student"] | {"heads": None}) == ["heads 1 -> none"]
    assert said(files={"vocabulary": "1"}) == ["the file of 'vocabulary'"]
    assert said(processes=4) == ["processes 1 -> 4"]
    assert said(images="1") == ["the images that are measured on, or their captions"]
    modules = list(teacher["sources"])
    assert said(sources=teacher["sources"] | {modules[0]: "1"}) == [f"the code of {modules[0]}"]
    assert said(sources=dict.fromkeys(modules, "1")) == [
        f"the code of {', '.join(modules[:3])} and {len(modules) - 3} more modules"]
    assert said(seed=4, threads=1) == ["seed 3 -> 4", "threads 2 -> 1"]
    assert lock.differences(recipe, {}, before) == {} == lock.differences(recipe, before, {})
