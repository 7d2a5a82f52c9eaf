"""Which version is served: the record, its evidence, its refusals. No server."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from labelling.database import Database
from labelling.records import Answer, Judgement, Verdict, Work
from labelling.store import Store
from models.sources import resolve_model, weights_fingerprint
from rlhf.config import LabelConfig, ServeConfig, parse_config
from rlhf.errors import ModelError, PromotionError, ResourceError, RunError
from rlhf.records import OVERALL, Message
from serving import chat_server
from serving.chat_server import Assistant, _kept, _promoted, serve_chat
from serving.promotion import (
    Live,
    Served,
    promote,
    roll_back,
    trained_by,
    wait_until_followed,
)
from tests.conftest import ROOT, build_tiny_model

WHY = "tried by hand on Monday"


@pytest.fixture(scope="module")
def second_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("second") / "policy", seed=1)


@pytest.fixture(scope="module")
def foreign_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    folder = tmp_path_factory.mktemp("foreign") / "policy"
    return build_tiny_model(folder, seed=2, chat_template=template)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path) -> Served:
    """What a server of the tiny model has said."""
    monkeypatch.setenv("PAVLOV_RUNS", str(tmp_path))
    found = Served("pavlov")
    found.say_live(Live(weights_fingerprint(tiny_model), str(tiny_model)))
    return found


@pytest.fixture
def labels(served: Served) -> LabelConfig:
    return parse_config(LabelConfig, {}, "test")


def judge(
    labels: LabelConfig, new: str, old: str, won: int, lost: int, **criteria: Verdict
) -> None:
    """People compare two versions in the project ``release``."""
    store = Store(Database(labels.label.url))
    given = []
    for n in range(won + lost):
        answers = Answer(f"yes {n}", "pavlov", new), Answer(f"no {n}", "pavlov", old)
        work = Work((Message("user", f"question {n}"),), *answers)
        verdicts = {OVERALL: "a" if n < won else "b", **criteria}
        given.append(Judgement(f"{n}", "ann", verdicts, at=float(n), work=work))
    store.add_judgements(store.make_project("release", list(criteria)), given)


def test_who_was_preferred_is_promoted_and_taken_back(served, labels, tiny_model, second_model):
    old, new = weights_fingerprint(tiny_model), weights_fingerprint(second_model)
    judge(labels, new, old, won=20, lost=4)
    done = promote(str(second_model), "pavlov", labels, "release")
    assert (done.version, done.before, done.override) == (new, old, None)
    assert done.evidence is not None
    assert done.evidence["record"] == {"wins": 20, "losses": 4, "ties": 0}
    assert (done.evidence["judges"], done.evidence["project"]) == (1, "release")
    assert served.current() == new
    # Weights are kept: the run's folder is not needed any more.
    assert weights_fingerprint(served.model(new)) == new
    assert weights_fingerprint(served.model(old)) == old

    back = roll_back("pavlov")
    assert (back.version, back.before, back.action) == (old, new, "rollback")
    assert served.current() == old
    with pytest.raises(PromotionError, match="nothing was promoted"):
        roll_back("pavlov")
    assert [each.action for each in served.promotions()] == ["promote", "rollback"]


def test_a_promotion_says_by_which_criteria_the_version_is_surely_worse(
    served, labels, tiny_model, second_model
):
    old, new = weights_fingerprint(tiny_model), weights_fingerprint(second_model)
    judge(labels, new, old, won=20, lost=0, harmless="b")
    done = promote(str(second_model), "pavlov", labels, "release")
    assert done.evidence is not None
    assert done.evidence["sentence"].endswith("; harmless: 0 to 20 (warning: surely worse)")
    assert done.evidence["criteria"] == {"harmless": {"wins": 0, "losses": 20, "ties": 0}}
    assert served.promotions() == [done]


def test_what_was_trained_anew_under_its_name_is_not_kept_as_the_version_before(
    served, labels, tiny_model, second_model, tmp_path
):
    policy = tmp_path / "policy"
    shutil.copytree(second_model, policy)
    served.say_live(Live(weights_fingerprint(tiny_model), str(policy)))
    with pytest.raises(ModelError, match=r"policy holds version \w+ now, not"):
        promote(str(second_model), "pavlov", labels, None, override=WHY)
    assert not list(served.folder.glob("versions/*"))
    shutil.rmtree(policy)
    with pytest.raises(ModelError, match="not a model folder"):
        served.keep(weights_fingerprint(tiny_model), policy)
    assert served.promotions() == []


def test_a_server_keeps_the_folder_that_it_starts_with(served, labels, second_model, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(second_model, policy)
    config = parse_config(ServeConfig, {"policy": {"model": str(policy)}}, "test")
    live = _kept(config, served, Live(weights_fingerprint(policy), str(policy)))
    shutil.rmtree(policy)
    assert live.model == str(served.model(live.version))
    # What is no folder of the user's is a cache, and stays where it is.
    embedded = Live("version", str(resolve_model("embedded")))
    assert _kept(parse_config(ServeConfig, {}, "test"), served, embedded) == embedded


def test_kept_weights_that_were_written_over_are_not_rolled_back_to(
    served, labels, tiny_model, second_model, tmp_path
):
    policy = tmp_path / "policy"
    shutil.copytree(tiny_model, policy)
    old = weights_fingerprint(policy)
    served.say_live(Live(old, str(policy)))
    promote(str(second_model), "pavlov", labels, None, override=WHY)
    # The kept file is a link to this one.
    weights = (second_model / "model.safetensors").read_bytes()
    (policy / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match=f"was written over .* weights of {old} back"):
        roll_back("pavlov")
    # Kept anew from where they still are.
    assert weights_fingerprint(served.keep(old, tiny_model)) == old
    assert roll_back("pavlov").version == old


def test_without_sure_evidence_nothing_changes(served, labels, tiny_model, second_model):
    old, new = weights_fingerprint(tiny_model), weights_fingerprint(second_model)
    judge(labels, new, old, won=6, lost=5)
    with pytest.raises(PromotionError, match=r"does not show .*\(6 to 5"):
        promote(str(second_model), "pavlov", labels, "release")
    with pytest.raises(PromotionError, match="give --project"):
        promote(str(second_model), "pavlov", labels, None)
    with pytest.raises(PromotionError, match="simulated"):
        promote(str(second_model), "pavlov", labels, "release", kind="simulated")
    assert served.promotions() == [] and served.current() == old


def test_evidence_against_another_version_is_none(served, labels, second_model):
    judge(labels, weights_fingerprint(second_model), "what was served last year", 30, 0)
    with pytest.raises(PromotionError, match="nobody has compared it"):
        promote(str(second_model), "pavlov", labels, "release")


def test_an_override_says_why_and_is_kept(served, labels, second_model):
    with pytest.raises(PromotionError, match="no reason"):
        promote(str(second_model), "pavlov", labels, None, override="yes")
    done = promote(str(second_model), "pavlov", labels, None, override=WHY)
    [line] = (served.folder / "promotions.jsonl").read_text().splitlines()
    kept = json.loads(line)
    assert kept["override"] == WHY and kept["evidence"] is None and kept["by"]
    with pytest.raises(PromotionError, match="served already"):
        promote(str(second_model), "pavlov", labels, None, override=WHY)
    assert done.version == served.current()


def test_what_cannot_be_served_is_refused(served, labels, foreign_model, tmp_path):
    with pytest.raises(ModelError, match="other tokens or another chat template"):
        promote(str(foreign_model), "pavlov", labels, None, override=WHY)
    cut = build_tiny_model(tmp_path / "cut", seed=3) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:5000])
    with pytest.raises(ModelError, match="is damaged"):
        promote(str(cut.parent), "pavlov", labels, None, override=WHY)
    with pytest.raises(ModelError, match="nowhere"):
        promote("nowhere", "pavlov", labels, None, override=WHY)
    with pytest.raises(PromotionError, match="nothing is served under the name other"):
        promote(str(foreign_model), "other", labels, None, override=WHY)
    with pytest.raises(PromotionError, match="nothing is served under the name other"):
        roll_back("other")
    assert not Served("other").folder.exists()
    assert served.promotions() == []
    assert not (served.folder / "versions").exists()


def test_a_version_that_the_server_could_not_take_is_not_what_is_served(
    served, labels, tiny_model, second_model
):
    old, new = weights_fingerprint(tiny_model), weights_fingerprint(second_model)
    done = promote(str(second_model), "pavlov", labels, None, override=WHY)
    assert not wait_until_followed("pavlov", done, 0)
    served.say_live(Live(old, str(tiny_model), done.at, failed="no room"))
    assert served.current() == old
    with pytest.raises(PromotionError, match=r"could not take .* goes on with .*: no room"):
        wait_until_followed("pavlov", done, 1)
    # Tried again, what failed before says nothing.
    again = promote(str(second_model), "pavlov", labels, None, override=WHY)
    assert served.current() == new
    assert not wait_until_followed("pavlov", again, 0)
    served.say_live(Live(new, str(second_model), again.at))
    assert wait_until_followed("pavlov", again, 0)


def test_nobody_waits_for_a_server_that_has_ended(served, labels, tiny_model, second_model):
    served.say_live(Live(weights_fingerprint(tiny_model), str(tiny_model), stopped=True))
    done = promote(str(second_model), "pavlov", labels, None, override=WHY)
    began = time.monotonic()
    assert not wait_until_followed("pavlov", done, 60)
    assert time.monotonic() - began < 30
    assert served.current() == done.version


def test_a_rollback_by_a_clock_that_is_behind_is_followed(
    served, labels, engines, tiny_model, second_model, monkeypatch
):
    told: list[str] = []
    monkeypatch.setattr("ray.serve.delete", lambda name, _blocking: told.append(name))
    monkeypatch.setattr(chat_server, "_SETTLE_S", 0.0)
    monkeypatch.setattr(chat_server, "_LOOK_EVERY_S", 0.01)
    done = promote(str(second_model), "pavlov", labels, None, override=WHY)
    engines.start()
    now = time.time()
    monkeypatch.setattr("serving.promotion.time.time", lambda: now - 3600)
    back = roll_back("pavlov")
    assert back.at > done.at
    # Nobody has followed it yet, and it is not said that somebody has.
    assert not wait_until_followed("pavlov", back, 0)
    server = engines.last
    server.ready("")
    try:
        assert wait_until_followed("pavlov", back, 10)
        assert served.live().version == back.version == done.before
        # And again, within what a clock may not tell apart.
        again = promote(str(second_model), "pavlov", labels, None, override=WHY)
        assert again.at > back.at
        assert wait_until_followed("pavlov", again, 10)
    finally:
        server._stopping.set()
        server._following.join()
    assert len(told) == 2


def test_a_record_whose_times_are_not_in_order_is_read_and_gone_on_from(
    served, labels, engines, tiny_model, second_model, monkeypatch
):
    monkeypatch.setattr("ray.serve.delete", lambda name, _blocking: None)
    monkeypatch.setattr(chat_server, "_SETTLE_S", 0.0)
    monkeypatch.setattr(chat_server, "_LOOK_EVERY_S", 0.01)
    done = promote(str(second_model), "pavlov", labels, None, override=WHY)
    engines.start()
    # As an earlier Pavlov wrote it, its clock behind.
    back = asdict(roll_back("pavlov")) | {"at": done.at - 1800}
    file = served.folder / "promotions.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n" + json.dumps(back) + "\n")
    server = engines.last
    server.ready("")
    try:
        deadline = time.monotonic() + 10
        while served.live().version != done.before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (served.live().version, served.live().seen) == (done.before, back["at"])
        again = promote(str(second_model), "pavlov", labels, None, override=WHY)
        assert again.at > done.at
        assert wait_until_followed("pavlov", again, 10)
    finally:
        server._stopping.set()
        server._following.join()


HOLDS = """
import sys, time
from serving.promotion import Served
with Served(sys.argv[1]).held():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_server_of_a_name_is_refused_until_the_first_has_ended(
    served, labels, second_model, tmp_path
):
    environment = {**os.environ, "PAVLOV_RUNS": str(tmp_path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, "pavlov"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        said = served.live()
        config = parse_config(ServeConfig, {}, "test")
        with pytest.raises(ResourceError, match=r"serve\.name = 'pavlov' is served by another"):
            serve_chat(config, Console(quiet=True))
        # What the first has said stands; another name is another server; promotions go on.
        assert served.live() == said
        with Served("other").held():
            pass
        assert promote(str(second_model), "pavlov", labels, None, override=WHY)
    finally:
        holder.kill()
        holder.wait()
    with served.held():
        pass


def test_what_a_server_starts_does_not_hold_its_name(served):
    with served.held():
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        with served.held():
            pass
    finally:
        child.kill()
        child.wait()


def test_a_server_that_did_not_come_up_ends_what_it_had_started(
    served, labels, engines, tiny_model, second_model, monkeypatch
):
    told: list[str] = []
    monkeypatch.setattr("ray.serve.delete", lambda name, _blocking: told.append(name))
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={}))
    monkeypatch.setattr(chat_server, "_SETTLE_S", 0.0)
    live = Live(weights_fingerprint(tiny_model), str(tiny_model))
    server = engines.assistant(live)
    # The ingress does not: it is named as the server.
    monkeypatch.setattr(chat_server, "run_application", engines.but("pavlov"))
    with pytest.raises(RunError, match="pavlov did not start"):
        server.start()
    assert not served.live().stopped
    server.stop()
    assert told == ["pavlov", served.live().engine]
    assert served.live().stopped and served.live().version == live.version
    # From then on nothing is deployed.
    with pytest.raises(RunError, match="is stopping"):
        server.start()


def test_an_engine_that_was_starting_at_the_end_has_not_failed(
    served, labels, engines, tiny_model, second_model, monkeypatch
):
    monkeypatch.setattr("ray.serve.delete", lambda name, _blocking: None)
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={}))
    server = engines.assistant(Live(weights_fingerprint(tiny_model), str(tiny_model)))
    server.start()
    done = promote(str(second_model), "pavlov", labels, None, override=WHY)

    def ended(*_: object) -> None:
        server.stop()
        raise RunError("its application was deleted")

    monkeypatch.setattr(chat_server, "run_application", ended)
    server._switch(done)
    live = served.live()
    assert live.stopped and not live.failed
    # The next server starts with it.
    assert _promoted(engines.config, served, done).version == done.version


def test_who_dies_while_writing_leaves_the_record_as_it_was(
    served, labels, second_model, monkeypatch
):
    done = promote(str(second_model), "pavlov", labels, None, override=WHY)

    def dies(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            roll_back("pavlov")
    assert served.promotions() == [done]
    assert roll_back("pavlov").before == done.version


class Engines:
    """Stand-ins for Serve's applications: what runs, and which weights do not load."""

    def __init__(self, served: Served) -> None:
        # The tiny model reads no more than 512 tokens.
        limits = {"max_prompt_tokens": 32, "max_tokens": 32}
        self.config = parse_config(ServeConfig, {"serve": limits}, "test")
        self.served = served
        self.running: list[str] = []
        self.broken: set[str] = set()

    def run(self, model: str | None, name: str, *_: object) -> None:
        if model in self.broken:
            raise RunError(f"{name} did not start: its weights do not load")
        self.running.append(name)

    def but(self, broken: str) -> Callable[..., None]:
        """`run`, with an application that does not come up."""

        def run(model: str | None, name: str, *_: object) -> None:
            if name == broken:
                raise RunError(f"{name} did not start: no room")
            self.run(model, name)

        return run

    def assistant(self, live: Live) -> Assistant:
        self.last = Assistant(self.config, self.served, live, None, Console(quiet=True))
        return self.last

    def start(self) -> Live:
        """A server's start: what it has said."""
        newest = self.served.newest()
        assert newest is not None
        self.running.clear()
        self.assistant(_promoted(self.config, self.served, newest)).start()
        live = self.served.live()
        assert live is not None
        return live


@pytest.fixture
def engines(served, monkeypatch):
    found = Engines(served)
    monkeypatch.setattr(chat_server, "run_application", found.run)
    monkeypatch.setattr(chat_server, "_engine", lambda _config, _judges, model: model)
    monkeypatch.setattr(chat_server, "_ingress", lambda *_: SimpleNamespace(bind=lambda: None))
    return found


def test_a_server_that_starts_serves_the_version_before_one_that_does_not_load(
    served, labels, engines, tiny_model, second_model
):
    old = weights_fingerprint(tiny_model)
    done = promote(str(second_model), "pavlov", labels, None, override=WHY)
    engines.broken.add(str(served.model(done.version)))
    found = engines.start()
    assert (found.version, found.seen) == (old, done.at)
    assert "do not load" in found.failed and served.current() == old
    assert any(old in name for name in engines.running)
    # It has been seen, and is not tried at every start.
    engines.broken.clear()
    assert replace(engines.start(), engine=found.engine) == found
    again = promote(str(second_model), "pavlov", labels, None, override=WHY)
    assert engines.start().version == again.version
    # Where none comes up there is nothing to serve.
    engines.broken |= {str(served.model(each)) for each in (old, done.version)}
    with pytest.raises(RunError, match="do not load"):
        engines.start()


@pytest.mark.parametrize("harm", ["damaged", "short"])
def test_a_server_that_starts_serves_the_version_before_one_that_cannot_be_used(
    served, labels, engines, tiny_model, second_model, harm
):
    old = weights_fingerprint(tiny_model)
    done = promote(str(second_model), "pavlov", labels, None, override=WHY)
    kept = served.model(done.version)
    if harm == "damaged":
        (kept / "model.safetensors").unlink()
    else:
        config = json.loads((kept / "config.json").read_text())
        (kept / "config.json").unlink()
        (kept / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    found = engines.start()
    assert (found.version, found.seen) == (old, done.at)
    assert found.failed and str(kept) in found.failed


def test_a_rollback_does_not_wait_for_what_the_version_before_still_answers(
    served, labels, engines, tiny_model, second_model, monkeypatch
):
    # Old engines are told to end, and never do.
    told = []
    monkeypatch.setattr("ray.serve.delete", lambda name, _blocking: told.append(name))
    monkeypatch.setattr(chat_server, "_SETTLE_S", 0.0)
    server = engines.assistant(Live(weights_fingerprint(tiny_model), str(tiny_model)))
    server.start()
    first = served.live()
    done = promote(str(second_model), "pavlov", labels, None, override=WHY)
    server._switch(done)
    second = served.live()
    server._switch(roll_back("pavlov"))
    third = served.live()
    assert first.version == third.version == done.before and second.version == done.version
    # Each engine is an application of its own.
    names = [each.engine for each in (first, second, third)]
    assert [each for each in engines.running if each != "pavlov"] == names
    assert len(set(names)) == 3 and told == names[:2]


class Runs:
    """Below PAVLOV_RUNS."""

    def __init__(self, folder: Path, policy: Path, reward: Path) -> None:
        self.folder, self.policy, self.reward = folder, policy, reward

    def add(self, name: str, start: str) -> Path:
        """The policy of a run that started from another."""
        run = self.folder / name
        shutil.copytree(self.policy, run / "policy")
        config = {"policy": {"model": start}, "reward": {"model": str(self.reward)}}
        (run / "config.json").write_text(json.dumps(config))
        return run / "policy"


@pytest.fixture
def runs(served, tmp_path, second_model, tiny_reward_model):
    return Runs(tmp_path, second_model, tiny_reward_model)


def test_which_reward_models_trained_a_policy(runs, tiny_model, tmp_path, monkeypatch):
    first = runs.add("first", "embedded")
    assert trained_by(first) == {"tiny"}
    # What its start policy was trained by counts too.
    assert trained_by(runs.add("second", str(first))) == {"tiny"}
    # The cache of the hub says that this is no folder's name.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub/models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("abc")
    (cached / "snapshots/abc").mkdir(parents=True)
    (cached / "snapshots/abc/config.json").write_text("{}")
    assert trained_by(runs.add("third", "owner/name")) == {"tiny"}
    # A folder that is there and no run's is where training began.
    assert trained_by(runs.add("fourth", str(tiny_model))) == {"tiny"}


def test_what_trained_a_policy_is_not_known_where_a_folder_on_the_way_does_not_say(
    runs, tiny_model
):
    first = runs.add("first", "embedded")
    second = runs.add("second", str(first))
    named = runs.add("named", "first/policy")
    assert trained_by(second) == trained_by(named) == {"tiny"}
    shutil.rmtree(first.parent)
    assert trained_by(second) is None and trained_by(named) is None
    # No run is known at all.
    assert trained_by(tiny_model) is None


def test_a_kept_version_says_what_trained_it_when_its_run_is_gone(runs, served, labels, tiny_model):
    first = runs.add("first", "embedded")
    done = promote("first", "pavlov", labels, None, override=WHY)
    shutil.rmtree(first.parent)
    assert done.trained_by == ["tiny"]
    kept = f"served/pavlov/versions/{done.version}"
    assert trained_by(runs.add("second", kept)) == {"tiny"}
    # Nothing was recorded of the version before it.
    assert trained_by(runs.add("third", f"served/pavlov/versions/{done.before}")) is None


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("{", "JSON"),
        ('{"version": "x"}', "before: Field required"),
        ("[]", "object"),
        (
            '{"version": "", "before": "", "source": "", "action": "rollback", "by": "", "at": 1}',
            "a rollback of no promotion",
        ),
    ],
)
def test_a_damaged_record_is_told_with_its_line(served, damaged, message):
    file = served.folder / "promotions.jsonl"
    file.write_text(f"\n{damaged}\n")
    told = rf"promotions\.jsonl line 2 is damaged: .*{message}"
    with pytest.raises(PromotionError, match=told):
        roll_back("pavlov")
    assert file.read_text() == f"\n{damaged}\n"


def test_a_damaged_word_of_the_servers_is_told(served):
    (served.folder / "live.json").write_text('{"version": 3}')
    with pytest.raises(PromotionError, match=r"live\.json is damaged: version: "):
        served.current()


def test_what_a_record_holds_beside_is_passed_over_and_kept(
    served, labels, tiny_model, second_model
):
    promote(str(second_model), "pavlov", None, None, override=WHY)
    file = served.folder / "promotions.jsonl"
    line = json.dumps(json.loads(file.read_text()) | {"note": "by the new one"})
    file.write_text(f"{line}\n\n")
    roll_back("pavlov")
    assert [each.action for each in served.promotions()] == ["promote", "rollback"]
    assert file.read_text().startswith(line)
