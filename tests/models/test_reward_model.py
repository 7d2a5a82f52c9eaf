"""The ensemble: what its members say together, and a folder that loads whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.heads import Heads
from models.reward_model import BankCard, FamilyCard, GroupCard, RewardCard, RewardModel
from rlhf.errors import ModelError
from rlhf.records import Message

QUESTION = (Message("user", "What is a good name for a cat?"),)

HEADS = Heads(
    weights_KCH=torch.tensor([[[1.0], [2.0]], [[2.0], [1.0]], [[1.0], [-1.0]]]),
    family_K=torch.tensor([0, 0, 1]),
    feature_mean_FH=torch.tensor([[1.0], [2.0]]),
    feature_deviation_FH=torch.tensor([[2.0], [4.0]]),
    whitening_FHH=torch.tensor([[[1.0]], [[0.5]]]),
    member_mean_KC=torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
    member_deviation_KC=torch.tensor([[1.0, 2.0], [1.0, 1.0], [4.0, 1.0]]),
    combination_C=torch.tensor([1.0, 0.5]),
    combined_deviation_K=torch.tensor([1.0, 0.5, 2.0]),
)
# One reply: its families (3, 10) standardise to (1, 2).
REPLY_NFH = torch.tensor([[[3.0], [10.0]]])


def bank_card(count: int = 3) -> BankCard:
    return BankCard(
        model="none",
        model_fingerprint="m",
        tokenizer_fingerprint="t",
        families=(FamilyCard(layers=1, pooling="last"), FamilyCard(layers=1, pooling="mean")),
        groups=(GroupCard(kind="probe", count=count, family=0, l2={"helpful": 0.1}),),
    )


def model_of(*banks: Heads, **changes: object) -> RewardModel:
    card = {
        "version": "v",
        "banks": tuple(bank_card(heads.members) for heads in banks),
        "dtype": "float32",
        "max_tokens": 64,
        "criteria": ("harmless", "helpful"),
        "combination": {"harmless": 1.0, "helpful": 0.5},
        "temperature": {"reward": 1.0, "harmless": 1.0, "helpful": 1.0},
        "signal_mean": (0.0, 0.0),
        "signal_deviation": (1.0, 1.0),
        "threshold": 0.5,
        "false_alarm_rate": 0.05,
        "false_alarm_interval": (0.03, 0.07),
        "seed": 0,
        "data": {},
        "metrics": {},
    }
    return RewardModel(RewardCard(**card | changes), banks)  # type: ignore[arg-type]


def test_rewards_by_hand():
    scores = model_of(HEADS).score_features((REPLY_NFH,))
    # Raw: (1, 2), (2, 1), (2, -2); less the means, by the deviations:
    criteria_KC = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.5, -3.0]])
    torch.testing.assert_close(scores.criteria_KCN, criteria_KC.unsqueeze(2))
    # First criterion plus half the second, by 1, 1/2 and 2.
    torch.testing.assert_close(scores.rewards_KN, torch.tensor([[1.5], [3.0], [-0.5]]))
    # The first family's members lie 0.75 from their mean; the second has one member: no say.
    torch.testing.assert_close(scores.disagreement_N, torch.tensor([0.75]))
    # Two families of one feature each, whitened by 1 and 1/2: distances 1 and 1.
    torch.testing.assert_close(scores.distance_N, torch.tensor([1.0]))


def test_banks_add_members_and_share_the_say_by_family():
    scores = model_of(HEADS, HEADS).score_features((REPLY_NFH, 2 * REPLY_NFH))
    alone = model_of(HEADS).score_features((2 * REPLY_NFH,))
    assert scores.rewards_KN.shape == (6, 1)
    torch.testing.assert_close(scores.rewards_KN[3:], alone.rewards_KN)
    torch.testing.assert_close(scores.disagreement_N, (0.75 + alone.disagreement_N) / 2)
    torch.testing.assert_close(scores.distance_N, (1.0 + alone.distance_N) / 2)


def test_the_shift_score_is_the_sum_of_both_signals_by_what_they_are_on_held_out_replies():
    model = model_of(HEADS, signal_mean=(0.5, 3.0), signal_deviation=(0.25, 2.0))
    scores = model.score_features((REPLY_NFH,))
    wanted = (0.75 - 0.5) / 0.25 + (1.0 - 3.0) / 2.0
    torch.testing.assert_close(scores.shift_N, torch.tensor([wanted]))


def test_a_reply_is_flagged_above_the_threshold_and_without_one_never():
    # The second reply lies where the training replies do: distance 0, and the members of the first
    # family say 0 and -1 x 2: disagreement 1.
    features_NFH = torch.tensor([[[3.0], [10.0]], [[1.0], [2.0]], [[1e6], [-1e6]]])
    shift_N = model_of(HEADS).score_features((features_NFH,)).shift_N
    assert shift_N[:2].tolist() == pytest.approx([1.75, 1.0])
    flags = {
        threshold: model_of(HEADS, threshold=threshold).score_features((features_NFH,)).shifted_N
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
    [trunk], [heads] = model.trunks(), model.banks
    for n, (messages, reply, finished) in enumerate(rows):
        features_1FH = trunk.features([trunk.tokenise(messages, reply, finished=finished)])
        torch.testing.assert_close(
            rewards_KN[:, n], heads.rewards(features_1FH)[:, 0], atol=1e-4, rtol=1e-4
        )
    assert (rewards_KN[:, 0] - rewards_KN[:, 1]).abs().max() > 1e-3
    assert scores.disagreement_N.shape == scores.shifted_N.shape == (3,)


def test_a_criterion_that_the_model_does_not_have_is_refused_by_name():
    assert model_of(HEADS).criterion("helpful") == 1
    with pytest.raises(ModelError, match="no criterion 'honest'; it has harmless, helpful"):
        model_of(HEADS).criterion("honest")


# The folder


@pytest.fixture
def folder(tiny_reward_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_reward_model, tmp_path / "reward"))


def test_a_saved_model_loads_as_it_was(tmp_path):
    model = model_of(HEADS, HEADS, threshold=None, data={"pairs": 3}, metrics={"accuracy": 0.7})
    model.save(tmp_path)
    again = RewardModel.load(tmp_path)
    assert again.card == model.card
    for name in (field.name for field in dataclasses.fields(Heads)):
        assert torch.equal(getattr(again.banks[1], name), getattr(HEADS, name)), name
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
    changed = {**load_file(path), **{f"0.{name}": tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


def edit_group(folder: Path, **values: object) -> None:
    path = folder / "reward.json"
    banks = json.loads(path.read_text())["banks"]
    banks[0]["groups"][0] |= values
    edit(path, banks=banks)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no heads": lambda f: (f / "heads.safetensors").unlink(),
    "cut heads": lambda f: (f / "heads.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"),
    "a tensor less": lambda f: replace_heads(f, member_mean_KC=None),
    "fewer members": lambda f: edit_group(f, count=1),
    "other features": lambda f: replace_heads(f, feature_mean_FH=torch.zeros(2, 7)),
    "other families": lambda f: replace_heads(f, whitening_FHH=torch.eye(128).unsqueeze(0)),
    "no such family": lambda f: replace_heads(f, family_K=torch.tensor([0, 0, 1, 2])),
    "no square": lambda f: replace_heads(f, whitening_FHH=torch.ones(2, 128, 64)),
    "other members": lambda f: replace_heads(f, member_mean_KC=torch.zeros(2, 1)),
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
    banks = json.loads((folder / "reward.json").read_text())["banks"]
    banks[0]["model"] = str(backbone)
    edit(folder / "reward.json", banks=banks)
    return folder, backbone


def test_the_same_backbone_in_another_place_is_accepted(moved):
    assert RewardModel.load(moved[0]).trunks()[0].layers == 2


def test_another_backbone_is_refused_by_its_fingerprint(moved):
    reward, backbone = moved
    weights = bytearray((backbone / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (backbone / "model.safetensors").write_bytes(weights)
    card = RewardModel.load(reward).card
    with pytest.raises(
        ModelError, match=f"trained on .* with fingerprint {card.banks[0].model_fingerprint}"
    ):
        RewardModel.load(reward).trunks()


def test_another_chat_template_is_refused(moved):
    reward, backbone = moved
    (backbone / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(ModelError, match="another tokenizer or chat template"):
        RewardModel.load(reward).trunks()


def test_a_backbone_that_is_gone_is_refused(moved):
    shutil.rmtree(moved[1])
    with pytest.raises(ModelError, match=str(moved[1])):
        RewardModel.load(moved[0]).trunks()
