"""What the three commands share: a command line made of options, and how a command ends."""

from __future__ import annotations

import _thread
import argparse
import codecs
import errno
import io
import os
import signal
import sys
import textwrap
import threading
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from cem.errors import CemError, DivergedError, MachineError, UsageError
from cem.interrupts import heeded
from cem.options import Composed, Options, converted, flag, helps, hints, kinds, nearest

C = TypeVar("C", bound=Options)
D = TypeVar("D", bound=Composed)


PLAIN = {
    "σ": "sigma", "λ": "lambda", "ρ": "rho", "±": "+-", "×": "x", "·": "*", "−": "-", "–": "-", "≤": "<=", "≥": ">=",
    "→": "->", "“": '"', "”": '"', "’": "'",
}  # fmt: skip
"""What stands for a character where an encoding does not have it; for others what is left of it without accents."""


ENDS_WITH_STDIN = "CEM_ENDS_WITH_STDIN"
"""Environment variable of a command that is interrupted when its stdin ends: when whoever started it is gone."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    text = "".join(PLAIN.get(each) or unicodedata.normalize("NFKD", each) for each in missing)
    return text.encode("ascii", "replace").decode(), error.end


codecs.register_error("cem.plain", _plain)


class _Paragraphs(argparse.HelpFormatter):
    """Fills the paragraphs of a description one by one, but for what is indented; names of options stay whole."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        return "\n\n".join(
            each if each.startswith(" ") else textwrap.fill(" ".join(each.split()), width, break_on_hyphens=False)
            for each in paragraphs
        )

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one line, and of flags that nobody gave says nothing."""

    def __init__(self, prog: str, description: str, usage: str = "[options]") -> None:
        super().__init__(
            prog,
            description=description,
            usage=f"{prog} {usage}",
            formatter_class=partial(_Paragraphs, max_help_position=26),
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            add_help=False,
        )
        self._types: dict[str, Any] = {}

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def add_options(self, options: Options, *, prefix: str = "", title: str = "", hidden: Iterable[str] = ()) -> None:
        """Flags for the fields of ``options``, in their groups; the values in it are the defaults that help shows."""
        groups: dict[str, Any] = {}
        types, texts = hints(type(options)), helps(type(options))
        for each in fields(options):  # type: ignore[arg-type]
            if each.name not in types or each.name in hidden:
                continue
            name = title or each.metadata["group"]
            if name not in groups:
                groups[name] = self.add_argument_group(name)
            self._types[prefix + each.name] = types[each.name]
            text = texts.get(each.name, "")
            family = options.families.get(each.name) if isinstance(options, Composed) else None
            if family is not None:
                text += f" There are: {'; '.join(f'{member} ({family[member].summary})' for member in family)}."
            _add(groups[name], prefix + each.name, types[each.name], text, getattr(options, each.name))

    def value(self, name: str, given: Any) -> Any:
        """What was given of the option ``name``, in the option's own type."""
        spoken = isinstance(given, str | list) and name in self._types
        return converted(name, self._types[name], given, spoken=True) if spoken else given

    def add_members(self, config: Composed, prefix: str = "") -> None:
        """Flags for the options of the members that ``config`` chooses: ``--centroid.momentum``."""
        for name in config.chosen():
            self.add_options(config.options_of(name), prefix=f"{prefix}{name}.", title=f"options of {name}")


def read(config: D, argv: Sequence[str], places: Iterable[str] = (), prefix: str = "") -> D:
    """``config`` with the members that ``argv`` chooses, before anything else of it can be read.

    Args:
        config: the defaults.
        argv: a command line.
        places: options to read; by default those that choose members.
        prefix: of their flags.
    """
    first = Parser("", "")
    for place in places or config.families:
        many = not isinstance(getattr(config, place), str)
        first.add_argument(flag(prefix + place), dest=place, nargs="*" if many else None)
    given = vars(first.parse_known_args(list(argv))[0])
    own: dict[str, Any] = {place: tuple(v) if isinstance(v, list) else v for place, v in given.items()}
    chosen = replace(config, **own)
    names = chosen.chosen()
    return replace(chosen, members={name: own for name, own in chosen.members.items() if name in names})


def parse_options(parser: Parser, argv: Sequence[str], *configs: Options, **others: Options) -> dict[str, Any]:
    """What ``argv`` says, by name.

    Args:
        parser: with the flags that there are.
        argv: a command line.
        configs: whose flags they are.
        others: the same of flags that begin with the keyword: ``attack`` of ``--attack.queries``.

    Raises:
        UsageError: an option does not exist, cannot be read, or belongs to a member that is not chosen.
        SystemExit: it asked for help (0).
    """
    parser.add_argument_group("help").add_argument("-h", "--help", action="help", help="Show this and end.")
    found, rest = parser.parse_known_args(list(argv))
    unknown = next((each for each in rest if each.startswith("--")), None)
    if unknown is not None:
        name = unknown[2:].partition("=")[0]
        prefixed = [("", config) for config in configs] + [(f"{prefix}.", config) for prefix, config in others.items()]
        composed = [(prefix, each) for prefix, each in prefixed if isinstance(each, Composed)]
        chosen = {prefix + member for prefix, config in composed for member in config.chosen()}
        for prefix, config in composed:
            own = name.removeprefix(prefix)
            owner, dot, _ = own.partition(".")
            if dot and prefix + owner not in chosen and any(owner in family for family in config.families.values()):
                said = config.stranger(own, config.chosen()).replace(own, f"--{name}", 1)
                raise UsageError(said.replace("give --", f"give --{prefix}"))
        known = [action.dest for action in parser._actions]
        hint = nearest(name, known).replace("mean ", "mean --").replace("_", "-")
        raise UsageError(f"there is no option {unknown.partition('=')[0]}{hint}")
    if rest:
        pairs = zip(argv, argv[2:], strict=False)
        full = [each for each, other in pairs if other == rest[0] and each.startswith("--") and "=" not in each]
        hint = f"; {full[0]} takes one value" if full else ""
        raise UsageError(f"{rest[0]!r} belongs to no option{hint}")
    return {name: parser.value(name, given) for name, given in vars(found).items()}


def overridden(config: C, given: Mapping[str, Any], prefix: str = "") -> C:
    """``config`` with what a command line gave of its options, and of its chosen members'."""
    types = hints(type(config))
    own = {name: given[prefix + name] for name in types if prefix + name in given}
    if isinstance(config, Composed):
        members = {name: overridden(config.options_of(name), given, f"{prefix}{name}.") for name in config.chosen()}
        return replace(config, **own, members=members)
    return replace(config, **own)  # type: ignore[type-var]


def read_first(options: C, argv: Sequence[str]) -> C:
    """``options`` with what ``argv`` says of them, which decides the defaults of all others."""
    first = Parser("", "")
    first.add_options(options)
    given = vars(first.parse_known_args([each for each in argv if each not in ("-h", "--help")])[0])
    return overridden(options, {name: first.value(name, value) for name, value in given.items()})


def run_command(work: Callable[[], int]) -> int:
    """Do ``work`` and return its exit code; 2 for what a user can mend, 3 if numbers diverged, 130 if interrupted.

    Whoever sends SIGTERM (a scheduler, a container) or closes the terminal gets what Ctrl-C gets: a run that can be
    continued; so does whoever is gone, if :data:`ENDS_WITH_STDIN` is set. In a thread, as a notebook's server has them,
    no signal comes. Errors that no user can mend are not caught: they are bugs, and their tracebacks say where. What
    stdout or stderr cannot encode is spelled out, see :data:`PLAIN`. Where nobody reads stdout to its end (``| head``)
    the code is 141, as of any command in a shell; a stream that was closed takes what it is given.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # whoever started this has closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for good
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is another, and takes everything
            stream.reconfigure(errors="cem.plain")
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    try:
        with heeded(*numbers):
            if os.environ.pop(ENDS_WITH_STDIN, ""):  # not for what this one may start
                threading.Thread(target=_end_with_stdin, daemon=True).start()
            return _read_to_the_end(work)
    except CemError as error:
        if not error.logged:
            print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, DivergedError) else 2
    except KeyboardInterrupt:
        return 130


def _read_to_the_end(work: Callable[[], int]) -> int:
    """``work`` and what it prints; a reader who had enough sooner is no bug."""
    try:
        try:
            return work()
        finally:
            sys.stdout.flush()
    except OSError as error:
        full = error.errno == errno.ENOSPC and error.filename is None
        if not (full or isinstance(error, BrokenPipeError)):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        if full:
            raise MachineError("what goes to stdout cannot be written: the disk is full") from error
        return 128 + 13


def _end_with_stdin() -> None:
    while os.read(0, 1):
        pass
    _thread.interrupt_main(signal.SIGTERM)


def _add(group: Any, name: str, hint: Any, text: str, default: Any) -> None:
    many = get_origin(hint) is tuple
    one = get_args(hint)[0] if many else hint
    text = text.replace("%", "%%")
    if one is bool:
        text += " (default)" if default else ""
        group.add_argument(flag(name), dest=name, action=argparse.BooleanOptionalAction, help=text)
        return
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    text += "" if shown in (None, "") else f" (default: {shown})"
    literals = [each for kind in kinds(one) if get_origin(kind) is Literal for each in get_args(kind)]
    numbers = [letter for kind, letter in ((int, "N"), (float, "X")) if kind in kinds(one)]
    metavar = "|".join(literals + numbers) or ("PATH" if Path in kinds(one) else "NAME")
    group.add_argument(flag(name), dest=name, metavar=metavar, help=text, nargs="*" if many else None)
