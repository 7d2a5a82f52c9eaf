"""Linear heads: they learn what was planted, each criterion its own, whoever stands beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.heads import (
    Comparisons,
    ProbeGroup,
    bootstrap,
    choose_l2,
    fit_heads,
    fit_probes,
    fit_temperature,
)
from rlhf.errors import PavlovError

PLANTED_H = torch.tensor([1.5, -1.0, 0.5, 0.0, 0.0, 2.0])
UNIT = (torch.zeros(6), torch.ones(6))


def differences(pairs: int, seed: int = 0) -> Tensor:
    return torch.randn(pairs, 6, generator=torch.Generator().manual_seed(seed))


def comparisons(
    difference_NH: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None = None,
    margins_N: Tensor | None = None,
    criterion_N: Tensor | None = None,
) -> Comparisons:
    """Pairs whose replies lie half a difference to either side of zero, in one family."""
    pairs = len(labels_N)
    return Comparisons(
        (difference_NH / 2).unsqueeze(1),
        (-difference_NH / 2).unsqueeze(1),
        labels_N,
        torch.ones(pairs) if weights_N is None else weights_N,
        torch.zeros(pairs) if margins_N is None else margins_N,
        torch.zeros(pairs, dtype=torch.long) if criterion_N is None else criterion_N,
    )


def fit(
    difference_NH: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None = None,
    *,
    members: int = 4,
    l2: float = 1e-4,
    seed: int = 0,
    first: int = 0,
) -> Tensor:
    pairs = comparisons(difference_NH, labels_N, weights_N)
    draws_KN = bootstrap(pairs.weights_N, members, seed, first)
    return fit_heads(pairs, 0, UNIT, draws_KN, torch.full((members,), l2))


def test_heads_recover_a_planted_linear_preference():
    difference_NH = differences(1500)
    labels_N = torch.bernoulli(
        torch.sigmoid(difference_NH @ PLANTED_H), generator=torch.Generator().manual_seed(1)
    )
    weights_KH = fit(difference_NH, labels_N, members=8)
    # 1,500 verdicts drawn at random: the standard error of a weight is about 0.1.
    torch.testing.assert_close(weights_KH.mean(dim=0), PLANTED_H, atol=0.35, rtol=0)
    cosines_K = torch.cosine_similarity(weights_KH, PLANTED_H.unsqueeze(0))
    assert cosines_K.min() > 0.97


def test_probabilities_as_labels_recover_the_planted_weights_themselves():
    difference_NH = differences(400)
    weights_KH = fit(difference_NH, torch.sigmoid(difference_NH @ PLANTED_H), l2=1e-7)
    torch.testing.assert_close(weights_KH, PLANTED_H.expand(4, 6), atol=0.02, rtol=0)


def test_every_member_is_at_the_minimum_of_its_own_loss():
    """Cross-entropy plus l2 * |w|^2 has no slope there."""
    # A bootstrap draw of one pair repeated is that pair: the loss of every member is known.
    difference_NH, l2 = differences(1).expand(60, 6), 0.05
    weights_KH = fit(difference_NH, torch.ones(60), l2=l2).requires_grad_()
    losses_K = -torch.nn.functional.logsigmoid(weights_KH @ difference_NH[0])
    (losses_K.sum() + l2 * weights_KH.square().sum()).backward()
    assert weights_KH.grad is not None
    assert weights_KH.grad.abs().max() < 1e-4
    assert weights_KH.abs().max() > 0.1


def test_bootstrap_members_differ_and_are_the_same_again_under_the_same_seed():
    difference_NH = differences(80)
    labels_N = (differences(80, 1)[:, 0] > 0).float()
    weights_KH = fit(difference_NH, labels_N)
    apart_KK = torch.cdist(weights_KH, weights_KH) + torch.eye(4)
    assert apart_KK.min() > 0.05
    assert torch.equal(fit(difference_NH, labels_N), weights_KH)
    assert not torch.allclose(fit(difference_NH, labels_N, seed=1), weights_KH, atol=0.01)


def test_a_member_does_not_depend_on_how_many_others_there_are():
    difference_NH = differences(80)
    labels_N = (differences(80, 1)[:, 0] > 0).float()
    few_KH, many_KH = (fit(difference_NH, labels_N, members=m, l2=0.01) for m in (2, 9))
    torch.testing.assert_close(few_KH, many_KH[:2], atol=5e-3, rtol=0)


def test_a_tie_pulls_to_neither_side_and_a_label_of_zero_to_the_other():
    difference_NH = differences(100)
    assert fit(difference_NH, torch.full((100,), 0.5)).abs().max() < 1e-3
    wins_KH = fit(difference_NH, torch.ones(100), l2=0.1)
    losses_KH = fit(difference_NH, torch.zeros(100), l2=0.1)
    torch.testing.assert_close(losses_KH, -wins_KH, atol=1e-3, rtol=0)


def test_a_pair_without_weight_has_no_say():
    difference_NH = differences(400)
    labels_N = torch.sigmoid(difference_NH @ PLANTED_H)
    weights_N = torch.ones(400)
    labels_N[200:], weights_N[200:] = 1 - labels_N[200:], 0.0
    weights_KH = fit(difference_NH, labels_N, weights_N, l2=1e-7)
    torch.testing.assert_close(weights_KH, PLANTED_H.expand(4, 6), atol=0.05, rtol=0)


def test_pairs_that_all_have_no_weight_never_give_heads_that_are_not_numbers():
    try:
        weights_KH = fit(differences(20), torch.ones(20), torch.zeros(20))
    except (ValueError, PavlovError):
        return
    assert torch.isfinite(weights_KH).all()


@pytest.mark.parametrize("planted", [0.3, 1.0, 4.0])
def test_the_temperature_that_was_planted_is_found(planted):
    margins_N = 2 * differences(3000).flatten()
    labels_N = torch.sigmoid(margins_N / planted)
    found = fit_temperature(margins_N, labels_N, torch.ones_like(margins_N))
    # The grid steps by 10 ** 0.025, about 6 %.
    assert found == pytest.approx(planted, rel=0.06)


def test_a_member_is_the_same_in_whatever_group_it_stands():
    difference_NH = differences(80)
    labels_N = (differences(80, 1)[:, 0] > 0).float()
    whole_KH = fit(difference_NH, labels_N, members=5, l2=0.01)
    later_KH = fit(difference_NH, labels_N, members=2, l2=0.01, first=3)
    torch.testing.assert_close(later_KH, whole_KH[3:], atol=5e-3, rtol=0)


def test_a_wanted_margin_pulls_the_rewards_apart_and_a_tie_has_none():
    difference_NH, ones_N = differences(200), torch.ones(200)
    labels_N = (difference_NH @ PLANTED_H > 0).float()
    draws_1N = (ones_N / 200).unsqueeze(0)
    l2_1 = torch.tensor([0.05])

    def margins_N(labels_N: Tensor, wanted: float) -> Tensor:
        pairs = comparisons(difference_NH, labels_N, margins_N=wanted * ones_N)
        return (fit_heads(pairs, 0, UNIT, draws_1N, l2_1) @ difference_NH.T)[0]

    assert margins_N(labels_N, 2.0).abs().mean() > 1.2 * margins_N(labels_N, 0.0).abs().mean()
    torch.testing.assert_close(
        margins_N(0.5 * ones_N, 2.0), margins_N(0.5 * ones_N, 0.0), atol=1e-3, rtol=0
    )


def test_centring_shrinks_the_sums_and_keeps_the_order():
    """What the replies of a pair share says nothing about the pair, and may still move rewards."""
    difference_NH = differences(300)
    shift_NH = 3 * differences(300, 1) + difference_NH
    labels_N = (difference_NH @ PLANTED_H > 0).float()
    draws_1N = torch.full((1, 300), 1 / 300)
    pairs = Comparisons(
        (shift_NH + difference_NH / 2).unsqueeze(1),
        (shift_NH - difference_NH / 2).unsqueeze(1),
        labels_N,
        torch.ones(300),
        torch.zeros(300),
        torch.zeros(300, dtype=torch.long),
    )

    def spread(centring: float) -> tuple[float, float]:
        weights_H = fit_heads(pairs, 0, UNIT, draws_1N, torch.tensor([1e-3]), centring=centring)[0]
        right_N = (difference_NH @ weights_H > 0) == (labels_N > 0)
        return float((2 * shift_NH @ weights_H).std()), float(right_N.float().mean())

    (free, _), (held, right) = spread(0.0), spread(0.05)
    assert held < 0.5 * free
    assert right > 0.9


def test_the_candidate_that_predicts_held_out_pairs_best_is_chosen():
    folds_N = torch.arange(300) % 5
    clean = comparisons(differences(300), (differences(300) @ PLANTED_H > 0).float())
    noise = comparisons(differences(300), (differences(300, 1)[:, 0] > 0).float())
    candidates = [0.001, 0.1, 10.0]
    l2, losses = choose_l2(clean, 0, candidates, folds_N)
    assert l2 == 0.001
    assert losses["0.001"] < losses["0.1"] < losses["10"] < 0.694
    assert choose_l2(noise, 0, candidates, folds_N)[0] != 0.001 or losses["0.001"] < 0.5
    assert choose_l2(noise, 0, [3.0], folds_N) == (3.0, {})


# Members, criteria and scales


@pytest.fixture(scope="module")
def opposed() -> Comparisons:
    """Criterion 0 is judged by the planted weights, criterion 1 by their opposite; two families,
    the second one without any sign of either."""
    difference_NH = differences(600)
    criterion_N = torch.arange(600) % 2
    wins_N = (difference_NH @ PLANTED_H > 0) == (criterion_N == 0)
    noise_NH = differences(600, 5)
    return Comparisons(
        torch.stack([difference_NH / 2, noise_NH], dim=1) + 3,
        torch.stack([-difference_NH / 2, -noise_NH], dim=1) + 3,
        wins_N.float(),
        torch.ones(600),
        torch.zeros(600),
        criterion_N,
    )


GROUPS = [ProbeGroup(0, 3, (0.01, 0.01)), ProbeGroup(1, 2, (0.01, 0.01))]


def test_criteria_that_oppose_each_other_are_each_learned_by_their_own_heads(opposed):
    heads = fit_probes(opposed, GROUPS, torch.tensor([0.5, 0.5]), 0)
    margins_KCN = heads.criteria(opposed.chosen_NFH) - heads.criteria(opposed.rejected_NFH)
    right_KCN = (margins_KCN > 0) == (opposed.labels_N > 0)
    for criterion in range(2):
        own_N = opposed.criterion_N == criterion
        assert right_KCN[:3, criterion, own_N].float().mean() > 0.95
        assert right_KCN[:3, criterion, ~own_N].float().mean() < 0.05


def test_the_reward_is_the_stated_combination(opposed):
    only_second = fit_probes(opposed, GROUPS, torch.tensor([0.0, 1.0]), 0)
    replies_NFH = opposed.replies_NFH
    torch.testing.assert_close(
        only_second.rewards(replies_NFH),
        only_second.criteria(replies_NFH)[:, 1],
        atol=1e-3,
        rtol=1e-3,
    )
    mixed = fit_probes(opposed, GROUPS, torch.tensor([1.0, 3.0]), 0)
    criteria_KCN = mixed.criteria(replies_NFH)
    wanted_KN = criteria_KCN[:, 0] + 3 * criteria_KCN[:, 1]
    torch.testing.assert_close(
        mixed.rewards(replies_NFH), wanted_KN / wanted_KN.std(dim=1, keepdim=True)
    )


def test_members_criteria_and_rewards_have_mean_zero_and_deviation_one_on_the_training_replies(
    opposed,
):
    heads = fit_probes(opposed, GROUPS, torch.tensor([1.0, -0.5]), 0)
    for values in (heads.criteria(opposed.replies_NFH), heads.rewards(opposed.replies_NFH)):
        torch.testing.assert_close(
            values.mean(dim=-1), torch.zeros(values.shape[:-1]), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            values.std(dim=-1), torch.ones(values.shape[:-1]), atol=1e-3, rtol=0
        )


def test_each_member_reads_its_own_family(opposed):
    heads = fit_probes(opposed, GROUPS, torch.tensor([1.0, 0.0]), 0)
    assert heads.family_K.tolist() == [0, 0, 0, 1, 1]
    moved_NFH = opposed.chosen_NFH.clone()
    moved_NFH[:, 1] += 1
    changed_KN = heads.rewards(moved_NFH) - heads.rewards(opposed.chosen_NFH)
    assert changed_KN[:3].abs().max() == 0
    assert changed_KN[3:].abs().min() > 0


def test_a_criterion_whose_pairs_have_no_weight_is_refused(opposed):
    weights_N = (opposed.criterion_N == 0).float()
    pairs = Comparisons(
        opposed.chosen_NFH,
        opposed.rejected_NFH,
        opposed.labels_N,
        weights_N,
        opposed.margins_N,
        opposed.criterion_N,
    )
    with pytest.raises(PavlovError, match="weight 0"):
        fit_probes(pairs, GROUPS, torch.tensor([1.0, 1.0]), 0)
