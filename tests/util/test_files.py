"""util/files.py: the old content or the new, never half of one."""

import hashlib
import json

import pytest

from util.files import file_sha256, replacing, write_json


@pytest.mark.parametrize("sync", [False, True])
def test_the_new_content_takes_the_old_ones_place_at_the_end(tmp_path, sync):
    path = tmp_path / "new" / "a.bin"
    with replacing(path, sync) as file:
        file.write(b"one")
    with replacing(path, sync) as file:
        file.write(b"two")
        file.flush()
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two" and [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_an_error_leaves_the_old_content_and_no_rubbish(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1} and len(list(tmp_path.iterdir())) == 1


def test_what_a_kill_left_behind_is_written_over(tmp_path):
    (tmp_path / ".a.json.tmp").write_text("half of a much longer content than the new one")
    write_json(tmp_path / "a.json", [1])
    assert json.loads((tmp_path / "a.json").read_text()) == [1] and len(list(tmp_path.iterdir())) == 1


def test_hash_of_a_file_and_of_a_folder(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"two")
    assert file_sha256(tmp_path) == hashlib.sha256(b"aonesub/btwo").hexdigest()
    (tmp_path / "a").rename(tmp_path / "c")
    assert file_sha256(tmp_path) != hashlib.sha256(b"aonesub/btwo").hexdigest()
