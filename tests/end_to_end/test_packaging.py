"""Requirements and imports agree, nothing unpickles, functions have types, the container file is lint-free."""

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
from util import dist

PACKAGES = sorted(path.parent for path in REPO.glob("[a-z]*/__init__.py") if path.parent.name != "tests")
SOURCES = [*REPO.glob("*.py"), *(path for folder in PACKAGES for path in folder.rglob("*.py"))]
TREES = {path.relative_to(REPO).as_posix(): ast.parse(path.read_text()) for path in SOURCES}
# import name -> name in the requirements
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "skimage": "scikit-image", "yaml": "pyyaml"}
DISTRIBUTIONS |= {"torch_fidelity": "torch-fidelity"}


def lines(name: str) -> list[str]:
    """The requirements in a file."""
    return [line for line in (REPO / name).read_text().splitlines() if re.match(r"\w", line)]


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of all imports in a file, those within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def test_every_import_is_required_somewhere() -> None:
    ours = {path.stem for path in REPO.glob("*.py")} | {folder.name for folder in PACKAGES}
    assert {"models", "util", "demo", "tools", "training", "generation"} <= ours
    required = {re.match(r"[\w-]+", line)[0] for line in lines("requirements.txt") + lines("requirements-extra.txt")}
    for path, tree in TREES.items():
        for name in set(imports(tree)) - ours - set(sys.stdlib_module_names):
            assert DISTRIBUTIONS.get(name, name) in required, f"{path} imports {name}: no requirements file names it"


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-extra.txt"])
def test_requirements_have_a_lowest_version(name: str) -> None:
    assert lines(name) and all(">=" in line for line in lines(name))


def test_nothing_unpickles() -> None:
    """torch.load only with weights_only=True, np.load only with allow_pickle=False, no pickle module."""
    needed = {"torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False")}
    needed["numpy.load"] = needed["np.load"]
    for path, tree in TREES.items():
        assert not {"pickle", "dill", "cloudpickle"} & set(imports(tree)), path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (rule := needed.get(ast.unparse(node.func))):
                keywords = [(keyword.arg, ast.unparse(keyword.value)) for keyword in node.keywords]
                assert rule in keywords, f"{path}:{node.lineno}"


def test_what_is_taken_from_dist_is_there() -> None:
    """In every file, tests too: what only a GPU runs is seen by no other test here."""
    for path in [*SOURCES, *(REPO / "tests").rglob("*.py")]:
        text = path.read_text()
        if re.search(r"^from util import .*\bdist\b", text, flags=re.M):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "dist":
                    assert hasattr(dist, node.attr), f"{path}:{node.lineno}: util.dist has no {node.attr}"


def test_public_functions_have_types() -> None:
    for path, tree in TREES.items():
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for f in (node for part in (tree, *classes) for node in part.body if isinstance(node, ast.FunctionDef)):
            arguments = [a for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)]
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert f.name.startswith("_") or f.returns is not None and not untyped, f"{path}:{f.lineno} {f.name}"


def test_citation() -> None:
    content = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert content["cff-version"] == "1.2.0" and content["preferred-citation"]["journal"].endswith("2503.16430")


def test_the_container_file_is_lint_free() -> None:
    lint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if lint is None:
        pytest.skip("hadolint, an optional extra, is not installed: make extras")
    result = subprocess.run([lint, REPO / "containers" / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
