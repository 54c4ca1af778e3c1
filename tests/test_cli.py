"""The command: answers, JSON, one-line errors and exit statuses."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import compress
from compress import answer, cli, doctor, ledger, pipeline, show
from compress.data.captions import hashed_split
from compress.errors import GateError
from compress.metrics import java

ROOT = Path(compress.__file__).resolve().parent.parent


@pytest.fixture
def lightcap(capsys, monkeypatch, tmp_path):
    """Runs the command in an empty folder: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        output, error = capsys.readouterr()
        return ended.value.code, output, error

    return run


def command(*arguments, cwd) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "compress", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment
    )


def test_version_and_help(lightcap, tmp_path):
    assert lightcap("--version") == (0, f"lightcap {compress.__version__}\n", "")
    status, output, _ = lightcap("--help")
    assert status == 0
    for name in ("recipes", "plan", "run", "compare", "sweep", "fit", "caption", "eval", "score", "profile", "export", "doctor"):
        assert f"\n  {name} " in output
    assert lightcap()[::2] == (2, output)  # alone, as wrong input
    done = command("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"lightcap {compress.__version__}\n")


@pytest.mark.parametrize("arguments", [("fit", "quickstart", "--max-mb", "2"), ("sweep", "quickstart", "--vary", "pruned.macs=0.8,0.5")])
def test_what_is_not_divided_among_processes_is_refused_to_several(lightcap, monkeypatch, arguments, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, error = lightcap(*arguments)
    assert status == 2 and f"'{arguments[0]}' runs in one process" in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_recipes(lightcap):
    status, output, _ = lightcap("recipes", "--json")
    assert status == 0
    assert {"quickstart", "photos"} <= {entry["recipe"] for entry in json.loads(output)}
    assert "quickstart" in lightcap("recipes")[1]


@pytest.mark.parametrize(("arguments", "status", "lines"), [(("recipes",), 0, 0), (("recipes", "--json"), 0, 0),
                                                            (("compare", "nowhere", "--json"), 2, 1)])
def test_nobody_has_to_read_all_that_a_command_says(tmp_path, arguments, status, lines):
    """A failure is still one, and said."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen([sys.executable, "-m", "compress", *arguments], cwd=tmp_path, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()
    with running.stderr as said:
        assert said.read().count(b"\n") == lines and running.wait() == status


def test_brackets_are_drawn_as_they_are(capsys):
    answer.print_drawn(show.doctor(doctor.examine() | {"missing": [{"what": "weights", "install": "pip install 'lightcap[photos]'"}]}))
    assert "lightcap[photos]" in capsys.readouterr().out
    answer.print_drawn("out[v2]: 1.00 MB [/b] :smile:")
    assert capsys.readouterr().out == "out[v2]: 1.00 MB [/b] :smile:\n"


def test_plan_of_a_shipped_recipe_without_its_photos(lightcap, tmp_path):
    """Counted for COCO's images; captions that are named have to be there."""
    status, output, error = lightcap("plan", "lightcap-coco", "--json")
    planned = json.loads(output)
    assert (status, error) == (0, "") and "no dataset_coco.json here" in planned["imagined"] and "113,287" in planned["imagined"]
    assert all(stage["lock"] is None and not stage["cached"] for stage in planned["stages"])
    spent = {stage["name"]: stage["tmacs"] for stage in planned["stages"]}
    assert len(spent) == 12 and min(spent.values()) > 0 and spent["student-tuned"] > 2 * spent["vocabulary"]
    assert "113,287 training images" in " ".join(lightcap("plan", "lightcap-coco")[1].split())
    status, _, error = lightcap("plan", "lightcap-coco", "--set", "data.captions=nowhere.json")
    assert status == 2 and "nowhere.json" in error and error.count("\n") == 1
    (tmp_path / "mine.yaml").write_text("extends: lightcap-coco\n")
    assert lightcap("plan", "mine.yaml")[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_plan_says_times_in_a_unit_that_can_be_read(capsys):
    seconds = {99.4: "about 99 s", 99.6: "about 2 min", 5900: "about 98 min", 40_000: "about 11 h", 3_732_720: "about 43 days"}
    stage = {"stage": "train", "lock": None, "cached": False, "measured": False, "tmacs": 1.0, "changed": []}
    planned = {"recipe": "mine", "stages": [stage | {"name": str(length), "seconds": length} for length in seconds]}
    answer.print_drawn(show.plan(planned))
    output = capsys.readouterr().out
    assert all(words in line for line, words in zip(output.splitlines()[4:9], seconds.values(), strict=True)), output
    assert "5 stages to do, about 44 days" in output


def test_plan_writes_nothing(lightcap, tmp_path):
    small = ("--set", "data.train_images=3", "--set", "data.val_images=2")
    status, output, error = lightcap("plan", "quickstart", *small, "--json")
    planned = json.loads(output)
    assert (status, error) == (0, "")
    assert planned["recipe"] == "quickstart" and len(planned["digest"]) == 64
    assert [stage["name"] for stage in planned["stages"]] == ["teacher", "student", "vocabulary", "pruned", "int8", "export"]
    assert all({"stage", "cached", "lock"} <= stage.keys() and not stage["cached"] for stage in planned["stages"])
    assert "6 stages to do" in lightcap("plan", "quickstart", *small)[1]
    assert list(tmp_path.iterdir()) == []


WRONG = [
    (("rum",), "no command 'rum'; there are .*; did you mean 'run'\\?"),
    (("run",), "Missing argument 'RECIPE'"),
    (("run", "quickstart", "--sett", "a=b"), "No such option.*--sett"),
    (("run", "quikstart"), "recipe 'quikstart' is neither a file nor a shipped recipe; .*did you mean 'quickstart'\\?"),
    (("run", "quickstart", "--set", "pruned.mac=0.5"), "--set pruned.mac=0.5: unknown key 'mac' in 'prune'.*did you mean 'macs'"),
    (("plan", "evil.yaml"), "evil.yaml:2: the tag '.*' is not allowed"),
    (("run", "quickstart", "--set", "data.source=karpathy", "--set", "data.captions=none.json"), "none.json"),
    (("caption", "nothing", "a.jpg"), "no model 'nothing'"),
    (("caption", "weights.pt", "a.jpg"), "weights.pt is a pickle, which can run code"),
    (("eval", "nothing", "--captions", "c.json", "--images", "i"), "no model 'nothing'"),
    (("export", "nothing", "--out", "there"), "no model 'nothing'"),
    (("compare", "nothing"), "nothing is not a run"),
    (("score", "--candidates", "a.json", "--references", "b.json"), "a.json: cannot be read"),
    (("score", "--candidates", "said.json", "--references", "numbers.json"), "numbers.json: an entry is no JSON object"),
    (("plan", "quickstart", "--set", "data.val_split=vall"), "no split 'vall'.*did you mean 'val'.*--set data.val_split=SPLIT"),
    (("run", "quickstart", "--set", "data.val_split=tets"), "no split 'tets'; there are: train .*--set data.val_split=SPLIT"),
    (("run", "quickstart", "--out", "evil.yaml/run"), "evil.yaml is a file, not a folder"),
    (("run", "quickstart", "--out", ""), "--out .: name a folder"),
    (("plan", "quickstart", "--out", "."), "--out .: name a folder"),
    (("fit", "quickstart", "--max-mb", "nan"), "Invalid value for '--max-mb': nan is no limit"),
    (("fit", "quickstart", "--max-mb", "2", "--max-drop-cider", "inf"), "'--max-drop-cider': inf is no limit"),
    (("run", "quickstart", "--set", "pruned.parts=[]"), "pruned.*parts.*nothing may leave"),
    (("plan", "quickstart", "--set", "pruned.parts=[concepts]"), "'pruned': parts: only concepts are to be pruned, but the"),
    (("profile", "lightcap", "--tokens", "65"), "--tokens 65: a caption has 64 positions"),
]


@pytest.mark.parametrize(("arguments", "expected"), WRONG)
def test_wrong_input_is_one_line_exit_2_and_writes_nothing(lightcap, tmp_path, arguments, expected):
    (tmp_path / "evil.yaml").write_text("seed: 1\ndata: !!python/object/apply:os.system [touch ran]\n")
    (tmp_path / "weights.pt").write_bytes(b"x")
    (tmp_path / "said.json").write_text('[{"image_id": 1, "caption": "a dog"}]')
    (tmp_path / "numbers.json").write_text('{"annotations": [1, 2]}')
    before = sorted(tmp_path.rglob("*"))
    status, output, error = lightcap(*arguments)
    assert (status, output) == (2, "")
    assert error.startswith("lightcap: ") and error.count("\n") == 1 and error.endswith("\n")
    assert re.search(expected, error), error
    status, output, _ = lightcap(*arguments, "--json")
    document = json.loads(output)
    assert status == 2 and document["ok"] is False and re.search(expected, document["error"])
    assert sorted(tmp_path.rglob("*")) == before


def test_run_in_json_has_its_shape_when_it_fails(lightcap):
    document = json.loads(lightcap("run", "quickstart", "--set", "teacher.epoch=1", "--json")[1])
    assert set(document) == {"ok", "run", "ledger", "error"}
    assert document["ledger"] == []


def test_compare(lightcap, tmp_path):
    for name, cider in (("a", 50.0), ("b", 40.0)):
        row = {"stage": "train", "name": "teacher", "artifact": "../.cache/x", "cider": cider, "bytes": 1e6, "latency_ms": {"p50": 9.0}}
        (tmp_path / name).mkdir()
        ledger.write(tmp_path / name / "ledger.jsonl", [row])
    alone = json.loads(lightcap("compare", "a", "b", "--json")[1])  # artifacts are gone: what rows say is all there is
    assert alone["pareto"] == [{"run": "a", "stage": "train", "name": "teacher"}]
    (tmp_path / ".cache" / "x").mkdir(parents=True)
    (tmp_path / ".cache" / "x" / "lock.json").write_text('{"images": "f"}')
    status, output, error = lightcap("compare", "a", "b", "--html", "report.html", "--json")
    document = json.loads(output)
    assert status == 0 and error == "wrote report.html\n"
    assert [entry["run"] for entry in document["runs"]] == ["a", "b"]
    assert document["runs"][1]["rows"] == ledger.read(tmp_path / "b" / "ledger.jsonl")
    assert document["pareto"] == [{"run": "a", "stage": "train", "name": "teacher"}]
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert "teacher" in lightcap("compare", "a", "b")[1]


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_run_that_misses_its_gate(lightcap, monkeypatch, tmp_path, more):
    """Its rows are printed all the same."""
    row = ledger.row({"stage": "train", "name": "teacher", "artifact": "x", "cider": 50.04})
    failed = pipeline.Result(tmp_path / "runs" / "x", (row,), GateError("stage 'pruned' missed its gate"))
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: failed)
    status, output, error = lightcap("run", "quickstart", *more)
    assert (status, error) == (1, "lightcap: stage 'pruned' missed its gate\n")
    assert json.loads(output) == json.loads(json.dumps(failed.json())) if more else ("teacher" in output and "50.0" in output)


def test_compare_shows_what_all_runs_share_once_and_cuts_no_number(lightcap, tmp_path):
    shared = {"stage": "train", "name": "teacher", "artifact": "../.cache/x", "cider": 50.0, "cider_ci95": [46.0, 54.0], "bytes": 115.73e6}
    for share in ("0.8", "0.65"):
        name = f"a-long-name-{'of-a-run-' * 10}{share}"
        own = {"stage": "prune", "name": "pruned", "artifact": f"../.cache/{share}", "cider": 48.0, "delta_cider": -2.0,
               "delta_ci95": [-3.0, -1.0], "bytes": 49.89e6}
        (tmp_path / "runs" / name).mkdir(parents=True)
        ledger.write(tmp_path / "runs" / name / "ledger.jsonl", [shared, own])
    names = [str(path.relative_to(tmp_path)) for path in sorted((tmp_path / "runs").iterdir())]
    status, output, _ = lightcap("compare", *names, "--html", "report.html")
    assert status == 0 and output.count("teacher") == output.count("every run") == 1 and output.count("pruned") == 2
    assert output.count("115.73") == 1 and output.count("49.89") == output.count("-2.0 [-3.0, -1.0]") == 2 and "…" not in output
    assert "runs/" not in output  # the folder that both lie in
    assert (tmp_path / "report.html").read_text().count("115.73") == 1
    assert lightcap("compare", names[0])[1].count("every run") == 0


def test_score(lightcap, tmp_path, monkeypatch):
    references = {
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [{"image_id": 1, "caption": "a dog runs on the grass"}, {"image_id": 2, "caption": "two men ride red bikes"}],
    }
    said = [{"image_id": 1, "caption": "a dog runs on the grass"}, {"image_id": 2, "caption": "two men ride red bikes"}]
    (tmp_path / "r.json").write_text(json.dumps(references))
    (tmp_path / "c.json").write_text(json.dumps(said))
    status, output, _ = lightcap("score", "--candidates", "c.json", "--references", "r.json", "--json")
    scores = json.loads(output)
    assert status == 0
    assert list(scores) == ["cider", "cider_ci95", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "images"]
    assert scores["bleu4"] == pytest.approx(100, abs=1e-4) and scores["cider"] == pytest.approx(1000)
    assert "CIDEr-D" in lightcap("score", "--candidates", "c.json", "--references", "r.json")[1]
    monkeypatch.setenv("PATH", str(tmp_path))
    status, output, error = lightcap("score", "--candidates", "c.json", "--references", "r.json", "--java", "--json")
    assert status == 0 and json.loads(output) == scores
    assert "not measured: METEOR and SPICE: no java here; apt install default-jre-headless" in error
    assert {"what": "java (optional: METEOR and SPICE)", "install": "apt install default-jre-headless, or brew install openjdk"} in (
        json.loads(lightcap("doctor", "--json")[1])["missing"])
    monkeypatch.setattr(doctor, "without_java", lambda: [])
    monkeypatch.setattr(java, "extra_scores", lambda written, wanted: {"meteor": 31.0, "spice": 22.5 + len(written) + len(wanted)})
    status, output, error = lightcap("score", "--candidates", "c.json", "--references", "r.json", "--java")
    assert status == 0 and error == "" and "METEOR" in output and "26.50" in output


def test_profile_of_a_preset(lightcap):
    status, output, _ = lightcap("profile", "lightcap", "--json")
    row = json.loads(output)
    assert status == 0 and tuple(row) == (*ledger.ROW, "params_fusion", "params_without_alignment")
    assert (row["params_fusion"], row["params_without_alignment"]) == (14_252_592, 38_838_633)
    assert row["params"] == 41_986_409 and row["params_by_part"]["encoder"] == 23_527_264
    assert row["gmacs_encoder"] == pytest.approx(5.37, abs=0.01)
    assert row["cider"] is None
    assert "41,986,409" in lightcap("profile", "lightcap")[1]
    status, _, error = lightcap("profile", "lightcp")
    assert status == 2 and "lightcp" in error and "lightcap" in error


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A float artifact with random weights, as small as there is."""
    from compress.config import Student
    from compress.training.start import new_captioner, write_captioner

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    network, tokenizer, settings = new_captioner(Student(preset="tiny"), "tiny", None, None, 0.0, 17)
    write_captioner(folder, network.eval(), tokenizer, settings)
    return folder


def test_profile_calls_an_artifact_of_a_run_by_its_label(lightcap, model, tmp_path):
    shutil.copytree(model, tmp_path / "0f3c")
    assert json.loads(lightcap("profile", "0f3c", "--json")[1])["name"] == "0f3c"
    (tmp_path / "0f3c" / "lock.json").write_text("{}")
    (tmp_path / "0f3c" / "metrics.json").write_text('{"name": "teacher"}')
    assert json.loads(lightcap("profile", "0f3c", "--json")[1])["name"] == "teacher"


@pytest.fixture(scope="module")
def exported(model) -> Path:
    from compress.artifact import Artifact
    from compress.stages.export import export

    out = model.parent / "exported"
    export(Artifact(model), out)
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(17)
    for name, size in (("b.png", (50, 70)), ("a.png", (80, 80))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff half")
    (folder / "notes.txt").write_text("not a photo")
    return folder


def test_caption_keeps_the_order_and_names_the_unreadable(lightcap, exported, photos):
    status, output, error = lightcap("caption", exported, photos / "b.png", photos, "--beam", "2", "--json")
    answers = json.loads(output)
    assert status == 1
    assert [Path(answer["image"]).name for answer in answers] == ["b.png", "a.png", "b.png", "broken.jpg"]
    assert set(answers[0]) == {"image", "caption", "logprob", "ms"} and answers[0]["ms"] > 0 > answers[0]["logprob"]
    assert answers[0]["caption"] == answers[2]["caption"]
    assert set(answers[3]) == {"image", "error"} and error.count("\n") == 1 and "broken.jpg" in error
    status, output, _ = lightcap("caption", exported, photos / "a.png", photos / "none.png", "--json")
    assert status == 1 and "error" in json.loads(output)[1]
    status, output, error = lightcap("caption", exported, photos / "aa.png")
    assert (status, output) == (1, "") and error.count("\n") == 1 and "did you mean 'a.png'?" in error
    status, output, error = lightcap("caption", "lightcap", photos / "a.png")
    assert (status, output) == (2, "") and "'lightcap' is a preset, which has no weights" in error
    status, output, error = lightcap("caption", exported, photos / "a.png")
    assert (status, error) == (0, "") and output.startswith(f"{photos / 'a.png'}\t")


def test_caption_of_an_export_imports_no_torch(exported, photos, tmp_path):
    code = (
        "import sys\nfrom compress import cli\n"
        f"try:\n    cli.main(['caption', {str(exported)!r}, {str(photos / 'a.png')!r}, '--json'])\n"
        "except SystemExit as ended:\n    print(ended.code, 'torch' in sys.modules, file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stderr == "0 False\n"
    assert len(json.loads(done.stdout)) == 1


def test_float_and_export_say_the_same(lightcap, model, exported, photos):
    captions = [json.loads(lightcap("caption", folder, photos / "a.png", "--json")[1])[0] for folder in (model, exported)]
    assert captions[0]["caption"] == captions[1]["caption"]
    assert captions[0]["logprob"] == pytest.approx(captions[1]["logprob"], abs=1e-3)


def test_a_float_model_is_read_once_for_many_photos(lightcap, model, photos, monkeypatch):
    from compress import evaluate

    read, times = evaluate.read_captioner, []
    monkeypatch.setattr(evaluate, "read_captioner", lambda path: times.append(path) or read(path))
    status, output, _ = lightcap("caption", model, photos / "a.png", photos / "b.png", photos / "a.png", "--beam", "1", "--json")
    answers = json.loads(output)
    assert status == 0 and len(answers) == 3 and times == [model] and answers[0]["caption"] == answers[2]["caption"]


def test_export_writes_a_folder_that_runs(lightcap, exported, tmp_path, photos):
    status, output, _ = lightcap("export", exported, "--out", "captioner", "--json")  # graphs are copied
    document = json.loads(output)
    assert status == 0 and {"caption.py", "requirements.txt", "encoder.onnx", "decoder.onnx"} <= set(document["files"])
    done = subprocess.run([sys.executable, "captioner/caption.py", str(photos / "a.png")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(str(photos / "a.png"))
    status, _, error = lightcap("export", exported, "--out", "captioner")
    assert status == 2 and "captioner is there already" in error


def test_export_says_where_int8_can_saturate(lightcap, exported, tmp_path):
    assert "saturate" not in lightcap("export", exported, "--out", "float")[2]
    config = json.loads((exported / "config.json").read_text())
    shutil.copytree(exported, tmp_path / "int8")
    for reduced in (False, True):
        described = {"scheme": "static", "reduce_range": reduced}
        (tmp_path / "int8" / "config.json").write_text(json.dumps(config | {"quantized": described}))
        status, _, error = lightcap("export", "int8", "--out", f"out-{reduced}", "--json")
        assert status == 0 and ("without VNNI" in error and "reduce_range: true" in error) is not reduced


def test_a_half_downloaded_model(lightcap, model, photos, tmp_path):
    for path in model.iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[:-9] if path.suffix == ".safetensors" else data)
    status, _, error = lightcap("caption", tmp_path, photos / "a.png")
    assert status == 2 and "half downloaded" in error and error.count("\n") == 1


def test_eval(lightcap, exported, photos):
    images = [{"filename": name, "split": "val", "sentences": [{"raw": "a grey square"}]} for name in ("a.png", "b.png")]
    (photos / "dataset.json").write_text(json.dumps({"dataset": "squares", "images": images}))
    arguments = ("eval", exported, "--captions", photos / "dataset.json", "--images", photos, "--beam", "1")
    status, output, error = lightcap(*arguments, "--json")
    assert status == 0, error
    scores = json.loads(output)
    keys = ["cider", "cider_ci95", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "images"]
    assert list(scores) == keys and scores["images"] == 2
    status, output, error = lightcap(*arguments, "--split", "vall")
    assert (status, output) == (2, "") and "did you mean 'val'" in error and error.count("\n") == 1


@pytest.mark.parametrize(("name", "split"), [("squares.json", "val"), ("captions_train2017.json", "train")])
def test_eval_takes_all_images_where_there_is_no_choice(lightcap, exported, photos, name, split):
    """COCO's annotations say no split: of a recipe's, a tenth would be val."""
    images = [{"id": number, "file_name": file} for number, file in enumerate(("a.png", "b.png"))]
    annotations = [{"image_id": image["id"], "caption": "a grey square"} for image in images]
    (photos / name).write_text(json.dumps({"images": images, "annotations": annotations}))
    arguments = ("eval", exported, "--captions", photos / name, "--images", photos, "--beam", "1", "--json")
    status, output, error = lightcap(*arguments)
    assert status == 0 and json.loads(output)["images"] == 2, error
    assert ("squares.json says no splits: all 2 images are measured, also those that a model" in error) == (split == "val")
    status, output, error = lightcap(*arguments, "--split", "train" if split == "val" else "val")
    drawn = [hashed_split(str(image["id"])) for image in images].count("train")
    if split == "train":
        assert status == 2 and "there is no split 'val'; there are: train (2)" in error
    else:
        assert drawn == 2 and json.loads(output)["images"] == drawn


def test_eval_reads_the_data_set_and_the_column_that_are_named(lightcap, exported, photos, tmp_path):
    """What their looks do not tell: photos that a Parquet file carries, captions in a column of any name."""
    import datasets

    rows = [{"image": {"bytes": (photos / name).read_bytes(), "path": name}, "said": "a grey square"} for name in ("a.png", "b.png")]
    kinds = datasets.Features({"image": datasets.Image(), "said": datasets.Value("string")})
    (tmp_path / "squares").mkdir()
    datasets.Dataset.from_list(rows, features=kinds).to_parquet(str(tmp_path / "squares" / "val.parquet"))
    arguments = ("eval", exported, "--images", "squares", "--captions", "said", "--beam", "1", "--json")
    status, output, error = lightcap(*arguments, "--source", "datasets")
    assert status == 0 and json.loads(output)["images"] == 2, error
    status, _, error = lightcap(*arguments)
    assert status == 2 and "--captions: there is no file or folder said" in error and "--source datasets" in error
    assert error.count("\n") == 1 and "--set" not in error
    done = command("eval", exported, "--images", "nowhere", "--captions", "said", "--source", "datasets", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("lightcap: --images: ") and done.stderr.count("\n") == 1


def test_eval_says_what_it_leaves_out_and_speaks_of_its_own_options(lightcap, exported, photos, tmp_path):
    names = ("a.png", "b.png", "broken.jpg")
    images = [{"filename": name, "split": "val", "sentences": [{"raw": "a grey square"}]} for name in names]
    (tmp_path / "broken.json").write_text(json.dumps({"dataset": "squares", "images": images}))
    arguments = ("eval", exported, "--captions", "broken.json", "--images", photos, "--beam", "1", "--json")
    status, _, error = lightcap(*arguments)
    assert status == 2 and "--set" not in error and "--images PATH" in error
    allowed = re.search(r"--max-unreadable [0-9.]+", error)[0].split()
    status, output, error = lightcap(*arguments, *allowed)
    assert status == 0 and json.loads(output)["images"] == 2
    assert "lightcap: 1 images are missing or unreadable and left out: broken.jpg" in error
    status, _, error = lightcap("eval", exported, "--captions", "none.json", "--images", photos)
    assert status == 2 and "--set" not in error and "--captions: there is no file or folder none.json" in error


def test_export_names_a_folder_that_cannot_be_written(lightcap, exported, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    status, _, error = lightcap("export", exported, "--out", "file/captioner")
    assert status == 2 and "file is a file, not a folder" in error and error.count("\n") == 1
    making = Path.mkdir

    def refused(self, *arguments, **more):
        if ".writing-" in self.name:
            raise PermissionError(13, "Permission denied")
        making(self, *arguments, **more)

    monkeypatch.setattr(Path, "mkdir", refused)
    status, _, error = lightcap("export", exported, "--out", "captioner")
    assert status == 2 and "cannot write into the folder . (Permission denied)" in error


def test_names_that_are_no_utf8(lightcap, exported, photos, tmp_path):
    odd = os.path.join(os.fsencode(tmp_path), b"odd-\xff.png")
    shutil.copy(photos / "a.png", odd)
    status, output, _ = lightcap("caption", exported, os.fsdecode(odd), "--json")
    assert status == 0 and os.fsencode(json.loads(output)[0]["image"]) == odd
    status, output, _ = lightcap("caption", exported, os.fsdecode(odd))
    assert status == 0 and "odd-\ufffd.png" in output


def test_a_folder_that_may_not_be_read_is_one_line(lightcap, exported, photos, monkeypatch):
    def refused(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    status, _, error = lightcap("caption", exported, photos)
    assert status == 2 and f"the folder {photos} cannot be read (Permission denied)" in error


def test_weights_may_be_read_by_whom_their_config_may(model):
    modes = [(model / name).stat().st_mode for name in ("config.json", "model.safetensors")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("written", [None, "{}", "[1]", "{"])
def test_a_preprocessor_that_says_nothing_is_one_line(lightcap, model, photos, tmp_path, written):
    shutil.copytree(model, tmp_path / "odd")
    (tmp_path / "odd" / "preprocessor_config.json").unlink()
    if written is not None:
        (tmp_path / "odd" / "preprocessor_config.json").write_text(written)
    status, _, error = lightcap("caption", "odd", photos / "a.png")
    assert status == 2 and "preprocessor_config.json" in error and error.count("\n") == 1


def test_doctor(lightcap, tmp_path):
    status, output, _ = lightcap("doctor", "--json")
    found = json.loads(output)
    assert status == 0 and found["ok"] is True and set(found) == {"ok", "versions", "cpu", "missing"}
    assert found["versions"]["numpy"] == np.__version__
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Test CPU\nflags\t\t: fpu avx2 avx512_vnni amx_int8\n")
    cpu = doctor.examine(cpuinfo)["cpu"]
    assert (cpu["name"], cpu["flags"], cpu["fast_int8"]) == ("Test CPU", ["AVX2", "AVX512-VNNI", "AMX-INT8"], True)
    assert cpu["int8_sums"] == "exact"
    cpuinfo.write_text("model name\t: Old CPU\nflags\t\t: fpu avx2\n")
    cpu = doctor.examine(cpuinfo)["cpu"]
    assert cpu["fast_int8"] is False
    assert "can saturate" in cpu["int8_sums"] and "reduce_range: true" in cpu["int8_sums"]
    cpuinfo.write_text("Features\t: fp asimd crc32\n")  # an ARM processor without dot products is slow, but adds in 32 bits
    cpu = doctor.examine(cpuinfo)["cpu"]
    assert (cpu["fast_int8"], cpu["int8_sums"]) == (False, "exact")
    assert doctor.examine(tmp_path / "absent")["cpu"]["int8_sums"] == "unknown"


def test_doctor_names_what_is_missing(lightcap, monkeypatch):
    monkeypatch.setitem(doctor.NEEDED, "no-such-package", "no_such_package")
    status, output, _ = lightcap("doctor", "--json")
    assert status == 1
    assert {"what": "no-such-package", "install": "pip install lightcap"} in json.loads(output)["missing"]


def test_doctor_names_a_version_that_lightcap_was_not_made_for(monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "2.9.1" if name == "torch" else version(name))
    found = doctor.examine()
    [wrong] = [missing for missing in found["missing"] if "torch " in missing["what"]]
    assert not found["ok"] and wrong["what"].startswith("another torch (2.9.1 is here, lightcap needs ")
    assert wrong["install"].startswith("pip install 'torch") and ">=2.12" in wrong["install"] and "<2.15" in wrong["install"]


def test_a_keyboard_stop(lightcap, monkeypatch):
    def stop(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.cli.commands["recipes"], "callback", stop)
    monkeypatch.setattr(cli.cli.commands["run"], "callback", stop)
    assert lightcap("recipes") == (130, "", "lightcap: stopped\n")
    assert lightcap("run", "quickstart") == (130, "", "lightcap: stopped; the same command goes on\n")
    status, output, _ = lightcap("recipes", "--json")
    assert status == 130 and json.loads(output) == {"ok": False, "error": "stopped"}
    status, output, _ = lightcap("run", "quickstart", "--json")
    assert status == 130 and json.loads(output) == {"ok": False, "run": None, "ledger": [], "error": "stopped"}


@pytest.mark.parametrize("command", ["plan", "run", "profile", "compare"])
def test_a_name_that_no_file_can_have_is_wrong_input(lightcap, command):
    status, output, error = lightcap(command, "x" * 300)
    assert (status, output) == (2, "") and error.count("\n") == 1 and "LIGHTCAP_TRACE" not in error


def test_a_result_that_cannot_be_written_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "compress", "recipes", "--json"], stdout=full, stderr=subprocess.PIPE, text=True,
                              cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


def test_a_bug_is_one_line_too(lightcap, monkeypatch):
    monkeypatch.setattr(cli.cli.commands["recipes"], "callback", lambda **_: 1 / 0)
    status, output, error = lightcap("recipes")
    assert (status, output) == (1, "") and error == "lightcap: ZeroDivisionError: division by zero (LIGHTCAP_TRACE=1 shows where)\n"
