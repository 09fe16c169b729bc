"""What a user can mend: commands turn these errors, and no others, into one line."""

from __future__ import annotations


class CemError(Exception):
    """Base of all errors that a user can mend; the message says what was expected and what came.

    Attributes:
        logged: whether a log, and so stderr, has the message already.

    Example::

        >>> import cem
        >>> try:
        ...     cem.DEFENSES["nois"]
        ... except cem.CemError as error:
        ...     print(error)
        --defenses takes noise, inversion, or package.module:Class for one of yours, got 'nois'
    """

    logged = False


class UsageError(CemError, ValueError):
    """An option or an argument cannot be used as given; the message names it."""


class DataError(CemError, ValueError):
    """A data set is not there, or cannot be read; the message names the file."""


class CheckpointError(CemError):
    """A file of a run is missing, damaged, or another run's; the message names it."""


class BackendError(CemError):
    """The backend that was asked for by name cannot compute what it should."""


class MachineError(CemError):
    """The machine does not give what is needed: a file, memory, a process. The message says what, and what to turn."""


class DivergedError(CemError):
    """A training, of a target or of an attacker, has left what numbers can hold; the message names the epoch."""
