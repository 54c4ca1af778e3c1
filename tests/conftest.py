"""The exported tiny captioner that the tests of graphs and of the runtime share, and a hub without network; whole recipes begin first."""

import sys
from pathlib import Path

import pytest
import tiny_captioner as tiny

import compress
from compress import runtime

BENCHMARKS = Path(compress.__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.exported(tmp_path_factory.getbasetemp() / "exported")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.exported(tmp_path_factory.getbasetemp() / "exported")[1]


@pytest.fixture(scope="module")
def captioner(folder):
    return runtime.Captioner(folder, threads=1)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes a repository in the hub's cache, which is a folder of this test: the place of its files. The hub itself is out of reach."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)

    def repository(name: str) -> Path:
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(COMMIT)
        (folder / "snapshots" / COMMIT).mkdir(parents=True)
        return folder / "snapshots" / COMMIT

    return repository


def pytest_collection_modifyitems(items):
    """Of two processes, none begins a test of minutes when the other is done (`worksteal` gives the first half of the list to one)."""
    items.sort(key=lambda item: item.path.name != "test_recipes.py")
