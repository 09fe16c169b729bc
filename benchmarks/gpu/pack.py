"""All that a bare CUDA machine needs for ``python -m benchmarks.gpu``, in one folder of 40 MiB at most.

The folder gets the project as last committed, wheels where some are asked for, and ``run.sh``: copy it to the machine,
and call ``bash FOLDER/run.sh`` there, with options of the command. No data is needed: digits come with scikit-learn,
and what a training step costs does not depend on images. Git ignores the folder, wherever it is.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_BYTES, PYTHON = 40 * 2**20, "3.12"  # the machine's
PLATFORMS = [*(f"manylinux{version}_x86_64" for version in ("_2_28", "_2_27", "_2_17", "2014", "1")), "any"]


def git(*words: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, stdout=subprocess.PIPE).stdout


def pack(folder: Path, wheels: list[str]) -> int:
    """Fill ``folder`` anew; returns its bytes.

    Raises:
        SystemExit: it holds something else than an earlier pack, or gets more than 40 MiB.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "run.sh").exists():
        raise SystemExit(f"{folder} is neither empty nor an earlier pack")
    if git("status", "--porcelain").strip():
        print("what is not committed is not packed", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(git("archive", "HEAD"))) as project:
        project.extractall(folder / "project", filter="data")
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    shutil.copy(Path(__file__).with_name("run.sh"), folder)
    if wheels:
        options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
        options += [word for platform in PLATFORMS for word in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(folder / "wheels"), *wheels]
        subprocess.run(command, check=True)
    size = sum(path.stat().st_size for path in folder.rglob("*"))
    if size > MOST_BYTES:
        raise SystemExit(f"{folder} has {size / 2**20:.1f} MiB, more than a folder to be copied may have: 40")
    return size


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.pack", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="to be filled")
    wheels = "packages that the machine lacks, and each that these need; python -m benchmarks.gpu says there which"
    parser.add_argument("--wheels", nargs="+", default=[], metavar="NAME", help=wheels)
    options = parser.parse_args(arguments)
    size = pack(options.folder, options.wheels) / 2**20
    print(f"{options.folder}: {size:.1f} MiB. Copy it to the machine; there: bash {options.folder.name}/run.sh")


if __name__ == "__main__":
    main()
