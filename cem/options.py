"""Options as dataclasses: default, help and range of each stand in one place, for command line, YAML file and API."""

from __future__ import annotations

import inspect
import math
import operator
import re
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
import yaml

from cem.errors import UsageError
from cem.files import write_text

FORMAT = 2
"""Of option files and of the directories that they lie in; runs of 0.1.0 had none."""

Self = TypeVar("Self", bound="Options")
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 40
_COMPARE = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
_LONGEST = 255  # bytes of a name, on any usual file system
_KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text", Path: "a path"}


def option(
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    names: Callable[[], Iterable[str]] | None = None,
    group: str = "",
    harmless: bool = False,
) -> Any:
    """A field of an :class:`Options` dataclass, whose docstring says under ``Attributes:`` what it does.

    Args:
        default: its default.
        least, above, most, below: bounds of a number; an infinity is refused in any case.
        names: gives what its text may be.
        group: heading that it stands under in ``--help``.
        harmless: whether it says where or how something is computed, and changes no number.
    """
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    metadata = {"bounds": bounds, "names": names, "group": group, "harmless": harmless}
    return field(default=default, metadata=metadata)


class Options:
    """Base of the dataclasses that hold options; their fields are made by :func:`option`.

    A field is text, a number, a boolean, a path, a ``Literal``, a tuple of one of these, or ``None``. Constructing one
    checks nothing; :meth:`checked` does.
    """

    def checked(self: Self, prefix: str = "") -> Self:
        """The same options, each of its own type (text made a path, a whole number a float) and in its range.

        Args:
            prefix: stands before the names in messages, such as ``"centroid."``.

        Raises:
            UsageError: naming the option, what it takes and what it got.
        """
        values = {name: converted(prefix + name, hint, getattr(self, name)) for name, hint in hints(type(self)).items()}
        for each in fields(self):  # type: ignore[arg-type]
            if each.name in values:
                _check_range(prefix + each.name, values[each.name], each.metadata)
        checked = replace(self, **values)  # type: ignore[type-var]
        checked.check()
        return checked

    def check(self) -> None:
        """Raise :class:`UsageError` where options do not go together; for subclasses."""

    def to_dict(self) -> dict[str, Any]:
        """The options as plain YAML values (paths as text, tuples as lists)."""
        return {name: _plain(getattr(self, name)) for name in hints(type(self))}

    @classmethod
    def from_dict(cls: type[Self], values: Mapping[str, Any], prefix: str = "") -> Self:
        """Inverse of :meth:`to_dict`; options that are absent keep their defaults.

        Raises:
            UsageError: a key is no option, or a value has the wrong type.
        """
        known = hints(cls)
        for key in values:
            if key not in known:
                raise UsageError(f"there is no option {prefix}{key}{nearest(str(key), known)}")
        return cls(**{name: converted(prefix + name, known[name], value) for name, value in values.items()})

    @classmethod
    def from_yaml(cls: type[Self], path: Path) -> Self:
        """Read options from ``path``; those that it does not name keep their defaults.

        Raises:
            UsageError: there is no such file, it is not YAML, or :meth:`from_dict` refuses what it holds.
        """
        values = read_yaml(path)
        try:
            return cls.from_dict({name: value for name, value in values.items() if name != "format"})
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error

    def to_yaml(self, path: Path, comment: str = "") -> None:
        """Write all options to ``path``, under a comment if there is one."""
        text = yaml.safe_dump({"format": FORMAT, **self.to_dict()}, sort_keys=False, allow_unicode=True)
        write_text(path, (f"# {comment}\n" if comment else "") + text)


@dataclass(frozen=True)
class Composed(Options):
    """Options that choose members of families, and hold the options of those that are chosen.

    Attributes:
        members: options of chosen members by the member's name; the others have their defaults.
        families: which fields choose, and among what; a field holds a name or a tuple of names.
    """

    families: ClassVar[Mapping[str, Any]] = {}

    members: Mapping[str, Options] = field(default_factory=dict, kw_only=True)

    def chosen(self) -> dict[str, Any]:
        """The chosen members by their own names, in the order of the fields.

        Raises:
            UsageError: there is no such member, or one is chosen twice.
        """
        found: dict[str, Any] = {}
        for place, family in self.families.items():
            names = getattr(self, place)
            for name in (names,) if isinstance(names, str) else names:
                member = family[name]
                if found.setdefault(member.name, member) is not member or list(names).count(name) > 1 < len(names):
                    raise UsageError(f"{flag(place)} names {member.name} twice")
        return found

    def options_of(self, name: str) -> Any:
        """The options of a chosen member."""
        return self.members[name] if name in self.members else self.chosen()[name].Options()

    def checked(self: Self, prefix: str = "") -> Self:
        """See :meth:`Options.checked`; names become those that members have, and every chosen member has options."""
        assert isinstance(self, Composed)
        places = {place: self._own_names(place) for place in self.families}
        if strangers := self.members.keys() - self.chosen().keys():
            raise UsageError(type(self).stranger(min(strangers), self.chosen()))
        members = {name: self.options_of(name).checked(f"{name}.") for name in self.chosen()}
        return Options.checked(replace(self, **places, members=members), prefix)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain YAML values, those of a chosen member under its name."""
        own = {name: self.options_of(name).to_dict() for name in self.chosen()}
        return super().to_dict() | {name: values for name, values in own.items() if values}

    @classmethod
    def from_dict(cls: type[Self], values: Mapping[str, Any], prefix: str = "") -> Self:
        """Inverse of :meth:`to_dict`."""
        known = hints(cls)
        assert issubclass(cls, Composed)
        families = [name for family in cls.families.values() for name in family]
        for key, given in values.items():
            # Before values are read: in a file of another command names mislead less than values do.
            if key not in known and key not in families and not isinstance(given, Mapping):
                raise UsageError(cls.stranger(str(key), ()))
        own: Any = super().from_dict({key: value for key, value in values.items() if key in known})
        chosen, members = own.chosen(), {}
        for key, given in values.items():
            if key in known:
                continue
            if key not in chosen:
                raise UsageError(cls.stranger(str(key), chosen))
            if not isinstance(given, Mapping):
                raise UsageError(
                    f"{key} holds the options of {key}, as a mapping of names to values, got {shown(given)}"
                )
            members[key] = chosen[key].Options.from_dict(given, f"{key}.")
        composed: Self = replace(own, members=members)
        return composed

    @classmethod
    def stranger(cls, name: str, chosen: Iterable[str]) -> str:
        """Why ``name`` is no option, or no member that has options here."""
        owner = name.partition(".")[0]
        for place, family in cls.families.items():
            if owner in family and owner not in chosen:
                return f"{name} is an option of {owner}, which is not chosen; give {flag(place)} {owner} with it"
        return f"there is no option {name}{nearest(name, [*hints(cls), *chosen])}"

    def _own_names(self, place: str) -> Any:
        """Names as members have them; of a class that is named by its module, as they were given."""
        own = lambda name: name if ":" in name else self.families[place][name].name  # noqa: E731
        names = getattr(self, place)
        return own(names) if isinstance(names, str) else tuple(map(own, names))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of option names to values in a YAML file.

    Raises:
        UsageError: there is no such file, it is not YAML, or it holds something else.
    """
    try:
        values = yaml.load(Path(path).expanduser().read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UsageError(f"cannot read options from {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read options from {path}: byte {error.start} is not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UsageError(f"cannot read options from {path}: {where}{error.problem}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = "too many brackets" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UsageError(f"cannot read options from {path}: {reason}") from error
    if not isinstance(values, dict):
        got = "nothing" if values is None else shown(values)
        raise UsageError(f"{path} must hold a mapping of option names to values, got {got}")
    return values


class _Loader(yaml.SafeLoader):
    """Plain YAML, in which every name stands once, and ``batch-size`` is ``batch_size``."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few lines of them hold more than any memory
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"options are written out, *{event.anchor} is not", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        named: dict[str, Any] = {}
        for key, value in node.value:
            # Not of mappings, which are called after members.
            if key.tag == "tag:yaml.org,2002:str" and not isinstance(value, yaml.MappingNode):
                key.value = key.value.replace("-", "_")
            if (first := named.setdefault(str(key.value), key)) is not key:
                problem = f"{key.value} stands in line {first.start_mark.line + 1} already"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def flag(name: str) -> str:
    """The command-line spelling of an option: ``"batch_size"`` → ``"--batch-size"``."""
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """``value`` for a message: as Python writes it, but short."""
    return _SHORT.repr(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that ``name`` may be a slip of, or nothing."""
    found = get_close_matches(name.replace("-", "_"), known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def differences(before: Options, after: Options, ignored: Iterable[str] = ()) -> list[str]:
    """Describe the options that differ: ``["--lr (was 0.05, got 0.1)"]``; of members too, ``--centroid.momentum``."""
    old, new = _flat(before.to_dict()), _flat(after.to_dict())
    return [
        f"{flag(name)} (was {old.get(name)}, got {new.get(name)})"
        for name in dict.fromkeys([*old, *new])
        if name not in ignored and old.get(name) != new.get(name)
    ]


def resolve_device(name: str) -> torch.device:
    """The device that ``--device name`` means.

    Raises:
        UsageError: it is no device, or one that this machine or this build of PyTorch does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    # PyTorch counts devices in a byte: to it cuda:256 is cuda:0.
    if device.type not in ("cpu", "cuda") or str(device) != name:
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    return device


def hints(cls: type[Options]) -> dict[str, Any]:
    """Types of a class's options by name, in their order."""
    found = get_type_hints(cls)
    return {each.name: found[each.name] for each in fields(cls) if "bounds" in each.metadata}  # type: ignore[arg-type]


def helps(cls: type[Options]) -> dict[str, str]:
    """What a class's options do, by name: the section ``Attributes:`` of its docstring."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): ((?:.+\n?(?!    \w))*.*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def kinds(hint: Any) -> Sequence[Any]:
    """The types that a field takes."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def converted(name: str, hint: Any, value: Any, *, spoken: bool = False) -> Any:
    """``value`` as the annotated type of option ``name``; ``spoken`` is what stands on a command line: text.

    Raises:
        UsageError: it cannot be that.
    """
    if types.NoneType in kinds(hint) and (value is None or (spoken and value == "none")):
        return None
    for kind in kinds(hint):
        if get_origin(kind) is tuple:
            if isinstance(value, list | tuple):
                return tuple(converted(name, get_args(kind)[0], each, spoken=spoken) for each in value)
        elif get_origin(kind) is Literal:
            if isinstance(value, str) and value in get_args(kind):
                return value
        elif kind is Path:
            text = str(value) if isinstance(value, str | Path) else ""
            fits = all(len(name.encode(errors="replace")) <= _LONGEST for name in Path(text).parts)
            if fits and text.strip() and "\0" not in text:
                with suppress(RuntimeError):  # there is no such home
                    return Path(value).expanduser()
        elif kind is float or (spoken and kind is int):
            # Of text too: YAML 1.1 reads 1e-4, without a point, as text.
            if not isinstance(value, bool):
                with suppress(TypeError, ValueError, OverflowError):
                    return kind(value)
        elif type(value) is kind:
            return value
    raise UsageError(f"{flag(name)} takes {' or '.join(map(describe, kinds(hint)))}, got {shown(value)}")


def describe(kind: Any) -> str:
    """A field's type in words."""
    if get_origin(kind) is tuple:
        return "a list of: " + describe(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    return _KINDS.get(kind, "nothing (null)")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _check_range(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    """Raise :class:`UsageError` where a number is out of its bounds, or text is none of the names."""
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, int | float) and not isinstance(each, bool):
            bounds = {words: bound for words, bound in metadata["bounds"].items() if bound is not None}
            holds = all(_COMPARE[words](each, bound) for words, bound in bounds.items())
            huge = isinstance(each, int) and each.bit_length() > 63  # more than any counter holds
            if not holds or huge or (isinstance(each, float) and not math.isfinite(each)):
                words = [f"{words} {bound:.12g}" for words, bound in bounds.items()]
                if not {"at most", "below"} & bounds.keys():
                    words = (
                        ["finite", *words] if isinstance(each, float) else [*words, "below 2**63"] if huge else words
                    )
                raise UsageError(f"{flag(name)} must be {' and '.join(words)}, got {shown(each)}")
        elif isinstance(each, str) and metadata["names"] is not None:
            names = tuple(metadata["names"]())
            if each not in names:
                raise UsageError(f"{flag(name)} must be one of {', '.join(names)}, got {shown(each)}")
