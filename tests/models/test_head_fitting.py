"""Fitting heads: they learn what was planted; what is chosen is chosen by held-out pairs."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.head_fitting import (
    Comparisons,
    ProbeGroup,
    bootstrap,
    choose_l2,
    correlation_losses,
    correlation_matrix,
    fit_heads,
    fit_temperature,
    prior_precision,
)
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


def apart(l2: float, members: int = 1) -> Tensor:
    """The prior of members of one criterion."""
    return torch.full((members, 1, 1), l2)


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
    return fit_heads(pairs, 0, UNIT, draws_KN, apart(l2, members))[:, 0]


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
    precision_KCC = l2_K.view(3, 1, 1)
    scale = mean_H, deviation_H
    weights_KH = fit_heads(pairs, 0, scale, draws_KN, precision_KCC, centring=centring)[:, 0]
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


def test_the_mean_of_eight_members_depends_on_the_seed_far_less_than_by_chance():
    difference_NH = differences(200)
    labels_N = (difference_NH @ PLANTED_H + 3 * differences(200, 1)[:, 0] > 0).float()
    seeds_SKH = torch.stack(
        [fit(difference_NH, labels_N, members=8, l2=0.05, seed=seed) for seed in range(8)]
    )
    of_means = seeds_SKH.mean(dim=1).std(dim=0).mean()
    of_members = seeds_SKH.std(dim=1).mean()
    # Draws without balance have about 1 here.
    assert of_means * 8**0.5 < 0.4 * of_members


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
        # Three pairs are drawn; of weights w the draw has counts c with c w / sum.
        unscaled_N = draw_N[weights_N > 0] / weights_N[weights_N > 0]
        counts_N = unscaled_N * 3 / unscaled_N.sum()
        torch.testing.assert_close(counts_N, counts_N.round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("planted", [0.3, 0.97, 1.0, 4.0])
def test_the_temperature_that_was_planted_is_found(planted):
    margins_N = 2 * differences(3000).flatten()
    labels_N = torch.sigmoid(margins_N / planted)
    found = fit_temperature(margins_N, labels_N, torch.ones_like(margins_N))
    # The finer grid steps by 0.2 %.
    assert found == pytest.approx(planted, rel=0.003)


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

    def margins_N(labels_N: Tensor, wanted: float) -> Tensor:
        pairs = comparisons(difference_NH, labels_N, margins_N=wanted * ones_N)
        return (fit_heads(pairs, 0, UNIT, draws_1N, apart(0.05)) @ difference_NH.T)[0, 0]

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
        weights_H = fit_heads(pairs, 0, UNIT, draws_1N, apart(1e-3), centring=centring)[0, 0]
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
        torch.tensor(CANDIDATES).view(3, 1, 1),
    )[:, 0]
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


# Criteria that tell of each other

BOTH_L2 = 0.1


def correlated(correlation: float) -> Tensor:
    return correlation_matrix(2, {(0, 1): correlation})


def related(
    correlation: float, few: int = 40, many: int = 600, width: int = 40
) -> tuple[Comparisons, Tensor, Tensor]:
    """Many pairs of criterion 0 and few of criterion 1, judged by planted heads whose cosine is
    `correlation`; the heads (2, H), and folds."""
    generator = torch.Generator().manual_seed(4)
    first_H, second_H = torch.linalg.qr(torch.randn(width, 2, generator=generator)).Q.T
    apart_by = math.sqrt(1 - correlation**2)
    planted_CH = 2 * torch.stack([first_H, correlation * first_H + apart_by * second_H])
    difference_NH = torch.randn(few + many, width, generator=generator)
    criterion_N = (torch.arange(few + many) < few).long()
    logits_N = (difference_NH * planted_CH[criterion_N]).sum(dim=1)
    labels_N = torch.bernoulli(torch.sigmoid(logits_N), generator=generator)
    pairs = comparisons(difference_NH, labels_N, criterion_N=criterion_N)
    return pairs, planted_CH, torch.arange(few + many) % 5


def fit_related(pairs: Comparisons, correlation: float) -> Tensor:
    """The two heads (2, H), with what they are taken to have in common beforehand."""
    draws_1N = (pairs.weights_N / pairs.weights_N.sum()).unsqueeze(0)
    width = pairs.chosen_NFH.shape[2]
    scale = torch.zeros(width), torch.ones(width)
    shares_C = torch.tensor([600, 40]) / 640
    l2_1C = torch.full((1, 2), BOTH_L2)
    precision_1CC = prior_precision(l2_1C, shares_C, correlated(correlation))
    return fit_heads(pairs, 0, scale, draws_1N, precision_1CC)[0]


@pytest.mark.parametrize("planted", [-0.9, 0.9])
def test_a_criterion_of_few_pairs_learns_from_one_that_it_agrees_with_or_opposes(planted):
    pairs, planted_CH, _ = related(planted)
    alone, helped, misled = (
        float(torch.cosine_similarity(fit_related(pairs, correlation)[1], planted_CH[1], dim=0))
        for correlation in (0.0, planted, -planted)
    )
    assert helped > alone + 0.15
    assert misled < alone


def test_without_correlation_criteria_are_fitted_as_if_alone():
    pairs, _, _ = related(0.9)
    both_CH = fit_related(pairs, 0.0)
    for criterion in (0, 1):
        own = pairs.between([criterion])
        draws_1N = torch.full((1, len(own.labels_N)), 1 / len(own.labels_N))
        scale = torch.zeros(40), torch.ones(40)
        alone_H = fit_heads(own, 0, scale, draws_1N, apart(BOTH_L2))[0, 0]
        torch.testing.assert_close(both_CH[criterion], alone_H, atol=2e-3, rtol=0)


def test_related_members_are_at_the_minimum_of_their_joint_loss():
    """Minus the logarithm of a posterior: the pairs' cross-entropy, and a Gaussian whose draws for
    the criteria are correlated, each with a variance by its own L2 and number of pairs."""
    pairs, _, _ = related(-0.5)
    # What the replies of a pair share, so that centring has something to do.
    shared_N1H = torch.randn(640, 1, 40, generator=torch.Generator().manual_seed(9))
    pairs = replace(
        pairs,
        chosen_NFH=pairs.chosen_NFH + shared_N1H,
        rejected_NFH=pairs.rejected_NFH + shared_N1H,
    )
    counts_C = torch.tensor([600.0, 40.0])
    l2_KC, correlation, centring = torch.tensor([[0.02, 0.3], [0.5, 0.1]]), -0.75, 0.1
    draws_KN = torch.stack([torch.ones(640), torch.arange(640) % 3 / 1.0])
    for criterion, count in enumerate(counts_C):
        own_N = pairs.criterion_N == criterion
        draws_KN[:, own_N] *= count / draws_KN[:, own_N].sum(dim=1, keepdim=True)
    precision_KCC = prior_precision(l2_KC, counts_C / 640, correlated(correlation))
    scale = torch.zeros(40), torch.ones(40)
    weights_KCH = fit_heads(pairs, 0, scale, draws_KN / 640, precision_KCC, centring=centring)
    weights_KCH.requires_grad_()
    own_KNH = weights_KCH[:, pairs.criterion_N]
    chosen_KN, rejected_KN = (
        (own_KNH * replies_NFH[:, 0]).sum(dim=2)
        for replies_NFH in (pairs.chosen_NFH, pairs.rejected_NFH)
    )
    losses_KN = F.binary_cross_entropy_with_logits(
        chosen_KN - rejected_KN, pairs.labels_N.expand(2, -1), reduction="none"
    )
    losses_KN = losses_KN + centring * (chosen_KN + rejected_KN).square()
    log_prior = torch.zeros(())
    for weights_CH, l2_C in zip(weights_KCH, l2_KC, strict=True):
        deviation_C = (1 / (2 * counts_C * l2_C)).sqrt()
        covariance_CC = correlated(correlation) * torch.outer(deviation_C, deviation_C)
        prior = torch.distributions.MultivariateNormal(torch.zeros(2), covariance_CC)
        log_prior = log_prior + prior.log_prob(weights_CH.T).sum()
    (((draws_KN * losses_KN).sum() - log_prior) / 640).backward()
    assert weights_KCH.grad is not None
    assert weights_KCH.grad.abs().max() < 1e-3
    assert weights_KCH.abs().amax(dim=2).min() > 0.02


def test_many_pairs_are_hardly_moved_by_a_criterion_of_few():
    pairs, _, _ = related(0.9, few=40, many=600)
    misled_CH, alone_CH = fit_related(pairs, -0.5), fit_related(pairs, 0.0)
    moved_C = (misled_CH - alone_CH).norm(dim=1) / alone_CH.norm(dim=1)
    assert moved_C[0] < 0.15
    assert moved_C[0] < 0.5 * moved_C[1]


def test_a_criterion_without_pairs_in_a_fold_is_what_the_others_tell_of_it():
    pairs, planted_CH, _ = related(-0.9)
    only_first = pairs[pairs.criterion_N == 0]
    first_H, second_H = fit_related(only_first, -0.5)
    assert torch.cosine_similarity(first_H, planted_CH[0], dim=0) > 0.7
    # By the same L2 of a mean over fewer pairs, the prior is as much wider.
    torch.testing.assert_close(second_H, -0.5 * math.sqrt(600 / 40) * first_H, atol=0.02, rtol=0)


@pytest.mark.parametrize("planted", [-0.9, 0.0, 0.9])
def test_the_correlation_is_found_in_held_out_pairs(planted):
    pairs, _, folds_N = related(planted, few=120)
    candidates = [-0.9, -0.5, 0.0, 0.5, 0.9]
    correlation_LCC = torch.stack(list(map(correlated, candidates)))
    group = ProbeGroup(0, 2, (BOTH_L2, BOTH_L2))
    losses_L = correlation_losses(pairs, group, correlation_LCC, folds_N)
    found = candidates[int(losses_L.argmin())]
    assert math.copysign(1, found) * (abs(found) >= 0.5) == round(planted)
    # Summed over pairs, in nats, whatever unit weights are in.
    assert 300 < losses_L[2] < 720 * math.log(2)
    heavy = replace(pairs, weights_N=100 * pairs.weights_N)
    heavy_L = correlation_losses(heavy, group, correlation_LCC, folds_N)
    torch.testing.assert_close(heavy_L, losses_L, atol=0.1, rtol=0)


def test_correlations_chosen_two_by_two_are_shrunk_until_they_fit_together():
    fitting = {(0, 1): -0.5, (0, 2): 0.25}
    correlation_CC = correlation_matrix(3, fitting)
    assert correlation_CC.tolist() == [[1, -0.5, 0.25], [-0.5, 1, 0], [0.25, 0, 1]]
    # Two that agree with a third, and oppose each other: no such three exist.
    torn_CC = correlation_matrix(3, {(0, 1): 0.9, (0, 2): 0.9, (1, 2): -0.9})
    assert torch.linalg.eigvalsh(torn_CC).min().item() == pytest.approx(0.05, abs=1e-5)
    assert torn_CC.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert torn_CC[0, 1].item() == pytest.approx(torn_CC[0, 2].item())
    assert torn_CC[1, 2].item() == pytest.approx(-torn_CC[0, 1].item())
    assert torn_CC[0, 1] > 0.2


def test_pairs_between_two_criteria_are_theirs_alone_and_numbered_anew():
    pairs = comparisons(differences(6), torch.ones(6), criterion_N=torch.tensor([2, 0, 1, 2, 1, 0]))
    both = pairs.between([0, 2])
    assert both.criterion_N.tolist() == [1, 0, 1, 0]
    assert torch.equal(both.chosen_NFH, pairs.chosen_NFH[[0, 1, 3, 5]])
