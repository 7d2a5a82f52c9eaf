"""`pavlov label`: work and verdicts in, labels and figures out, invitations, judges by program."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.progress import Progressing
from labelling.database import Database
from labelling.evidence import judge_name
from labelling.exchange import Form, read_judgements, read_work, write_judgements
from labelling.flagged import flagged_work
from labelling.judges import (
    Decide,
    Truth,
    as_person,
    as_reward_model,
    judge_over_http,
    require_service,
    truths_of,
)
from labelling.labels import METHODS, Method, counted, soft_labels
from labelling.records import Kind, Work
from labelling.report import report
from labelling.store import Project, Role, Store
from labelling.training_pairs import preference_rows, write_preferences
from labelling.worlds import SimulatedPerson
from models.data_files import ReadReport
from models.sources import resolve_reward_model
from rlhf.config import data_path, runs_path
from rlhf.config.label import LabelConfig
from rlhf.errors import DataError
from rlhf.records import OVERALL

_SAY_BAD = 5
_LONGEST_NAME = 80


def open_store(config: LabelConfig, *, make: bool = True) -> Store:
    """The configured store.

    Args:
        make: whether a database is made where there is none.

    Raises:
        DataError, ResourceError: the database cannot be used.
    """
    return Store(Database(config.label.url, make=make))


def import_work(
    config: LabelConfig, project: str, file: Path, console: Console, *, honeypots: bool = False
) -> None:
    """Put the pairs of a file into a project's queue; the project is made where there is none."""
    works, read = read_work(_found(file), honeypots=honeypots)
    _tell(read, console, "pairs", len(works))
    store = open_store(config)
    into = store.make_project(project, config.label.criteria)
    new, known = store.add_work(into, works, config.label.judges_per_pair)
    pots = sum(work.honeypot is not None for work in works)
    console.print(f"project {project}: {new} new pairs, {known} known, {pots} of them honeypots")


def import_flagged(
    config: LabelConfig, project: str, run: Path, limit: int | None, console: Console
) -> None:
    """Put what a run has flagged into a project's queue, the furthest out first."""
    folder = run if run.is_dir() else runs_path(str(run))
    works, left_out = flagged_work(folder, limit)
    store = open_store(config)
    into = store.make_project(project, config.label.criteria)
    new, known = store.add_work(into, works, config.label.judges_per_pair)
    console.print(
        f"project {project}: {new} new pairs with what {folder.name} flagged, {known} known, "
        f"{left_out} left out (text with a NUL character)"
    )


def import_judgements(
    config: LabelConfig, project: str, file: Path, form: Form, console: Console
) -> None:
    """Take verdicts that were given elsewhere."""
    file = _found(file)
    store = open_store(config)
    judgements, read = read_judgements(file, form, store.kinds(project))
    _tell(read, console, "judgements", len(judgements))
    criteria = sorted({name for each in judgements for name in each.verdicts} - {OVERALL})
    into = store.make_project(project, criteria, at_least=True)
    new, known = store.add_judgements(into, judgements)
    console.print(f"project {project}: {new} new judgements, {known} known")


def invite(
    config: LabelConfig, project: str, name: str, kind: Kind, role: Role, *, again: bool = False
) -> str:
    """A new assessor's token, or `again` another one; the project is made where there is none."""
    store = open_store(config)
    if again:
        return store.invite_again(store.project(project), name)
    return store.invite(store.make_project(project, config.label.criteria), name, kind, role)


def export(
    config: LabelConfig,
    project: str,
    out: Path,
    console: Console,
    *,
    judgements: bool = False,
    kind: Kind = "person",
    criterion: str = OVERALL,
    method: Method = "dawid-skene",
) -> None:
    """Write soft labels as preferences for `pavlov reward`, or the judgements themselves."""
    store = open_store(config, make=False)
    of = store.project(project)
    of.require(criterion)
    if method not in METHODS:
        raise DataError(f"{method!r} is no method: {', '.join(METHODS)}")
    found = store.judgements(of, with_work=True)
    if judgements:
        write_judgements(found, out)
        console.print(f"{len(found)} judgements: {out}")
        return
    used = counted(found, kind, criterion)
    if used and all(each.work is None for each in used):
        raise DataError(
            f"project {project} has {len(used)} judgements by {_plural(kind)}, but not the texts "
            "that they are of: import them with prompt, answer_a and answer_b, or export them as "
            "they are with --judgements"
        )
    labels = soft_labels(
        [each for each in found if each.work is not None],
        method,
        judges_wanted=config.label.judges_per_pair,
        kind=kind,
        criterion=criterion,
    )
    if not labels:
        raise DataError(
            f"project {project} has no judgements by {_plural(kind)} that labels could be made "
            f"from ({len(found)} in all); label it first, or choose another --kind"
        )
    rows = preference_rows(
        found, labels, project=project, method=method, criterion=criterion, kind=kind
    )
    write_preferences(rows, out)
    console.print(
        f"{len(rows)} pairs from {len(used)} judgements by {_plural(kind)}, {method}: {out}"
    )


def show_report(
    config: LabelConfig, project: str, kind: Kind, criterion: str = OVERALL
) -> dict[str, Any]:
    """A project's figures, as they are: reviews are the server's."""
    store = open_store(config, make=False)
    return report(store, store.project(project), config, kind, criterion)


def judge(
    config: LabelConfig,
    project: str,
    url: str | None,
    console: Console,
    *,
    reward: str | None,
    truth: list[Path],
) -> None:
    """Simulated assessors, or a reward model, judge over HTTP until nothing is left for them."""
    settings = config.simulated
    decides: dict[str, Callable[[], Decide]] = {}
    kind: Kind
    if reward is not None:
        from models.reward_model import RewardModel

        folder = resolve_reward_model(reward)
        version = RewardModel.load(folder).card.version
        kind, name = "model", judge_name(folder.parent.name, version)
        decides[name] = partial(as_reward_model, folder, settings.ties_below)
    else:
        kind = "simulated"
        truths = _truths(truth, console)
        for number in range(settings.assessors):
            person = SimulatedPerson(
                f"simulated-{number}",
                accuracy=settings.accuracy,
                honeypot_accuracy=settings.honeypot_accuracy,
                tie_rate=settings.tie_rate,
                position_bias=settings.position_bias,
                fatigue_onset=settings.fatigue_onset,
                spam=settings.spam if number < settings.spammers else None,
            )
            decides[person.name] = partial(as_person, person, truths, config.seed)
    store = open_store(config, make=False)
    of = store.project(project)
    address = url or f"http://{config.label.host}:{config.label.port}"
    require_service(address)
    counts, failures = dict.fromkeys(decides, 0), list[Exception]()
    tokens = {name: store.invite(of, _free_name(store, of, name), kind) for name in decides}
    wanted = store.counts(of, kind)
    total = min(wanted["wanted"] - wanted["taken"], wanted["pairs"] * len(decides))
    with Progressing(console, "judging", total) as progress:

        def work(name: str) -> None:
            try:
                counts[name] = judge_over_http(
                    address, tokens[name], decides[name](), told=progress.advance
                )
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in decides]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    console.print(f"{sum(counts.values())} judgements by {len(decides)} {_plural(kind)}")


def as_lines(found: dict[str, Any]) -> list[str]:
    """A report for people."""

    def share(value: dict[str, Any]) -> str:
        if value["share"] is None:
            return "none yet"
        return f"{value['share']:.0%} [{value['low']:.0%}, {value['high']:.0%}]"

    bias = found["position_bias"]
    lines = [
        f"judgements     {found['judgements']}, {found['doubted']} not counted",
        f"progress       {json.dumps(found['progress'])}",
        f"criterion      {found['criterion']}",
        f"agreement      {_number(found['agreement'])}",
        f"alpha          {_number(found['alpha'])} [{_number(found['alpha_low'])}, "
        f"{_number(found['alpha_high'])}]",
        f"first chosen   {share(bias)}, p = {_number(bias['p'])}",
    ]
    for each in found["assessors"]:
        lines.append(
            f"  {_shown(each['id']):24} {each['state']:8} {each['judgements']:5} judgements, "
            f"known answers {share(each['honeypot'])}, again {share(each['consistency'])}, others "
            f"{share(each['agreement'])}" + (f"  ({each['reason']})" if each["reason"] else "")
        )
    for version, thumbs in found["reactions"].items():
        lines.append(f"thumbs         {_shown(version)}: {thumbs['up']} up, {thumbs['down']} down")
    for one, row in found["win_matrix"].items():
        for other, record in row.items():
            if one < other:
                lines.append(
                    f"  {_shown(one)} against {_shown(other)}: {record['share']:.0%} "
                    f"[{record['low']:.0%}, {record['high']:.0%}], {record['wins']} to "
                    f"{record['losses']}, {record['ties']} ties, adjusted p = "
                    f"{_number(record['p'])}"
                )
    if found["condorcet_winner"]:
        sure = found["sure_winner"] == found["condorcet_winner"]
        doubt = "" if sure else ", so far without certainty"
        lines.append(f"winner         {_shown(found['condorcet_winner'])} beats every other{doubt}")
    elif found["smith_set"]:
        smallest = ", ".join(map(_shown, found["smith_set"]))
        lines.append(f"no winner      smallest set that beats the rest: {smallest}")
    lines += [f"cycle          among {', '.join(map(_shown, cycle))}" for cycle in found["cycles"]]
    if found["ask_next"]:
        asked = found["ask_next"][0]
        lines.append(f"ask next       {_shown(asked['one'])} against {_shown(asked['other'])}")
    return lines


def _shown(name: str) -> str:
    """A name as a terminal may print it: what would move its cursor is spelt out."""
    cut = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut)


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"


def _plural(kind: Kind) -> str:
    return {"person": "people", "simulated": "simulated assessors", "model": "models"}[kind]


def _found(file: Path) -> Path:
    return file if file.is_file() else data_path(str(file))


def _truths(files: list[Path], console: Console) -> dict[frozenset[str], Truth]:
    known, tests = list[Work](), list[Work]()
    for file in map(_found, files):
        found, read = read_work(file, honeypots=True)
        _tell(read, console, "pairs whose better answer is known", len(truths_of(found, ())))
        known += found
        tests += [work for work in read_work(file)[0] if work.honeypot is not None]
    return truths_of(known, tests)


def _free_name(store: Store, of: Project, wanted: str) -> str:
    taken = {each.name for each in store.assessors(of)}
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted} {count}"
    return name


def _tell(read: ReadReport, console: Console, what: str, usable: int) -> None:
    console.print(read.sentence())
    for bad in read.bad[:_SAY_BAD]:
        console.print(f"line {bad.line} left out: {bad.reason}")
    if not usable:
        raise DataError(f"{read.path} holds no usable {what}")
