"""Two policies answer the same prompts, for judges who compare them directly."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

from rich.console import Console

from cluster.files import write_atomically
from cluster.layout import usable_cores
from cluster.progress import Progressing
from cluster.session import ray_session
from labelling.forms import work_row
from labelling.records import Answer, Work
from models.sources import require_context, resolve_policy, weights_fingerprint
from rlhf.config import ClusterSection, RLSection, RolloutSection, data_path
from rlhf.errors import DataError, ModelError
from rlhf.records import Completion, Prompt
from trainers.prompts import usable_prompts
from trainers.sampling import requests_for, sample_with_engine


def write_pairs(
    names: tuple[str, str],
    prompts: Path,
    out: Path,
    console: Console,
    *,
    limit: int,
    max_tokens: int,
    max_prompt_tokens: int,
    seed: int,
) -> None:
    """Write a pair of answers for every prompt that fits, in the form that `pavlov label import
    --pairs` reads: each names its model and, as its checkpoint, the hash of the weights that wrote
    it. Pairs whose answers are equal or of which one is empty are left out and counted.

    Raises:
        ModelError: a policy cannot be used, or both are the same weights.
        DataError: no prompt can be used, no pair is left, or `out` cannot be written or is the file
            of prompts.
    """
    folders = [resolve_policy(name) for name in names]
    versions = [weights_fingerprint(folder) for folder in folders]
    if versions[0] == versions[1]:
        raise ModelError(f"{names[0]} and {names[1]} are the same weights ({versions[0]})")
    if out.suffix == ".parquet" or out.is_dir():
        raise DataError(f"--out {out} must be a file of JSON lines, e.g. pairs.jsonl")
    for folder in folders:
        require_context(folder, max_prompt_tokens + max_tokens, "max_prompt_tokens + max_tokens")
    titles = [_title(folder) for folder in folders]
    if titles[0] == titles[1]:
        titles = [f"{title} {version}" for title, version in zip(titles, versions, strict=True)]
    file = prompts if prompts.is_file() else data_path(str(prompts))
    if out.resolve() == file.resolve():
        raise DataError(f"--out {out} is the file of prompts; pairs need a file of their own")
    asked = usable_prompts([file], folders, max_prompt_tokens, console)[:limit]
    settings = RLSection(max_tokens=max_tokens)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {out} cannot be written: {error.strerror or error}") from None
    with ray_session("compare", num_cpus=usable_cores()) as run:
        drawn = [
            _answers(folder, title, asked, settings, max_prompt_tokens, seed, run, console)
            for folder, title in zip(folders, titles, strict=True)
        ]
    works = list[Work]()
    for prompt, *answers in zip(asked, *drawn, strict=True):
        one, other = (
            Answer(answer.text, title, version, answer.finish_reason == "stop")
            for answer, title, version in zip(answers, titles, versions, strict=True)
        )
        with contextlib.suppress(ValueError):
            works.append(Work(prompt.messages, one, other, prompt.source))
    if not works:
        raise DataError("no pair to compare: all answers are equal or empty")
    write_atomically(
        out, "".join(json.dumps(work_row(work), ensure_ascii=False) + "\n" for work in works)
    )
    console.print(
        f"{len(works)} pairs, {len(asked) - len(works)} left out (equal or empty answers): {out}"
    )


def _answers(
    folder: Path,
    title: str,
    prompts: list[Prompt],
    settings: RLSection,
    max_prompt_tokens: int,
    seed: int,
    run: str,
    console: Console,
) -> list[Completion]:
    """One answer to every prompt, by an engine of its own."""
    requests = requests_for(prompts, 1, settings, seed)
    with Progressing(console, title, len(requests)) as progress:
        drawn = asyncio.run(
            sample_with_engine(
                str(folder),
                RolloutSection(),
                ClusterSection(),
                requests,
                run,
                say=console.print,
                done=progress.advance,
                max_prompt_tokens=max_prompt_tokens,
            )
        )
    return [completion for (completion,) in drawn]


def _title(folder: Path) -> str:
    """What judges' reports call a policy: its run."""
    return folder.parent.name if folder.name == "policy" else folder.name
