"""What a package needs beside its code: requirements and imports agree, the container file is lint-free, nothing unpickles, types are written down."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers import REPO

FOLDERS = ("checkpoints", "dataset", "demo", "evaluation", "generation", "models", "tools", "training", "util")
SOURCES = [*REPO.glob("*.py"), *(path for folder in FOLDERS for path in (REPO / folder).rglob("*.py"))]
# import name -> name in the requirements
PACKAGES = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "yaml": "pyyaml",
    "torch_fidelity": "torch-fidelity",
}


def named(requirements: str) -> set[str]:
    return {
        re.match(r"[\w-]+", line)[0] for line in (REPO / requirements).read_text().splitlines() if re.match(r"\w", line)
    }


def imports(path: Path) -> Iterator[str]:
    """Top-level names of all imports in a file, those within functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def test_every_import_is_required_somewhere() -> None:
    ours = {path.stem for path in REPO.glob("*.py")} | set(FOLDERS)
    allowed = named("requirements.txt") | named("requirements-extra.txt")
    for path in SOURCES:
        for name in set(imports(path)) - ours - set(sys.stdlib_module_names):
            assert PACKAGES.get(name, name) in allowed, f"{path.name} imports {name}, which no requirements file names"


def test_requirements_have_a_lowest_version() -> None:
    for name in ("requirements.txt", "requirements-extra.txt"):
        for line in (REPO / name).read_text().splitlines():
            if re.match(r"\w", line):
                assert ">=" in line, f"{name}: {line}"


def test_nothing_unpickles() -> None:
    """torch.load only with weights_only=True, np.load never with allow_pickle=True, no pickle module."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert (
                    given.get("weights_only") == "True"
                    if "torch" in ast.unparse(node.func)
                    else given.get("allow_pickle") == "False"
                ), f"{path.name}:{node.lineno}"
        assert not {"pickle", "dill", "cloudpickle"} & set(imports(path)), path.name


def test_public_functions_have_types() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
        functions += [
            f for c in tree.body if isinstance(c, ast.ClassDef) for f in c.body if isinstance(f, ast.FunctionDef)
        ]
        for f in functions:
            if not f.name.startswith("_"):
                arguments = [
                    a for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")
                ]
                assert f.returns is not None and all(a.annotation is not None for a in arguments), (
                    f"{path.name}:{f.lineno} {f.name}"
                )


def test_citation() -> None:
    content = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert content["cff-version"] == "1.2.0" and content["preferred-citation"]["journal"].endswith("2503.16430")


def test_the_container_file_is_lint_free() -> None:
    lint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if lint is None:
        pytest.skip("hadolint, an optional extra, is not installed: make extras")
    result = subprocess.run([lint, REPO / "containers" / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
