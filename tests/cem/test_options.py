"""Options: their types and ranges, the way to YAML and back, and options that choose members of families."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from kitchen import Basil, Cream, Oven, Pizza, Tomato

from cem.errors import UsageError
from cem.options import FORMAT, Options, converted, differences, helps, nearest, resolve_device

OVEN = Oven(200.0, 0.25, 10, 1, 2, True, "bottom", "low", ("low",), (3, 5), Path("a/b"), 2.5)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("minutes", 2.5, "a whole number"),
        ("minutes", True, "a whole number"),
        ("degrees", "hot", "a number"),
        ("degrees", True, "a number"),
        ("fan", 1, "true or false"),
        ("shelf", 18, "text"),
        ("recipe", 3, "a path or nothing (null)"),
        ("heat", "left", "one of top, bottom"),
        ("trays", "all", "a whole number or nothing (null)"),
        ("minutes", None, "a whole number"),
        ("times", 3, "a list of: a whole number"),
        ("times", ["3"], "a whole number"),
        ("speed", "fast", "a number or one of slow"),
    ],
)
def test_wrong_type_is_refused_with_option_and_value(name: str, value: Any, expected: str) -> None:
    wrong = value[0] if isinstance(value, list) else value
    for attempt in (lambda: Oven.from_dict({name: value}), replace(Oven(), **{name: value}).checked):
        with pytest.raises(UsageError) as error:
            attempt()
        assert str(error.value) == f"--{name} takes {expected}, got {wrong!r}"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("degrees", -1.0, "--degrees must be at least 0 and at most 300, got -1.0"),
        ("degrees", 301.0, "--degrees must be at least 0 and at most 300, got 301.0"),
        ("degrees", float("nan"), "--degrees must be at least 0 and at most 300, got nan"),
        ("share", 0.0, "--share must be above 0 and below 1, got 0.0"),
        ("share", 1.0, "--share must be above 0 and below 1, got 1.0"),
        ("speed", float("inf"), "--speed must be finite and above 0, got inf"),
        ("minutes", 0, "--minutes must be at least 1, got 0"),
        ("seed", 2**32, "--seed must be below 4294967296, got 4294967296"),
        ("trays", 0, "--trays must be at least 1, got 0"),
        ("times", (3, 0), "--times must be at least 1, got 0"),
        ("shelf", "attic", "--shelf must be one of low, middle, got 'attic'"),
        ("shelves", ("low", "attic"), "--shelves must be one of low, middle, got 'attic'"),
    ],
)
def test_value_out_of_range_is_refused_with_option_range_and_value(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as error:
        replace(Oven(), **{name: value}).checked()
    assert str(error.value) == message


def test_bounds_belong_to_the_range_where_they_say_so() -> None:
    for degrees in (0.0, 300.0):
        assert Oven(degrees=degrees).checked().degrees == degrees


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(UsageError, match="--fan takes --heat top"):
        Oven(fan=True, heat="bottom").checked()


def test_checked_options_have_the_types_of_their_fields() -> None:
    checked = Oven(degrees=200, recipe="a/b", times=[3], speed="2").checked()  # type: ignore[arg-type]
    assert checked == Oven(degrees=200.0, recipe=Path("a/b"), times=(3,), speed=2.0)
    assert isinstance(checked.degrees, float)


def test_yaml_gives_back_every_option(tmp_path: Path) -> None:
    default = Oven().to_dict()
    same = [name for name, value in OVEN.to_dict().items() if value == default[name]]
    assert same == [], "the example must differ from the default in every option"
    for each in (OVEN, Oven()):
        each.to_yaml(tmp_path / "oven.yaml")
        assert Oven.from_yaml(tmp_path / "oven.yaml") == each


def test_yaml_holds_plain_values_and_its_format_under_a_comment(tmp_path: Path) -> None:
    OVEN.to_yaml(tmp_path / "oven.yaml", comment="by hand")
    text = (tmp_path / "oven.yaml").read_text()
    assert text.startswith(f"# by hand\nformat: {FORMAT}\ndegrees: 200.0\n")
    values = yaml.safe_load(text)
    assert (values["times"], values["recipe"], values["speed"]) == ([3, 5], "a/b", 2.5)


def test_options_absent_from_yaml_keep_their_defaults(tmp_path: Path) -> None:
    (tmp_path / "oven.yaml").write_text("minutes: 3\n")
    assert Oven.from_yaml(tmp_path / "oven.yaml") == Oven(minutes=3)


def test_scientific_notation_without_point_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "oven.yaml").write_text("share: 1e-4\n")
    assert isinstance(yaml.safe_load("1e-4"), str), "the reason for this test"
    assert Oven.from_yaml(tmp_path / "oven.yaml").share == 1e-4


@pytest.mark.parametrize("content", ["- epochs\n", "epochs\n", "", "a: [1\n"])
def test_yaml_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "oven.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"oven\.yaml"):
        Oven.from_yaml(tmp_path / "oven.yaml")


def test_missing_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read options from .*absent\.yaml"):
        Oven.from_yaml(tmp_path / "absent.yaml")


def test_unknown_key_is_refused_with_file_and_the_nearest_option(tmp_path: Path) -> None:
    (tmp_path / "oven.yaml").write_text("minute: 3\n")
    with pytest.raises(UsageError, match=r"oven\.yaml: there is no option minute; did you mean minutes\?$"):
        Oven.from_yaml(tmp_path / "oven.yaml")


def test_a_hint_is_given_only_where_something_is_near() -> None:
    assert nearest("bach-size", ["batch_size", "lr"]) == "; did you mean batch_size?"
    assert nearest("temperature", ["batch_size", "lr"]) == ""


def test_help_is_what_the_docstring_says_of_each_option() -> None:
    assert helps(Oven) == {
        "degrees": "How hot.",
        "share": "Part of the tray, 50 % if nobody says.",
        "fan": "Whether it turns.",
        "shelves": "All of them.",
    }
    assert helps(Options) == {}


def test_chosen_members_stand_in_the_order_of_fields_and_names() -> None:
    assert list(Pizza(sauce="cream", toppings=("olives", "basil")).chosen()) == ["cream", "olives", "basil"]


def test_checked_members_have_their_own_names_and_all_their_options() -> None:
    checked = Pizza(sauce="red", toppings=("basil",)).checked()
    assert (checked.sauce, checked.toppings) == ("tomato", ("basil",))
    assert checked.members == {"tomato": Tomato.Options(), "basil": Basil.Options()}


def test_options_of_a_member_that_is_not_chosen_are_refused() -> None:
    with pytest.raises(UsageError, match="cream, which is not chosen; give --sauce cream with it"):
        Pizza(members={"cream": Cream.Options()}).checked()


def test_member_without_options_of_its_own_given_has_the_defaults() -> None:
    pizza = Pizza(toppings=("basil",), members={"tomato": Tomato.Options(salt=2.0)})
    assert pizza.options_of("tomato").salt == 2.0
    assert pizza.options_of("basil").salt == 1.0


def test_options_of_members_are_checked_under_the_members_name() -> None:
    with pytest.raises(UsageError, match=r"^--tomato\.salt must be finite and at least 0, got -1\.0$"):
        Pizza(members={"tomato": Tomato.Options(salt=-1.0)}).checked()
    with pytest.raises(UsageError, match=r"^--cream\.kind must be one of sweet, sour, got 'old'$"):
        Pizza(sauce="cream", members={"cream": Cream.Options(kind="old")}).checked()


def test_member_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"--sauce takes tomato, cream, plain, or .* got 'pesto'"):
        Pizza(sauce="pesto").checked()


def test_member_chosen_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="--toppings names basil twice"):
        Pizza(toppings=("basil", "olives", "basil")).checked()


def test_yaml_gives_back_the_options_of_members(tmp_path: Path) -> None:
    pizza = Pizza("cream", ("olives",), 20, members={"cream": Cream.Options(0.1, "sour")}).checked()
    pizza.to_yaml(tmp_path / "pizza.yaml")
    assert Pizza.from_yaml(tmp_path / "pizza.yaml") == pizza
    assert yaml.safe_load((tmp_path / "pizza.yaml").read_text())["cream"] == {"fat": 0.1, "kind": "sour"}


def test_yaml_leaves_out_members_that_have_no_options() -> None:
    assert Pizza(sauce="plain", toppings=("basil",)).to_dict().keys() == {"sauce", "toppings", "size", "basil"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cream": {"fat": 0.1}}, "^cream is an option of cream, which is not chosen; give --sauce cream with it$"),
        ({"basil": {}}, "^basil is an option of basil, which is not chosen; give --toppings basil with it$"),
        ({"tomatoe": {"salt": 1}}, r"^there is no option tomatoe; did you mean tomato\?$"),
        ({"tomato": {"sallt": 1}}, r"^there is no option tomato\.sallt; did you mean salt\?$"),
        ({"tomato": {"salt": "much"}}, r"^--tomato\.salt takes a number, got 'much'$"),
        ({"tomato": 3}, "^tomato holds the options of tomato, as a mapping of names to values, got 3$"),
        ({"siz": 3}, r"^there is no option siz; did you mean size\?$"),
    ],
)
def test_what_members_cannot_take_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Pizza.from_dict(values)


def test_differences_name_options_and_those_of_members_with_both_values() -> None:
    before = Pizza(toppings=("basil",))
    assert differences(before, before) == []
    after = replace(before, size=20, members={"basil": Basil.Options(salt=0.5)})
    assert differences(before, after) == ["--size (was 30, got 20)", "--basil.salt (was 1.0, got 0.5)"]
    assert differences(before, after, ignored=("size",)) == ["--basil.salt (was 1.0, got 0.5)"]


def test_differences_name_the_options_of_members_that_come_and_go() -> None:
    assert differences(Pizza(), Pizza(sauce="plain")) == [
        "--sauce (was tomato, got plain)",
        "--tomato.salt (was 1.0, got None)",
    ]


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x", ""])
def test_device_that_cannot_be_used_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match="--device must be auto, cpu, cuda or cuda:N, got"):
        resolve_device(device)


def test_cuda_device_beyond_the_last_is_refused() -> None:
    with pytest.raises(UsageError, match=f"--device cuda:99: PyTorch sees {torch.cuda.device_count()} CUDA"):
        resolve_device("cuda:99")


def test_automatic_device_is_cuda_where_there_is_one() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("hint", [Path | None, int | None, float | None])
def test_none_is_nothing_on_a_command_line_where_an_option_may_be_nothing(hint: Any) -> None:
    assert converted("size", hint, "none", spoken=True) is None


def test_none_is_a_word_where_an_option_is_text() -> None:
    assert converted("bottleneck", str, "none", spoken=True) == "none"
