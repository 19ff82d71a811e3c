"""A frozen list of all command-line flags (tests/flags.json): one that is lost, renamed or gets another default fails here, and must be meant."""

import argparse
import json

import pytest
from conftest import REPO, golden_json

import main_cache
import main_tokenbridge
import main_vae
import reconstruction

PARSERS = {"main_tokenbridge.py": main_tokenbridge.build_parser, "main_cache.py": main_cache.build_parser, "main_vae.py": main_vae.build_parser,
           "reconstruction.py": reconstruction.build_parser}
DEVIATIONS = {"--device": "auto"}           # published default: cuda; auto takes cuda where there is one


def flags_of(parser: argparse.ArgumentParser) -> dict[str, object]:
    """{flag: default} without --help; choices stand beside the default."""
    return {flag: action.default if action.choices is None else [action.default, *action.choices]
            for action in parser._actions for flag in action.option_strings if action.dest != "help"}


@pytest.mark.parametrize("script", PARSERS)
def test_the_frozen_list(script: str) -> None:
    assert flags_of(PARSERS[script]()) == json.loads((REPO / "tests" / "flags.json").read_text())[script]


@pytest.mark.parametrize("script", [name for name in PARSERS if name != "main_vae.py"])
def test_published_flags_keep_name_and_default(script: str) -> None:
    actions = {flag: action for action in PARSERS[script]()._actions for flag in action.option_strings}
    for flag, published in golden_json("cli_flags")[script].items():
        assert flag in actions, flag
        assert actions[flag].dest == published["dest"]
        assert actions[flag].default == DEVIATIONS.get(flag, published["default"]), flag


@pytest.mark.parametrize("script", PARSERS)
def test_every_flag_has_its_place_in_the_help(script: str) -> None:
    text = PARSERS[script]().format_help()
    assert all(flag in text for flag in flags_of(PARSERS[script]()))
