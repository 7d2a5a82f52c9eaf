import math
from dataclasses import replace

import numpy as np
import pytest

from labelling.fatigue import (
    Course,
    FatigueSettings,
    _Line,
    adjusted_seconds,
    fatigue,
    right_by_others,
)
from labelling.pool import columns, fit
from labelling.records import Judgement
from labelling.worlds import SimulatedPerson, World, play
from rlhf.records import OVERALL


def judged(pair, assessor, verdict, **more):
    return Judgement(pair, assessor, {OVERALL: verdict}, "a", **more)


def log_seconds(seed, count, *, onset=None, practice=0.5, spread=0.5):
    noise = np.random.default_rng(seed).normal(0, spread, count)
    number = np.arange(count)
    log_n = math.log(30) + np.log1p(practice * np.exp(-number / 25)) + noise
    if onset is not None:
        log_n[onset:] += math.log(0.6)
    return log_n


def alone(log_n, right_n=None, settings=None):
    right_n = np.full(len(log_n), np.nan) if right_n is None else right_n
    pot_n = np.zeros(len(log_n), dtype=bool)
    return Course(settings or FatigueSettings(), math.log(30)).shift(log_n, right_n, pot_n, 0)


def test_the_predictive_of_seconds_is_the_students_t_of_its_prior():
    # One feature, mean 0, covariance 3 over the variance, shape 2, rate 0.5: of value 1 the
    # predictive is Student-t with 4 degrees of freedom and squared scale 0.5 / 2 * (1 + 3) = 1.
    line = _Line(np.zeros((1, 1)), np.array([[3.0]]), 2.0, np.array([0.5]))
    expected = math.log(math.gamma(2.5) / (math.gamma(2) * math.sqrt(4 * math.pi))) - 2.5 * (
        math.log(1 + 1 / 4)
    )
    assert line.learn(np.ones(1), np.ones(1))[0] == pytest.approx(expected)
    # Posterior: mean 3 / 4, covariance 3 / 4, shape 2.5, rate 0.5 + 1 / 2 / 4.
    assert line.mean_KF[0, 0] == pytest.approx(0.75)
    assert line.covariance_FF[0, 0] == pytest.approx(0.75)
    assert (line.shape, line.rate_K[0]) == (2.5, pytest.approx(0.625))


def test_a_tired_shift_is_found_soon_and_its_onset_nearly_where_it_was():
    found = [alone(log_seconds(seed, 200, onset=100)) for seed in range(20)]
    soon = [one for one in found if one is not None and 100 <= one[1] <= 135]
    assert len(soon) >= 14
    assert abs(np.median([one[0] for one in soon]) - 100) <= 4


def test_shifts_without_fatigue_are_let_be_though_everybody_gets_faster_by_practice():
    found = [alone(log_seconds(seed, 200, practice=0.8)) for seed in range(60)]
    assert sum(one is not None for one in found) <= 5


def test_errors_alone_are_found_as_well():
    draw = np.random.default_rng(0)
    right_n = np.concatenate([draw.random(150) < 0.97, draw.random(150) < 0.5]).astype(float)
    settings = FatigueSettings(accuracy=0.4)
    onset, found, seconds, accuracy = alone(np.full(300, np.nan), right_n, settings)
    assert 135 <= onset <= 165 and onset <= found <= 190
    assert seconds == 0 and accuracy > 3


def test_the_words_are_taken_out_and_a_telephone_call_is_clipped():
    draw = np.random.default_rng(0)
    rows = []
    for at in range(200):
        words = int(draw.integers(20, 2000))
        seconds = 2 * words**0.5 * math.exp(draw.normal(0, 0.1))
        rows.append(judged(f"{at}", "x", "a", seconds=seconds, words=(words, 0), at=at))
    rows[7] = replace(rows[7], seconds=1700.0)
    left = adjusted_seconds(rows, columns(rows))
    assert left.std() < 0.15
    assert left.max() < np.median(left) + 0.5


def test_windows_say_where_and_when_in_the_sequence_that_was_given():
    people = tuple(
        SimulatedPerson(f"p{at}", fatigue_onset=80 if at == 0 else None, spread=0.3)
        for at in range(8)
    )
    judgements = play(World(people, each=140), 0).judgements
    judgements = [replace(row, at=row.at + 1e9) for row in judgements]
    windows = [window for window in fatigue(judgements) if window.assessor == "p0"]
    assert len(windows) == 1
    [window] = windows
    mine = [at for at, row in enumerate(judgements) if row.assessor == "p0"]
    assert window.onset == mine[window.onset_number - 1]
    assert window.found == mine[window.found_number - 1]
    assert window.end == mine[-1]
    assert judgements[window.onset].at == window.onset_at
    assert abs(window.onset_number - 80) <= 12 and window.found_number <= 110
    assert window.seconds_evidence > 0


def test_a_shift_ends_with_half_an_hour_without_a_judgement():
    log_n = log_seconds(3, 160, onset=80, practice=0, spread=0.2)
    rows = [
        judged(f"{at}", "x", "tie", seconds=math.exp(log_n[at]), at=60.0 * at) for at in range(160)
    ]
    [window] = fatigue(rows)
    assert window.end == 159
    # The same seconds, but on another day from judgement 100 on: the shift ends there.
    later = [replace(row, at=row.at + 1e5 * (at >= 100)) for at, row in enumerate(rows)]
    assert fatigue(later)[0].end == 99


def test_known_truth_and_the_others_say_what_is_right_and_ties_say_nothing():
    rows = [
        judged("pot", "x", "b", truth="a", at=0),
        judged("pot-2", "x", "tie", truth="tie", at=1),
        judged("1", "x", "tie", at=2),
        judged("2", "x", "a", at=3),
        judged("2", "y", "a", at=4),
        judged("3", "x", "a", at=5),
    ]
    data = columns(rows)
    right = right_by_others(data, fit(data))
    assert list(right[:2]) == [0, 1]
    assert math.isnan(right[2])
    assert 0.6 < right[3] < 1
    assert right[5] == pytest.approx(0.5)


def test_unknown_seconds_and_nothing_at_all_are_no_fatigue():
    assert fatigue([]) == []
    assert fatigue([judged(f"{at}", "x", "tie", at=at) for at in range(50)]) == []
    assert fatigue([judged("1", "x", "a", seconds=0.0)]) == []


def test_judgements_without_a_time_or_without_seconds_tell_no_fatigue():
    """Those of other tools: 60 pairs that all agree on, then 60 that nobody does."""
    draw = np.random.default_rng(0)
    rows = [
        judged(f"{at}", f"p{who}", "a" if at < 60 or draw.random() < 0.5 else "b", seconds=9.0)
        for who in range(30)
        for at in range(120)
    ]
    assert fatigue(rows) == []
    unmeasured = [
        replace(row, at=1e9 + 30 * place, seconds=math.nan) for place, row in enumerate(rows)
    ]
    assert fatigue(unmeasured) == []


def test_the_rest_of_a_shift_is_told_by_where_it_stands_in_the_sequence():
    log_n = log_seconds(3, 160, onset=80, practice=0, spread=0.2)
    rows = [
        judged(f"{at}", "x", "tie", seconds=math.exp(log_n[at]), at=1e9 + 60.0 * at)
        for at in range(160)
    ]
    [window] = fatigue(rows)
    timeless = [judged(f"old {at}", "x", "tie", seconds=9.0) for at in range(40)]
    [same] = fatigue([*rows, *timeless])
    assert (same.onset, same.end) == (window.onset, window.end)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="false_break_rate 1"):
        FatigueSettings(false_break_rate=1)
    with pytest.raises(ValueError, match=r"speed 1\.5"):
        FatigueSettings(speed=1.5)
