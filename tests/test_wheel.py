"""A built wheel works outside the clone, with its recipes and its report's template."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import compress

ROOT = Path(compress.__file__).resolve().parent.parent
SOURCES = ("compress", "students", "teachers", "recipes", "tests", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


@pytest.mark.slow
def test_a_wheel_outside_the_clone(tmp_path):
    clone = tmp_path / "clone"  # building leaves files beside the sources
    clone.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, clone)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, clone], check=True)
    (wheel,) = tmp_path.glob("lightcap-*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    data = {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").iterdir() if path.suffix in (".yaml", ".md")}
    code = {str(path.relative_to(ROOT)) for top in ("compress", "students", "teachers") for path in (ROOT / top).rglob("*.py")}
    assert data | code | {"compress/report/report.html.j2", "compress/data/concepts.txt"} <= set(held)
    assert {name.partition("/")[0] for name in held if ".dist-info" not in name} == {"compress", "students", "teachers", "recipes"}
    assert any(name.endswith("LICENSE") for name in held) and not any("__pycache__" in name for name in held)

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    away = tmp_path / "away"
    (away / "recipes").mkdir(parents=True)  # a folder of that name where the user stands shadows nothing
    (away / "recipes" / "mine.yaml").write_text("# mine\n")

    def lightcap(*arguments):
        environment = os.environ | {"PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, "-m", "compress", *arguments], capture_output=True, text=True, cwd=away, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert [entry["recipe"] + ".yaml" for entry in json.loads(lightcap("recipes", "--json"))] == sorted(
        name.partition("/")[2] for name in data if name.endswith(".yaml")
    )
    planned = json.loads(lightcap("plan", "quickstart", "--set", "data.train_images=3", "--set", "data.val_images=2", "--json"))
    assert planned["recipe"] == "quickstart"
    (away / "run").mkdir()
    (away / "run" / "ledger.jsonl").write_text('{"stage": "train", "name": "teacher", "artifact": "x"}\n')
    lightcap("compare", "run", "--html", "report.html")
    assert "teacher" in (away / "report.html").read_text()
    assert (site / "bin" / "lightcap").is_file()
