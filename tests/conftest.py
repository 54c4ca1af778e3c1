"""What tests of several files share: the tiny captioner, exported; a hub without network; small caption files; a captioner to be pruned.

Whole recipes begin first.
"""

import sys
from pathlib import Path

import caption_files
import pytest
import tiny_captioner as tiny

import compress
from compress import data, runtime
from compress.config import Data
from students.lightcap.encoder import CLIP_MEAN, CLIP_STD, ENCODERS, EncoderSpec

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


@pytest.fixture
def karpathy(tmp_path):
    """Six images in Karpathy's layout, as `caption_files.karpathy` writes them."""
    return caption_files.karpathy(tmp_path)


@pytest.fixture(scope="session")
def pruning_scenes():
    return data.load(Data(train_images=40, val_images=4))


@pytest.fixture
def pruning(pruning_scenes, tmp_path):
    """What `prunable.world` makes: a captioner on scenes, and the context in which it is pruned."""
    import prunable  # here, as torch-pruning is not for every test

    return prunable.world(pruning_scenes, tmp_path)


@pytest.fixture
def clip_small(monkeypatch):
    """An encoder "clip-small", built as CLIP's is."""
    import prunable

    monkeypatch.setitem(ENCODERS, "clip-small", EncoderSpec(64, 32, 512, CLIP_MEAN, CLIP_STD, prunable.small_clip))


def pytest_collection_modifyitems(items):
    """The file that takes longest begins first: a process runs whole files, whose fixtures are then made once."""
    items.sort(key=lambda item: item.path.name != "test_recipes.py")
