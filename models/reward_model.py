"""The reward-model ensemble: members on frozen trunks, as one folder.

A reward model is a folder: ``heads.safetensors`` and ``reward.json``. Its members stand in *banks*:
a bank is one backbone, its feature families, and the heads that read them, so that all members of
one backbone share one pass. Shapes: K members over all banks, C criteria, N replies.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.heads import Heads
from models.precision import resolve_dtype
from models.sources import resolve_model, weights_fingerprint
from models.top_layers import TopLayers, file_hash
from models.trunk import Family, Pooling, TokenRow, Trunk
from rlhf.config import DType
from rlhf.ensemble import family_disagreement, shift_score
from rlhf.errors import ModelError
from rlhf.records import Message, PreferencePair
from rlhf.rows import reply_room

_DECIDES = {
    *("dtype", "max_tokens", "criteria", "combination", "temperature", "signal_mean"),
    *("signal_deviation", "threshold", "false_alarm_rate"),
}
"""Fields of a card that its scores, probabilities and flags depend on, beside banks and heads."""
COMBINED = "reward"
"""What the stated combination of criteria is called beside them."""

Reply = tuple[Sequence[Message], str, bool]
"""Conversation, reply, and whether the reply was finished."""
RowFeatures = tuple[Tensor, ...]
"""Features of the same N replies in every bank, each of shape (N, F, H)."""

_BATCH_TOKENS = 2048
"""Padded tokens a scoring pass may hold."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OwnLayersCard(_Part):
    """Layers that a member trained: ``own/<name>.safetensors``, named by the file's hash."""

    name: str = Field(pattern=r"^[0-9a-f]{16}$")
    end: int = Field(ge=1)
    """The backbone's layer that they end with."""


class FamilyCard(_Part):
    """A feature family: see `models.trunk.Family`."""

    layers: int = Field(ge=0)
    pooling: Pooling
    own: OwnLayersCard | None = None

    @property
    def family(self) -> Family:
        """What the trunk computes."""
        return Family(self.layers, self.pooling, "" if self.own is None else self.own.name)


class GroupCard(_Part):
    """Members of one kind and setting in a bank."""

    kind: str
    count: int = Field(ge=1)
    family: int = Field(ge=0)
    l2: dict[str, float] = {}
    training: dict[str, float] = {}
    """What training a member gave: its last losses, seconds, pairs."""


class BankCard(_Part):
    """A backbone and what stands on it."""

    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    families: tuple[FamilyCard, ...]
    groups: tuple[GroupCard, ...]


class RewardCard(_Part):
    """``reward.json``: what the members were trained on, and what they may be used with."""

    version: str
    banks: tuple[BankCard, ...] = Field(min_length=1)
    dtype: DType
    max_tokens: int = Field(ge=2)
    criteria: tuple[str, ...] = Field(min_length=1)
    combination: dict[str, float]
    """The reward is this weighted sum of the standardised criteria, standardised again."""
    correlation: dict[str, float] = {}
    """How alike the heads of two criteria were taken to be before their pairs were seen."""
    temperature: dict[str, float]
    """By criterion, and of the combination (`reward`)."""
    signal_mean: tuple[float, float]
    """Disagreement and distance on held-out replies."""
    signal_deviation: tuple[float, float]
    threshold: float | None
    """Of the shift score, on held-out replies; None where they are too few to promise the rate."""
    false_alarm_rate: float
    false_alarm_interval: tuple[float, float]
    seed: int
    ancestry: tuple[str, ...] = ()
    """Versions that this one was refreshed from, oldest first."""
    data: dict[str, Any]
    metrics: dict[str, Any]

    @model_validator(mode="after")
    def _every_criterion_has_its_numbers(self) -> RewardCard:
        if set(self.combination) != set(self.criteria):
            raise ValueError("combination and criteria differ")
        if set(self.temperature) != {COMBINED, *self.criteria}:
            raise ValueError("temperature and criteria differ")
        return self

    @property
    def members(self) -> int:
        """K, over all banks."""
        return sum(group.count for bank in self.banks for group in bank.groups)

    def require_room(
        self, tokenizer: str, prompt_tokens: int, reply_tokens: int, setting: str
    ) -> None:
        """Refuse a policy that may write more than the reward model reads: what stands beyond moves
        neither reward nor disagreement.

        Args:
            tokenizer: the policy's fingerprint. Where a bank has another one, or another template,
                prompts may be longer there, and are taken to be as long as they can be.
            prompt_tokens, reply_tokens: the most, in the policy's tokens.
            setting: says how many tokens a reply may have.

        Raises:
            ModelError: a reply may be longer.
        """
        alike = all(bank.tokenizer_fingerprint == tokenizer for bank in self.banks)
        room = reply_room(self.max_tokens, prompt_tokens if alike else self.max_tokens)
        if reply_tokens > room:
            raise ModelError(
                f"{setting} = {reply_tokens}, but the reward model reads at most {room} tokens of "
                f"a reply (its rows have {self.max_tokens}, of which a prompt keeps up to a "
                f"third): what is written beyond would count for nothing; set it to {room} or "
                "less, or train a reward model with a larger ensemble.max_tokens"
            )


@dataclass(frozen=True, slots=True)
class BankAnswers:
    """What the members of one bank say of N replies: rewards of the combination and its parts, in
    deviations over the training replies; which members are told from each other by disagreement
    alone (`kin`); and the distance from the training replies in each of the bank's families.
    `cut` is whether the bank's row was too short to read a reply to its end."""

    rewards_KN: Tensor
    criteria_KCN: Tensor
    kin_K: Tensor
    distances_FN: Tensor
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Answers:
    """What the members of all banks say of N replies.

    `rewards_KN` are of the combination, `criteria_KCN` its parts; all are in deviations over the
    training replies.
    """

    rewards_KN: Tensor
    criteria_KCN: Tensor
    disagreement_N: Tensor
    distance_N: Tensor


@dataclass(frozen=True, slots=True)
class Scores(Answers):
    """Answers, and whether the replies are what the members know: both signals in one number, and
    whether it passes the threshold of held-out replies."""

    shift_N: Tensor
    shifted_N: Tensor


def ask_bank(heads: Heads, features_NFH: Tensor) -> BankAnswers:
    """A bank's members on its features."""
    criteria_KCN = heads.criteria(features_NFH)
    rewards_KN = heads.combined(criteria_KCN)
    return BankAnswers(rewards_KN, criteria_KCN, heads.kin_K, heads.distances(features_NFH))


def join(banks: Sequence[BankAnswers]) -> Answers:
    """What banks say together, all of a reward model or those there are.

    Disagreement is taken within a family and averaged over families, distance averaged over them.
    """
    rewards_KN = torch.cat([bank.rewards_KN for bank in banks])
    kin, offset = [], 0
    for bank in banks:
        kin.append(bank.kin_K + offset)
        offset += int(bank.kin_K.max()) + 1
    return Answers(
        rewards_KN,
        torch.cat([bank.criteria_KCN for bank in banks]),
        family_disagreement(rewards_KN, torch.cat(kin)),
        torch.cat([bank.distances_FN for bank in banks]).mean(dim=0),
    )


def ask(banks: Sequence[Heads], features: RowFeatures) -> Answers:
    """Every bank's members on its own features of the same replies."""
    return join(list(map(ask_bank, banks, features)))


def scored(card: RewardCard, said: Answers) -> Scores:
    """Answers by the signals and the threshold of the card."""
    shift_N = shift_score(
        torch.stack([said.disagreement_N, said.distance_N]),
        torch.tensor(card.signal_mean),
        torch.tensor(card.signal_deviation),
    )
    # Without a threshold (too few held-out replies to promise the rate) nothing is flagged.
    threshold = float("inf") if card.threshold is None else card.threshold
    return Scores(
        said.rewards_KN,
        said.criteria_KCN,
        said.disagreement_N,
        said.distance_N,
        shift_N,
        shift_N > threshold,
    )


class RewardModel:
    """An ensemble that is ready to score: its card, its heads, and the trunks loaded on demand.

    Args:
        own: the folder of the members' own layers, where they have some.
    """

    def __init__(
        self, card: RewardCard, banks: Sequence[Heads], own: Path = Path("nowhere")
    ) -> None:
        self.card = card
        self.banks = tuple(banks)
        self._own = own
        self._trunks: tuple[Trunk, ...] = ()

    def trunks(self, device: str = "cpu") -> tuple[Trunk, ...]:
        """One trunk a bank, as the heads were trained on, loaded on first use.

        Raises:
            ModelError: a backbone or its tokenizer is another one than in training.
        """
        if not self._trunks:
            self._trunks = tuple(self._load_trunk(bank, device) for bank in self.card.banks)
        return self._trunks

    def _load_trunk(self, bank: BankCard, device: str) -> Trunk:
        folder = resolve_model(bank.model)
        found = weights_fingerprint(folder)
        if found != bank.model_fingerprint:
            raise ModelError(
                f"the reward model was trained on {bank.model} with fingerprint "
                f"{bank.model_fingerprint}, but the model there now has {found}"
            )
        trunk = build_trunk(
            bank.model,
            bank.families,
            own=self._own,
            dtype=self.card.dtype,
            max_tokens=self.card.max_tokens,
            batch_tokens=_BATCH_TOKENS,
            device=device,
        )
        width = self.banks[self.card.banks.index(bank)].feature_mean_FH.shape[1]
        if trunk.width != width:
            raise ModelError(
                f"the reward model's heads read {width} features, {bank.model} has {trunk.width}"
            )
        if trunk.tokenizer.fingerprint != bank.tokenizer_fingerprint:
            raise ModelError(
                f"the reward model was trained with another tokenizer or chat template than "
                f"{bank.model} has now"
            )
        return trunk

    def tokenise(self, reply: Reply) -> tuple[TokenRow, ...]:
        """One row a bank.

        Raises:
            ModelError: the reply has no token, or a chat template refuses the conversation.
        """
        messages, text, finished = reply
        return tuple(trunk.tokenise(messages, text, finished=finished) for trunk in self.trunks())

    def reads_to_its_end(self, reply: Reply, rows: Sequence[TokenRow]) -> bool:
        """Whether every bank reads the whole reply, of which `tokenise` made these rows."""
        messages, text, finished = reply
        return all(
            trunk.reads_to_its_end(row, messages, text, finished=finished)
            for trunk, row in zip(self.trunks(), rows, strict=True)
        )

    def features(
        self,
        rows: Sequence[tuple[TokenRow, ...]],
        progress: Callable[[int], None] = lambda count: None,
    ) -> RowFeatures:
        """Features of tokenised rows in every bank; `progress` gets the rows done in the last."""
        quiet: Callable[[int], None] = lambda count: None  # noqa: E731
        return tuple(
            trunk.features(
                [row[bank] for row in rows], progress if bank == len(self.banks) - 1 else quiet
            )
            for bank, trunk in enumerate(self.trunks())
        )

    def score(self, replies: Sequence[Reply]) -> Scores:
        """Scores of replies."""
        return self.score_features(self.features([self.tokenise(reply) for reply in replies]))

    def score_features(self, features: RowFeatures) -> Scores:
        """Scores of trunk features."""
        return scored(self.card, ask(self.banks, features))

    def part(self, bank: int) -> RewardModel:
        """The members of one bank as a reward model of their own, of the same version."""
        card = self.card.model_copy(update={"banks": (self.card.banks[bank],)})
        return RewardModel(card, [self.banks[bank]], self._own)

    def criterion(self, name: str) -> int:
        """The place of a criterion.

        Raises:
            ModelError: the model has no heads for it.
        """
        if name not in self.card.criteria:
            raise ModelError(
                f"the reward model has no criterion {name!r}; it has "
                f"{', '.join(self.card.criteria)}"
            )
        return self.card.criteria.index(name)

    def save(self, folder: Path) -> None:
        """Write ``heads.safetensors`` and ``reward.json`` into `folder`, which must exist."""
        tensors: dict[str, Tensor] = {}
        for bank, heads in enumerate(self.banks):
            tensors |= heads.tensors(f"{bank}.")
        save_file(tensors, folder / "heads.safetensors")
        for own in own_layers([f for bank in self.card.banks for f in bank.families]):
            (folder / "own").mkdir(exist_ok=True)
            file = f"{own.name}.safetensors"
            shutil.copyfile(self._own / file, folder / "own" / file)
        (folder / "reward.json").write_text(self.card.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RewardModel:
        """Read a reward-model folder, or the one in a run's folder.

        Raises:
            ModelError: it is not one, or its files do not fit each other.
        """
        if not (folder / "reward.json").is_file():
            nested = folder / "reward"
            if (nested / "reward.json").is_file():
                return cls.load(nested)
            raise ModelError(f"{folder} is not a reward model: it has no reward.json")
        try:
            card = RewardCard.model_validate_json((folder / "reward.json").read_text())
            tensors = load_file(folder / "heads.safetensors")
            banks = [_heads(tensors, f"{bank}.") for bank in range(len(card.banks))]
        except (ValidationError, SafetensorError, OSError, KeyError, UnicodeDecodeError) as error:
            raise ModelError(
                f"{folder} is a damaged reward model: {str(error).splitlines()[0]}"
            ) from None
        if not all(_fits(heads, bank, card) for heads, bank in zip(banks, card.banks, strict=True)):
            raise ModelError(f"{folder} is a damaged reward model: heads and card disagree")
        return cls(card, banks, folder / "own")


def own_layers(families: Sequence[FamilyCard]) -> list[OwnLayersCard]:
    """The trained layers among families."""
    return [family.own for family in families if family.own is not None]


def build_trunk(
    model: str,
    families: Sequence[FamilyCard],
    *,
    own: Path,
    dtype: DType,
    max_tokens: int,
    batch_tokens: int,
    device: str = "cpu",
) -> Trunk:
    """A trunk with the trained layers that its families name, from the files in `own`."""
    folder = resolve_model(model)
    return Trunk(
        folder,
        [family.family for family in families],
        dtype=dtype,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        device=device,
        own=_load_own_layers(folder, families, own, resolve_dtype(dtype, device)),
    )


def trunk_of(arguments: Mapping[str, Any], device: str = "cpu") -> Trunk:
    """`build_trunk` on arguments that are plain data, as they travel to an actor."""
    families = [FamilyCard.model_validate(given) for given in arguments["families"]]
    own = Path(arguments["own"])
    return build_trunk(**{**arguments, "families": families, "own": own, "device": device})


def _load_own_layers(
    model: Path, families: Sequence[FamilyCard], folder: Path, dtype: str
) -> dict[str, TopLayers]:
    """The trained layers that families name, from the files in `folder`.

    Raises:
        ModelError: a file is missing, or is not what it was.
    """
    layers: dict[str, TopLayers] = {}
    # The backbone is loaded once for all members of one span.
    fresh: dict[tuple[int, int], TopLayers] = {}
    for family in families:
        if family.own is None:
            continue
        path = folder / f"{family.own.name}.safetensors"
        if not path.is_file() or file_hash(path) != family.own.name:
            raise ModelError(f"a member's own layers are missing or damaged: {path}")
        span = family.layers, family.own.end
        if span not in fresh:
            fresh[span] = TopLayers(model, *span, dtype).requires_grad_(False)
        layers[family.own.name] = copy.deepcopy(fresh[span]).read(path)
    return layers


def in_combination(criterion: str, combination: Mapping[str, float]) -> bool:
    """Whether the combined reward is about pairs judged by this: not where it is a criterion
    without weight in it, whose pairs may well contradict it."""
    return combination.get(criterion) != 0


def of_the_combination(pairs: Sequence[PreferencePair], combination: Mapping[str, float]) -> Tensor:
    """The pairs that the combined reward is about (`in_combination`); all where there are none.
    Boolean, shape (N,)."""
    about_N = torch.tensor([in_combination(pair.judged_by, combination) for pair in pairs])
    return about_N if about_N.any() else torch.ones(len(pairs), dtype=torch.bool)


def version_of(banks: Sequence[Heads], card: RewardCard) -> str:
    """A name for what a reward model says: a hash of all its heads' tensors, and of all in its card
    that decides a score, a probability or a flag."""
    digest = hashlib.sha256()
    digest.update(card.model_dump_json(include=_DECIDES).encode())
    for bank_card in card.banks:
        families = [family.model_dump() for family in bank_card.families]
        reads = (bank_card.model_fingerprint, bank_card.tokenizer_fingerprint, families)
        digest.update(repr(reads).encode())
    for bank, heads in enumerate(banks):
        for name, tensor in heads.tensors(f"{bank}.").items():
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def _heads(tensors: Mapping[str, Tensor], prefix: str) -> Heads:
    return Heads(**{field.name: tensors[f"{prefix}{field.name}"] for field in fields(Heads)})


def _fits(heads: Heads, bank: BankCard, card: RewardCard) -> bool:
    families = [group.family for group in bank.groups for _ in range(group.count)]
    combination = [card.combination[criterion] for criterion in card.criteria]
    return (
        heads.fit_together()
        and heads.family_K.tolist() == families
        and len(heads.feature_mean_FH) == len(bank.families)
        and torch.equal(heads.combination_C, torch.tensor(combination))
    )
