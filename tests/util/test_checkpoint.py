"""util/checkpoint.py (docs/spec.md 7): atomic writes, no code is run, errors name the file."""

import argparse
import gzip
import math
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests.helpers import Explosive, tiny_model
from util.checkpoint import LAST, atomic_save, find_file, load_state, read_file
from util.options import ArgumentError


def test_what_is_saved_is_loaded(tmp_path):
    content = {
        "model": {"w": torch.arange(3.0)},
        "epoch": 4,
        "classes": ["a", "b"],
        "nested": {"x": [1, 2.5, None, True]},
    }
    path = tmp_path / "made" / "too" / "a.pth"
    atomic_save(content, path)
    found = read_file(path)
    assert torch.equal(found["model"].pop("w"), torch.arange(3.0))
    content["model"].pop("w")
    assert found == content
    assert [p.name for p in path.parent.iterdir()] == ["a.pth"]


def test_the_new_file_is_complete_on_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    """Order of events: written to another name in the same folder, flushed to disk, renamed."""
    path, events = tmp_path / "a.pth", []
    atomic_save({"step": 1}, path)
    real_save, real_fsync, real_replace = torch.save, os.fsync, os.replace

    def save(content, file):
        events.append(("save", Path(file.name).parent == tmp_path, Path(file.name) != path))
        real_save(content, file)

    def fsync(number):
        events.append("fsync")
        real_fsync(number)

    def replace(source, target):
        events.append(("rename", read_file(source) == {"step": 2}, read_file(path) == {"step": 1}))
        real_replace(source, target)

    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    atomic_save({"step": 2}, path)
    assert events == [("save", True, True), "fsync", ("rename", True, True), "fsync"]  # the last one is of the folder
    assert read_file(path) == {"step": 2}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "directory entry cut", "safetensors", "gzip"])
def test_broken_files_are_named(tmp_path, kind, mmap):
    path = tmp_path / "checkpoint-last.pth"
    atomic_save({"w": torch.randn(1000)}, path)
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[:2000],
            "text": b"<html>not found</html>",
            "empty": b"",
            "directory entry cut": content[:-30],
            "safetensors": save({"w": torch.zeros(3)}),
            "gzip": gzip.compress(content),
        }[kind]
    )
    with pytest.raises(ValueError, match="checkpoint-last.pth.*truncated") as caught:
        read_file(path, "resume", mmap=mmap)
    message = str(caught.value)  # without torch's advice to load the file unsafely
    assert "\n" not in message and "weights_only" not in message and caught.value.argument == "resume"


@pytest.mark.parametrize("mmap", [False, True])
def test_code_is_refused_and_not_run(tmp_path, mmap):
    path = tmp_path / "a.pth"
    torch.save({"model": {}, "args": Explosive(tmp_path / "boom")}, path)
    with pytest.raises(ValueError, match=r"a\.pth holds code \([\w.]*getattr\), which is never run"):
        read_file(path, "resume", mmap)
    assert not (tmp_path / "boom").exists()
    with zipfile.ZipFile(path) as archive:  # the trap is real: pickle, a reader that runs code, springs it
        pickle.loads(archive.read("a/data.pkl"))
    assert (tmp_path / "boom").exists()


def test_published_files_with_their_arguments_load(tmp_path):
    """The published scripts save their parsed arguments, an argparse.Namespace, under "args"."""
    torch.save(
        {"model": {}, "epoch": 399, "args": argparse.Namespace(lr=1e-4, model="tokenbridge_large")}, tmp_path / "a.pth"
    )
    assert read_file(tmp_path / "a.pth")["args"].model == "tokenbridge_large"


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), "text", 5])
def test_files_without_a_dict(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"not a checkpoint: it holds a {type(content).__name__}"):
        read_file(tmp_path / "a.pth")


def test_absent_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*absent.pth") as caught:
        read_file(tmp_path / "absent.pth", "other")
    assert isinstance(caught.value, ArgumentError) and caught.value.argument == "other"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        read_file(tmp_path)  # a folder is no file


def test_a_folder_means_its_last_checkpoint(tmp_path):
    assert find_file(tmp_path) == tmp_path / "checkpoint-last.pth"
    (tmp_path / "model.safetensors").touch()
    assert find_file(tmp_path) == tmp_path / "model.safetensors"
    (tmp_path / "checkpoint-last.pth").touch()
    assert find_file(tmp_path) == tmp_path / LAST
    (tmp_path / "epoch7.pth").touch()
    assert find_file(str(tmp_path / "epoch7.pth")) == tmp_path / "epoch7.pth"
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        read_file(tmp_path / "model.safetensors")


def test_mapped_and_read_are_equal(tmp_path):
    state = tiny_model().state_dict()
    for name, new in (("new.pth", True), ("old.pth", False)):
        torch.save({"model": state}, tmp_path / name, _use_new_zipfile_serialization=new)
        for mmap in (False, True):
            content = read_file(tmp_path / name, mmap=mmap)
            assert all(torch.equal(value, content["model"][key]) for key, value in state.items())


def test_strict_loading_into_the_model():
    state = {key: value + 1 if value.is_floating_point() else value for key, value in tiny_model().state_dict().items()}
    model = tiny_model()
    load_state(model, state, "a.pth")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mask_token"), r"a\.pth does not fit.*lacks 1 keys \(mask_token\)"),
        (lambda s: s.update(other=torch.zeros(1)), r"1 unknown keys \(other\)"),
        (lambda s: s.update(mask_token=torch.zeros(1, 1, 7)), r"mask_token: file \(1, 1, 7\), here \(1, 1, 96\)"),
        (lambda s: s.update(mask_token="weights"), r"mask_token: file no tensor but str"),
        (
            lambda s: s["z_proj.bias"].__setitem__(3, math.nan),
            r"a\.pth holds NaN or infinite weights, first: z_proj\.bias",
        ),
        (lambda s: s["z_proj.bias"].__setitem__(3, math.inf), "infinite"),
        (lambda s: s["boundaries"].__setitem__(3, math.nan), "NaN.*boundaries"),
    ],
)
def test_states_that_do_not_fit_leave_the_model_alone(change, message):
    state = {key: value.clone() for key, value in tiny_model().state_dict().items()}
    change(state)
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_state(model, state, "a.pth")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_flags_to_check_are_named():
    """A checkpoint of 64 levels into a model of 16: every wrong weight counted, the flags that decide shapes in the
    message.
    """
    # 2 tables, 15 embeddings, 16 heads' weights
    with pytest.raises(ValueError, match=r"quant_bits.*33 weights of another shape"):
        load_state(
            tiny_model(),
            tiny_model(quant_levels=64).state_dict() | {f"channel_heads.{c}.bias": torch.zeros(16) for c in range(16)},
            "a.pth",
        )
