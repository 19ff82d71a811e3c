"""The rule of imports (CONTRIBUTING.md): for the files at the root here, among the packages by import-linter.

Imports within functions and under TYPE_CHECKING count too. `make lint` runs both.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
ENTRIES = {"main_tokenbridge", "main_cache", "main_vae", "reconstruction"}
ENGINE = {"engine_tokenbridge"}
PACKAGES = {"evaluation", "generation", "training", "checkpoints", "dataset", "models", "util"}
ABOVE = {"tools", "demo"}
SETTINGS = (REPO / "pyproject.toml").read_text()
CONTRACTS = SETTINGS[SETTINGS.index("[tool.importlinter]") :]


def imported(source: str) -> Iterator[tuple[str, int]]:
    """(top-level name, line) of every import of the source text, importlib.import_module("...") included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], node.lineno
        elif isinstance(node, ast.Call) and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func)):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield argument.value.split(".")[0], node.lineno


def forbidden(name: str) -> set[str]:
    """What the package or root file of this name must not import."""
    if name in ABOVE:
        return {"tests"}
    return {"tests"} | ABOVE | ENTRIES | (ENGINE if name in PACKAGES else set())


def wrong_imports(path: str, source: str) -> list[str]:
    """A line for each import that runs up in the file `path` (below the repository) with this content."""
    names = forbidden(path.split("/")[0].removesuffix(".py"))
    return [f"{path}:{line} imports {name}" for name, line in imported(source) if name in names]


def files() -> list[str]:
    found = [*REPO.glob("*.py"), *(path for folder in PACKAGES | ABOVE for path in (REPO / folder).rglob("*.py"))]
    return sorted(path.relative_to(REPO).as_posix() for path in found)


def test_every_file_has_its_place() -> None:
    """Files at the root and folders with code are known here; packages have an __init__.py and are in the contracts."""
    assert {path.stem for path in REPO.glob("*.py")} == ENTRIES | ENGINE
    folders = {path.parts[0] for path in (p.relative_to(REPO) for p in REPO.glob("*/*.py")) if path.parts[0][0] != "."}
    assert folders - {"tests"} == PACKAGES | ABOVE
    for name in PACKAGES | ABOVE:
        assert (REPO / name / "__init__.py").is_file(), name
        places = re.findall(rf'"{name}"|: {name}"|"{name} :|{name} \||\| {name}"', CONTRACTS)
        assert len(places) == 3, name  # a root package, a layer, an ancestor
    assert "exclude_type_checking" not in CONTRACTS and "ignore_imports" not in CONTRACTS


@pytest.mark.parametrize("path", files())
def test_imports_run_down(path: str) -> None:
    wrong = wrong_imports(path, (REPO / path).read_text())
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "path, source, count",
    [
        ("dataset/x.py", "import main_cache", 1),
        ("models/sampling/x.py", "def f():\n    from engine_tokenbridge import train", 1),
        ("util/x.py", "import importlib\nimportlib.import_module('tools.plot')", 1),
        ("engine_tokenbridge.py", "if TYPE_CHECKING:\n    import main_tokenbridge", 1),
        ("main_vae.py", "def f():\n    import main_cache, demo.run", 2),
        ("tools/x.py", "from tests.helpers import REPO", 1),
        ("engine_tokenbridge.py", "import training.step\nfrom evaluation import scores", 0),
        ("main_vae.py", "import engine_tokenbridge", 0),
        ("tools/x.py", "import main_cache, demo.run", 0),
    ],
)
def test_a_planted_import_is_found(path: str, source: str, count: int) -> None:
    assert len(wrong_imports(path, source)) == count


@pytest.mark.parametrize(
    "name, source, words",
    [
        ("models", "", ""),
        ("generation", "import models, dataset", ""),
        ("models", "import generation", "models is not allowed to import generation"),
        ("dataset", "def f():\n    from evaluation import a", "dataset is not allowed to import evaluation"),
        ("util", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import training", "to import training"),
        ("training", "import generation", "training is not allowed to import generation"),
        ("models", "from models import b", "No cycles are allowed in models"),
    ],
)
def test_import_linter_finds_planted_imports(tmp_path: Path, name: str, source: str, words: str) -> None:
    """The contracts of pyproject.toml on empty packages, one of which holds this source."""
    pytest.importorskip("importlinter", reason="import-linter is installed by make lint")
    for package in PACKAGES | ABOVE:
        (tmp_path / package).mkdir()
        for module in ("__init__", "a", "b"):
            (tmp_path / package / f"{module}.py").write_text("")
    (tmp_path / name / "b.py").write_text(f"import {name}.a" if "No cycles" in words else "")
    (tmp_path / name / "a.py").write_text(source)
    (tmp_path / "pyproject.toml").write_text(CONTRACTS)
    command = [Path(sys.executable).with_name("lint-imports"), "--config", "pyproject.toml", "--no-cache"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode != 0) == bool(words) and words in result.stdout, result.stdout + result.stderr
