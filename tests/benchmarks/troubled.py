"""What performs jobs that are words, in a process that imports nothing heavy: it crashes, hangs, or answers."""

import os
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    name: str
    expected: float = 0.1
    limit: float = 60.0


class Troubled:
    def __call__(self, word):
        if word.name == "crashes":
            os._exit(7)
        if word.name.startswith("hangs "):  # with a child, whose number it leaves in a file
            child = subprocess.Popen(["sleep", "600"])
            with open(word.name.removeprefix("hangs "), "w") as file:
                file.write(str(child.pid))
            child.wait()
        return {"status": "ok", "process": os.getpid(), "lost": word.name == "loses the device"}


def broken():
    raise RuntimeError("nothing works here")
