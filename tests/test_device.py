"""An exported folder on a machine of its own: an environment that holds its requirements.txt and nothing else."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_captioner as tiny
from PIL import Image
from stage_context import context

from compress import runtime
from compress.config import Quantize
from compress.stages import export, quantize

BATCH = (
    "import json, sys, caption; captioner = caption.Captioner('.', threads=1); found = captioner.captions(sys.argv[2:], int(sys.argv[1])); "
    "print(json.dumps([found, sorted(sys.modules)]))"
)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a new environment in which only an export's requirements.txt was installed."""
    place = tmp_path_factory.mktemp("device")
    export.write_program(place)
    subprocess.run([sys.executable, "-m", "venv", place / "environment"], check=True)
    interpreter = place / "environment" / "bin" / "python"
    pip = [interpreter, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--requirement", place / "requirements.txt"], check=True, env=alone())
    listed = subprocess.run([*pip, "list", "--format", "json"], check=True, capture_output=True, text=True, env=alone())
    names = {entry["name"].lower() for entry in json.loads(listed.stdout)}
    assert {"numpy", "pillow", "tokenizers", "onnxruntime"} <= names
    assert not names & {"torch", "torchvision", "transformers", "onnx", "safetensors", "lightcap", "neural-compressor"}
    return interpreter


def alone() -> dict[str, str]:
    """This process's environment without what would lend the other interpreter this one's packages."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


@pytest.fixture(scope="module", params=["float", "int8"])
def captioner(request, tmp_path_factory):
    """The export that goes to the device, in float or in INT8."""
    place = tmp_path_factory.mktemp(request.param)
    source = tiny.artifact(tiny.build(tiny.PRUNED, steps=120), place / "model")
    if request.param == "int8":
        where = context(place / "int8", tiny.captioned("train"), "quantize")
        quantize.run(source, Quantize(calibration_images=12), where)
        source = tiny.Artifact(where.output)
    export.export(source, place / "out")
    return runtime.Captioner(place / "out", threads=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photos of three sizes."""
    place = tmp_path_factory.mktemp("photos")
    for index, picture in enumerate(tiny.pictures(3)):
        Image.fromarray(picture).resize((60 + 50 * index, 80)).save(place / f"{index}.png")
    return [str(path) for path in sorted(place.iterdir())]


@pytest.mark.slow
@pytest.mark.parametrize("beam", [1, 3])
def test_an_export_runs_where_only_its_requirements_are_installed(python, captioner, photos, tmp_path, beam):
    expected = [captioner.caption(photo, beam) for photo in photos]
    assert [text for text, _ in expected] == [tiny.caption(index) for index in range(3)]

    command = [python, captioner.folder / "caption.py", "--json", "--beam", str(beam), "--threads", "1", *photos, tmp_path / "none.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=alone())
    *rows, absent = json.loads(done.stdout)
    assert done.returncode == 1 and absent["error"].endswith("no such image") and done.stderr.endswith("none.png: no such image\n")
    assert [(row["image"], row["caption"]) for row in rows] == [(photo, text) for photo, (text, _) in zip(photos, expected, strict=True)]
    np.testing.assert_allclose([row["logprob"] for row in rows], [logprob for _, logprob in expected], atol=1e-3)

    command = [python, "-c", BATCH, str(beam), *photos]
    done = subprocess.run(command, capture_output=True, text=True, cwd=captioner.folder, env=alone())
    assert done.returncode == 0, done.stderr
    found, modules = json.loads(done.stdout)
    assert [text for text, _ in found] == [text for text, _ in expected]
    np.testing.assert_allclose([logprob for _, logprob in found], [logprob for _, logprob in expected], atol=1e-3)
    assert "onnxruntime" in modules and not {"torch", "transformers"}.intersection(modules)
