"""A frozen list of the flags of all command lines (tests/flags.json): a lost, renamed or changed one fails here.

The published list, tests/golden/cli_flags.json, never changes: every flag in it keeps its name and default, but for the
deviations below, which docs/published.md and docs/differences.md name. To update tests/flags.json after an intended
change: python tests/end_to_end/test_flags.py
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
PUBLISHED_FLAGS: dict[str, dict] = json.loads(PUBLISHED.read_text())
SCRIPTS = ("main_tokenbridge.py", "main_cache.py", "main_vae.py", "reconstruction.py")
DEVIATIONS = {"--device": "auto", "--grad_checkpointing": "none"}  # published: cuda; False, which is "none"


def command_lines() -> list[str]:
    """The scripts and modules with an entry point, as tests/flags.json names them."""
    files = [path for folder in ("demo", "tools") for path in (REPO / folder).rglob("*.py")]
    files = [path.relative_to(REPO) for path in files if "sys.exit(run_cli(main))" in path.read_text()]
    return [*SCRIPTS, *sorted(".".join(path.with_suffix("").parts).removesuffix(".__main__") for path in files)]


class Captured(Exception):
    """Carries a parser out of a `main`."""


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser that a script or module builds before it reads the command line."""

    def stop(parser: argparse.ArgumentParser, *args: object) -> None:
        raise Captured(parser)

    module = name.removesuffix(".py")
    module += ".__main__" if (REPO / module.replace(".", "/")).is_dir() else ""
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(Captured) as caught:
        importlib.import_module(module).main([])
    return caught.value.args[0]


def flags_of(parser: argparse.ArgumentParser) -> dict[str, object]:
    """{flag: default} without --help; choices beside the default, flags of a sub-command under its name; as JSON."""
    found: dict[str, object] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name: flags_of(sub) for name, sub in action.choices.items()}
        elif action.dest != "help":
            value = action.default if action.choices is None else [action.default, *action.choices]
            found |= dict.fromkeys(action.option_strings, value)
    return json.loads(json.dumps(found))


@pytest.mark.parametrize("name", command_lines())
def test_the_frozen_list(name: str) -> None:
    assert flags_of(parser_of(name)) == json.loads(FROZEN.read_text())[name]


def test_the_list_names_what_exists() -> None:
    assert json.loads(FROZEN.read_text()).keys() == set(command_lines())
    assert {path.name for path in REPO.glob("*.py") if "sys.exit(run_cli(main))" in path.read_text()} == set(SCRIPTS)


def test_the_published_list_never_changes() -> None:
    assert hashlib.sha256(PUBLISHED.read_bytes()).hexdigest() == PUBLISHED_SHA256


@pytest.mark.parametrize("script", PUBLISHED_FLAGS)
def test_published_flags_keep_name_and_default(script: str) -> None:
    actions = {flag: action for action in parser_of(script)._actions for flag in action.option_strings}
    for flag, published in PUBLISHED_FLAGS[script].items():
        assert flag in actions, flag
        assert actions[flag].dest == published["dest"]
        assert actions[flag].default == DEVIATIONS.get(flag, published["default"]), flag


def test_exceptions_are_documented() -> None:
    """Another default, several values or other choices than published: in docs/differences.md and docs/published.md."""
    published = {flag for flags in PUBLISHED_FLAGS.values() for flag in flags}
    section = (REPO / "docs" / "differences.md").read_text().partition("\n## Flags\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `--")]
    exceptions = {flag for row in rows for flag in re.findall(r"`(--\w+)`", row)}
    assert DEVIATIONS.keys() <= exceptions <= published
    for script in PUBLISHED_FLAGS:
        several = {flag for a in parser_of(script)._actions if a.nargs == "+" for flag in a.option_strings}
        assert several & published <= exceptions, script
    named = (
        (REPO / "docs" / "published.md")
        .read_text()
        .partition("with its default and meaning, except:")[2]
        .partition("\n\n")[0]
    )
    named = set(re.findall(r"`(--\w+)`", named))
    assert named >= DEVIATIONS.keys() | {"--dist_on_itp", "--patch_size"} and named & published <= exceptions


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_its_place_in_the_help(script: str) -> None:
    parser = parser_of(script)
    text = parser.format_help()
    assert all(flag in text for flag in flags_of(parser))


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    FROZEN.write_text(json.dumps({name: flags_of(parser_of(name)) for name in command_lines()}, indent=1) + "\n")
