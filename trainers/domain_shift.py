"""When a completion counts as outside of what the reward model knows, for one run.

The reward model has a threshold of its own, set on human-rated replies. A small policy that is cut
off at a few tokens is far from those before it has learned anything, so a run acts upon a second
one: the conformal quantile of the shift score over completions of its *start policy*, sampled as
the run samples. What the policy says before it is trained is in the domain by definition.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.files import write_atomically
from rlhf.config import RLConfig
from rlhf.ensemble import false_alarm_interval, quantile_threshold
from rlhf.errors import CheckpointError
from rlhf.prompts import PromptCursor
from rlhf.records import Prompt, ScoredGroup
from rlhf.seeding import derive_seed
from trainers.fleet import Fleet
from trainers.sampling import requests_for

FILE = "domain_shift.json"


async def shift_threshold(
    config: RLConfig,
    fleet: Fleet,
    prompts: Sequence[Prompt],
    folder: Path,
    say: Callable[[str], None],
    *,
    reward_version: str,
    at_start: bool,
) -> float | None:
    """The run's threshold, set once and kept in ``domain_shift.json``.

    None where it is left to the reward model: by the settings, or because so many completions
    failed that those left cannot promise the rate.

    Args:
        reward_version: of the reward model that scores. A threshold that another one set is set
            anew at the start, and later refused by `require_same_scores`.
        at_start: the fleet holds the start policy.
    """
    path = folder / FILE
    if not config.reward.domain_shift.calibration_completions:
        return None
    kept = _kept(path)
    if at_start and (kept is None or _of_another(kept, reward_version)):
        kept = await _calibrate(config, fleet, prompts)
        write_atomically(path, json.dumps(kept, indent=2))
    if kept is None:
        say(f"this run has no {FILE}: the reward model's own threshold is used")
        return None
    if kept["threshold"] is None:
        say(
            f"{kept['completions']} completions of the start policy could be scored, too few to "
            f"promise a false-alarm rate of {kept['false_alarm_rate']:g}: the reward model's own "
            "threshold is used"
        )
        return None
    return float(kept["threshold"])


def require_same_scores(config: RLConfig, folder: Path, reward_version: str) -> None:
    """Refuse to go on by a threshold of another reward model's scores.

    Raises:
        CheckpointError: it is.
    """
    kept = _kept(folder / FILE) if config.reward.domain_shift.calibration_completions else None
    if kept is not None and _of_another(kept, reward_version):
        raise CheckpointError(
            f"{folder / FILE} was set by version {kept['reward_version']} of the reward model, but "
            f"reward.model = {config.reward.model!r} is version {reward_version} now; resume with "
            "the same or choose another run.dir"
        )


def _of_another(kept: Mapping[str, Any], reward_version: str) -> bool:
    """Whether scores of another reward model set a threshold; None where nothing was scored."""
    return kept["reward_version"] not in (None, reward_version)


def _kept(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


async def _calibrate(config: RLConfig, fleet: Fleet, prompts: Sequence[Prompt]) -> dict[str, Any]:
    settings = config.reward.domain_shift
    cursor = PromptCursor(prompts, derive_seed(config.seed, FILE))
    # As many prompts as there are: siblings are alike, and would promise more than they know.
    count = min(len(prompts), settings.calibration_completions)
    drawn = [cursor.next()[0] for _ in range(count)]
    siblings = -(-settings.calibration_completions // count)
    requests = requests_for(drawn, siblings, config.rl, derive_seed(config.seed, FILE))
    await fleet.publish(0)
    groups = await fleet.score(await fleet.sample(requests))
    scored = [group for group in groups if isinstance(group, ScoredGroup)]
    shift_N = torch.tensor([shift for group in scored for shift in group.scores.shift_G])
    threshold = quantile_threshold(shift_N, settings.false_alarm_rate)
    return {
        "threshold": threshold if math.isfinite(threshold) else None,
        "completions": len(shift_N),
        "false_alarm_rate": settings.false_alarm_rate,
        "false_alarm_interval": false_alarm_interval(len(shift_N), settings.false_alarm_rate),
        "reward_version": scored[0].scores.reward_version if scored else None,
    }
