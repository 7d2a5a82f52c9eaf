"""Judges that are not people: simulated ones and reward models, over the same HTTP interface.

They are assessors of kind ``simulated`` or ``model``, have a demand of their own for every pair,
and are never counted together with people.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from labelling.records import Work
from labelling.worlds import SimulatedPerson, Task
from rlhf.errors import ResourceError, RunError
from rlhf.records import Message

Decide = Callable[[dict[str, Any], int], tuple[dict[str, str], float | None]]
"""From a task as the interface gives it and its number (1 is the first) to the verdict on each
criterion as shown, and the seconds taken (None: the time since the task was handed out)."""

_PATIENCE_S = 120.0
_FIRST_PATIENCE_S = 10.0
_TASK = {"id", "prompt", "first", "second", "criteria"}


def require_service(url: str, patience_s: float = _FIRST_PATIENCE_S) -> None:
    """Do nothing where a service answers.

    Raises:
        ResourceError: none does within `patience_s` seconds, or something else does.
    """
    try:
        with httpx.Client(base_url=url, timeout=patience_s) as client:
            answer = _ask(client, "/health", None, patience_s, method="GET")
        if answer is None or answer.get("status") != "ok":
            raise RunError(f"{url} does not say that it is well ({str(answer)[:200]})")
    except (httpx.InvalidURL, RunError) as error:
        raise ResourceError(
            f"there is no labelling service at {url}: {error}; start `pavlov label serve`, or give "
            "its address with --url"
        ) from None


def judge_over_http(
    url: str,
    token: str,
    decide: Decide,
    *,
    at_most: int | None = None,
    told: Callable[[], None] = lambda: None,
    patience_s: float = _PATIENCE_S,
) -> int:
    """Judge until nothing is left, or until paused; returns how many judgements were acknowledged.

    A server that is away is waited for, and a judgement without an answer sent again: it counts
    once.

    Raises:
        RunError: the server refuses, or was away for `patience_s` seconds.
    """
    done = 0
    with httpx.Client(
        base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=30
    ) as client:
        while at_most is None or done < at_most:
            answer = _ask(client, "/api/next", None, patience_s)
            task = answer and answer.get("task")
            if task is None:
                break
            if not isinstance(task, dict) or not task.keys() >= _TASK:
                raise RunError(f"{url} gives out no task of a labelling service")
            verdicts, seconds = decide(task, done + 1)
            body = {"task": task["id"], "verdicts": verdicts, "seconds": seconds}
            if _ask(client, "/api/judgements", body, patience_s) is None:
                break
            done += 1
            told()
    return done


def _ask(
    client: httpx.Client,
    path: str,
    body: dict[str, Any] | None,
    patience_s: float,
    method: str = "POST",
) -> dict[str, Any] | None:
    """The answer; None for one who is paused."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            answer = client.request(method, path, json=body)
        except httpx.UnsupportedProtocol as error:
            raise RunError(str(error)) from None
        except httpx.RequestError as error:
            reason, wait = str(error) or type(error).__name__, 0.5
        else:
            if answer.status_code == 403:
                return None
            reason = f"{answer.status_code}: {' '.join(answer.text[:200].split())}"
            if answer.status_code == 200:
                return _object(answer, f"{client.base_url} is no labelling service ({reason})")
            # Ray Serve's own 404, in plain text, is of a service that is only starting.
            starting = answer.status_code == 404 and "json" not in answer.headers.get(
                "content-type", ""
            )
            if answer.status_code not in (429, 500, 502, 503, 504) and not starting:
                raise RunError(f"{client.base_url} refused {path} ({reason})")
            wait = _retry_after_s(answer)
        if time.monotonic() + wait > deadline:
            raise RunError(f"{client.base_url} did not take {path} for {patience_s:g} s ({reason})")
        time.sleep(wait)


def _object(answer: httpx.Response, otherwise: str) -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise RunError(otherwise)
    return found


def _retry_after_s(answer: httpx.Response) -> float:
    """What a server asks for in seconds; a date (RFC 9110, 10.2.3) is not followed."""
    asked = answer.headers.get("retry-after", "")
    return min(float(asked), 60.0) if asked.isdecimal() else 0.5


@dataclass(frozen=True, slots=True)
class Truth:
    """The better one of two answers, and whether everybody ought to see it."""

    text: str
    honeypot: bool


def truths_of(known: Iterable[Work], honeypots: Iterable[Work]) -> dict[frozenset[str], Truth]:
    """The better answers, by both texts.

    Args:
        known: pairs with their verdict as if all were honeypots; those without a better answer are
            left out.
        honeypots: the pairs that are honeypots.
    """
    tests = {frozenset((work.a.text, work.b.text)) for work in honeypots}
    found = {}
    for work in known:
        if work.honeypot is not None and work.honeypot.verdict in ("a", "b"):
            better = work.a if work.honeypot.verdict == "a" else work.b
            both = frozenset((work.a.text, work.b.text))
            found[both] = Truth(better.text, both in tests)
    return found


def as_person(person: SimulatedPerson, truths: Mapping[frozenset[str], Truth], seed: int) -> Decide:
    """Judges as a simulated person: about the planted truth, or where there is none about the rule
    of `labelling.simulated`. All criteria get the same verdict."""
    from labelling.simulated import rule

    def decide(task: dict[str, Any], number: int) -> tuple[dict[str, str], float]:
        first, second = task["first"], task["second"]
        truth = truths.get(frozenset((first, second)))
        if truth is None:
            question = task["prompt"][-1]["content"]
            scores = [rule(question, text, finished=True) for text in (first, second)]
            truth = Truth(first if scores[0] >= scores[1] else second, False)
        # To the person the answer shown first is a.
        shown = Task(
            pair="".join(sorted((first, second))),
            truth="a" if truth.text == first else "b",
            first="a",
            words=(len(first.split()), len(second.split())),
            honeypot=truth.honeypot,
        )
        verdict, seconds = person.judge(shown, number, seed)
        said = {"a": "first", "b": "second"}.get(verdict, verdict)
        return dict.fromkeys(task["criteria"], said), seconds

    return decide


def as_reward_model(folder: Path, ties_below: float) -> Decide:
    """Judges by a reward model: the overall verdict by its reward, a criterion by its own heads
    where it has them; a tie where the rewards differ by less than `ties_below`.

    Raises:
        ModelError: the folder holds no reward model.
    """
    from models.reward_model import RewardModel
    from rlhf.ensemble import aggregate

    model = RewardModel.load(folder)
    model.trunks("cpu")

    def said(rewards: Any) -> str:
        difference = float(rewards[0] - rewards[1])
        if abs(difference) < ties_below:
            return "tie"
        return "first" if difference > 0 else "second"

    def decide(task: dict[str, Any], number: int) -> tuple[dict[str, str], None]:
        messages = [Message(**turn) for turn in task["prompt"]]
        texts = [model.tokenise((messages, task[name], True)) for name in ("first", "second")]
        scores = model.score_features(model.features(texts))
        overall = said(aggregate(scores.rewards_KN))
        return {
            name: said(scores.criteria_KCN[:, model.criterion(name)].mean(dim=0))
            if name in model.card.criteria
            else overall
            for name in task["criteria"]
        }, None

    return decide
