import gzip

import pytest
import torch

from cem.data.idx import find_idx, read_idx
from cem.errors import DataError

HEADER = bytes((0, 0, 8, 2)) + (2).to_bytes(4, "big") + (3).to_bytes(4, "big")


@pytest.mark.parametrize(("name", "pack"), [("x", bytes), ("x.gz", gzip.compress)])
def test_plain_and_gzipped_files_read_the_same(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(HEADER + bytes((0, 1, 2, 253, 254, 255))))
    assert torch.equal(read_idx(tmp_path / name, 2), torch.tensor([[0, 1, 2], [253, 254, 255]], dtype=torch.uint8))


def test_plain_files_are_found_before_gzipped_ones(tmp_path):
    assert find_idx(tmp_path, "x") is None
    for name in ("x.gz", "x"):
        (tmp_path / name).touch()
        assert find_idx(tmp_path, "x") == tmp_path / name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty", b"", "expected the idx header 00000802.*, got an empty file"),
        ("short header", HEADER[:10], "expected the idx header 00000802"),
        ("dimensions", bytes((0, 0, 8, 1)) + HEADER[4:] + bytes(6), "got 00000801"),
        ("type", bytes((0, 0, 13, 2)) + HEADER[4:] + bytes(6), "got 00000d02"),
        ("short", HEADER + bytes(5), "promises 6 bytes .* has 5"),
        ("long", HEADER + bytes(7), "promises 6 bytes .* has 7"),
        ("empty.gz", b"", "expected the idx header .*, got an empty file"),
        ("other.gz", b"not gzip", ""),
        ("cut.gz", gzip.compress(HEADER + bytes(6), mtime=0)[:-9], ""),
    ],
)
def test_corrupt_files_are_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: .*{message}"):
        read_idx(tmp_path / name, 2)
