"""The prompts that policies can be asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from models.chat import ChatTokenizer
from models.preferences import read_prompts
from rlhf.errors import DataError, ModelError
from rlhf.records import Prompt


def usable_prompts(
    files: Sequence[Path],
    policies: Sequence[Path],
    max_tokens: int,
    console: Console,
    limit: int | None = None,
) -> list[Prompt]:
    """The prompts of the files that every policy reads in at most `max_tokens`; what was left out
    is said.

    Args:
        limit: of the prompts that are read.

    Raises:
        DataError: none is left.
    """
    prompts, reports = read_prompts(files, limit)
    for report in reports:
        console.print(report.sentence())
    tokenizers = [ChatTokenizer(policy) for policy in policies]
    kept: list[Prompt] = []
    why: Counter[str] = Counter()
    for prompt in prompts:
        try:
            length = max(len(each.prompt_ids(prompt.messages)) for each in tokenizers)
        except ModelError as error:
            why[str(error)] += 1
            continue
        if length <= max_tokens:
            kept.append(prompt)
        else:
            why[f"longer than {max_tokens} tokens"] += 1
    reasons = "; ".join(f"{count} prompts: {reason}" for reason, count in reasons_of(why))
    if not kept:
        raise DataError(f"none of the {len(prompts)} prompts can be used ({reasons})")
    if reasons:
        console.print(f"left out: {reasons}")
    for policy, tokenizer in zip(policies, tokenizers, strict=True):
        say_default_template(policy, tokenizer, console)
    return kept


def say_default_template(policy: Path, tokenizer: ChatTokenizer, console: Console) -> None:
    """Tell of a policy that has no chat template of its own, as raw base models have none."""
    if tokenizer.uses_default_template:
        console.print(f"{policy.name} has no chat template: Pavlov's default one is used")


def reasons_of(why: Counter[str]) -> list[tuple[str, int]]:
    """The three most frequent reasons with their counts, and all others in one."""
    most = why.most_common(3)
    others = why.total() - sum(count for _, count in most)
    return [*most, ("other reasons", others)] if others else most
