"""The reward actor, built directly: every group gets what the reward model says of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from actors.reward import EMPTY_REWARD, RewardActor
from models.reward_model import RewardModel
from rlhf.config import RewardFunction
from rlhf.errors import GenerationError
from rlhf.records import Completion, GroupScores, Message, Prompt, RolloutGroup
from tests.two_criteria import COMBINATION, build_two_criteria

TEXTS = ("Tom is a good name.", "Rice")


def completion(text: str, **values: Any) -> Completion:
    defaults: dict[str, Any] = {
        "token_ids": (1, 2),
        "text": text,
        "rollout_logprobs_T": (-0.5, -0.5),
        "finish_reason": "stop",
        "oldest_version": 0,
        "newest_version": 0,
        "seed": 1,
    }
    return Completion(**defaults | values)


def group(question: str, *completions: Completion, role: str = "user") -> RolloutGroup:
    prompt = Prompt(question, (Message(role, question),))  # type: ignore[arg-type]
    return RolloutGroup(prompt, 0, (7, 8), completions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_reward_model: Path) -> Path:
    return build_two_criteria(tmp_path_factory.mktemp("two") / "reward", tiny_reward_model)


@pytest.fixture(scope="module")
def actor(folder: Path) -> RewardActor:
    return RewardActor(str(folder), 0.0, "run", "reward")


def scored(actor: RewardActor, *groups: RolloutGroup) -> list[GroupScores]:
    found = actor.score(groups)
    assert all(isinstance(scores, GroupScores) for scores in found)
    return found  # type: ignore[return-value]


def test_every_group_gets_the_scores_of_its_own_completions_in_order(actor, folder):
    groups = [group("Why?", *map(completion, TEXTS)), group("Who?", completion("Tom"))]
    model = RewardModel.load(folder)
    for given, found in zip(groups, scored(actor, *groups), strict=True):
        wanted = model.score([(given.prompt.messages, c.text, True) for c in given.completions])
        for member_G, wanted_N in zip(found.rewards_KG, wanted.rewards_KN.tolist(), strict=True):
            assert member_G == pytest.approx(wanted_N, abs=1e-4)
        assert found.rewards_G == pytest.approx(wanted.rewards_KN.mean(dim=0).tolist(), abs=1e-4)
        for name in ("disagreement", "distance", "shift"):
            wanted_N = getattr(wanted, f"{name}_N").tolist()
            assert getattr(found, f"{name}_G") == pytest.approx(wanted_N, rel=1e-4, abs=1e-4)
        assert found.reward_version == actor.version() == model.card.version


def test_parts_are_the_criteria_by_name_averaged_over_members(actor, folder):
    given = group("Why?", *map(completion, TEXTS))
    [found] = scored(actor, given)
    wanted = RewardModel.load(folder).score([(given.prompt.messages, t, True) for t in TEXTS])
    assert list(found.parts_G) == ["helpful", "harmless"]
    for place, name in enumerate(found.parts_G):
        wanted_N = wanted.criteria_KCN[:, place].mean(dim=0).tolist()
        assert found.parts_G[name] == pytest.approx(wanted_N, abs=1e-4)
    # The model's combined deviation is 1: the reward is their stated combination.
    for sibling, reward in enumerate(found.rewards_G):
        combined = sum(w * found.parts_G[name][sibling] for name, w in COMBINATION.items())
        assert reward == pytest.approx(combined, abs=1e-4)


def test_completions_that_the_row_is_too_short_for_are_told(actor):
    long = completion("water " * 200)
    found = scored(actor, group("Why?", completion(TEXTS[0]), long), group("Who?", long))
    assert [each.cut_G for each in found] == [(False, True), (True,)]


def test_a_completion_that_was_cut_off_is_scored_as_unfinished(actor, folder):
    cut_off = completion(TEXTS[0], finish_reason="length")
    [found] = scored(actor, group("Why?", completion(TEXTS[0]), cut_off))
    rows = [((Message("user", "Why?"),), TEXTS[0], finished) for finished in (True, False)]
    wanted_N = RewardModel.load(folder).score(rows).rewards_KN.mean(dim=0).tolist()
    assert found.rewards_G == pytest.approx(wanted_N, abs=1e-4)
    assert found.rewards_G[0] != pytest.approx(found.rewards_G[1], abs=1e-3)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_a_completion_without_visible_text_gets_the_same_from_everyone_and_is_flagged(actor, text):
    [found] = scored(actor, group("Why?", completion(text), completion("Tom")))
    assert {member_G[0] for member_G in found.rewards_KG} == {EMPTY_REWARD}
    assert found.rewards_G[0] == EMPTY_REWARD
    assert {part_G[0] for part_G in found.parts_G.values()} == {EMPTY_REWARD}
    assert found.disagreement_G[0] == 0.0
    assert (found.data_shift_G, found.domain_shift_G) == ((True, False), (True, False))
    [alone] = scored(actor, group("Why?", completion("Tom")))
    assert found.rewards_G[1] == pytest.approx(alone.rewards_G[0], abs=1e-4)


def test_the_penalty_is_taken_off_the_reward_by_disagreement_and_off_nothing_else(actor, folder):
    strict = RewardActor(str(folder), 0.5, "run", "strict")
    given = group("Why?", *map(completion, TEXTS))
    [plain], [penalised] = scored(actor, given), scored(strict, given)
    assert penalised.rewards_KG == plain.rewards_KG
    assert penalised.parts_G == plain.parts_G
    for sibling, reward in enumerate(penalised.rewards_G):
        members = [member_G[sibling] for member_G in plain.rewards_KG]
        mean = sum(members) / len(members)
        # The disagreement that is recorded: within families, not over all members.
        disagreement = plain.disagreement_G[sibling]
        assert reward == pytest.approx(mean - 0.5 * disagreement, abs=1e-4)
        deviation = (sum((m - mean) ** 2 for m in members) / len(members)) ** 0.5
        assert abs(deviation - disagreement) > 1e-3


@pytest.fixture
def refusing(
    tmp_path: Path, tiny_model: Path, tiny_reward_model: Path, monkeypatch: pytest.MonkeyPatch
) -> RewardActor:
    """An actor whose backbone's template takes no system turn, and that also counts characters."""
    (tmp_path / "counting_rewards.py").write_text(
        "def characters(prompts, completions):\n    return [len(c.text) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    characters = RewardFunction(name="characters", function="counting_rewards:characters")
    backbone = Path(shutil.copytree(tiny_model, tmp_path / "backbone"))
    template = backbone / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    folder = build_two_criteria(tmp_path / "reward", tiny_reward_model, model=backbone)
    return RewardActor(str(folder), 0.0, "run", "refusing", functions=[characters])


def test_a_group_that_cannot_be_tokenised_is_an_error_in_its_place(refusing):
    bad = group("Be brief.", completion("Yes."), role="system")
    good = group("Why?", *map(completion, TEXTS))
    first, second, third = refusing.score([good, bad, good])
    assert isinstance(second, GenerationError)
    assert "prompt Be brief.: the chat template refuses" in str(second)
    assert isinstance(first, GroupScores)
    assert isinstance(third, GroupScores)
    assert third.rewards_G == pytest.approx(first.rewards_G, abs=1e-4)
    counted = tuple(float(len(text)) for text in TEXTS)
    assert first.own_G == third.own_G == {"characters": counted}


@pytest.mark.filterwarnings("ignore:std")
def test_groups_that_are_all_refused_or_none_at_all_are_no_crash(refusing):
    bad = group("Be brief.", completion("Yes."), role="system")
    [error] = refusing.score([bad])
    assert isinstance(error, GenerationError)
    assert refusing.score([]) == []
