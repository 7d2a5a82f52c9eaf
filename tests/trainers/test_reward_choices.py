"""What cross-validation chooses for a reward model: what criteria tell of each other, and when not
to believe it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from models.head_fitting import Comparisons, ProbeGroup
from models.heads import TrainedHead
from tests.models.test_head_fitting import BOTH_L2, comparisons, related
from trainers.reward_choices import choose_correlations

CANDIDATES = [-0.9, -0.5, 0.0, 0.5, 0.9]
GROUP = ProbeGroup(0, 2, (BOTH_L2, BOTH_L2))


def chosen(
    pairs: Comparisons,
    folds_N: torch.Tensor,
    groups: Sequence[ProbeGroup | TrainedHead] = (GROUP,),
    candidates: Sequence[float] = CANDIDATES,
) -> tuple[dict[tuple[int, int], float], dict[str, dict[str, float]]]:
    return choose_correlations([pairs], [groups], folds_N, ["helpful", "honest"], candidates)


@pytest.mark.parametrize("planted", [-0.9, 0.9])
def test_criteria_that_agree_or_oppose_each_other_are_found_to(planted):
    pairs, _, folds_N = related(planted, few=120)
    correlations, losses = chosen(pairs, folds_N)
    assert correlations[0, 1] * planted > 0.4
    assert losses["helpful, honest"]["0"] - min(losses["helpful, honest"].values()) > 1


def test_of_few_verdicts_at_random_a_correlation_is_hardly_ever_believed():
    """Some candidate is always best by chance; few gain a nat by it (3 of 24 such draws)."""
    preferred = believed = 0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        difference_NH = torch.randn(60, 40, generator=generator)
        labels_N = (torch.rand(60, generator=generator) > 0.5).float()
        pairs = comparisons(difference_NH, labels_N, criterion_N=torch.arange(60) % 2)
        correlations, losses = chosen(pairs, torch.arange(60) % 5, [ProbeGroup(0, 2, (0.3, 0.3))])
        tried = losses["helpful, honest"]
        preferred += min(tried, key=tried.__getitem__) != "0"
        believed += correlations[0, 1] != 0
    assert preferred >= 6
    assert believed <= 2


def test_one_candidate_is_taken_untried_and_zero_keeps_criteria_apart():
    pairs, _, folds_N = related(-0.9)
    assert chosen(pairs, folds_N, candidates=[0.0]) == ({(0, 1): 0.0}, {})
    assert chosen(pairs, folds_N, candidates=[-0.3]) == ({(0, 1): -0.3}, {})


def test_without_a_zero_among_the_candidates_the_weakest_is_what_has_to_be_beaten():
    pairs, _, folds_N = related(-0.9, few=120)
    assert chosen(pairs, folds_N, candidates=[0.5, 0.9])[0] == {(0, 1): 0.5}


def test_trained_heads_say_nothing_of_criteria():
    pairs, _, folds_N = related(-0.9)
    trained = TrainedHead(0, 1, torch.zeros(2, 40))
    correlations, losses = chosen(pairs, folds_N, [trained])
    assert (correlations, losses) == ({(0, 1): 0.0}, {"helpful, honest": {}})
    assert chosen(pairs, folds_N, [trained, GROUP]) == chosen(pairs, folds_N)


def test_every_two_of_three_criteria_are_asked_about_and_loss_is_the_mean_over_groups():
    pairs, _, folds_N = related(-0.9, few=120)
    # A third criterion, of the verdicts at every fourth pair of the first.
    criterion_N = pairs.criterion_N.clone()
    criterion_N[(criterion_N == 0) & (torch.arange(len(criterion_N)) % 4 == 0)] = 2
    three = Comparisons(
        pairs.chosen_NFH,
        pairs.rejected_NFH,
        pairs.labels_N,
        pairs.weights_N,
        pairs.margins_N,
        criterion_N,
    )
    names = ["helpful", "honest", "harmless"]
    group = ProbeGroup(0, 2, (BOTH_L2,) * 3)
    correlations, losses = choose_correlations([three], [[group]], folds_N, names, CANDIDATES)
    assert list(losses) == ["helpful, honest", "helpful, harmless", "honest, harmless"]
    assert correlations[0, 1] < 0 < correlations[0, 2]
    assert correlations[1, 2] <= 0
    again = choose_correlations([three, three], [[group], [group]], folds_N, names, CANDIDATES)
    assert again[0] == correlations
    for name, tried in losses.items():
        assert again[1][name] == pytest.approx(tried)
