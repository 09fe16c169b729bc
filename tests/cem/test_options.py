"""Options: their types and ranges, the way to YAML and back, and options that choose members of families."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from kitchen import Basil, Cream, Oven, Pizza, Tomato

from cem.errors import UsageError
from cem.options import FORMAT, Options, converted, differences, helps, nearest, resolve_device

OVEN = Oven(200.0, 0.25, 10, 1, 2, True, "bottom", "low", ("low",), (3, 5), Path("a/b"), 2.5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("minutes", 2.5, "takes a whole number, got 2.5"),
        ("minutes", True, "takes a whole number, got True"),
        ("minutes", None, "takes a whole number, got None"),
        ("degrees", "hot", "takes a number, got 'hot'"),
        ("fan", 1, "takes true or false, got 1"),
        ("shelf", 18, "takes text, got 18"),
        ("recipe", 3, "takes a path or nothing (null), got 3"),
        ("heat", "left", "takes one of top, bottom, got 'left'"),
        ("trays", "all", "takes a whole number or nothing (null), got 'all'"),
        ("times", 3, "takes a list of: a whole number, got 3"),
        ("times", ["3"], "takes a whole number, got '3'"),
        ("degrees", 10**400, f"takes a number, got 1{'0' * 17}...{'0' * 19}"),
        ("recipe", " ", "takes a path or nothing (null), got ' '"),
        ("recipe", "~no-such-user/x", "takes a path or nothing (null), got '~no-such-user/x'"),
        ("speed", "fast", "takes a number or one of slow, got 'fast'"),
        ("degrees", -1.0, "must be at least 0 and at most 300, got -1.0"),
        ("degrees", 301.0, "must be at least 0 and at most 300, got 301.0"),
        ("degrees", float("nan"), "must be at least 0 and at most 300, got nan"),
        ("share", 0.0, "must be above 0 and below 1, got 0.0"),
        ("share", 1.0, "must be above 0 and below 1, got 1.0"),
        ("speed", float("inf"), "must be finite and above 0, got inf"),
        ("minutes", 0, "must be at least 1, got 0"),
        ("minutes", 10**20, f"must be at least 1 and below 2**63, got {10**20}"),
        ("seed", 2**32, "must be below 4294967296, got 4294967296"),
        ("times", (3, 0), "must be at least 1, got 0"),
        ("shelf", "attic", "must be one of low, middle, got 'attic'"),
        ("shelves", ("low", "attic"), "must be one of low, middle, got 'attic'"),
    ],
)
def test_wrong_type_or_range_is_refused_with_option_and_value(name, value, message):
    attempts = [replace(Oven(), **{name: value}).checked]
    if message.startswith("takes"):  # a wrong type is none in a file either
        attempts.append(lambda: Oven.from_dict({name: value}))
    for attempt in attempts:
        with pytest.raises(UsageError) as error:
            attempt()
        assert str(error.value) == f"--{name} {message}"


def test_checked_options_have_the_types_of_their_fields_and_may_lie_on_a_bound():
    checked = Oven(degrees=300, recipe=Path("~/b"), times=[3], speed="2").checked()
    assert checked == Oven(degrees=300.0, recipe=Path.home() / "b", times=(3,), speed=2.0)
    assert isinstance(checked.degrees, float)
    assert Oven(degrees=0.0).checked().degrees == 0
    with pytest.raises(UsageError, match="--fan takes --heat top"):
        Oven(fan=True, heat="bottom").checked()


def test_yaml_gives_back_every_option_from_plain_values_under_a_comment(tmp_path):
    default, path = Oven().to_dict(), tmp_path / "oven.yaml"
    same = [name for name, value in OVEN.to_dict().items() if value == default[name]]
    assert same == [], "the example must differ from the default in every option"
    for each in (Oven(), OVEN):
        each.to_yaml(path, comment="by hand")
        assert Oven.from_yaml(path) == each
    assert path.read_text().startswith(f"# by hand\nformat: {FORMAT}\ndegrees: 200.0\n")
    values = yaml.safe_load(path.read_text())
    assert (values["times"], values["recipe"], values["speed"]) == ([3, 5], "a/b", 2.5)
    path.write_text("share: 1e-4\n")  # which YAML reads as text, for want of a point
    assert Oven.from_yaml(path) == Oven(share=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((content, r"oven\.yaml must hold a mapping .* got") for content in ("- epochs\n", "epochs\n", "")),
        (None, r"cannot read options from .*oven\.yaml: No such file or directory$"),
        ("a: [1\n", r"oven\.yaml: line 2, column 1: expected"),
        ("a:\t1", r"oven\.yaml: line 1, column 3: found character '\\t'"),
        ("a: " + 9999 * "[", r"oven\.yaml: too many brackets$"),
        ("a: &a [1]\ntimes: [*a, *a]", r"oven\.yaml: line 2, column 9: options are written out, \*a is not$"),
        ("seed: 1\nseed: 2\n", r"oven\.yaml: line 2, column 1: seed stands in line 1 already$"),
        ("{preheat-to: 1, preheat_to: 2}", r"oven\.yaml: line 1, column 17: preheat_to stands in line 1 already$"),
        ("a: \udcff", r"oven\.yaml: byte 3 is not UTF-8 text$"),
        ("minute: 3\n", r"oven\.yaml: there is no option minute; did you mean minutes\?$"),
    ],
)
def test_yaml_that_cannot_be_used_is_refused_by_name(tmp_path, content, message):
    if content is not None:
        (tmp_path / "oven.yaml").write_text(content, errors="surrogateescape")
    with pytest.raises(UsageError, match=message):
        Oven.from_yaml(tmp_path / "oven.yaml")


def test_help_is_what_the_docstring_says_and_a_hint_is_given_only_where_something_is_near():
    said = {"degrees": "How hot.", "share": "Part of the tray, 50 % if nobody says."}
    assert helps(Oven) == said | {"fan": "Whether it turns.", "shelves": "All of them."}
    assert helps(Options) == {}
    assert nearest("bach-size", ["batch_size", "lr"]) == "; did you mean batch_size?"
    assert nearest("temperature", ["batch_size", "lr"]) == ""


def test_checked_members_stand_in_order_under_their_own_names_with_options_given_or_default():
    assert list(Pizza(sauce="cream", toppings=("olives", "basil")).chosen()) == ["cream", "olives", "basil"]
    checked = Pizza(sauce="red", toppings=("basil",), members={"basil": Basil.Options(salt=2.0)}).checked()
    assert (checked.sauce, checked.toppings) == ("tomato", ("basil",))
    assert checked.members == {"tomato": Tomato.Options(salt=1.0), "basil": Basil.Options(salt=2.0)}


def test_yaml_gives_back_the_options_of_members_that_have_any(tmp_path):
    pizza = Pizza("cream", ("olives",), 20, members={"cream": Cream.Options(0.1, "sour")}).checked()
    pizza.to_yaml(tmp_path / "pizza.yaml")
    assert Pizza.from_yaml(tmp_path / "pizza.yaml") == pizza
    assert yaml.safe_load((tmp_path / "pizza.yaml").read_text())["cream"] == {"fat": 0.1, "kind": "sour"}
    assert Pizza(sauce="plain", toppings=("basil",)).to_dict().keys() == {"sauce", "toppings", "size", "basil"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cream": {"fat": 0.1}}, "^cream is an option of cream, which is not chosen; give --sauce cream with it$"),
        ({"basil": {}}, "^basil is an option of basil, which is not chosen; give --toppings basil with it$"),
        ({"tomatoe": {"salt": 1}}, r"^there is no option tomatoe; did you mean tomato\?$"),
        ({"tomato": {"sallt": 1}}, r"^there is no option tomato\.sallt; did you mean salt\?$"),
        ({"tomato": {"salt": "much"}}, r"^--tomato\.salt takes a number, got 'much'$"),
        ({"tomato": {"salt": -1.0}}, r"^--tomato\.salt must be finite and at least 0, got -1\.0$"),
        ({"tomato": 3}, "^tomato holds the options of tomato, as a mapping of names to values, got 3$"),
        ({"sauce": "cream", "cream": {"kind": "old"}}, r"^--cream\.kind must be one of sweet, sour, got 'old'$"),
        ({"siz": 3}, r"^there is no option siz; did you mean size\?$"),
        ({"sauce": "pesto"}, r"--sauce takes tomato, cream, plain, or .* got 'pesto'"),
        ({"toppings": ["basil", "olives", "basil"]}, "--toppings names basil twice"),
    ],
)
def test_members_that_cannot_be_chosen_and_their_options_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        Pizza.from_dict(values).checked()
    with pytest.raises(UsageError, match="cream, which is not chosen; give --sauce cream with it"):
        Pizza(members={"cream": Cream.Options()}).checked()


def test_differences_name_options_and_those_of_members_with_both_values():
    before = Pizza(toppings=("basil",))
    assert differences(before, before) == []
    after = replace(before, size=20, members={"basil": Basil.Options(salt=0.5)})
    assert differences(before, after) == ["--size (was 30, got 20)", "--basil.salt (was 1.0, got 0.5)"]
    assert differences(before, after, ignored=("size",)) == ["--basil.salt (was 1.0, got 0.5)"]
    gone = ["--sauce (was tomato, got plain)", "--tomato.salt (was 1.0, got None)"]
    assert differences(Pizza(), Pizza(sauce="plain")) == gone


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x", "", "cuda:256", "cuda:99"])
def test_device_that_cannot_be_used_is_refused_and_auto_is_cuda_where_there_is_one(device):
    known = f"--device cuda:99: PyTorch sees {torch.cuda.device_count()} CUDA"
    message = known if device == "cuda:99" else "--device must be auto, cpu, cuda or cuda:N, got"
    with pytest.raises(UsageError, match=message):
        resolve_device(device)
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_none_on_a_command_line_is_nothing_but_where_an_option_is_text():
    assert [converted("size", hint, "none", spoken=True) for hint in (Path | None, int | None, float | None)] == [
        None
    ] * 3
    assert converted("bottleneck", str, "none", spoken=True) == "none"
