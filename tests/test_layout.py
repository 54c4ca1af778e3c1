"""The house rules: who may import what, what stays light, what a file may hold."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import compress
from compress import cli

ROOT = Path(compress.__file__).resolve().parent.parent
PACKAGES = ("compress", "students", "teachers")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every absolute module name that the file's text imports, anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports from the top"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and "import_module" in (getattr(node.func, "attr", ""), getattr(node.func, "id", "")):
            names |= {name.value for name in node.args if isinstance(name, ast.Constant)}
    return names


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def users_of(library: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in FILES if library in tops(path)}


def test_leaves_stand_alone():
    for path in FILES:
        package = path.relative_to(ROOT).parts[0]
        if package == "students":
            assert not tops(path) & {"compress", "teachers"}, path
        if package == "teachers":
            assert "compress" not in tops(path), path


@pytest.mark.parametrize(
    ("library", "stage"), [("neural_compressor", "quantize"), ("torchao", "quantize"), ("torch_pruning", "prune")]
)
def test_a_library_has_one_user(library, stage):
    users = users_of(library)
    assert users, f"nothing uses {library}"
    assert all(user.startswith((f"compress/stages/{stage}.py", f"compress/stages/{stage}/")) for user in users), users


def test_only_cli_and_errors_import_click():
    assert users_of("click") == {"compress/cli.py", "compress/errors.py"}


def test_runtime_needs_four_packages():
    standard = set(sys.stdlib_module_names) | {"__future__"}
    assert tops(ROOT / "compress" / "runtime.py") - standard <= {"numpy", "PIL", "tokenizers", "onnxruntime"}


def test_nothing_pickles():
    for path in FILES:
        assert not tops(path) & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [getattr(node, key, "") or "" for key in ("name", "attr", "id")]
            assert not any(re.search(r"object_list$|gather_object$", str(name)) for name in named), path  # pickled on the way
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                called = f"{node.func.value.id}.{node.func.attr}"
                assert called != "torch.save", path
                if called == "torch.load":
                    safe = [key.value for key in node.keywords if key.arg == "weights_only"]
                    assert safe and isinstance(safe[0], ast.Constant) and safe[0].value is True, path
                if called in ("np.load", "numpy.load"):
                    assert not any(key.arg == "allow_pickle" and getattr(key.value, "value", True) for key in node.keywords), path


def test_names_and_sizes():
    for path in FILES:
        assert path.stem not in ("utils", "helpers", "common", "misc"), path
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


LIGHT = (
    "import compress",
    "import compress.recipe, compress.config, compress.artifact, compress.ledger, compress.errors, compress.lock, compress.pipeline",
    "import compress.data, compress.metrics, compress.context, compress.card, compress.doctor, compress.report, compress.cli",
    "import compress.runtime",
    "import compress.cli; compress.cli.cli(['--help'], standalone_mode=False)",
)


@pytest.mark.parametrize("code", LIGHT)
def test_light_modules_import_no_torch(code, tmp_path):
    code += "\nimport sys; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_the_public_face_is_exact():
    assert sorted(compress.__all__) == sorted([
        "Artifact", "Captioner", "LightcapError", "Recipe", "__version__", "plan", "read_recipe", "read_run", "resolve", "run", "score",
    ])
    for name in compress.__all__:
        assert getattr(compress, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = compress.trian


def test_every_command_answers_in_json_and_has_an_example():
    for name, command in cli.cli.commands.items():
        assert any("--json" in option.opts for option in command.params), name
        assert "Example: lightcap" in command.help, name


def test_recipes_are_data():
    assert {path.suffix for path in (ROOT / "recipes").iterdir() if path.name != "__pycache__"} == {".yaml", ".md"}
