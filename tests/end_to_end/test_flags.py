"""A frozen list of the flags of all command lines (tests/flags.json): one that is lost, renamed or gets another default fails here.

The published list, tests/golden/cli_flags.json, never changes: every flag in it keeps its name and default, but for the deviations below, which
README.md and docs/differences.md name. To update tests/flags.json after a change that is meant: python tests/end_to_end/test_flags.py
"""

import argparse
import hashlib
import importlib
import json
import re
import sys
from pathlib import Path
from unittest import mock

import pytest

REPO = Path(__file__).resolve().parents[2]
FROZEN, PUBLISHED = REPO / "tests" / "flags.json", REPO / "tests" / "golden" / "cli_flags.json"
PUBLISHED_SHA256 = "c50b561c169beab175c94bfa60c55715a075bf4ba248162c7ca0f17594d3cf1b"
SCRIPTS = ("main_tokenbridge.py", "main_cache.py", "main_vae.py", "reconstruction.py")
TOOLS = tuple(
    f"tools.{name}"
    for name in ("bench", "download", "export", "fid_stats", "inspect", "plot", "posthoc_ema", "vae_stats")
) + tuple(f"demo.{name}" for name in ("ablations", "app", "run", "samplers"))
DEVIATIONS = {"--device": "auto"}  # published default: cuda; auto takes cuda where there is one


def file_of(name: str) -> str:
    """The file with the `main` of a script or module."""
    if name in SCRIPTS:
        return name
    path = name.replace(".", "/")
    return f"{path}/__main__.py" if (REPO / path).is_dir() else f"{path}.py"


class Captured(Exception):
    """Carries a parser out of a `main`."""


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that a script or module builds before it reads the command line."""

    def stop(parser: argparse.ArgumentParser, *args: object) -> None:
        raise Captured(parser)

    module = importlib.import_module(file_of(name).removesuffix(".py").replace("/", "."))
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(Captured) as caught:
        module.main([])
    return caught.value.args[0]


def flags_of(parser: argparse.ArgumentParser) -> dict[str, object]:
    """{flag: default} without --help; choices stand beside the default, the flags of a sub-command under its name."""
    found: dict[str, object] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name: flags_of(sub) for name, sub in action.choices.items()}
        elif action.dest != "help":
            value = action.default if action.choices is None else [action.default, *action.choices]
            found |= dict.fromkeys(action.option_strings, value)
    return found


def all_flags() -> dict[str, dict]:
    """Of every command line; as JSON keeps them."""
    return json.loads(json.dumps({name: flags_of(parser_of(name)) for name in SCRIPTS + TOOLS}))


@pytest.mark.parametrize("name", SCRIPTS + TOOLS)
def test_the_frozen_list(name: str) -> None:
    assert json.loads(json.dumps(flags_of(parser_of(name)))) == json.loads(FROZEN.read_text())[name]


def test_no_command_line_is_left_out() -> None:
    """Every file with a parser of its own and an entry point is in the list, and nothing else is."""
    files = [*REPO.glob("*.py"), *(path for folder in ("demo", "tools") for path in (REPO / folder).rglob("*.py"))]
    found = {path.relative_to(REPO).as_posix() for path in files if "sys.exit(run_cli(main))" in path.read_text()}
    assert (
        found
        == {file_of(name) for name in json.loads(FROZEN.read_text())}
        == {file_of(name) for name in SCRIPTS + TOOLS}
    )


def test_the_published_list_never_changes() -> None:
    assert hashlib.sha256(PUBLISHED.read_bytes()).hexdigest() == PUBLISHED_SHA256


@pytest.mark.parametrize("script", json.loads(PUBLISHED.read_text()))
def test_published_flags_keep_name_and_default(script: str) -> None:
    actions = {flag: action for action in parser_of(script)._actions for flag in action.option_strings}
    for flag, published in json.loads(PUBLISHED.read_text())[script].items():
        assert flag in actions, flag
        assert actions[flag].dest == published["dest"]
        assert actions[flag].default == DEVIATIONS.get(flag, published["default"]), flag


def published_flags() -> set[str]:
    return {flag for flags in json.loads(PUBLISHED.read_text()).values() for flag in flags}


def documented_exceptions() -> set[str]:
    """The flags in the first column of the table of docs/differences.md."""
    section = (REPO / "docs" / "differences.md").read_text().partition("\n## Flags\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `--")]
    return {flag for row in rows for flag in re.findall(r"`(--\w+)`", row)}


def test_exceptions_are_documented() -> None:
    """Another default, several values or other choices than published: in docs/differences.md; what README.md names is there too."""
    exceptions = documented_exceptions()
    assert exceptions <= published_flags() and exceptions >= DEVIATIONS.keys()
    for script in json.loads(PUBLISHED.read_text()):
        several = {
            flag for action in parser_of(script)._actions if action.nargs == "+" for flag in action.option_strings
        }
        assert several & published_flags() <= exceptions, script
    paragraph = (
        (REPO / "README.md").read_text().partition("with its default and meaning, except:")[2].partition("\n\n")[0]
    )
    named = set(re.findall(r"`(--\w+)`", paragraph))
    assert named >= DEVIATIONS.keys() | {"--dist_on_itp", "--patch_size"} and named & published_flags() <= exceptions


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_its_place_in_the_help(script: str) -> None:
    parser = parser_of(script)
    text = parser.format_help()
    assert all(flag in text for flag in flags_of(parser))


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    FROZEN.write_text(json.dumps(all_flags(), indent=1) + "\n")
