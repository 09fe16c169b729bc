"""Files that are complete or not there."""

import json

import pytest

from cem.files import replacing, write_json, write_text


def test_file_takes_the_place_of_the_one_before(tmp_path):
    for text in ("σ = 0.1", "σ = 0.2"):
        write_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "σ = 0.2"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_fails_halfway_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})

    def fail():
        with replacing(tmp_path / "a.json") as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
