"""What ``cem`` offers."""

import doctest

import pytest

import cem


@pytest.mark.parametrize("name", cem.__all__)
def test_the_example_of_a_public_name_does_what_it_shows(name):
    text = getattr(cem, name).__doc__ or ""
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    report = []
    assert test.examples, f"cem.{name} has no example"
    assert doctest.DocTestRunner().run(test, out=report.append).failed == 0, "".join(report)


def test_there_are_few_public_names():
    assert len(set(cem.__all__)) == len(cem.__all__) <= 17
