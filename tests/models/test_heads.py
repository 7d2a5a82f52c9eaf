"""Linear heads: each criterion has its own, whoever stands beside them, on scales of their own."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.head_fitting import Comparisons, ProbeGroup, choose_l2, correlation_losses
from models.heads import Heads, fit_members, rescaled
from rlhf.ensemble import whitening
from rlhf.errors import DataError
from tests.models.test_head_fitting import PLANTED_H, comparisons, differences


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
    for each in (pairs, replace(pairs, weights_N=torch.zeros_like(weights_N))):
        with pytest.raises(DataError, match="weight 0"):
            fit_members(each, GROUPS, torch.tensor([1.0, 1.0]), 0)


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


def random_heads(family_K: list[int]) -> Heads:
    """Of three families of 16 features, for two criteria."""
    generator = torch.Generator().manual_seed(0)
    members = len(family_K)
    return Heads(
        weights_KCH=torch.randn(members, 2, 16, generator=generator),
        family_K=torch.tensor(family_K),
        kin_K=torch.tensor(family_K),
        feature_mean_FH=torch.randn(3, 16, generator=generator),
        feature_deviation_FH=torch.rand(3, 16, generator=generator) + 0.5,
        whitening_FHH=torch.eye(16).repeat(3, 1, 1),
        member_mean_KC=torch.zeros(members, 2),
        member_deviation_KC=torch.ones(members, 2),
        combination_C=torch.ones(2),
        combined_deviation_K=torch.ones(members),
    )


def test_members_in_any_order_of_families_are_each_the_plain_formula():
    # Family 1 has no member.
    heads = random_heads([2, 0, 2, 0, 0])
    features_NFH = torch.randn(9, 3, 16, generator=torch.Generator().manual_seed(1))
    raw_KCN = heads.raw(features_NFH)
    for member, family in enumerate(heads.family_K.tolist()):
        mean_H, deviation_H = heads.feature_mean_FH[family], heads.feature_deviation_FH[family]
        standard_NH = (features_NFH[:, family] - mean_H) / deviation_H
        for criterion in range(2):
            wanted_N = (standard_NH * heads.weights_KCH[member, criterion]).sum(dim=1)
            torch.testing.assert_close(raw_KCN[member, criterion], wanted_N)


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor has that is made inside."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.numbers = max(self.numbers, made.numel())
        return made


def test_more_members_do_not_copy_the_features():
    features_NFH = torch.zeros(50, 3, 16)
    with LargestTensor() as made:
        random_heads([0, 1, 2, 2] * 6).raw(features_NFH)
    assert made.numbers <= features_NFH.numel()


def test_fitting_and_scoring_hold_no_more_than_one_family_of_features_beside_them():
    generator = torch.Generator().manual_seed(0)
    pairs = Comparisons(
        *torch.randn(2, 400, 8, 16, generator=generator),
        torch.ones(400),
        torch.ones(400),
        torch.zeros(400),
        torch.arange(400) % 2,
    )
    groups = [ProbeGroup(family, 1, (0.1, 0.1)) for family in range(8)]
    # Of both replies.
    family_of_both = 2 * 400 * 16
    with LargestTensor() as made:
        heads = fit_members(pairs, groups, torch.ones(2), 0)
    assert made.numbers <= family_of_both
    with LargestTensor() as made:
        heads.criteria(pairs.chosen_NFH)
        heads.distances(pairs.chosen_NFH)
        choose_l2(pairs, 3, [0.1, 1.0], torch.arange(400) % 5)
        correlation_losses(pairs, groups[3], torch.eye(2).unsqueeze(0), torch.arange(400) % 5)
    assert made.numbers <= family_of_both


def test_one_family_alone_is_a_view_of_the_pairs(opposed):
    second = opposed.of_family(1)
    assert torch.equal(second.replies_NFH[:, 0], opposed.replies_NFH[:, 1])
    for own, whole in zip(
        (second.chosen_NFH, second.rejected_NFH),
        (opposed.chosen_NFH, opposed.rejected_NFH),
        strict=True,
    ):
        assert own.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


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


def test_members_of_related_criteria_borrow_and_others_do_not(opposed):
    """Of the opposed criteria the second has a dozen pairs."""
    few = opposed[(opposed.criterion_N == 0) | (torch.arange(600) < 24)]
    rest = opposed[(opposed.criterion_N == 1) & (torch.arange(600) >= 24)]
    groups = [ProbeGroup(0, 3, (0.1, 0.1))]

    def second(correlation_CC: Tensor | None) -> tuple[Tensor, float]:
        heads = fit_members(few, groups, torch.ones(2), 0, correlation_CC)
        margins_KN = heads.raw(rest.chosen_NFH)[:, 1] - heads.raw(rest.rejected_NFH)[:, 1]
        right = ((margins_KN > 0) == (rest.labels_N > 0)).float().mean()
        return heads.weights_KCH[:, 1], float(right)

    apart_KH, apart = second(None)
    # As without the other criterion's pairs, on the same scales.
    scaled = replace(few, weights_N=torch.where(few.criterion_N == 1, 1.0, 1e-6))
    alone_KH = fit_members(scaled, groups, torch.ones(2), 0).weights_KCH[:, 1]
    torch.testing.assert_close(apart_KH, alone_KH, atol=5e-3, rtol=0)
    related_KH, related = second(torch.tensor([[1.0, -0.9], [-0.9, 1.0]]))
    assert related > apart + 0.05
    assert (related_KH - apart_KH).abs().max() > 0.05
