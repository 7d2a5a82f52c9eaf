import pytest

from rlhf.config import EntropySection, KLSection, RLSection
from rlhf.steering import steered

STILL = {"entropy/mean": 2.0, "entropy/coefficient": 0.0}


@pytest.mark.parametrize(
    ("mean", "factor"),
    [
        # Error -0.1, times 0.1; +1 and -1 are cut to a fifth.
        (4.5, 0.99),
        (10.0, 1.02),
        (0.0, 0.98),
        (5.0, 1.0),
        (-3.0, 0.98),
        (None, 1.0),
    ],
)
def test_coefficients_are_steered_towards_their_targets_by_hand(mean, factor):
    settings = RLSection(
        kl=KLSection(coefficient=0.5, target=5.0),
        entropy=EntropySection(coefficient=0.25, target=5.0),
    )
    last = {
        "kl/mean": mean,
        "kl/coefficient": 0.4,
        "entropy/mean": mean,
        "entropy/coefficient": 0.2,
    }
    found = steered(settings, last)
    # From where the last step was, not from where the run began; more entropy is less bonus.
    assert found.kl.coefficient == pytest.approx(0.4 * factor)
    assert found.entropy.coefficient == pytest.approx(0.2 * (2 - factor))


def test_without_targets_the_settings_hold_whatever_an_earlier_attempt_had():
    settings = RLSection(kl=KLSection(coefficient=0.5))
    last = {"kl/mean": 9.0, "kl/coefficient": 0.1, **STILL}
    assert steered(settings, last) == settings


def test_steered_long_enough_a_coefficient_holds_the_target():
    # A policy whose KL falls with the coefficient as 1 / coefficient.
    settings, coefficient = RLSection(kl=KLSection(target=5.0, rate=0.5)), 0.02
    for _ in range(200):
        last = {"kl/mean": 1 / coefficient, "kl/coefficient": coefficient, **STILL}
        coefficient = steered(settings, last).kl.coefficient
    assert 1 / coefficient == pytest.approx(5.0, rel=0.01)
