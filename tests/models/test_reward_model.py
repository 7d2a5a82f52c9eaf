"""The ensemble: what its members say together, and a folder that loads whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.chat import ChatTokenizer
from models.heads import Heads
from models.reward_model import (
    BankCard,
    FamilyCard,
    GroupCard,
    RewardCard,
    RewardModel,
    of_the_combination,
    version_of,
)
from models.sources import weights_fingerprint
from models.trunk import Family, Trunk
from rlhf.errors import ModelError
from rlhf.records import Message, PreferencePair
from tests.conftest import build_tiny_model

QUESTION = (Message("user", "What is a good name for a cat?"),)

HEADS = Heads(
    weights_KCH=torch.tensor([[[1.0], [2.0]], [[2.0], [1.0]], [[1.0], [-1.0]]]),
    family_K=torch.tensor([0, 0, 1]),
    kin_K=torch.tensor([0, 0, 1]),
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


def bank_card() -> BankCard:
    """The card of `HEADS`."""
    return BankCard(
        model="none",
        model_fingerprint="m",
        tokenizer_fingerprint="t",
        families=(FamilyCard(layers=1, pooling="last"), FamilyCard(layers=1, pooling="mean")),
        groups=(
            GroupCard(kind="probe", count=2, family=0, l2={"helpful": 0.1}),
            GroupCard(kind="probe", count=1, family=1, l2={"helpful": 0.3}),
        ),
    )


def model_of(*banks: Heads, **changes: object) -> RewardModel:
    card = {
        "version": "v",
        "banks": (bank_card(),) * len(banks),
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


@pytest.fixture(scope="module")
def two_backbones(tiny_reward_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    """Two banks of the tiny reward model's members: its own backbone, and one that differs in
    weights and template, and of which one layer and one family are read."""
    other = build_tiny_model(
        tmp_path_factory.mktemp("other") / "other",
        chat_template="{{ messages[-1].content }} So: ",
        seed=1,
    )
    model = RewardModel.load(tiny_reward_model)
    [heads], [bank] = model.banks, model.card.banks
    shallow = bank.model_copy(
        update={
            "model": str(other),
            "model_fingerprint": weights_fingerprint(other),
            "tokenizer_fingerprint": ChatTokenizer(other).fingerprint,
            "families": (FamilyCard(layers=1, pooling="mean"),),
            "groups": (GroupCard(kind="probe", count=4, family=0, l2={"overall": 0.1}),),
        }
    )
    one_family = dataclasses.replace(
        heads,
        family_K=torch.zeros(4, dtype=torch.long),
        kin_K=torch.zeros(4, dtype=torch.long),
        feature_mean_FH=heads.feature_mean_FH[:1],
        feature_deviation_FH=heads.feature_deviation_FH[:1],
        whitening_FHH=heads.whitening_FHH[:1],
    )
    card = model.card.model_copy(update={"banks": (bank, shallow)})
    return RewardModel(card, [heads, one_family])


def test_each_bank_reads_the_reply_by_its_own_backbone(two_backbones):
    rows = [(QUESTION, "Tom is a good name.", True), (QUESTION, "Rice", False)]
    tokenised = [two_backbones.tokenise(row) for row in rows]
    for bank, trunk in enumerate(two_backbones.trunks()):
        for (messages, reply, finished), row in zip(rows, tokenised, strict=True):
            assert row[bank] == trunk.tokenise(messages, reply, finished=finished)
    assert tokenised[0][0][0] != tokenised[0][1][0]
    features = two_backbones.features(tokenised)
    families = [[Family(2, "last"), Family(2, "mean")], [Family(1, "mean")]]
    for bank, f_NFH in enumerate(features):
        alone = Trunk(
            Path(two_backbones.card.banks[bank].model),
            families[bank],
            dtype="float32",
            max_tokens=128,
            batch_tokens=512,
        )
        wanted_NFH = alone.features([row[bank] for row in tokenised])
        assert wanted_NFH.shape == (2, len(families[bank]), 128)
        torch.testing.assert_close(f_NFH, wanted_NFH, atol=1e-5, rtol=1e-5)


def test_members_of_two_backbones_are_one_ensemble(two_backbones):
    rows = [(QUESTION, "Tom is a good name.", True), (QUESTION, "Rice", False)]
    scores = two_backbones.score(rows)
    features = two_backbones.features([two_backbones.tokenise(row) for row in rows])
    parts = [
        (heads.rewards(f_NFH), heads.distances(f_NFH), heads.criteria(f_NFH))
        for heads, f_NFH in zip(two_backbones.banks, features, strict=True)
    ]
    assert two_backbones.card.members == 8
    torch.testing.assert_close(scores.rewards_KN, torch.cat([part[0] for part in parts]))
    torch.testing.assert_close(scores.criteria_KCN, torch.cat([part[2] for part in parts]))
    # Three families: members 0 and 1, 2 and 3, and all four of the second backbone.
    families = [scores.rewards_KN[0:2], scores.rewards_KN[2:4], scores.rewards_KN[4:8]]
    deviations = torch.stack([part_KN.std(dim=0, correction=0) for part_KN in families])
    torch.testing.assert_close(scores.disagreement_N, deviations.mean(dim=0))
    torch.testing.assert_close(
        scores.distance_N, torch.cat([part[1] for part in parts]).mean(dim=0)
    )


def test_progress_counts_a_reply_once_however_many_backbones_read_it(two_backbones):
    counts: list[int] = []
    rows = [two_backbones.tokenise((QUESTION, "Tom " * n, True)) for n in range(1, 6)]
    two_backbones.features(rows, counts.append)
    assert sum(counts) == 5


def test_two_backbones_are_saved_and_loaded(two_backbones, tmp_path):
    two_backbones.save(tmp_path)
    again = RewardModel.load(tmp_path)
    assert again.card == two_backbones.card
    row = (QUESTION, "Tom is a good name.", True)
    assert torch.equal(again.score([row]).rewards_KN, two_backbones.score([row]).rewards_KN)


def test_heads_have_a_version_of_their_own_and_keep_it_when_saved(tmp_path):
    model = model_of(HEADS, HEADS)
    card = model.card
    version = version_of([HEADS, HEADS], card)
    model.save(tmp_path)
    again = RewardModel.load(tmp_path)
    assert version_of(again.banks, again.card) == version
    for field in dataclasses.fields(Heads):
        tensor = getattr(HEADS, field.name)
        moved = dataclasses.replace(HEADS, **{field.name: tensor + 1})
        assert version_of([HEADS, moved], card) != version, field.name
        assert version_of([HEADS, moved], card) != version_of([moved, HEADS], card), field.name
    assert version_of([HEADS], card) != version


def test_the_version_is_another_one_where_a_score_or_a_flag_may_be():
    card = model_of(HEADS).card
    version = version_of([HEADS], card)
    for changed in (
        {"threshold": 0.6},
        {"threshold": None},
        {"false_alarm_rate": 0.1},
        {"max_tokens": 32},
        {"dtype": "bfloat16"},
        {"temperature": {"reward": 1.0, "harmless": 1.0, "helpful": 2.0}},
        {"combination": {"harmless": 0.25, "helpful": 4.0}},
        {"banks": (bank_card().model_copy(update={"families": ()}),)},
        {"signal_mean": (0.0, 1.0)},
        {"signal_deviation": (1.0, 2.0)},
        {"banks": (bank_card().model_copy(update={"model_fingerprint": "other"}),)},
        {"banks": (bank_card().model_copy(update={"tokenizer_fingerprint": "other"}),)},
    ):
        assert version_of([HEADS], card.model_copy(update=changed)) != version, changed
    for same in ({"seed": 1}, {"metrics": {"total_s": 3.0}}, {"version": "other"}):
        assert version_of([HEADS], card.model_copy(update=same)) == version, same


def test_a_combination_is_about_the_pairs_of_the_criteria_that_have_weight_in_it():
    pairs = [
        PreferencePair(QUESTION, "yes", "no", criterion=name) for name in ("a", "b", "a", "other")
    ]
    assert of_the_combination(pairs, {"a": 1.0, "b": 0.0}).tolist() == [True, False, True, True]
    assert of_the_combination(pairs[1:2], {"a": 1.0, "b": 0.0}).tolist() == [True]


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


def edit_banks(folder: Path, change: Callable[[list[Any]], object]) -> None:
    path = folder / "reward.json"
    banks = json.loads(path.read_text())["banks"]
    change(banks)
    edit(path, banks=banks)


def edit_group(folder: Path, **values: object) -> None:
    edit_banks(folder, lambda banks: banks[0]["groups"][0].update(values))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no heads": lambda f: (f / "heads.safetensors").unlink(),
    "cut heads": lambda f: (f / "heads.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"),
    "a tensor less": lambda f: replace_heads(f, member_mean_KC=None),
    "fewer members": lambda f: edit_group(f, count=1),
    "other features": lambda f: replace_heads(f, feature_mean_FH=torch.zeros(2, 7)),
    "other families": lambda f: replace_heads(f, whitening_FHH=torch.eye(128).unsqueeze(0)),
    "no such family": lambda f: replace_heads(f, family_K=torch.tensor([0, 0, 1, 2])),
    "not a number": lambda f: replace_heads(f, weights_KCH=torch.full((4, 1, 128), torch.nan)),
    "other precision": lambda f: replace_heads(f, member_mean_KC=torch.zeros(4, 1).half()),
    "fractional families": lambda f: replace_heads(f, family_K=torch.tensor([0.0, 0, 1, 1])),
    "families of others": lambda f: replace_heads(f, family_K=torch.tensor([0, 1, 1, 1])),
    "another combination": lambda f: replace_heads(f, combination_C=torch.zeros(1)),
    "more criteria": lambda f: edit(f / "reward.json", criteria=["overall", "honest"]),
    "no temperature": lambda f: edit(f / "reward.json", temperature={"reward": 1.0}),
    "no bank": lambda f: edit(f / "reward.json", banks=[]),
    "unknown precision": lambda f: edit(f / "reward.json", dtype="int8"),
    "no tokens": lambda f: edit(f / "reward.json", max_tokens=0),
    "no square": lambda f: replace_heads(f, whitening_FHH=torch.ones(2, 128, 64)),
    "another bank": lambda f: edit_banks(f, lambda banks: banks.append(banks[0])),
    "another family": lambda f: edit_banks(f, lambda banks: banks[0]["families"].pop()),
    "a negative family": lambda f: replace_heads(f, family_K=torch.tensor([0, 0, 1, -1])),
    "other criteria": lambda f: replace_heads(f, combination_C=torch.ones(2)),
    "flat weights": lambda f: replace_heads(f, weights_KCH=torch.zeros(4, 128)),
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


def test_another_tokenizer_is_refused(moved):
    reward, backbone = moved
    tokenizer = json.loads((backbone / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (backbone / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="another tokenizer or chat template"):
        RewardModel.load(reward).trunks()


def test_a_backbone_that_is_gone_is_refused(moved):
    shutil.rmtree(moved[1])
    with pytest.raises(ModelError, match=str(moved[1])):
        RewardModel.load(moved[0]).trunks()


def test_a_policy_may_write_what_is_left_of_a_row_behind_the_longest_prompt(tiny_reward_model):
    card = RewardModel.load(tiny_reward_model).card
    tokenizer = card.banks[0].tokenizer_fingerprint
    # Rows of 128, of which a prompt keeps 42 at most.
    for prompt, room in ((1000, 86), (42, 86), (20, 108)):
        card.require_room(tokenizer, prompt, room, "rl.max_tokens")
        with pytest.raises(ModelError, match=rf"rl.max_tokens = {room + 1}, but .* most {room} "):
            card.require_room(tokenizer, prompt, room + 1, "rl.max_tokens")
    # By another template the same prompt may be longer.
    card.require_room("another", 20, 86, "rl.max_tokens")
    with pytest.raises(ModelError, match="at most 86 tokens"):
        card.require_room("another", 20, 87, "rl.max_tokens")
