"""Errors as one line for a report: no trace, and no folder of the machine."""

from __future__ import annotations

import re


def cut_folders(text: str) -> str:
    """The text with folders cut off file names."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\"]+/)+", "", text)


def describe(error: BaseException) -> str:
    """Kind and first line of an error, with folders cut off file names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {cut_folders(lines[0] if lines else '')}"[:300].removesuffix(": ")
