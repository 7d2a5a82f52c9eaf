"""What fine-tuning reads, checked before anything starts; what is left out is counted and said."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from models.chat import ChatTokenizer
from models.conversations import Example, examples_of
from models.data_files import short_name
from models.preferences import read_conversations, read_prompts
from models.reward_model import RewardModel
from models.sources import (
    portable_name,
    require_context,
    resolve_model,
    resolve_reward_model,
)
from rlhf.config import SFTConfig, data_path
from rlhf.errors import DataError, ModelError
from rlhf.records import Conversation, Message, Prompt
from rlhf.seeding import derive_seed
from trainers.prompts import reasons_of, say_default_template


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a command has read and checked before it claims its folder.

    `prompts` holds `answers.limit` prompts and behind them as many as were asked for; `prompted`
    are the former with the baseline's prompting, none where a template refuses it.
    """

    model: str
    reward: Path
    reward_version: str
    train: Sequence[Example]
    held_out: Sequence[Example]
    prompts: Sequence[Prompt]
    prompted: Sequence[Prompt]
    longest_prompt: int

    @property
    def fingerprint(self) -> str:
        """Hash of all that must stay the same when a run is resumed."""
        parts = [
            self.model,
            self.reward_version,
            *(repr((e.token_ids, e.learnt)) for e in (*self.train, *self.held_out)),
            *(repr(prompt) for prompt in (*self.prompts, *self.prompted)),
        ]
        return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def prepare(config: SFTConfig, console: Console, *, more_prompts: int = 0) -> Prepared:
    """Read the data and check it against policy and reward model; what is left out is said.

    Raises:
        DataError: too little is left.
        ModelError: a model cannot be used.
    """
    model = portable_name(config.policy.model)
    policy = resolve_model(model)
    tokenizer = ChatTokenizer(policy)
    say_default_template(policy, tokenizer, console)
    reward = resolve_reward_model(config.reward.model)
    ensemble = RewardModel.load(reward)
    train, held_out, shown, taught = teaching(config, tokenizer, console)
    prompts = asked(config, tokenizer, ensemble, taught, console, more=more_prompts)

    def longest(some: Sequence[Prompt]) -> int:
        """Tokens of the longest, which the engine reads with an answer behind it."""
        length = max(len(tokenizer.prompt_ids(prompt.messages)) for prompt in some)
        what = "tokens of the longest prompt and answers.max_tokens"
        require_context(policy, length + config.answers.max_tokens, what)
        return length

    learnt = max(len(example.token_ids) for example in (*train, *held_out))
    require_context(policy, learnt, "tokens of the longest conversation (data.max_tokens)")
    length = longest(prompts)
    ensemble.card.require_room(
        tokenizer.fingerprint, length, config.answers.max_tokens, "answers.max_tokens"
    )
    before = prompted(config, prompts[: config.answers.limit], shown)
    try:
        length = max(length, longest(before))
    except ModelError as error:
        console.print(f"no baseline by prompting: {error}")
        before = []
    return Prepared(model, reward, ensemble.card.version, train, held_out, prompts, before, length)


def teaching(
    config: SFTConfig, tokenizer: ChatTokenizer, console: Console
) -> tuple[list[Example], list[Example], list[Conversation], set[str]]:
    """What is learnt, what the loss is measured on, conversations for the baseline's examples, and
    what those to learn from open with; what was left out is said.

    Raises:
        DataError: nothing is left to learn from, or to measure on.
    """
    settings = config.data
    found, reports = read_conversations(
        [data_path(path) for path in settings.conversations], settings.limit
    )
    for report in reports:
        console.print(report.sentence())
    kept: list[tuple[Conversation, list[Example]]] = []
    why: Counter[str] = Counter()
    first: dict[str, str] = {}
    for line, path, conversation in found:
        try:
            examples = examples_of(conversation, tokenizer)
            longest = max(len(example.token_ids) for example in examples)
            reason = f"longer than {settings.max_tokens} tokens"
            if longest <= settings.max_tokens:
                kept.append((conversation, examples))
                continue
        except ModelError as error:
            reason = str(error)
        why[reason] += 1
        first.setdefault(reason, f"first at line {line} of {short_name(path)}")
    for reason, count in reasons_of(why):
        where = f" ({first[reason]})" if reason in first else ""
        console.print(f"left out: {count} conversations: {reason}{where}")
    turns = sorted(
        {conversation.first_user_turn for conversation, _ in kept},
        key=lambda turn: (derive_seed(config.seed, "held out", turn), turn),
    )
    measured: set[str] = set()
    held: list[Example] = []
    for turn in turns:
        if len(measured) >= settings.held_out or len(measured) >= len(turns) // 2:
            break
        measured.add(turn)
    held = [e for c, each in kept if c.first_user_turn in measured for e in each]
    train = [e for c, each in kept if c.first_user_turn not in measured for e in each]
    if not train or not held:
        raise DataError(
            f"{len(kept)} conversations with {len(turns)} different openings are left: too few to "
            "learn from some and measure the loss on others; give more, or a larger data.max_tokens"
        )
    random.Random(config.seed).shuffle(train)
    console.print(
        f"{len(train)} examples to learn from, {sum(e.count for e in train)} tokens learnt of "
        f"{sum(len(e.token_ids) for e in train)}; loss on {len(held)} others"
    )
    shown = [c for c, _ in kept if c.first_user_turn not in measured and len(c.messages) == 2]
    taught = {c.first_user_turn for c, _ in kept} - measured
    return train, held, shown, taught


def asked(
    config: SFTConfig,
    tokenizer: ChatTokenizer,
    ensemble: RewardModel,
    taught: set[str],
    console: Console,
    *,
    more: int = 0,
) -> list[Prompt]:
    """The prompts that are answered on the way, from the files in turns: `answers.limit` of them,
    and `more` behind, which open otherwise than all of the former.

    Raises:
        DataError: fewer than two are left, or less than `more` behind them.
    """
    settings = config.answers
    found, reports = read_prompts([data_path(path) for path in settings.prompts])
    for report in reports:
        console.print(report.sentence())
    by_source: dict[str, list[Prompt]] = {}
    for prompt in found:
        by_source.setdefault(prompt.source, []).append(prompt)
    turns = [p for each in zip_longest(*by_source.values()) for p in each if p is not None]
    kept: list[Prompt] = []
    openings: set[str] = set()
    why: Counter[str] = Counter()
    for prompt in turns:
        if len(kept) == settings.limit + more:
            break
        opening = next((m.content for m in prompt.messages if m.role == "user"), "")
        try:
            length = len(tokenizer.prompt_ids(prompt.messages))
            ensemble.tokenise((prompt.messages, "Yes.", True))
        except ModelError as error:
            why[str(error)] += 1
            continue
        if opening in taught:
            why["conversations to learn from open with them"] += 1
        elif len(kept) >= settings.limit and opening in openings:
            why["prompts that are answered on the way open with them"] += 1
        elif length > settings.max_prompt_tokens:
            why[f"longer than {settings.max_prompt_tokens} tokens"] += 1
        else:
            kept.append(prompt)
            if len(kept) <= settings.limit:
                openings.add(opening)
    for reason, count in reasons_of(why):
        console.print(f"left out: {count} prompts: {reason}")
    if len(kept) < 2 or (more and len(kept) < settings.limit + more):
        raise DataError(
            f"{len(kept)} of the {len(found)} prompts of answers.prompts can be answered: at least "
            f"{settings.limit + more if more else 2} are needed; give others than the "
            "conversations', or a larger answers.max_prompt_tokens"
        )
    return kept


def prompted(
    config: SFTConfig, prompts: Sequence[Prompt], shown: Sequence[Conversation]
) -> list[Prompt]:
    """The same prompts with the baseline's system turn and examples before them; system turns of
    their own stand below the baseline's."""
    shots = tuple(m for c in shown[: config.baseline.shots] for m in c.messages)
    made: list[Prompt] = []
    for prompt in prompts:
        own = [m.content for m in prompt.messages if m.role == "system"]
        system = Message("system", "\n\n".join([config.baseline.system, *own]))
        turns = (m for m in prompt.messages if m.role != "system")
        made.append(Prompt(prompt.id, (system, *shots, *turns)))
    return made


def write_examples(examples: Sequence[Example], path: Path) -> None:
    """Tokens and what is learnt of them, as Ray Data reads them."""
    table = pa.table(
        {
            "token_ids": pa.array([list(e.token_ids) for e in examples], pa.list_(pa.int32())),
            "learnt": pa.array([list(e.learnt) for e in examples], pa.list_(pa.bool_())),
        }
    )
    beside = path.with_suffix(".part")
    pq.write_table(table, beside)
    beside.rename(path)
