"""Every shipped recipe, made small by --set, from its first stage to a caption said without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import compress
from compress.recipe import recipes

ROOT = Path(compress.__file__).resolve().parent.parent
QUICKSTART = (
    "data.train_images=48", "data.val_images=12", "teacher.epochs=1", "student.epochs=1", "pruned.recover_epochs=1",
    "pruned.recover_encoder_epochs=1", "int8.calibration_images=16", "pruned.max_drop_cider=1000", "int8.max_drop_cider=1000",
)  # fmt: skip
PHOTOS = (
    "data.captions=dataset.json", "data.images=images", "frozen.epochs=1", "teacher.epochs=1", "teacher-2.epochs=0.5",
    "teacher-3.epochs=0.5", "student.epochs=1", "pruned.recover_epochs=1", "pruned.recover_encoder_epochs=1", "int8.calibration_images=8",
    "pruned.max_drop_cider=1000", "int8.max_drop_cider=1000",
)  # fmt: skip


def lightcap(*arguments, cwd: Path) -> dict | list:
    """The command's JSON, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    done = subprocess.run(
        [sys.executable, "-m", "compress", *map(str, arguments), "--json"], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout)


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


def check(name: str, values: tuple[str, ...], folder: Path, stages: list[str]) -> None:
    first = lightcap("run", name, *settings(values), cwd=folder)
    assert first["ok"] and first["error"] is None
    rows = first["ledger"]
    assert [row["name"] for row in rows] == ["nearest", *stages]
    by_name = {row["name"]: row for row in rows}
    for row in rows[1:]:
        assert row["cider"] >= 0 and row["params"] > 0 and row["bytes"] > 0 and row["latency_ms"]["p50"] > 0, row["name"]
        assert (folder / "runs" / name / row["artifact"] / "config.json").is_file()
    assert by_name["pruned"]["gmacs_caption"] <= 0.8 * by_name["vocabulary"]["gmacs_caption"] + 1e-9
    assert by_name["vocabulary"]["params"] < by_name["student"]["params"]
    assert by_name["int8"]["bytes"] < 0.5 * by_name["pruned"]["bytes"]
    assert by_name["int8"]["latency_ms"]["runtime"] == "onnxruntime"
    planned = lightcap("plan", name, *settings(values), cwd=folder)
    assert [stage["cached"] for stage in planned["stages"]] == [True] * len(stages)
    assert lightcap("run", name, *settings(values), cwd=folder)["ledger"] == rows

    array, _ = picture(1)
    Image.fromarray(array).save(folder / "photo.png")
    code = (
        "import sys; from compress import cli\n"
        "try: cli.main(['caption', sys.argv[1], 'photo.png', '--json'])\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, f"runs/{name}"], capture_output=True, text=True, cwd=folder,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    [answer] = json.loads(done.stdout)
    assert set(answer) == {"image", "caption", "logprob", "ms"} and answer["logprob"] < 0
    assert done.stderr.splitlines()[-1] == "False"


def test_every_shipped_recipe_is_tested_here():
    assert {entry[0] for entry in recipes()} == {"quickstart", "photos"}


@pytest.mark.timeout(1200)
def test_quickstart(tmp_path):
    check("quickstart", QUICKSTART, tmp_path, ["teacher", "student", "vocabulary", "pruned", "int8", "export"])


@pytest.mark.timeout(1200)
def test_photos(tmp_path):
    karpathy(tmp_path)
    check("photos", PHOTOS, tmp_path, ["frozen", "teacher", "teacher-2", "teacher-3", "student", "vocabulary", "pruned", "int8", "export"])
