"""What the three commands share: command lines made of options, help, and exit codes."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kitchen import Cream, Oven, Pizza, Tomato

from cem import attack, compare, train
from cem.attacks.config import AttackConfig
from cem.command import Parser, overridden, parse_options, read, read_first, run_command
from cem.errors import BackendError, CheckpointError, DataError, DivergedError, UsageError
from cem.options import hints
from cem.training import TrainConfig

COMMANDS = pytest.mark.parametrize("command", [train, attack, compare], ids=lambda each: each.__name__)


@pytest.fixture(autouse=True)
def _handlers_as_before() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def bake(*argv: str, oven: Oven | None = None) -> Oven:
    """What a command line makes of an oven's options."""
    oven = oven or Oven()
    parser = Parser("bake", "Bakes.\n\nExamples:\n\n  bake   --fan")
    parser.add_options(oven)
    return overridden(oven, parse_options(parser, argv, oven))


def order(*argv: str, pizza: Pizza | None = None) -> Pizza:
    """What a command line makes of a pizza's options, and of those that it is made of."""
    pizza = read(pizza or Pizza(), argv)
    parser = Parser("order", "Orders.")
    parser.add_options(pizza)
    parser.add_members(pizza)
    return overridden(pizza, parse_options(parser, argv, pizza))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], Oven()),
        (["--degrees", "2e2", "--minutes=7"], Oven(degrees=200.0, minutes=7)),
        (["--trays", "2"], Oven(trays=2)),
        (["--trays", "none"], Oven()),
        (["--fan"], Oven(fan=True)),
        (["--no-fan"], Oven()),
        (["--heat", "bottom", "--shelf", "low"], Oven(heat="bottom", shelf="low")),
        (["--shelves", "low", "middle", "--times", "3", "5"], Oven(shelves=("low", "middle"), times=(3, 5))),
        (["--times"], Oven()),
        (["--recipe", "a/b"], Oven(recipe=Path("a/b"))),
        (["--speed", "2.5"], Oven(speed=2.5)),
        (["--minutes", "3", "--minutes", "4"], Oven(minutes=4)),
    ],
)
def test_text_becomes_the_type_of_the_option(argv: list[str], expected: Oven) -> None:
    assert bake(*argv) == expected


def test_what_is_not_given_keeps_the_value_that_it_had() -> None:
    assert bake("--minutes", "3", oven=Oven(degrees=200.0, times=(4,))) == Oven(200.0, minutes=3, times=(4,))


def test_options_of_chosen_members_are_read() -> None:
    assert order("--sauce", "cream", "--cream.fat", "0.1", "--toppings", "olives", "--olives.salt", "2") == Pizza(
        "cream", ("olives",), members={"cream": Cream.Options(fat=0.1), "olives": Tomato.Options(salt=2.0)}
    )


def test_member_may_be_chosen_after_its_options_and_by_another_name() -> None:
    pizza = order("--tomato.salt", "3", "--sauce", "red", pizza=Pizza(sauce="cream"))
    assert pizza.checked() == Pizza(members={"tomato": Tomato.Options(salt=3.0)})


def test_options_that_a_member_has_already_stay_where_it_is_chosen_again_and_go_where_it_is_not() -> None:
    pizza = Pizza("cream", members={"cream": Cream.Options(fat=0.1)})
    assert order("--cream.kind", "sour", pizza=pizza).members == {"cream": Cream.Options(0.1, "sour")}
    assert order("--sauce", "tomato", pizza=pizza).members == {"tomato": Tomato.Options()}


@pytest.mark.parametrize(
    ("made", "argv", "message"),
    [
        (bake, "--minutes many", "--minutes takes a whole number, got 'many'"),
        (bake, "--minutes 2.5", "--minutes takes a whole number, got '2.5'"),
        (bake, "--trays all", "--trays takes a whole number or nothing (null), got 'all'"),
        (bake, "--heat left", "--heat takes one of top, bottom, got 'left'"),
        (bake, "--times 3 soon", "--times takes a whole number, got 'soon'"),
        (bake, "--minutes", "argument --minutes: expected one argument"),
        (bake, "--minute 3", "there is no option --minute; did you mean --minutes?"),
        (bake, "--recipes=x", "there is no option --recipes; did you mean --recipe?"),
        (bake, "--temperature 3", "there is no option --temperature"),
        (bake, "stray --minutes 3", "'stray' belongs to no option"),
        (order, "--cream.fat 1", "--cream.fat is an option of cream, which is not chosen; give --sauce cream with it"),
        (order, "--olives.salt=1", "--olives.salt is an option of olives, which is not chosen; give --toppings olives"),
        (order, "--tomato.sal 1", "there is no option --tomato.sal; did you mean --tomato.salt?"),
        (order, "--tomatoe.salt 1", "there is no option --tomatoe.salt; did you mean --tomato.salt?"),
        (order, "--tomato.salt much", "--tomato.salt takes a number, got 'much'"),
        (order, "--sauce pesto", "--sauce takes tomato, cream, plain, or package.module:Class for one of yours, got"),
        (order, "--toppings basil basil", "--toppings names basil twice"),
    ],
)
def test_command_line_that_cannot_be_read_is_refused_in_one_line(made: Any, argv: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        made(*argv.split())
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--attention.var-threshold", "1"], "--attention.var-threshold is an option of attention, which is not"),
        (["--centroid.momentun", "1"], "there is no option --centroid.momentun; did you mean --centroid.momentum?"),
    ],
)
@pytest.mark.parametrize("command", [train, compare], ids=lambda each: each.__name__)
def test_commands_refuse_options_of_members_by_name(command: Any, argv: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        command.parse(argv)
    assert str(error.value).startswith(message)


def help_of(parse: Any, capsys: pytest.CaptureFixture[str], *argv: str, **options: Any) -> str:
    with pytest.raises(SystemExit) as done:
        parse(*argv, "--help", **options)
    assert done.value.code == 0
    return capsys.readouterr().out


def test_help_shows_groups_types_what_options_do_and_the_defaults_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(bake, capsys, oven=Oven(degrees=200.0, shelves=("low", "middle"), fan=True))
    assert "\n\n  bake   --fan\n\n" in text, "examples stay as they are"
    text = " ".join(text.split())
    assert "bake --fan heat: --degrees X How hot. (default: 200.0)" in text
    assert "--fan, --no-fan Whether it turns. (default) room: --share X Part of the tray, 50 % if nobody" in text
    assert "--shelves [NAME ...] All of them. (default: low middle)" in text
    for flag in ("--minutes N", "--trays N", "--heat top|bottom", "--recipe PATH", "--speed slow|X", "--times [N ...]"):
        assert f" {flag} " in text


def test_help_lists_members_and_the_options_of_those_that_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(help_of(order, capsys, "--sauce", "cream").split())
    assert "What is below. There are: tomato (red, of tomatoes); cream (what else); plain (what else)." in text
    assert "(default: cream)" in text
    assert "options of cream: --cream.fat X Share of it. (default: 0.3) --cream.kind NAME (default: sweet)" in text
    assert "--tomato.salt" not in text


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (train, [*hints(TrainConfig), *hints(train.Sources), "centroid.momentum"]),
        (attack, [*hints(AttackConfig), *hints(attack.Sources)]),
        (compare, [*hints(compare.Sources), "surrogates", "attack.attackers", "mixture.clusters"]),
    ],
)
def test_help_explains_every_option_in_80_columns_with_examples_that_are_understood(
    command: Any, names: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    text = help_of(lambda *argv: command.main(argv), capsys)
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert [name for name in names if f" --{name.replace('_', '-')}" not in text] == []
    for where in ("runs/first/config.yaml", "runs/compare-quick/compare.yaml"):
        Path(where).parent.mkdir(parents=True)
        TrainConfig().to_yaml(Path(where)) if "first" in where else compare.quick().to_yaml(Path(where), "")
    examples = re.findall(rf"^  python -m {command.__name__} (.+?)   ", text, re.MULTILINE)
    assert len(examples) == 3
    for line in examples:
        command.parse(shlex.split(line))


def test_what_decides_defaults_is_read_before_the_rest() -> None:
    assert read_first(Oven(), ["--help", "--recipe=a", "--sauce", "cream", "--fan"]) == Oven(recipe=Path("a"), fan=True)
    with pytest.raises(UsageError, match="argument --recipe: expected one argument"):
        read_first(Oven(), ["--recipe"])


@COMMANDS
@pytest.mark.parametrize("argv", [["--config"], ["--seed"], ["--no-such-option", "1"], ["--device", "gpu", "x"]])
def test_bad_command_line_ends_with_2_and_one_line(
    command: Any, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        *((kind("no file"), 2, "error: no file\n") for kind in (UsageError, DataError, CheckpointError, BackendError)),
        (DivergedError("lower --lr"), 1, ""),  # the log has said so
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_user_can_mend_is_an_exit_code_and_at_most_a_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(raising(error)) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), SystemExit(0)])
def test_anything_else_passes_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as passed:
        run_command(raising(error))
    assert passed.value is error


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("name", "before", "code"),
    [("SIGTERM", signal.SIG_DFL, 130), ("SIGHUP", signal.SIG_DFL, 130), ("SIGHUP", signal.SIG_IGN, 7)],
)
def test_signals_of_schedulers_and_terminals_interrupt_unless_they_are_ignored(
    name: str, before: signal.Handlers, code: int
) -> None:
    number = getattr(signal, name)
    signal.signal(number, before)
    assert run_command(lambda: os.kill(os.getpid(), number) or 7) == code


def raising(error: BaseException) -> Any:
    def work() -> int:
        raise error

    return work


SHOWS_HELP = """
import sys
from cem import attack, compare, train
for command in (train, attack, compare):
    try:
        command.main(["--help"])
    except SystemExit:
        pass
print(*sorted({"torchvision", "sklearn", "matplotlib", "tensorboard", "scipy"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.slow
def test_help_imports_nothing_that_computes() -> None:
    done = subprocess.run([sys.executable, "-c", SHOWS_HELP], capture_output=True, text=True, check=True)
    assert done.stderr == "\n"
    assert done.stdout.count("usage: python -m cem.") == 3
