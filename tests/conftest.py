"""The exported tiny captioner that the tests of graphs and of the runtime share; whole recipes begin first."""

import pytest
import tiny_captioner as tiny

from compress import runtime


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.exported(tmp_path_factory.getbasetemp() / "exported")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.exported(tmp_path_factory.getbasetemp() / "exported")[1]


@pytest.fixture(scope="module")
def captioner(folder):
    return runtime.Captioner(folder, threads=1)


def pytest_collection_modifyitems(items):
    """Of two processes, none begins a test of minutes when the other is done (`worksteal` gives the first half of the list to one)."""
    items.sort(key=lambda item: item.path.name != "test_recipes.py")
