"""The ensemble: heads that learn what was planted, and a folder that loads whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.reward_model import Heads, RewardCard, RewardModel, fit_heads, fit_temperature
from rlhf.errors import ModelError, PavlovError
from rlhf.records import Message

QUESTION = (Message("user", "What is a good name for a cat?"),)
PLANTED_D = torch.tensor([1.5, -1.0, 0.5, 0.0, 0.0, 2.0])


def differences(pairs: int, seed: int = 0) -> Tensor:
    return torch.randn(pairs, 6, generator=torch.Generator().manual_seed(seed))


def fit(
    difference_ND: Tensor,
    labels_N: Tensor,
    weights_N: Tensor | None = None,
    *,
    members: int = 4,
    l2: float = 1e-4,
    seed: int = 0,
) -> Tensor:
    weights_N = torch.ones(len(labels_N)) if weights_N is None else weights_N
    return fit_heads(difference_ND, labels_N, weights_N, members=members, l2=l2, seed=seed)


# Heads


def test_heads_recover_a_planted_linear_preference():
    difference_ND = differences(1500)
    labels_N = torch.bernoulli(
        torch.sigmoid(difference_ND @ PLANTED_D), generator=torch.Generator().manual_seed(1)
    )
    weights_KD = fit(difference_ND, labels_N, members=8)
    # 1,500 verdicts drawn at random: the standard error of a weight is about 0.1.
    torch.testing.assert_close(weights_KD.mean(dim=0), PLANTED_D, atol=0.35, rtol=0)
    cosines_K = torch.cosine_similarity(weights_KD, PLANTED_D.unsqueeze(0))
    assert cosines_K.min() > 0.97


def test_probabilities_as_labels_recover_the_planted_weights_themselves():
    difference_ND = differences(400)
    weights_KD = fit(difference_ND, torch.sigmoid(difference_ND @ PLANTED_D), l2=1e-7)
    torch.testing.assert_close(weights_KD, PLANTED_D.expand(4, 6), atol=0.02, rtol=0)


def test_every_member_is_at_the_minimum_of_its_own_loss():
    """Cross-entropy plus l2 * |w|^2 has no slope there."""
    # A bootstrap draw of one pair repeated is that pair: the loss of every member is known.
    difference_ND, l2 = differences(1).expand(60, 6), 0.05
    weights_KD = fit(difference_ND, torch.ones(60), l2=l2).requires_grad_()
    losses_K = -torch.nn.functional.logsigmoid(weights_KD @ difference_ND[0])
    (losses_K.sum() + l2 * weights_KD.square().sum()).backward()
    assert weights_KD.grad is not None
    assert weights_KD.grad.abs().max() < 1e-4
    assert weights_KD.abs().max() > 0.1


def test_bootstrap_members_differ_and_are_the_same_again_under_the_same_seed():
    difference_ND = differences(80)
    labels_N = (differences(80, 1)[:, 0] > 0).float()
    weights_KD = fit(difference_ND, labels_N)
    apart_KK = torch.cdist(weights_KD, weights_KD) + torch.eye(4)
    assert apart_KK.min() > 0.05
    assert torch.equal(fit(difference_ND, labels_N), weights_KD)
    assert not torch.allclose(fit(difference_ND, labels_N, seed=1), weights_KD, atol=0.01)


def test_a_member_does_not_depend_on_how_many_others_there_are():
    difference_ND = differences(80)
    labels_N = (differences(80, 1)[:, 0] > 0).float()
    few_KD, many_KD = (fit(difference_ND, labels_N, members=m, l2=0.01) for m in (2, 9))
    torch.testing.assert_close(few_KD, many_KD[:2], atol=5e-3, rtol=0)


def test_a_tie_pulls_to_neither_side_and_a_label_of_zero_to_the_other():
    difference_ND = differences(100)
    assert fit(difference_ND, torch.full((100,), 0.5)).abs().max() < 1e-3
    wins_KD = fit(difference_ND, torch.ones(100), l2=0.1)
    losses_KD = fit(difference_ND, torch.zeros(100), l2=0.1)
    torch.testing.assert_close(losses_KD, -wins_KD, atol=1e-3, rtol=0)


def test_a_pair_without_weight_has_no_say():
    difference_ND = differences(400)
    labels_N = torch.sigmoid(difference_ND @ PLANTED_D)
    weights_N = torch.ones(400)
    labels_N[200:], weights_N[200:] = 1 - labels_N[200:], 0.0
    weights_KD = fit(difference_ND, labels_N, weights_N, l2=1e-7)
    torch.testing.assert_close(weights_KD, PLANTED_D.expand(4, 6), atol=0.05, rtol=0)


def test_pairs_that_all_have_no_weight_never_give_heads_that_are_not_numbers():
    try:
        weights_KD = fit(differences(20), torch.ones(20), torch.zeros(20))
    except (ValueError, PavlovError):
        return
    assert torch.isfinite(weights_KD).all()


@pytest.mark.parametrize("planted", [0.3, 1.0, 4.0])
def test_the_temperature_that_was_planted_is_found(planted):
    margins_N = 2 * differences(3000).flatten()
    labels_N = torch.sigmoid(margins_N / planted)
    found = fit_temperature(margins_N, labels_N, torch.ones_like(margins_N))
    # The grid steps by 10 ** 0.025, about 6 %.
    assert found == pytest.approx(planted, rel=0.06)


# Scores


def model_of(heads: Heads, **changes: object) -> RewardModel:
    card = {
        "version": "v",
        "model": "none",
        "model_fingerprint": "m",
        "tokenizer_fingerprint": "t",
        "dtype": "float32",
        "depth": 0.5,
        "layers": 1,
        "max_tokens": 64,
        "members": 3,
        "l2": 0.1,
        "temperature": 1.0,
        "signal_mean": (0.0, 0.0),
        "signal_deviation": (1.0, 1.0),
        "threshold": 0.5,
        "false_alarm_rate": 0.05,
        "false_alarm_interval": (0.03, 0.07),
        "seed": 0,
        "data": {},
        "metrics": {},
    }
    return RewardModel(RewardCard(**card | changes), heads)  # type: ignore[arg-type]


HEADS = Heads(
    weights_KD=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
    feature_mean_D=torch.tensor([1.0, 2.0]),
    feature_deviation_D=torch.tensor([2.0, 4.0]),
    member_mean_K=torch.tensor([0.0, 1.0, -1.0]),
    member_deviation_K=torch.tensor([1.0, 2.0, 4.0]),
    whitening_FHH=torch.tensor([[[1.0]], [[0.5]]]),
)


def test_rewards_by_hand():
    # (3, 10) standardises to (1, 2): raw 1, 2, 3; by member (1-0)/1, (2-1)/2, (3+1)/4.
    scores = model_of(HEADS).score_features(torch.tensor([[3.0, 10.0]]))
    torch.testing.assert_close(scores.rewards_KN, torch.tensor([[1.0], [0.5], [1.0]]))
    # Deviations from 5/6 are 1/6, -1/3, 1/6: the mean square is 1/18.
    torch.testing.assert_close(scores.disagreement_N, torch.tensor([math.sqrt(1 / 18)]))
    # Two families of one feature each, whitened by 1 and 1/2: distances 1 and 1.
    torch.testing.assert_close(scores.distance_N, torch.tensor([1.0]))


def test_the_shift_score_is_the_sum_of_both_signals_by_what_they_are_on_held_out_replies():
    model = model_of(HEADS, signal_mean=(0.5, 3.0), signal_deviation=(0.25, 2.0))
    scores = model.score_features(torch.tensor([[3.0, 10.0]]))
    wanted = (math.sqrt(1 / 18) - 0.5) / 0.25 + (1.0 - 3.0) / 2.0
    torch.testing.assert_close(scores.shift_N, torch.tensor([wanted]))


def test_a_reply_is_flagged_above_the_threshold_and_without_one_never():
    # The second reply standardises to (0, 0): members give 0, -1/2 and 1/4, deviation sqrt(7/72),
    # and it lies where the training replies do, at distance 0.
    features_ND = torch.tensor([[3.0, 10.0], [1.0, 2.0], [1e6, -1e6]])
    shift_N = model_of(HEADS).score_features(features_ND).shift_N
    assert shift_N[1] == pytest.approx(math.sqrt(7 / 72))
    flags = {
        threshold: model_of(HEADS, threshold=threshold).score_features(features_ND).shifted_N
        for threshold in (0.0, float(shift_N[1]), float(shift_N[0]), None)
    }
    assert [flagged_N.tolist() for flagged_N in flags.values()] == [
        [True, True, True],
        [True, False, True],
        [False, False, True],
        [False, False, False],
    ]


def test_text_is_scored_by_the_trunks_features_and_a_cut_off_reply_otherwise(tiny_reward_model):
    model = RewardModel.load(tiny_reward_model)
    rows = [(QUESTION, "Tom", True), (QUESTION, "Tom", False), (QUESTION, "Rice", True)]
    scores = model.score(rows)
    rewards_KN = scores.rewards_KN
    trunk = model.trunk()
    for n, (messages, reply, finished) in enumerate(rows):
        features_1D = trunk.features([trunk.tokenise(messages, reply, finished=finished)])
        torch.testing.assert_close(
            rewards_KN[:, n], model.heads.rewards(features_1D)[:, 0], atol=1e-4, rtol=1e-4
        )
    assert (rewards_KN[:, 0] - rewards_KN[:, 1]).abs().max() > 1e-3
    assert scores.disagreement_N.shape == scores.shifted_N.shape == (3,)


# The folder


@pytest.fixture
def folder(tiny_reward_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_reward_model, tmp_path / "reward"))


def test_a_saved_model_loads_as_it_was(tmp_path):
    model = model_of(HEADS, threshold=None, data={"pairs": 3}, metrics={"accuracy": 0.7})
    model.save(tmp_path)
    again = RewardModel.load(tmp_path)
    assert again.card == model.card
    for name in (field.name for field in dataclasses.fields(Heads)):
        assert torch.equal(getattr(again.heads, name), getattr(HEADS, name)), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.safetensors", "reward.json"]


def test_a_run_folder_stands_for_the_reward_model_in_it(folder):
    assert RewardModel.load(folder.parent).card == RewardModel.load(folder).card


def test_a_folder_that_is_no_reward_model_is_refused_by_name(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(
            ModelError, match=f"^{path} is not a reward model: it has no reward.json"
        ):
            RewardModel.load(path)


def edit(card: Path, **values: object) -> None:
    card.write_text(json.dumps(json.loads(card.read_text()) | values))


def replace_heads(folder: Path, **tensors: Tensor | None) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "heads.safetensors"
    changed = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no heads": lambda f: (f / "heads.safetensors").unlink(),
    "cut heads": lambda f: (f / "heads.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"),
    "a tensor less": lambda f: replace_heads(f, member_mean_K=None),
    "a tensor more": lambda f: replace_heads(f, other=torch.ones(1)),
    "fewer members": lambda f: edit(f / "reward.json", members=4),
    "other features": lambda f: replace_heads(f, feature_mean_D=torch.zeros(7)),
    "other families": lambda f: replace_heads(f, whitening_FHH=torch.eye(128).unsqueeze(0)),
    "no square": lambda f: replace_heads(f, whitening_FHH=torch.ones(2, 128, 64)),
    "other members": lambda f: replace_heads(f, member_mean_K=torch.zeros(2)),
    "broken json": lambda f: (f / "reward.json").write_text('{"version": '),
    "binary json": lambda f: (f / "reward.json").write_bytes(b"\xff\xfe\x00"),
    "unknown key": lambda f: edit(f / "reward.json", surprise=1),
    "text for a number": lambda f: edit(f / "reward.json", temperature="warm"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_sentence(folder, damage):
    RewardModel.load(folder)
    DAMAGES[damage](folder)
    with pytest.raises(ModelError, match="is a damaged reward model") as caught:
        RewardModel.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def moved(folder: Path, tiny_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A reward model whose backbone is a copy that may be changed; both folders."""
    backbone = Path(shutil.copytree(tiny_model, tmp_path / "backbone"))
    edit(folder / "reward.json", model=str(backbone))
    return folder, backbone


def test_the_same_backbone_in_another_place_is_accepted(moved):
    assert RewardModel.load(moved[0]).trunk().layers == 2


def test_another_backbone_is_refused_by_its_fingerprint(moved):
    reward, backbone = moved
    weights = bytearray((backbone / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (backbone / "model.safetensors").write_bytes(weights)
    card = RewardModel.load(reward).card
    with pytest.raises(
        ModelError, match=f"trained on .* with fingerprint {card.model_fingerprint}"
    ):
        RewardModel.load(reward).trunk()


def test_another_chat_template_is_refused(moved):
    reward, backbone = moved
    (backbone / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ModelError, match="another tokenizer or chat template"):
        RewardModel.load(reward).trunk()


def test_a_backbone_that_is_gone_is_refused(moved):
    shutil.rmtree(moved[1])
    with pytest.raises(ModelError, match=str(moved[1])):
        RewardModel.load(moved[0]).trunk()
