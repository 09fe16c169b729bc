"""Options of decoders, and what is said of one that had not converged."""

import pytest

from cem.attacks.decoder import Decoder, _state
from cem.attacks.fit import PUBLISHED, Fitted
from cem.attacks.networks import Average
from cem.errors import UsageError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"networks": ("preactN8",)}, "--decoder.networks preactN8: networks are named like preactN8C64"),
        ({"networks": ("deconvC8:huber",)}, "the loss must be one of mse, l1, ssim, got 'huber'"),
        ({"networks": ()}, "--decoder.networks needs at least one"),
        ({"networks": ("deconvC8", "deconvC8:mse")}, "--decoder.networks takes .* once, got deconvC8:mse twice"),
    ],
    ids=str,
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(UsageError, match=message):
        Decoder.Options(**options).checked("decoder.")


def test_the_first_cycle_follows_the_images_unless_it_is_given_and_the_published_schedule_is_one_option():
    assert [Decoder.Options().training(images).cycle_epochs for images in (591, 48_000)] == [5, 1]
    assert Decoder.Options(cycle_epochs=7, max_cycles=3).training(48_000).cycles() == [7, 14, 28]
    assert Decoder.Options(schedule="published", lr=1.0).training(591) == PUBLISHED


@pytest.mark.parametrize(
    ("converged", "cycles", "said"),
    [
        (True, [1.0, 0.99], "converged"),
        (None, [1.0], "was trained for the published number of epochs, converged or not"),
        (False, [1.0, 0.5], "had not converged: --decoder.max-cycles 6 would give it another one"),
        (
            False, [1.0, 0.9, 0.855],
            "had not converged: --decoder.max-cycles 6 would give it another one, and endless training might lower "
            "its MSE by 5%",
        ),
    ],
)  # fmt: skip
def test_a_network_that_had_not_converged_says_what_would_help_and_how_much(converged, cycles, said):
    assert _state(Fitted(Average([]), 0.0, [], cycles, 1, converged, 0.0), Decoder.Options()) == said
