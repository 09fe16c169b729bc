import gzip
from pathlib import Path

import pytest
import torch

from cem.data.idx import find_idx, read_idx
from cem.errors import DataError

HEADER = bytes((0, 0, 8, 2)) + (2).to_bytes(4, "big") + (3).to_bytes(4, "big")


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_plain_and_gzipped_files_read_the_same(tmp_path: Path) -> None:
    content = HEADER + bytes((0, 1, 2, 253, 254, 255))
    expected = torch.tensor([[0, 1, 2], [253, 254, 255]], dtype=torch.uint8)
    assert torch.equal(read_idx(written(tmp_path / "x", content), 2), expected)
    assert torch.equal(read_idx(written(tmp_path / "x.gz", gzip.compress(content)), 2), expected)


def test_plain_files_are_found_before_gzipped_ones(tmp_path: Path) -> None:
    assert find_idx(tmp_path, "x") is None
    zipped = written(tmp_path / "x.gz", b"")
    assert find_idx(tmp_path, "x") == zipped
    plain = written(tmp_path / "x", b"")
    assert find_idx(tmp_path, "x") == plain


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected the idx header 00000802"),
        (HEADER[:10], "expected the idx header 00000802"),
        (bytes((0, 0, 8, 1)) + HEADER[4:] + bytes(6), "got 00000801"),
        (bytes((0, 0, 13, 2)) + HEADER[4:] + bytes(6), "got 00000d02"),
        (HEADER + bytes(5), "promises 6 bytes .* has 5"),
        (HEADER + bytes(7), "promises 6 bytes .* has 7"),
    ],
)
def test_corrupt_files_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = written(tmp_path / "broken", content)
    with pytest.raises(DataError, match=f"broken: .*{message}"):
        read_idx(path, 2)


@pytest.mark.parametrize("content", [b"", b"not gzip", gzip.compress(HEADER + bytes(6), mtime=0)[:-9]])
def test_broken_gzip_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "broken.gz", content)
    with pytest.raises(DataError, match=r"broken\.gz: "):
        read_idx(path, 2)
