"""What the three commands share: command lines made of options, help, and exit codes."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from kitchen import Cream, Oven, Pizza, Tomato

from cem import attack, compare, train
from cem.attacks.config import AttackConfig
from cem.command import Parser, overridden, parse_options, read, read_first, run_command
from cem.data import synthetic
from cem.errors import BackendError, CheckpointError, DataError, DivergedError, MachineError, UsageError
from cem.options import hints
from cem.training import TrainConfig


@pytest.fixture(autouse=True)
def _handlers_as_before():
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    kept = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def bake(*argv, oven=None):
    """What a command line makes of an oven's options."""
    oven = oven or Oven()
    parser = Parser("bake", "Bakes.\n\nExamples:\n\n  bake   --fan")
    parser.add_options(oven)
    return overridden(oven, parse_options(parser, argv, oven))


def order(*argv, pizza=None):
    """What a command line makes of a pizza's options, and of those that it is made of."""
    pizza = read(pizza or Pizza(), argv)
    parser = Parser("order", "Orders.")
    parser.add_options(pizza)
    parser.add_members(pizza)
    return overridden(pizza, parse_options(parser, argv, pizza))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", Oven()),
        ("--degrees 2e2 --minutes=7", Oven(degrees=200.0, minutes=7)),
        ("--trays 2 --fan", Oven(trays=2, fan=True)),
        ("--trays none --no-fan", Oven()),
        ("--heat bottom --shelf low", Oven(heat="bottom", shelf="low")),
        ("--shelves low middle --times 3 5", Oven(shelves=("low", "middle"), times=(3, 5))),
        ("--times --recipe a/b --speed 2.5", Oven(recipe=Path("a/b"), speed=2.5)),
        ("--minutes 3 --minutes 4", Oven(minutes=4)),
    ],
)
def test_text_becomes_the_type_of_the_option(line, expected):
    assert bake(*line.split()) == expected


def test_what_is_not_given_keeps_its_value_and_what_decides_defaults_is_read_before_the_rest():
    assert bake("--minutes", "3", oven=Oven(degrees=200.0, times=(4,))) == Oven(200.0, minutes=3, times=(4,))
    assert read_first(Oven(), ["--help", "--recipe=a", "--sauce", "cream", "--fan"]) == Oven(recipe=Path("a"), fan=True)
    with pytest.raises(UsageError, match="argument --recipe: expected one argument"):
        read_first(Oven(), ["--recipe"])


def test_options_of_chosen_members_are_read_before_or_after_the_choice():
    assert order("--sauce", "cream", "--cream.fat", "0.1", "--toppings", "olives", "--olives.salt", "2") == Pizza(
        "cream", ("olives",), members={"cream": Cream.Options(fat=0.1), "olives": Tomato.Options(salt=2.0)}
    )
    pizza = order("--tomato.salt", "3", "--sauce", "red", pizza=Pizza(sauce="cream"))
    assert pizza.checked() == Pizza(members={"tomato": Tomato.Options(salt=3.0)})


def test_options_that_a_member_has_already_stay_where_it_is_chosen_again_and_go_where_it_is_not():
    pizza = Pizza("cream", members={"cream": Cream.Options(fat=0.1)})
    assert order("--cream.kind", "sour", pizza=pizza).members == {"cream": Cream.Options(0.1, "sour")}
    assert order("--sauce", "tomato", pizza=pizza).members == {"tomato": Tomato.Options()}


@pytest.mark.parametrize(
    ("parse", "line", "message"),
    [
        (bake, "--times 3 soon", "--times takes a whole number, got 'soon'"),
        (bake, "--minutes", "argument --minutes: expected one argument"),
        (bake, "--minute 3", "there is no option --minute; did you mean --minutes?"),
        (bake, "--recipes=x", "there is no option --recipes; did you mean --recipe?"),
        (bake, "--temperature 3", "there is no option --temperature"),
        (bake, "stray --minutes 3", "'stray' belongs to no option"),
        (bake, "--minutes 3 4", "'4' belongs to no option; --minutes takes one value"),
        (order, "--cream.fat 1", "--cream.fat is an option of cream, which is not chosen; give --sauce cream with it"),
        (order, "--olives.salt=1", "--olives.salt is an option of olives, which is not chosen; give --toppings olives"),
        (order, "--tomato.sal 1", "there is no option --tomato.sal; did you mean --tomato.salt?"),
        (order, "--tomato.salt much", "--tomato.salt takes a number, got 'much'"),
    ],
)
def test_command_line_that_cannot_be_read_is_refused(parse, line, message):
    with pytest.raises(UsageError) as error:
        parse(*line.split())
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("command", [train, attack, compare], ids=lambda each: each.__name__)
@pytest.mark.parametrize("line", ["--config", "--seed", "--device gpu x", "--attention.var-threshold 1"])
def test_bad_command_line_ends_with_2_and_one_line(command, line, capsys):
    assert command.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ")
    if line.startswith("--attention") and command is not attack:
        assert "is an option of attention, which is not chosen" in err


def help_of(parse, capsys, *argv, **options):
    with pytest.raises(SystemExit) as done:
        parse(*argv, "--help", **options)
    assert done.value.code == 0
    return capsys.readouterr().out


def test_help_shows_groups_types_what_options_do_and_the_defaults_in_force(capsys):
    text = help_of(bake, capsys, oven=Oven(degrees=200.0, shelves=("low", "middle"), fan=True))
    assert "\n\n  bake   --fan\n\n" in text, "examples stay as they are"
    text = " ".join(text.split())
    assert text.startswith("usage: bake [options] Bakes. Examples: bake --fan heat: --degrees X How hot. (default: 200")
    assert "--fan, --no-fan Whether it turns. (default) room: --share X Part of the tray, 50 % if nobody" in text
    assert "--shelves [NAME ...] All of them. (default: low middle)" in text
    for flag in ("--minutes N", "--trays N", "--heat top|bottom", "--recipe PATH", "--speed slow|X", "--times [N ...]"):
        assert f" {flag} " in text


def test_help_lists_members_and_the_options_of_those_that_are_chosen(capsys):
    text = " ".join(help_of(order, capsys, "--sauce", "cream").split())
    assert "What is below. There are: tomato (red, of tomatoes); cream (what else); plain (what else)." in text
    assert "(default: cream)" in text
    assert "options of cream: --cream.fat X Share of it. (default: 0.3) --cream.kind NAME (default: sweet)" in text
    assert "--tomato.salt" not in text


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (train, [*hints(TrainConfig), *hints(train.Sources), "slots.num-slots"]),
        (attack, [*hints(AttackConfig), *hints(attack.Sources), "decoder.max_cycles"]),
        (compare, [*hints(compare.Sources), "surrogates", "attack.attacks", "attack.decoder.lr", "mixture.clusters"]),
        (synthetic, [*hints(synthetic.Sizes)]),
    ],
)
def test_help_explains_every_option_in_80_columns_by_examples_too_and_in_ascii(command, names, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    for encoding in ("ascii", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit, match="0"):
            command.main(["--help"])
    text = stream.buffer.getvalue().decode()
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert [name for name in names if f" --{name.replace('_', '-')}" not in text] == []
    for where in ("runs/first", "runs/compare-quick"):
        Path(where).mkdir(parents=True)
    TrainConfig().to_yaml(Path("runs/first/config.yaml"))
    compare.quick().to_yaml(Path("runs/compare-quick/compare.yaml"), "")
    examples = re.findall(rf"^  python -m {command.__name__} (.+?)   ", text, re.MULTILINE)
    assert len(examples) == (0 if command is synthetic else 3)
    for line in examples:
        command.parse(shlex.split(line))


def logged(error):
    error.logged = True
    return error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        *((kind("no file"), 2, "error: no file\n") for kind in (UsageError, DataError, CheckpointError, BackendError)),
        (DivergedError("lower --lr"), 3, "error: lower --lr\n"),
        (logged(DivergedError("lower --lr")), 3, ""),
        (logged(MachineError("the disk is full")), 2, ""),
        (KeyboardInterrupt(), 130, ""),
        *((bug, None, "") for bug in (ValueError("a bug"), RuntimeError("a bug"), SystemExit(0))),
    ],
)
def test_what_a_user_can_mend_is_an_exit_code_and_anything_else_passes_through(error, code, said, capsys):
    def work():
        raise error

    if code is None:
        with pytest.raises(type(error)) as passed:
            run_command(work)
        assert passed.value is error
    else:
        assert run_command(work) == code
    assert capsys.readouterr().err == said


def test_command_runs_in_a_thread_and_leaves_signals_as_they_were():
    before, codes = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: codes.append(run_command(lambda: 7)))
    thread.start()
    thread.join()
    assert (codes, run_command(lambda: 8), signal.getsignal(signal.SIGTERM)) == ([7], 8, before)


def test_reader_who_had_enough_is_no_error(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run_command(lambda: print("more") or 0) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize(("name", "before", "code"), [("SIGTERM", 0, 130), ("SIGHUP", 0, 130), ("SIGHUP", 1, 7)])
def test_signals_of_schedulers_and_terminals_interrupt_unless_they_are_ignored(name, before, code):
    number = getattr(signal, name)
    signal.signal(number, signal.Handlers(before))
    assert run_command(lambda: os.kill(os.getpid(), number) or 7) == code


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "attack", "compare"])
def test_help_imports_nothing_that_computes(command):
    line = [sys.executable, "-X", "importtime", "-m", f"cem.{command}", "--help"]
    imported = subprocess.run(line, capture_output=True, text=True, check=True).stderr
    assert re.findall(r"\b(cem|torchvision|sklearn|matplotlib|tensorboard|scipy)$", imported, re.MULTILINE) == ["cem"]
