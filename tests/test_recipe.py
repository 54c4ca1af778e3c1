"""One parse path: what a recipe comes to, and the one line that each mistake gives."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from compress import config, recipe
from compress.errors import RecipeError
from compress.recipe import read_recipe

CHAIN = """\
name: chain
seed: 3
data: {train_images: 10}
student: {preset: tiny, heads: 2}
stages:
  - train: {as: teacher, epochs: 2}
  - train: {as: teacher-2, from: teacher, seed: 18}
  - train: {as: other, preset: tiny}
  - distill: {as: student, teachers: [teacher, teacher-2], match: tokens}
  - vocabulary: {}
  - prune: {as: pruned, macs: 0.7}
  - quantize: {as: int8}
  - export:
"""


def write(folder: Path, text: str, name: str = "chain.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_student_that_starts_from_bert_has_its_pieces_and_layers(tmp_path):
    """DESIGN's own example: the student's section names BERT's weights, and nothing else says what goes with them."""
    named = CHAIN.replace("heads: 2}", "heads: 2, fusion_weights: huawei-noah/TinyBERT_General_4L_312D}")
    read = read_recipe(write(tmp_path, named))
    assert read.student.tokenizer == "huawei-noah/TinyBERT_General_4L_312D" and read.stages[3].config.init == "weights"
    written = named.replace("match: tokens", "match: tokens, init: teacher").replace("D}", "D, tokenizer: minilm}")
    read = read_recipe(write(tmp_path, written))
    assert read.student.tokenizer == "minilm" and read.stages[3].config.init == "teacher"
    plain = read_recipe(write(tmp_path, CHAIN))
    assert plain.student.tokenizer is None and plain.stages[3].config.init == "teacher"


@pytest.mark.parametrize(("weights", "tokenizer"), [
    ("bert/model.safetensors", "bert"), ("pytorch_model.bin", "."), ("bert", "bert"), ("minilm", "minilm"), ("owner/name", "owner/name"),
])
def test_the_tokenizer_of_a_file_of_weights_lies_beside_it(tmp_path, weights, tokenizer):
    path = write(tmp_path, f"student: {{preset: tiny, fusion_weights: {weights}}}\nstages:\n  - train: {{}}\n")
    assert read_recipe(path).student.tokenizer == tokenizer


def test_presets_and_encoders_are_the_students():
    """Listed twice, since the students' own list cannot be read without torch."""
    from students.lightcap.config import PRESETS
    from students.lightcap.encoder import ENCODERS

    assert set(config.CHOICES["preset",]) == set(PRESETS) and set(config.CHOICES["student", "encoder"]) == set(ENCODERS)


def test_a_gate_of_int8_searches_where_the_recipe_is_silent(tmp_path):
    def searched(settings: str) -> tuple[int, float]:
        quantize = read_recipe(write(tmp_path, one_stage(f"quantize: {{{settings}}}"))).stages[1].config
        return quantize.trials, quantize.tune_epochs

    assert [searched(settings) for settings in ("", "max_drop_cider: 2", "max_drop_cider: 2, trials: 0", "tune_epochs: 3")] == [
        (0, 0.0), (4, 1.0), (0, 0.0), (0, 3.0)]
    assert searched("max_drop_cider: 2, trials: 2, tune_epochs: 0") == (2, 0.0)


def test_an_extractor_of_a_captioner_that_was_taught_speaks(tmp_path):
    stages = one_stage("concepts: {as: found}") + "  - scst: {}\n"
    stages += "  - concepts: {as: new, preset: tiny}\n  - distill: {from: new, teachers: scst}\n"
    assert [stage.name for stage in read_recipe(write(tmp_path, stages)).stages] == ["teacher", "found", "scst", "new", "distill"]


def error_of(folder: Path, text: str, *settings: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read_recipe(write(folder, text), settings)
    assert caught.value.exit_code == 2
    message = caught.value.message
    assert "\n" not in message
    return message.replace(str(folder) + "/", "")


def one_stage(line: str) -> str:
    return f"stages:\n  - train: {{as: teacher}}\n  - {line}\n"


def test_an_extractor_starts_a_new_captioner(tmp_path):
    text = "stages:\n  - concepts: {}\n  - train: {as: teacher, preset: tiny, extractor: concepts}\n  - scst: {}\n"
    read = read_recipe(write(tmp_path, text))
    assert [(stage.name, stage.parent) for stage in read.stages] == [("concepts", None), ("teacher", None), ("scst", "teacher")]
    assert [config.references(stage.config) for stage in read.stages] == [(), ("concepts",), ()]


def test_stages_and_what_they_work_on(tmp_path):
    read = read_recipe(write(tmp_path, CHAIN))
    assert (read.name, read.seed) == ("chain", 3)
    assert [(stage.kind, stage.name, stage.parent) for stage in read.stages] == [
        ("train", "teacher", None),
        ("train", "teacher-2", "teacher"),
        ("train", "other", None),  # a preset starts anew
        ("distill", "student", None),  # a new student
        ("vocabulary", "vocabulary", "student"),
        ("prune", "pruned", "vocabulary"),
        ("quantize", "int8", "pruned"),
        ("export", "export", "int8"),
    ]
    assert read.stages[0].config == config.Train(epochs=2.0)
    assert read.stages[3].config.teachers == ("teacher", "teacher-2")
    assert read.stages[3].config.match == ("tokens",)
    assert isinstance(read.stages[0].config.epochs, float)


def test_rows_are_compared_with_what_against_names(tmp_path):
    text = """stages:
  - concepts: {}
  - train: {as: plain, preset: tiny}
  - train: {as: rich, preset: tiny, extractor: concepts, against: plain}
  - distill: {as: student, teachers: rich}
  - distill: {as: other, teachers: rich, against: student}
  - prune: {macs: 0.5}
"""
    read = read_recipe(write(tmp_path, text))
    assert [stage.against for stage in read.stages] == [None, None, "plain", "rich", "student", "other"]
    again = read_recipe(write(tmp_path, recipe.as_yaml(read), "again.yaml"))
    assert again == read
    wrong = error_of(tmp_path, text, "other.against=studnet")
    assert "key 'against': 'studnet' is not a stage here" in wrong and "did you mean 'student'" in wrong
    assert "'concepts' has no captions to compare with" in error_of(tmp_path, text, "other.against=concepts")
    assert "key 'against': 'prune' comes later" in error_of(tmp_path, text, "other.against=prune")
    assert "'concepts' makes no captions to compare" in error_of(tmp_path, text.replace("concepts: {}", "concepts: {against: plain}"))


def test_a_student_keeps_its_heads(tmp_path):
    """Another number of heads than the section's is a new student's; what goes on from it is taught by one teacher each, or gets more."""
    text = """student: {heads: 1}
stages:
  - train: {as: a, preset: tiny}
  - train: {as: b, preset: tiny}
  - distill: {as: wide, heads: 2, teachers: [a, b]}
  - distill: {as: tuned, from: wide, teachers: [b, a]}
"""
    assert read_recipe(write(tmp_path, text)).stages[3].config.teachers == ("b", "a")
    assert "2 teachers for 1 heads" in error_of(tmp_path, text.replace("heads: 2, ", ""))
    assert read_recipe(write(tmp_path, text), ["tuned.heads=2"]).stages[3].config.heads == 2
    assert "2 teachers for 3 heads" in error_of(tmp_path, text, "tuned.heads=3")


def test_null_is_what_is_not_written(tmp_path):
    text = """student: {preset: tiny, fusion_weights: minilm, tokenizer: null}
stages:
  - concepts: {as: found}
  - train: {as: teacher, from: null, extractor: found}
  - distill: {as: student, from: null}
"""
    read = read_recipe(write(tmp_path, text))
    plain = "\n".join(line.replace(", from: null", "").replace(", tokenizer: null", "") for line in text.splitlines())
    assert read == read_recipe(write(tmp_path, plain)) and read.student.tokenizer == "minilm"
    assert [stage.parent for stage in read.stages] == [None] * 3 and read.stages[2].config.init == "weights"
    assert read_recipe(write(tmp_path, recipe.as_yaml(read), "again.yaml")) == read


def test_distill_learns_from_the_stage_before(tmp_path):
    read = read_recipe(write(tmp_path, one_stage("distill: {}")))
    assert read.stages[1].config.teachers == ("teacher",)
    assert read.name == "chain"  # the file's


def test_resolved_reads_back_the_same(tmp_path):
    read = read_recipe(write(tmp_path, CHAIN))
    again = read_recipe(write(tmp_path, recipe.as_yaml(read), "again.yaml"))
    assert again == read
    assert recipe.digest(again) == recipe.digest(read)
    changed = read_recipe(tmp_path / "chain.yaml", ["pruned.macs=0.5"])
    assert recipe.digest(changed) != recipe.digest(read)


@pytest.mark.parametrize("name", [name for name, _ in recipe.recipes()])
def test_shipped_recipes_read(name):
    read = read_recipe(name)
    assert read.name == name
    if name not in ("ablation", "undistilled"):  # which have branches, but no main line
        assert [stage.kind for stage in read.stages][-2:] == ["quantize", "export"]
        assert {"teacher", "student", "pruned", "int8"} <= {stage.name for stage in read.stages}
    assert dict(recipe.recipes())[name]


def test_numbers_as_people_write_them(tmp_path):
    read = read_recipe(write(tmp_path, "stages: [{train: {learning_rate: 3e-4, epochs: 2}}]"))
    assert read.stages[0].config.learning_rate == 3e-4


# ---- extends


def test_extends_merges_mappings_and_replaces_lists(tmp_path):
    write(tmp_path, CHAIN)
    child = "extends: chain.yaml\nstudent: {layers: 1}\nstages:\n  - train: {as: teacher}\n"
    read = read_recipe(write(tmp_path, child, "small.yaml"))
    assert (read.name, read.seed, len(read.stages)) == ("small", 3, 1)
    assert (read.student.preset, read.student.heads, read.student.layers) == ("tiny", 2, 1)


def test_a_section_without_keys_is_the_parent_s(tmp_path):
    """All of them commented out: it is YAML's null, which takes nothing away."""
    write(tmp_path, CHAIN)
    child = "extends: chain.yaml\ndata:\n  # seed: 4\nstudent:\n"
    read = read_recipe(write(tmp_path, child, "small.yaml"))
    parent = read_recipe(tmp_path / "chain.yaml")
    assert (read.data, read.student) == (parent.data, parent.student) != (config.Data(), config.Student())
    own = read_recipe(write(tmp_path, "student:\nstages:\n  - train: {preset: tiny}\n", "own.yaml"))
    assert own.student == config.Student()


def test_after_puts_the_parent_s_first_stages_before_the_own(tmp_path):
    parent = read_recipe(write(tmp_path, CHAIN, "parent.yaml"))
    last = parent.stages[1].name
    child = f"extends: parent.yaml\nafter: {last}\nstages:\n  - distill: {{as: more, teachers: teacher}}\n"
    read = read_recipe(write(tmp_path, child, "child.yaml"), ["teacher.epochs=7"])
    assert [stage.name for stage in read.stages] == [*(stage.name for stage in parent.stages[:2]), "more"]
    assert read.stages[1].config == parent.stages[1].config and read.stages[0].config.epochs == 7
    assert read.stages[0].place.startswith(str(tmp_path / "parent.yaml")) and "child.yaml:4" in read.stages[2].place
    grandchild = "extends: child.yaml\nafter: teacher\nstages:\n  - export: {}\n"
    assert [stage.name for stage in read_recipe(write(tmp_path, grandchild, "last.yaml")).stages] == ["teacher", "export"]
    assert "a second stage is named 'teacher'" in error_of(tmp_path, child.replace("as: more", "as: teacher"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: parent.yaml\nafter: teachr\nstages:\n  - export: {}\n", "the parent has no stage 'teachr'; it has teacher, "),
        ("extends: parent.yaml\nafter: [teacher]\nstages:\n  - export: {}\n", "key 'after' must be"),
        ("extends: parent.yaml\nafter: teacher\n", "it needs 'extends' and 'stages'"),
        ("after: teacher\nstages:\n  - train: {preset: tiny}\n", "it needs 'extends' and 'stages'"),
        ("extends: parent.yaml\nafter: teacher\nstages: []\n", "key 'stages' must be a list"),
    ],
)
def test_after_what_is_not_there(tmp_path, text, expected):
    write(tmp_path, CHAIN, "parent.yaml")
    assert expected in error_of(tmp_path, text)


def test_extends_a_shipped_recipe(tmp_path):
    read = read_recipe(write(tmp_path, "extends: quickstart\nseed: 5\n", "mine.yaml"))
    assert (read.name, read.seed) == ("mine", 5)
    assert read.stages == read_recipe("quickstart").stages


def test_extends_in_a_circle(tmp_path):
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    with pytest.raises(RecipeError, match="comes back to a recipe that extends this one"):
        read_recipe(tmp_path / "a.yaml")


def test_extends_without_an_end(tmp_path):
    for number in range(40):
        write(tmp_path, f"extends: {number + 1}.yaml\n", f"{number}.yaml")
    with pytest.raises(RecipeError, match="more than 16 recipes extend one another"):
        read_recipe(tmp_path / "0.yaml")


def test_extends_what_is_not_there(tmp_path):
    message = error_of(tmp_path, "seed: 1\nextends: photoss\n")
    assert message.startswith("chain.yaml:2: recipe 'photoss' is neither a file nor a shipped recipe")
    assert message.endswith("did you mean 'photos'?")


# ---- --set


def test_set_by_section_stage_name_and_kind(tmp_path):
    path = write(tmp_path, CHAIN)
    settings = ["seed=4", "data.captions=a b.json", "pruned.macs=0.5", "quantize.calibration_images=8", "student.epochs=3"]
    read = read_recipe(path, [*settings, "student.layers=1", "student.match=[tokens, hidden]"])
    assert (read.seed, read.data.captions, read.student.layers) == (4, "a b.json", 1)
    assert read.stages[5].config.macs == 0.5
    assert read.stages[6].config.calibration_images == 8
    assert (read.stages[3].config.epochs, read.stages[3].config.match) == (3.0, ("tokens", "hidden"))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("train.epochs=2", "3 stages are a 'train'; use the stage's name: teacher, teacher-2, other"),
        ("prunned.macs=0.5", "no section or stage 'prunned' here"),
        ("prunned.macs=0.5", "did you mean 'pruned'?"),
        ("pruned.mac=0.5", "unknown key 'mac' in 'prune'"),
        ("pruned.macs=1.5", "key 'macs' must be above 0 and below 1, not 1.5"),
        ("pruned.macs", "write it as NAME.key=value"),
        ("macs=0.5", "'macs' has no key; write NAME.key=value, seed=N or name=NAME"),
        ("data.source=!!python/name:os.system", "is not allowed"),
        ("data.seed=[1", "not valid YAML"),
        ("scst.epochs=1", "no section or stage 'scst' here"),
        ("data.images=photos #2", "'#2' would be a comment; put the value in quotes"),
        ("data.images=#2", "'#2' would be a comment"),
        ("train.seed=010", "YAML reads 010 as 8, in octal; write it without the leading zero"),
    ],
)
def test_wrong_settings(tmp_path, setting, expected):
    message = error_of(tmp_path, CHAIN, setting)
    assert message.startswith(f"--set {setting}: ")
    assert expected in message and f"did you mean '{setting.split('.')[0]}'" not in message


# ---- one line for each mistake


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sede: 1\nstages: [{train: {}}]", r"chain.yaml:1: unknown key 'sede'; allowed: name, .*; did you mean 'seed'\?"),
        ("stages:\n  - trian: {}", r"chain.yaml:2: unknown stage 'trian'; allowed: concepts, train, .*; did you mean 'train'\?"),
        ("stages:\n  - train:\n      epoch: 2", r"chain.yaml:3: unknown key 'epoch' in 'train'; .*did you mean 'epochs'\?"),
        ("stages: [{train: {epochs: many}}]", r"chain.yaml:1: key 'epochs' must be a number, not 'many'"),
        ("stages: [{train: {batch_images: 2.5}}]", r"key 'batch_images' must be a whole number, not 2.5"),
        ("stages: [{train: {batch_images: true}}]", r"key 'batch_images' must be a whole number, not True"),
        ("stages: [{train: {epochs: -1}}]", r"key 'epochs' must be above 0, not -1"),
        ("stages: [{train: {epochs: .nan}}]", r"key 'epochs' must be above 0, not nan"),
        ("stages: [{train: {epochs: .inf}}]", r"key 'epochs' must be above 0, not inf"),
        ("stages: [{train: {epochs: [1]}}]", r"key 'epochs' must be a number, not a list"),
        ("stages: [{train: {epochs: }}]", r"key 'epochs' has no value"),
        ("stages: [{train: {encoder: thawed}}]", r"key 'encoder': 'thawed' is not one of frozen, tuned"),
        ("data: {captions: 12}\nstages: [{train: {}}]", r"chain.yaml:1: key 'captions' must be text, not 12: put it in quotes"),
        ("data: scenes\nstages: [{train: {}}]", r"chain.yaml:1: key 'data' must be a mapping"),
        ("data: {source: flickr}\nstages: [{train: {}}]", r"'flickr' is not one of scenes, .*; did you mean 'flickr8k'\?"),
        ("name: a/b\nstages: [{train: {}}]", r"chain.yaml:1: key 'name' must be a word"),
        ("seed: 1", r"chain.yaml:1: key 'stages' must be a list with at least one of concepts, train, "),
        ("stages: []", r"key 'stages' must be a list"),
        ("stages: [train]", r"a stage is one key with its settings"),
        ("stages: [{train: 3}]", r"the settings of 'train' must be a mapping"),
        ("stages: [{train: {as: nearest}}]", r"key 'as' must be a word"),
        ("stages:\n  - train: {}\n  - train: {}", r"chain.yaml:3: a second stage is named 'train'; give it its own 'as: NAME'"),
        ("stages: [{prune: {macs: 0.5}}]", r"the first stage cannot be 'prune'"),
        ("stages: [{distill: {}}]", r"'distill' needs a teacher"),
        (one_stage("prune: {}"), r"chain.yaml:3: 'prune' needs a target"),
        (one_stage("quantize: {trials: 2}"), r"chain.yaml:3: key 'trials': there is nothing to try for without 'max_drop_cider'"),
        (one_stage("vocabulary: {from: teachr}"), r"'teachr' is not a stage here; earlier stages: teacher; did you mean 'teacher'\?"),
        (one_stage("train: {from: teacher, preset: tiny}"), r"keys 'from' and 'preset' exclude each other"),
        (one_stage("distill: {as: s, teachers: [later]}") + "  - train: {as: later}", r"key 'teachers': 'later' comes later"),
        (one_stage("train: {as: s, extractor: later}") + "  - concepts: {as: later}", r"key 'extractor': 'later' comes later"),
        (one_stage("train: {as: s, from: teacher, extractor: teacher}"), r"keys 'from' and 'extractor' exclude each other"),
        ("stages: [{scst: {}}]", r"the first stage cannot be 'scst'"),
        ("student: {encoder: resnet-smal}\nstages: [{train: {}}]", r"chain.yaml:1: key 'encoder': .* did you mean 'resnet-small'\?"),
        ("stages: [{train: {preset: tinny}}]", r"chain.yaml:1: key 'preset': 'tinny' is not one of .*; did you mean 'tiny'\?"),
        ("stages:\n  - concepts: {as: found}\n  - distill: {}", r"chain.yaml:3: 'found' was not taught to write captions, which 'distill'"),
        ("stages:\n  - concepts: {as: found}\n  - vocabulary: {}\n  - export: {}", r"chain.yaml:4: 'vocabulary' was not taught to write"),
        (one_stage("scst: {samples: 1}"), r"key 'samples' must be 2 or more"),
        (one_stage("distill: {token_weight: 1.5}"), r"key 'token_weight' must be 0 or more and at most 1"),
        (one_stage("concepts: {as: words}") + "  - prune: {macs: 0.5, max_drop_cider: 1}",
         r"chain.yaml:4: key 'max_drop_cider': 'words', which 'prune' would be compared with, has no captions; name a stage that has"),
        (one_stage("quantize: {}") + "  - prune: {macs: 0.5}", r"'quantize' is already ONNX graphs \(quantize\), which 'prune' cannot"),
        ("student: {heads: 3}\n" + one_stage("distill: {teachers: [teacher, teacher]}"), r"2 teachers for 3 heads; give one, or exactly"),
        ("seed: 1\nseed: 2", r"chain.yaml:2: key 'seed' is written twice"),
        ("a: [1", r"chain.yaml:1: not valid YAML"),
        ("- 1", r"chain.yaml:1: a recipe is a mapping"),
        ("", r"chain.yaml:1: a recipe is a mapping"),
        ("? [a]\n: 1", r"a key must be one word"),
        ("seed: 1\n---\nseed: 2", r"not valid YAML"),
        ('name: "\\U00110000"', r"chain.yaml:1: not valid YAML: "),
        ("data: &a {<<: *a}", r"chain.yaml:1"),
    ],
)
def test_one_line_says_what_is_wrong(tmp_path, text, expected):
    assert re.search(expected, error_of(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system [touch ran]",
        "data: !!python/name:os.system",
        "data: !import other.yaml",
        "seed: !!int '3'",
    ],
)
def test_no_tag_runs(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(r"chain.yaml:1: the tag '.*' is not allowed: a recipe is data only", error_of(tmp_path, text))
    assert not (tmp_path / "ran").exists()


def test_explosions_are_refused(tmp_path):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "more than 8 aliases" in error_of(tmp_path, "\n".join(levels))
    assert "nested deeper than 16 levels" in error_of(tmp_path, "[" * 5000 + "]" * 5000)
    assert "an alias that contains itself" in error_of(tmp_path, "seed: &a [*a, *a]")
    assert "too large for a recipe" in error_of(tmp_path, "#" * 300_000)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="neither a file nor a shipped recipe.*did you mean 'quickstart'"):
        read_recipe("quikstart")
    with pytest.raises(RecipeError, match="is a folder"):
        read_recipe(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not UTF-8"):
        read_recipe(tmp_path / "x.yaml")


def test_every_number_has_a_range_and_every_choice_a_key():
    types = {"data": config.Data, "student": config.Student, **config.STAGES}
    for section, type_ in types.items():
        for name, hint in typing.get_type_hints(type_).items():
            if {int, float} & {hint, *typing.get_args(hint)}:
                assert name in config.RANGES, (section, name)
    fields = {(section, field.name) for section, type_ in types.items() for field in dataclasses.fields(type_)}
    for key in config.CHOICES:
        assert key in fields or key[0] in {name for _, name in fields}, key
