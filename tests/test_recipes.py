"""Every shipped recipe, made small by --set, from its first stage to a caption said without torch."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import foreign_captioners
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import compress
from compress import cli, lock
from compress.architectures import architectures
from compress.recipe import read_recipe, recipes
from students.lightcap.bert import load_bert
from students.lightcap.fusion import Fusion

MINILM_PIECES = 30522
ROOT = Path(compress.__file__).resolve().parent.parent
QUICKSTART = (
    "data.train_images=48", "data.val_images=12", "teacher.epochs=1", "student.epochs=1", "pruned.recover_epochs=1",
    "pruned.recover_encoder_epochs=1", "int8.calibration_images=16", "pruned.max_drop_cider=1000", "int8.max_drop_cider=1000",
)
WALLS = ("data.captions=dataset.json", "data.images=images")
TRAINED = ("concepts", "train", "distill", "scst")
PHOTOS = (
    *WALLS, "extractor.vocabulary=concepts.txt",
    *(f"{stage.name}.epochs=1" for stage in read_recipe("photos").stages if stage.kind in TRAINED),
    "pruned.recover_epochs=1", "pruned.recover_encoder_epochs=1", "int8.calibration_images=8", "pruned.max_drop_cider=1000",
    "int8.max_drop_cider=1000",
)
UNDISTILLED = (*WALLS, *(f"{stage.name}.epochs=1" for stage in read_recipe("undistilled").stages if stage.kind in TRAINED))


TINY = ("student.preset=tiny", "student.encoder=resnet-small", "student.encoder_weights=none", "extractor.text_encoder=minilm",
        "extractor.inner=16", "extractor.epochs=2", "data.captions=dataset.json", "data.images=images")
SMALL = (*TINY, "student.tokenizer=vocab.txt", "extractor.vocabulary=concepts.txt")  # 30,000 pieces would be read at each row
SMALL_PHOTOS = (*SMALL, *PHOTOS, "extractor.preset=tiny", "frozen.preset=tiny", "frozen.fusion_weights=null")
PRETRAINED = (
    *SMALL, "teacher.model=blip", "student.fusion_weights=null", "extractor.preset=tiny",
    *(f"{name}.epochs=1" for name in ("distilled", "student", "student-cider", "pruned-cider")),
    "pruned.recover_epochs=1", "pruned.recover_encoder_epochs=1", "int8.calibration_images=8", "pruned.max_drop_cider=1000",
    "int8.max_drop_cider=1000",
)
CAPTIONERS = [stage for stage in read_recipe("ablation").stages if stage.kind != "concepts"]
MADE_SMALL = [stage.name for stage in CAPTIONERS if stage.kind != "average"]
PLAIN = ("frozen", "baseline", "concepts", "modulator", "modulator-18", "modulator-19", "masked")
ABLATION = (
    *SMALL, "student.fusion_weights=null", "extractor.preset=tiny", *(f"{name}.preset=tiny" for name in PLAIN),
    *(f"{name}.fusion_weights=null" for name in PLAIN),
    *(f"{name}.epochs=1" for name in MADE_SMALL),
)
COCO = (
    *TINY, "data.captions=dataset_coco.json", "data.images=coco",
    "student.tokenizer=bert", "student.fusion_weights=bert", "teacher-pretrained.fusion_weights=bert/model.safetensors",
    "teacher-pretrained.preset=tiny", "teacher-pretrained.modulator=4",
    *(f"{name}.epochs=2" for name in ("teacher-pretrained", "teacher", "teacher-2", "teacher-3", "student-pretrained", "student-tuned")),
    "student-pretrained.match_epochs=1", "student.epochs=1", "student.batch_images=4",
    "pruned.recover_epochs=1", "pruned.recover_encoder_epochs=1",
    "int8.calibration_images=7", "pruned.max_drop_cider=1000", "int8.max_drop_cider=1000",
)


def lightcap(*arguments, cwd: Path) -> dict | list:
    """The command's JSON, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    done = subprocess.run(
        [sys.executable, "-m", "compress", *map(str, arguments), "--json"], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert not re.findall(r"^[WE]\d{4} .*", done.stderr, re.MULTILINE), "torch's own log is not for who runs a recipe"
    return json.loads(done.stdout)


def here(*arguments, cwd: Path) -> dict | list:
    """The command's JSON, in this process: for what finds all in the cache."""
    with contextlib.chdir(cwd):
        done = CliRunner().invoke(cli.cli, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output[-4000:]
    return json.loads(done.stdout)


def benchmark(name: str, *arguments, cwd: Path) -> dict:
    """Its JSON, in a process of its own."""
    command = [sys.executable, ROOT / "benchmarks" / f"{name}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def settings(values: tuple[str, ...]) -> list[str]:
    """`student` is both a section and a stage of these recipes; a stage's key that is no key of the section reaches the stage."""
    return [part for value in values for part in ("--set", value)]


def picture(number: int) -> tuple[np.ndarray, str]:
    colour = {"red": (210, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 210), "white": (235, 235, 235)}
    name = list(colour)[number % 4]
    noise = np.random.default_rng(number).normal(0, 20, (60 + number, 90, 3))
    return (np.array(colour[name]) + noise).clip(0, 255).astype(np.uint8), name


def karpathy(folder: Path, train: int = 12, val: int = 4) -> None:
    """A dataset.json and its images: plain colours with five captions each."""
    (folder / "images").mkdir()
    images = []
    for number in range(train + val):
        array, colour = picture(number)
        Image.fromarray(array).save(folder / "images" / f"{number}.jpg")
        texts = [f"a {colour} wall", f"the wall is {colour}", f"one {colour} picture", f"a plain {colour} wall", f"{colour} paint"]
        sentences = [{"raw": text, "tokens": text.split(), "imgid": number, "sentid": 5 * number + i} for i, text in enumerate(texts)]
        images.append({"filename": f"{number}.jpg", "imgid": number, "split": "train" if number < train else "val", "sentences": sentences})
    (folder / "dataset.json").write_text(json.dumps({"dataset": "walls", "images": images}))
    spelled(folder / "vocab.txt")
    things = "wall picture paint dog cat person child tree house street car bus boat bird horse ball hat shirt table water grass sky snow"
    (folder / "concepts.txt").write_text("\n".join(things.split()) + "\n")


def spelled(file: Path) -> int:
    """Writes a vocab.txt of letters and some words, and returns the number of its pieces."""
    words = "a the is one wall picture plain paint red green blue white . , dog cat person car".split()
    letters = "abcdefghijklmnopqrstuvwxyz"
    whole = [word for word in words if len(word) > 1 or not word.isalpha()]
    whole += [first + second for first in letters for second in letters if first + second not in whole]  # most are in no caption
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *whole]
    file.write_text("\n".join(pieces) + "\n")
    return len(pieces)


def check(name: str, values: tuple[str, ...], folder: Path, stages: list[str]) -> list[dict]:
    """Runs the recipe, looks at all that it leaves, and returns its rows."""
    first = lightcap("run", name, *settings(values), cwd=folder)
    assert first["ok"] and first["error"] is None
    rows = first["ledger"]
    assert [row["name"] for row in rows] == ["nearest", *stages]
    by_name = {row["name"]: row for row in rows}
    for row in rows[1:]:
        if row["stage"] != "concepts":
            assert row["cider"] >= 0 and row["latency_ms"]["p50"] > 0, row["name"]
        assert row["params"] > 0 and row["bytes"] > 0, row["name"]
        assert (folder / "runs" / name / row["artifact"] / "config.json").is_file()
    assert by_name["pruned"]["gmacs_caption"] <= 0.8 * by_name["vocabulary"]["gmacs_caption"] + 1e-9
    assert by_name["vocabulary"]["params"] < by_name["student"]["params"]
    assert by_name["int8"]["bytes"] < 0.5 * by_name["pruned"]["bytes"]
    assert by_name["int8"]["latency_ms"]["runtime"] == "onnxruntime"
    cards = {kind: (folder / "runs" / name / by_name[kind]["artifact"] / "README.md").read_text() for kind in ("int8", "export")}
    assert by_name["export"]["against"] == "int8" and "| CIDEr less that of 'int8' |" in cards["export"]
    assert all("Note: on x86 processors without VNNI" in said for said in cards.values())  # whoever is given one has not seen it made
    assert ["python FOLDER/caption.py PHOTO" in cards[kind] for kind in ("int8", "export")] == [False, True]
    planned = here("plan", name, *settings(values), cwd=folder)
    assert [stage["cached"] for stage in planned["stages"]] == [True] * len(stages)
    assert here("run", name, *settings(values), cwd=folder)["ledger"] == rows

    array, _ = picture(1)
    Image.fromarray(array).save(folder / "photo.png")
    code = (
        "import sys; from compress import cli\n"
        "try: cli.main(['caption', sys.argv[1], 'photo.png', '--json'])\n"
        "finally: print({'torch', 'transformers'} & {*sys.modules}, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, f"runs/{name}"], capture_output=True, text=True, cwd=folder,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    [answer] = json.loads(done.stdout)
    assert set(answer) == {"image", "caption", "logprob", "ms"} and answer["logprob"] < 0
    assert done.stderr.splitlines()[-1] == "set()"
    return rows


def test_every_shipped_recipe_is_tested_here():
    assert {entry[0] for entry in recipes()} == {"quickstart", "photos", "pretrained", "ablation", "undistilled", "lightcap-coco"}


@pytest.mark.parametrize(("name", "last"), [("ablation", "teacher-cider"), ("undistilled", "student-cider-1")])
def test_a_recipe_that_goes_on_behind_photos_finds_its_stages_in_the_cache(name, last):
    photos, other = (locks(recipe) for recipe in ("photos", name))
    shared = list(photos)[: list(photos).index(last) + 1]
    assert {stage: other[stage] for stage in shared} == {stage: photos[stage] for stage in shared}


def locks(name: str) -> dict[str, str]:
    recipe, found = read_recipe(name), {}
    for stage in recipe.stages:
        found[stage.name] = lock.digest(lock.parts(recipe, stage, found, "data", 2))
    return found


@pytest.mark.parametrize("name", ["photos", "pretrained", "ablation", "undistilled"])
def test_pretrained_weights_fit_every_student_that_starts_from_them(name):
    """The runs below are made small without them."""
    recipe = read_recipe(name)
    models, _ = architectures(recipe, MINILM_PIECES)
    started = set()
    for stage in recipe.stages:
        from_weights = stage.kind == "train" or (stage.kind == "distill" and stage.config.init == "weights")
        if stage.parent is None and from_weights:
            model, weights = models[stage.name], getattr(stage.config, "fusion_weights", None) or recipe.student.fusion_weights
            started.add((weights, model.positions, model.hidden, model.layers, model.attention_heads, model.ffn))
    assert started and all(weights == "minilm" for weights, *_ in started)
    for weights, *sizes in started:
        load_bert(Fusion(MINILM_PIECES, *sizes, 1280, 0.0), weights)


@pytest.mark.timeout(1200)
def test_quickstart(tmp_path):
    check("quickstart", QUICKSTART, tmp_path, ["teacher", "student", "vocabulary", "pruned", "int8", "export"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ways_of_rounding_are_compared_and_what_runs_is_what_was_calibrated(tmp_path):
    check("quickstart", QUICKSTART, tmp_path, ["teacher", "student", "vocabulary", "pruned", "int8", "export"])
    rows = benchmark("int8", "runs/quickstart", "--images", "6", cwd=tmp_path)["rows"]
    assert [(row["rounding"], row["smoothing"]) for row in rows] == [
        ("nearest", 0.0), ("nearest", 0.8), ("gptq", 0.0), ("gptq", 0.8)]
    assert rows[2]["grid_error"] < rows[0]["grid_error"] and rows[3]["grid_error"] == rows[2]["grid_error"]
    # What ONNX Runtime says is what PyTorch says of the same calibration, and that is what the run has; also of weights that were tuned.
    tuned = (*QUICKSTART, "int8.trials=0", "int8.tune_epochs=4", "int8.tune_learning_rate=1e-3")
    lightcap("run", "quickstart", *settings(tuned), "--out", "runs/tuned", cwd=tmp_path)
    for run in ("quickstart", "tuned"):
        found = benchmark("equality", f"runs/{run}", cwd=tmp_path)
        assert found["arithmetic"] == "integers" and found["encoder_floats"] == 0 and found["float_parts"] == [], found
        assert found["same_graphs"] and found["images"] == 12 and found["equal"] >= 11 and found["largest_gap"] < 0.05, found


@pytest.mark.timeout(1200)
def test_ablation(tmp_path):
    """Each row is compared with the row that it adds to, on the same images."""
    karpathy(tmp_path)
    rows = lightcap("run", "ablation", *settings(ABLATION), cwd=tmp_path)["ledger"]
    by_name = {row["name"]: row for row in rows}
    silent = {"nearest", "extractor", "blind"}
    assert len(rows) == len(silent) + len(CAPTIONERS) and by_name["extractor"]["concept_recall"] > 0.5
    said = {name: json.loads((tmp_path / "runs/ablation" / row["artifact"] / "captions.val.json").read_text())
            for name, row in by_name.items() if name not in silent}
    mean = {name: sum(item["cider"] for item in items) / len(items) for name, items in said.items()}
    pairs = {"concepts": "baseline", "modulator-18": "concepts", "tokens-19": "modulator-19", "states": "tokens", "sequential": "states",
             "heads-18": "sequential-18", "cider-19": "heads-19"}
    for name, against in pairs.items():
        assert by_name[name]["delta_cider"] == pytest.approx(mean[name] - mean[against], abs=1e-3), name
        low, high = by_name[name]["delta_ci95"]
        assert low <= by_name[name]["delta_cider"] <= high and by_name[name]["p_value"] is not None
    assert any(by_name[name]["delta_cider"] for name in pairs)
    more = by_name["heads"]["params_by_part"]["heads"] - by_name["tokens"]["params_by_part"]["heads"]
    assert more == 2 * (32 * 32 + 32 + 2 * 32)  # two Linears and their LayerNorms; one bias of the vocabulary serves all
    macs = {name: row["gmacs_caption"] for name, row in by_name.items() if row["gmacs_caption"]}
    assert macs["baseline"] < macs["concepts"] < macs["modulator"] == macs["tokens"] < macs["heads"] == macs["cider"]
    tables = {name: benchmark(name, "runs/ablation", *arguments, "--json", cwd=tmp_path)["rows"]
              for name, arguments in (("gains", ()), ("oracle", ("modulator",)))}
    gained = {row["name"]: row for row in tables["gains"]}
    assert gained["tokens"]["seeds"] == len(gained["tokens"]["gain_by_seed"]) == 3 and "tokens-18" not in gained
    assert gained["concepts"]["gain"] == pytest.approx(by_name["concepts"]["delta_cider"], abs=1e-4)
    found, *others = tables["oracle"]
    assert found["cider"] == pytest.approx(by_name["modulator"]["cider"], abs=1e-4) and found["delta"] is None
    assert [row["concepts"] for row in others] == ["of another image", "precise", "oracle"]
    _, precise, oracle = others
    assert precise["recall"] == pytest.approx(found["recall"]) and precise["precision"] >= found["precision"]
    assert oracle["recall"] >= found["recall"] and oracle["precision"] >= found["precision"]
    assert all(row["delta"] == pytest.approx(row["cider"] - found["cider"], abs=1e-4) for row in others)


def small_bert(folder: Path) -> None:
    """A checkpoint in TinyBERT's and bert-base-uncased's layout: a folder of config.json, vocab.txt and model.safetensors."""
    from transformers import BertConfig, BertForMaskedLM

    folder.mkdir()
    pieces = spelled(folder / "vocab.txt")
    config = BertConfig(vocab_size=pieces, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(config).save_pretrained(folder)


def coco(folder: Path, train: int = 7, val: int = 3) -> None:
    """Karpathy's dataset_coco.json, images in the folders of two years, and both years' instances with a box in each training image, the
    last of which is `restval`: of the other year, as COCO's are."""
    images, listed, boxes = [], {"train2014": [], "val2014": []}, {"train2014": [], "val2014": []}
    for number in range(train + val):
        array, colour = picture(number)
        year = "train2014" if number < train - 1 else "val2014"
        name = f"COCO_{year}_{number:012d}.jpg"
        (folder / "coco" / year).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / "coco" / year / name)
        texts = [f"a {colour} wall", f"a person at the {colour} wall", f"one {colour} car", f"a plain {colour} wall", f"{colour} paint"]
        sentences = [{"raw": text, "tokens": text.split(), "imgid": number, "sentid": 5 * number + i} for i, text in enumerate(texts)]
        split = "train" if number < train - 1 else "restval" if number < train else "val"
        images.append({"filepath": year, "filename": name, "imgid": number, "cocoid": number, "split": split, "sentences": sentences})
        if number < train:
            listed[year].append({"id": number, "file_name": name, "width": array.shape[1], "height": array.shape[0]})
            box = {"id": number, "image_id": number, "category_id": 1 + 2 * (number % 2), "bbox": [10, 10, 40, 40], "iscrowd": 0}
            boxes[year].append(box)
    (folder / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    (folder / "annotations").mkdir()
    categories = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
    for year in listed:
        instances = {"images": listed[year], "annotations": boxes[year], "categories": categories}
        (folder / "annotations" / f"instances_{year}.json").write_text(json.dumps(instances))


@pytest.mark.timeout(1200)
def test_lightcap_coco(tmp_path):
    """The paper's whole course on ten images: concepts, modulator, masked pieces, matching, two phases of distillation, three heads, CIDEr
    optimisation."""
    coco(tmp_path)
    small_bert(tmp_path / "bert")
    names = ["extractor", "teacher-pretrained", "teacher", "teacher-2", "teacher-3", "student-pretrained", "student-tuned", "student",
             "vocabulary", "pruned", "int8", "export"]
    rows = check("lightcap-coco", COCO, tmp_path, names)
    assert all({"alignment", "modulator"} <= row["params_by_part"].keys() for row in rows[2:])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sizes", [
    pytest.param(("student.image_size=64", *PHOTOS), marks=pytest.mark.slow, id="its own models"), pytest.param(SMALL_PHOTOS, id="small")
])
def test_photos(tmp_path, sizes):
    karpathy(tmp_path)
    names = ["extractor", "frozen", "tuned", "teacher-1", "teacher-2", "teacher-3", "teacher", "cider-1", "cider-2", "cider-3",
             "teacher-cider", "student", "student-cider-1", "student-cider-2", "student-cider-3", "student-cider", "vocabulary", "pruned",
             "pruned-cider", "int8", "export"]
    check("photos", sizes, tmp_path, names)
    rows = {tuple(row["taken"]): row for row in benchmark("parts", "runs/photos", "vocabulary", "pruned", "--json", cwd=tmp_path)["rows"]}
    ciders = {row["name"]: row["cider"] for row in here("compare", "runs/photos", cwd=tmp_path)["runs"][0]["rows"]}
    assert len(rows) == 8 and rows[()]["delta"] is None
    assert rows[()]["cider"] == pytest.approx(ciders["vocabulary"], abs=1e-4)
    assert rows["encoder", "concepts", "fusion"]["cider"] == pytest.approx(ciders["pruned"], abs=1e-4)


@pytest.mark.timeout(1200)
def test_pretrained(tmp_path):
    karpathy(tmp_path)
    foreign_captioners.blip(tmp_path / "blip")
    names = ["extractor", "teacher", "distilled", "student", "student-cider", "vocabulary", "pruned", "pruned-cider", "int8", "export"]
    rows = {row["name"]: row for row in check("pretrained", PRETRAINED, tmp_path, names)}
    assert rows["student"]["against"] == rows["student-cider"]["against"] == "teacher"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_undistilled(tmp_path):
    karpathy(tmp_path)
    rows = {row["name"]: row for row in lightcap("run", "undistilled", *settings(UNDISTILLED), cwd=tmp_path)["ledger"]}
    assert rows["plain"]["params"] == rows["student"]["params"] and rows["plain-cider-19"]["delta_ci95"] is not None
    gained = {row["name"]: row for row in benchmark("gains", "runs/undistilled", "--json", cwd=tmp_path)["rows"]}
    assert gained["student-cider-1"]["seeds"] == 3
    for name in ("plain-cider", "alone-cider"):
        assert (gained[name]["seeds"], gained[name]["against"], gained[name]["against_seeds"]) == (3, "student-cider-1", 3)
    assert rows["alone-cider"]["params"] > rows["student"]["params"]  # whole feed-forward layers: in its favour
