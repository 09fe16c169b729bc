"""Options of a command in one flat dataclass, shared by command line, YAML file and API."""

from __future__ import annotations

import types
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import yaml

Self = TypeVar("Self", bound="Options")


class ConfigError(ValueError):
    """An option cannot be used as given; the message names it, what it takes and what it got."""


@dataclass
class Options:
    """Base of the dataclasses that hold a command's options; subclasses add :meth:`validate`.

    Fields may be text, numbers, booleans, paths, ``Literal`` choices, tuples of one of these, or ``None``.
    """

    def convert(self) -> None:
        """Make every value its option's own type where it is a kindred one: text a path, a whole number a float.

        Raises:
            ConfigError: a value cannot become that.
        """
        for name, hint in _hints(type(self)).items():
            setattr(self, name, _convert(name, hint, getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """The options as plain YAML values (paths as strings, tuples as lists)."""
        return {name: _plain(getattr(self, name)) for name in _hints(type(self))}

    @classmethod
    def from_dict(cls: type[Self], values: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; options that are absent keep their defaults.

        Raises:
            ConfigError: if a key is no option, or a value has the wrong type.
        """
        hints = _hints(cls)
        unknown = sorted(str(key) for key in values if key not in hints)
        if unknown:
            raise ConfigError(f"unknown option {', '.join(unknown)}; the options are {', '.join(hints)}")
        return cls(**{name: _convert(name, hints[name], value) for name, value in values.items()})

    def to_yaml(self, path: Path) -> None:
        """Write all options to ``path``."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    @classmethod
    def from_yaml(cls: type[Self], path: Path) -> Self:
        """Read options from ``path``; those that it does not name keep their defaults.

        Raises:
            ConfigError: if there is no such file, it is not YAML, or :meth:`from_dict` refuses what it holds.
        """
        values = read_yaml(path)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of option names to values in a YAML file.

    Raises:
        ConfigError: if there is no such file, it is not YAML, or it holds something else.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read options from {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of option names to values, got {values!r}")
    return values


def option(name: str) -> str:
    """The command-line spelling of a field: ``"batch_size"`` → ``"--batch-size"``."""
    return "--" + name.replace("_", "-")


def resolve_device(name: str) -> torch.device:
    """The device that ``--device name`` means.

    Raises:
        ConfigError: if it is no device, or one that this machine or this build of PyTorch does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def _hints(cls: type[Options]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _convert(name: str, hint: Any, value: Any) -> Any:
    """Return ``value`` as the annotated type of option ``name``, or raise :class:`ConfigError`."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is tuple:
            if isinstance(value, list | tuple):
                return tuple(_convert(name, get_args(kind)[0], each) for each in value)
        elif get_origin(kind) is Literal:
            if isinstance(value, str) and value in get_args(kind):
                return value
        elif kind is Path:
            if isinstance(value, str | Path):
                return Path(value)
        elif kind is float:
            # YAML 1.1 reads 1e-4, without a point, as text.
            if isinstance(value, str | int | float) and not isinstance(value, bool):
                try:
                    return float(value)
                except ValueError:
                    pass
        elif type(value) is kind:
            return value
    raise ConfigError(f"{option(name)} takes {' or '.join(map(_describe, kinds))}, got {value!r}")


def _describe(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "a list of: " + _describe(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", Path: "a path"}
    return names.get(kind, "nothing (null)")
