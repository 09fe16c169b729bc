"""Options of an oven and of a pizza, whose sauce and toppings are members of families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from cem.errors import UsageError
from cem.options import Composed, Options, option
from cem.terms import Family


@dataclass(frozen=True)
class Oven(Options):
    """Of an oven.

    Attributes:
        degrees: How hot.
        share: Part of the tray, 50 % if
            nobody says.
        fan: Whether it turns.
        shelves: All of them.
    """

    degrees: float = option(180.0, least=0, most=300, group="heat")
    share: float = option(0.5, above=0, below=1, group="room")
    minutes: int = option(20, least=1)
    seed: int = option(0, below=2**32)
    trays: int | None = option(None, least=1)
    fan: bool = option(False, group="heat")
    heat: Literal["top", "bottom"] = option("top")
    shelf: str = option("middle", names=lambda: ("low", "middle"))
    shelves: tuple[str, ...] = option((), names=lambda: ("low", "middle"))
    times: tuple[int, ...] = option((), least=1)
    recipe: Path | None = option(None)  # noqa: RUF009 - it has a default as all the others
    speed: float | Literal["slow"] = option("slow", above=0)

    def check(self) -> None:
        if self.fan and self.heat == "bottom":
            raise UsageError("--fan takes --heat top")


class Tomato:
    name: ClassVar[str] = "tomato"
    summary: ClassVar[str] = "red, of tomatoes"

    @dataclass(frozen=True)
    class Options(Options):
        salt: float = option(1.0, least=0)


class Basil(Tomato):
    name = "basil"


class Olives(Tomato):
    name = "olives"


class Cream(Tomato):
    name, summary = "cream", "what else"

    @dataclass(frozen=True)
    class Options(Options):
        """Of cream.

        Attributes:
            fat: Share of it.
        """

        fat: float = option(0.3, above=0)
        kind: str = option("sweet", names=lambda: ("sweet", "sour"))


class Plain(Tomato):
    name, summary = "plain", "what else"

    @dataclass(frozen=True)
    class Options(Options):
        pass


SAUCES: Family[Any] = Family("sauce", Tomato, aliases={"red": "tomato"})
TOPPINGS: Family[Any] = Family("toppings", Tomato)
for family, members in ((SAUCES, (Tomato, Cream, Plain)), (TOPPINGS, (Basil, Olives))):
    for member in members:
        family.register(member)


@dataclass(frozen=True)
class Pizza(Composed):
    """Of a pizza.

    Attributes:
        sauce: What is below.
        toppings: What is above.
    """

    families: ClassVar[Mapping[str, Any]] = {"sauce": SAUCES, "toppings": TOPPINGS}

    sauce: str = option("tomato")
    toppings: tuple[str, ...] = option(())
    size: int = option(30, least=1)
