"""Linear heads: they learn what was planted, each criterion its own, whoever stands beside them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.heads import (
    Comparisons,
    ProbeGroup,
    bootstrap,
    choose_l2,
    fit_heads,
    fit_members,
    fit_temperature,
    rescaled,
)
from rlhf.ensemble import whitening
from rlhf.errors import DataError

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
    """Bradley-Terry with margins, plus centring, plus l2 * |w|^2 has no slope there."""
    pairs = replace(
        comparisons(differences(60), torch.linspace(0, 1, 60), differences(60, 1)[:, 0].square()),
        margins_N=differences(60, 2)[:, 0].abs(),
    )
    # What the replies of a pair share, so that centring has something to do.
    shared_NF1H = differences(60, 3).unsqueeze(1)
    pairs = replace(
        pairs,
        chosen_NFH=pairs.chosen_NFH + shared_NF1H,
        rejected_NFH=pairs.rejected_NFH + shared_NF1H,
    )
    mean_H, deviation_H = torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6)
    l2_K, centring = torch.tensor([0.01, 0.1, 1.0]), 0.2
    draws_KN = bootstrap(pairs.weights_N, 3, 0)
    weights_KH = fit_heads(pairs, 0, (mean_H, deviation_H), draws_KN, l2_K, centring=centring)
    weights_KH.requires_grad_()

    chosen_KN, rejected_KN = (
        weights_KH @ ((replies_NFH[:, 0] - mean_H) / deviation_H).T
        for replies_NFH in (pairs.chosen_NFH, pairs.rejected_NFH)
    )
    logits_KN = chosen_KN - rejected_KN - pairs.margins_N * (2 * pairs.labels_N - 1)
    losses_KN = -pairs.labels_N * F.logsigmoid(logits_KN)
    losses_KN = losses_KN - (1 - pairs.labels_N) * F.logsigmoid(-logits_KN)
    losses_KN = losses_KN + centring * (chosen_KN + rejected_KN).square()
    losses_K = (draws_KN * losses_KN).sum(dim=1) + l2_K * weights_KH.square().sum(dim=1)
    losses_K.sum().backward()
    assert weights_KH.grad is not None
    assert weights_KH.grad.abs().max() < 1e-3
    assert weights_KH.abs().max(dim=1).values.min() > 0.02


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


def test_pairs_that_all_have_no_weight_are_refused():
    with pytest.raises(DataError, match="every pair has weight 0: there is nothing to train on"):
        fit(differences(20), torch.ones(20), torch.zeros(20))


def test_a_bootstrap_draw_is_one_of_as_many_pairs_as_count_each_by_its_weight():
    weights_N = torch.tensor([1.0, 0.0, 2.0, 1.0])
    draws_KN = bootstrap(weights_N, 200, 0)
    torch.testing.assert_close(draws_KN.sum(dim=1), torch.ones(200))
    assert not draws_KN[:, 1].any()
    for draw_N in draws_KN[:20]:
        # Three pairs drawn with replacement; of weights w the draw has counts c with c w / sum.
        unscaled_N = draw_N[weights_N > 0] / weights_N[weights_N > 0]
        counts_N = unscaled_N * 3 / unscaled_N.sum()
        torch.testing.assert_close(counts_N, counts_N.round(), atol=1e-4, rtol=0)


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


def test_centring_shrinks_the_sums_and_not_the_differences():
    """What the replies of a pair share says nothing about the pair, and may still move rewards."""
    difference_NH, shift_NH = differences(300), 3 * differences(300, 1)
    # Pairs differ in the first half of the features, and lie elsewhere in the second half.
    difference_NH[:, 3:] /= 10
    shift_NH[:, :3] = 0
    labels_N = torch.sigmoid(difference_NH @ (PLANTED_H + 3))
    pairs = replace(
        comparisons(difference_NH, labels_N),
        chosen_NFH=(shift_NH + difference_NH / 2).unsqueeze(1),
        rejected_NFH=(shift_NH - difference_NH / 2).unsqueeze(1),
    )
    draws_1N = torch.full((1, 300), 1 / 300)

    def spread(centring: float) -> tuple[float, float]:
        weights_H = fit_heads(pairs, 0, UNIT, draws_1N, torch.tensor([1e-3]), centring=centring)[0]
        return float((2 * shift_NH @ weights_H).std()), float((difference_NH @ weights_H).std())

    (free_sums, free), (held_sums, held) = spread(0.0), spread(0.05)
    assert held_sums < 0.3 * free_sums
    assert held > 0.9 * free


CANDIDATES = [0.001, 0.1, 10.0]


def verdicts(signal: float) -> Comparisons:
    """Few pairs in many features, judged by the first one as far as `signal` says."""
    difference_NH = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    probabilities_N = torch.sigmoid(signal * difference_NH[:, 0])
    labels_N = torch.bernoulli(probabilities_N, generator=torch.Generator().manual_seed(1))
    return comparisons(difference_NH, labels_N)


def test_clean_verdicts_are_given_a_smaller_l2_than_noise():
    folds_N = torch.arange(300) % 5
    clean = comparisons(differences(300), torch.sigmoid(differences(300) @ PLANTED_H))
    l2, losses = choose_l2(clean, 0, CANDIDATES, folds_N)
    assert (l2, list(losses)) == (0.001, ["0.001", "0.1", "10"])
    assert losses["0.001"] == min(losses.values())
    # Each after its own temperature: a head that l2 made small is not taken for an unsure one.
    assert losses["10"] < 0.5
    l2, losses = choose_l2(verdicts(signal=0.0), 0, CANDIDATES, torch.arange(200) % 5)
    assert l2 == 10.0
    # Heads of noise predict nothing: one temperature brings them back to a coin, no further.
    assert losses["10"] == min(losses.values()) == pytest.approx(math.log(2), abs=0.005)


def test_the_candidate_is_chosen_by_pairs_that_its_heads_did_not_see():
    # On the pairs that it is fitted on the smallest l2 always wins.
    pairs = verdicts(signal=2.0)
    seen = fit_heads(
        pairs,
        0,
        (torch.zeros(100), torch.ones(100)),
        torch.full((3, 200), 1 / 200),
        torch.tensor(CANDIDATES),
    )
    margins_LN = seen @ (pairs.chosen_NFH - pairs.rejected_NFH)[:, 0].T
    right_LN = (margins_LN > 0) == (pairs.labels_N > 0)
    assert right_LN.float().mean(dim=1).argmax() == 0
    assert choose_l2(pairs, 0, CANDIDATES, torch.arange(200) % 5)[0] != 0.001


def test_a_weaker_l2_is_preferred_as_long_as_it_keeps_nine_tenths_of_the_gain():
    pairs, folds_N = verdicts(signal=2.0), torch.arange(200) % 5
    candidates = [0.001, 0.03, 0.05, 0.06, 0.08, 0.1, 0.2, 0.3]
    chosen, losses = choose_l2(pairs, 0, candidates, folds_N)
    coin = float(torch.nn.functional.binary_cross_entropy(torch.full((200,), 0.5), pairs.labels_N))
    gains = {l2: coin - losses[f"{l2:g}"] for l2 in candidates}
    best = max(candidates, key=gains.__getitem__)
    # Not the best one: the first that is nearly as good.
    assert chosen < best
    assert gains[chosen] >= 0.9 * gains[best]
    assert all(gains[l2] < 0.9 * gains[best] for l2 in candidates if l2 < chosen)
    assert chosen > 0.001


def test_a_pair_without_weight_does_not_choose():
    pairs = verdicts(signal=2.0)
    dead = replace(pairs, labels_N=1 - pairs.labels_N, weights_N=torch.zeros(200))
    both = Comparisons(
        *(torch.cat([getattr(pairs, f.name), getattr(dead, f.name)]) for f in fields(Comparisons))
    )
    folds_N = torch.arange(200) % 5
    alone = choose_l2(pairs, 0, CANDIDATES, folds_N)
    with_dead = choose_l2(both, 0, CANDIDATES, torch.cat([folds_N, folds_N]))
    assert with_dead[0] == alone[0]
    assert with_dead[1] == pytest.approx(alone[1], abs=1e-3)


def test_a_single_candidate_is_taken_untried():
    assert choose_l2(verdicts(0.0), 0, [3.0], torch.arange(200) % 5) == (3.0, {})


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
    heads = fit_members(opposed, GROUPS, torch.tensor([0.5, 0.5]), 0)
    margins_KCN = heads.criteria(opposed.chosen_NFH) - heads.criteria(opposed.rejected_NFH)
    right_KCN = (margins_KCN > 0) == (opposed.labels_N > 0)
    for criterion in range(2):
        own_N = opposed.criterion_N == criterion
        assert right_KCN[:3, criterion, own_N].float().mean() > 0.95
        assert right_KCN[:3, criterion, ~own_N].float().mean() < 0.05


def test_the_reward_is_the_stated_combination(opposed):
    only_second = fit_members(opposed, GROUPS, torch.tensor([0.0, 1.0]), 0)
    replies_NFH = opposed.replies_NFH
    torch.testing.assert_close(
        only_second.rewards(replies_NFH),
        only_second.criteria(replies_NFH)[:, 1],
        atol=1e-3,
        rtol=1e-3,
    )
    mixed = fit_members(opposed, GROUPS, torch.tensor([1.0, 3.0]), 0)
    criteria_KCN = mixed.criteria(replies_NFH)
    wanted_KN = criteria_KCN[:, 0] + 3 * criteria_KCN[:, 1]
    torch.testing.assert_close(
        mixed.rewards(replies_NFH), wanted_KN / wanted_KN.std(dim=1, keepdim=True)
    )


def test_members_criteria_and_rewards_have_mean_zero_and_deviation_one_on_the_training_replies(
    opposed,
):
    heads = fit_members(opposed, GROUPS, torch.tensor([1.0, -0.5]), 0)
    for values in (heads.criteria(opposed.replies_NFH), heads.rewards(opposed.replies_NFH)):
        torch.testing.assert_close(
            values.mean(dim=-1), torch.zeros(values.shape[:-1]), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            values.std(dim=-1), torch.ones(values.shape[:-1]), atol=1e-3, rtol=0
        )


def test_each_member_reads_its_own_family(opposed):
    heads = fit_members(opposed, GROUPS, torch.tensor([1.0, 0.0]), 0)
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
    with pytest.raises(DataError, match="weight 0"):
        fit_members(pairs, GROUPS, torch.tensor([1.0, 1.0]), 0)


def test_members_do_not_depend_on_the_groups_before_and_after_them(opposed):
    """A member is its number's: the groups beside it may change in anything but their count."""
    combination_C = torch.tensor([1.0, 0.0])
    both = fit_members(opposed, GROUPS, combination_C, 0).weights_KCH
    alone = fit_members(opposed, GROUPS[:1], combination_C, 0).weights_KCH
    torch.testing.assert_close(both[:3], alone, atol=5e-3, rtol=0)
    other = ProbeGroup(1, 3, (3.0, 3.0), centring=0.5)
    beside = fit_members(opposed, [other, GROUPS[1]], combination_C, 0).weights_KCH
    torch.testing.assert_close(both[3:], beside[3:], atol=5e-3, rtol=0)
    assert (both[3:].abs().amax(dim=2) > 0.01).all()


def test_two_groups_alike_are_one_group_of_as_many_members(opposed):
    half, combination_C = ProbeGroup(0, 2, (0.01, 0.01)), torch.tensor([1.0, 0.0])
    halves = fit_members(opposed, [half, half], combination_C, 0).weights_KCH
    whole = fit_members(opposed, [replace(half, count=4)], combination_C, 0).weights_KCH
    torch.testing.assert_close(halves, whole, atol=5e-3, rtol=0)
    assert (halves[:2] - halves[2:]).abs().max() > 0.05


def test_a_group_is_centred_as_it_says(opposed):
    # Chosen replies that lie anywhere from 0 to 6: the sums of a pair are far from even.
    chosen_NFH = opposed.chosen_NFH * torch.linspace(0, 2, 600)[:, None, None]
    pairs, free = replace(opposed, chosen_NFH=chosen_NFH), ProbeGroup(0, 2, (0.01, 0.01))
    heads = fit_members(pairs, [free, replace(free, centring=10.0)], torch.ones(2), 0)
    sums_KCN = heads.raw(pairs.chosen_NFH) + heads.raw(pairs.rejected_NFH)
    assert sums_KCN[2:].square().mean() < 0.5 * sums_KCN[:2].square().mean()


def test_each_criterion_has_an_l2_of_its_own(opposed):
    def sizes_C(*l2_C: float) -> Tensor:
        heads = fit_members(opposed, [ProbeGroup(0, 2, l2_C)], torch.tensor([1.0, 1.0]), 0)
        return heads.weights_KCH.norm(dim=2).mean(dim=0)

    even_C, held_C = sizes_C(0.01, 0.01), sizes_C(0.01, 10.0)
    assert held_C[0].item() == pytest.approx(even_C[0].item(), rel=0.01)
    assert held_C[1] < 0.2 * even_C[1]


def test_raw_differences_are_log_odds_on_standardised_features():
    # One family, one head: chosen (4) and rejected (1) lie 3 apart in a feature of deviation 3/2.
    pairs = comparisons(torch.zeros(2, 1), torch.ones(2))
    heads = fit_members(
        replace(pairs, chosen_NFH=torch.tensor([[[4.0]], [[1.0]]])),
        [ProbeGroup(0, 1, (0.1,))],
        torch.ones(1),
        0,
    )
    shifted = replace(
        heads,
        weights_KCH=torch.tensor([[[2.0]]]),
        feature_mean_FH=torch.tensor([[1.0]]),
        feature_deviation_FH=torch.tensor([[1.5]]),
    )
    assert shifted.raw(torch.tensor([[[4.0]], [[1.0]]])).flatten().tolist() == [4.0, 0.0]


def test_distance_is_that_from_the_training_replies_in_each_family(opposed):
    heads = fit_members(opposed, GROUPS, torch.tensor([1.0, 0.0]), 0)
    replies_NFH = opposed.replies_NFH
    own_FN = heads.distances(replies_NFH)
    far_NFH = replies_NFH.clone()
    far_NFH[:, 1] += 5
    far_FN = heads.distances(far_NFH)
    assert torch.equal(far_FN[0], own_FN[0])
    assert far_FN[1].min() > own_FN[1].median()
    # By the family's own mean, deviation and covariance.
    for family in range(2):
        part_NH = replies_NFH[:, family]
        standard_NH = (part_NH - part_NH.mean(dim=0)) / part_NH.std(dim=0)
        wanted_N = (standard_NH @ whitening(standard_NH).T).norm(dim=1)
        torch.testing.assert_close(own_FN[family], wanted_N, atol=1e-3, rtol=1e-3)


def test_scales_can_be_taken_anew_from_other_replies(opposed):
    heads = fit_members(opposed, GROUPS, torch.tensor([1.0, 2.0]), 0)
    others_NFH = opposed.replies_NFH[::3] * 4 - 1
    again = rescaled(heads, others_NFH)
    for values in (again.criteria(others_NFH), again.rewards(others_NFH)):
        torch.testing.assert_close(
            values.mean(dim=-1), torch.zeros(values.shape[:-1]), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            values.std(dim=-1), torch.ones(values.shape[:-1]), atol=1e-3, rtol=0
        )
    assert torch.equal(again.weights_KCH, heads.weights_KCH)
    assert torch.equal(again.whitening_FHH, heads.whitening_FHH)
    assert not torch.allclose(again.member_mean_KC, heads.member_mean_KC, atol=0.1)


def test_a_pair_without_weight_does_not_move_the_scales(opposed):
    dead = Comparisons(
        50 * opposed.chosen_NFH,
        50 * opposed.rejected_NFH,
        opposed.labels_N,
        torch.zeros(600),
        opposed.margins_N,
        opposed.criterion_N,
    )
    both = Comparisons(
        *(
            torch.cat([getattr(opposed, field.name), getattr(dead, field.name)])
            for field in dataclasses.fields(Comparisons)
        )
    )
    alone, beside = (fit_members(p, GROUPS, torch.tensor([1.0, 0.5]), 0) for p in (opposed, both))
    for field in dataclasses.fields(alone):
        torch.testing.assert_close(
            getattr(beside, field.name), getattr(alone, field.name), atol=1e-3, rtol=1e-3
        )
