"""Which verdicts speak for a new version of the assistant."""

from collections import defaultdict
from dataclasses import replace

import pytest

from labelling.comparison import Record
from labelling.evidence import LEVEL, Evidence, direct_evidence, judge_name
from labelling.records import Answer, Honeypot, Judgement, Verdict, Work
from rlhf.errors import PromotionError
from rlhf.records import OVERALL, Message

NEW, OLD = "new-weights", "old-weights"
TRAINED_BY = {"aaaaaaaaaaaaaaaa"}


def judged(
    number: int, verdict: Verdict, assessor: str = "ann", versions: tuple[str, str] = (NEW, OLD)
) -> Judgement:
    """A verdict on pair `number`: ``a`` prefers the first of `versions`."""
    one, other = (
        Answer(f"{text} {number}", "pavlov", version)
        for text, version in zip(("yes", "no"), versions, strict=True)
    )
    work = Work((Message("user", f"question {number}"),), one, other)
    return Judgement(f"pair {number}", assessor, {OVERALL: verdict}, at=float(number), work=work)


def wins(won: int, lost: int, **more) -> list[Judgement]:
    return [judged(n, "a" if n < won else "b", **more) for n in range(won + lost)]


def test_an_equal_version_passes_seldom_though_one_looks_after_every_pair():
    def sure(won: int, lost: int) -> bool:
        return Evidence("person", Record(won, lost), won + lost, 1, 0).sure

    chances, passed = {0: 1.0}, 0.0
    for count in range(1, 301):
        after: dict[int, float] = defaultdict(float)
        for won, chance in chances.items():
            after[won] += chance / 2
            after[won + 1] += chance / 2
        passed += sum(chance for won, chance in after.items() if sure(won, count - won))
        chances = {won: chance for won, chance in after.items() if not sure(won, count - won)}
    assert 0.01 < passed <= LEVEL / 2


@pytest.mark.parametrize(("won", "lost"), [(8, 0), (11, 1), (14, 2), (20, 5)])
def test_so_many_pairs_are_enough(won, lost):
    assert direct_evidence(wins(won, lost), NEW, OLD, "person").sure
    assert not direct_evidence(wins(won - 1, lost), NEW, OLD, "person").sure


def test_enough_people_who_prefer_the_new_version_are_evidence():
    found = direct_evidence(wins(20, 5), NEW, OLD, "person")
    assert found.sure
    assert (found.record.wins, found.record.losses, found.judges) == (20, 5, 1)
    assert "preferred in 80%" in found.sentence and "20 to 5" in found.sentence


@pytest.mark.parametrize(
    ("won", "lost"),
    [(3, 0), (7, 0), (19, 5), (13, 12), (5, 20), (0, 0)],
)
def test_few_even_worse_or_no_verdicts_are_none(won, lost):
    assert not direct_evidence(wins(won, lost), NEW, OLD, "person").sure


def test_it_does_not_matter_which_answer_is_a():
    flipped = [judged(n, "b", versions=(OLD, NEW)) for n in range(12)]
    assert direct_evidence(flipped, NEW, OLD, "person").sure
    assert not direct_evidence(flipped, OLD, NEW, "person").sure


def test_other_criteria_are_told_with_a_warning_and_decide_nothing():
    given = wins(20, 0)
    for n, each in enumerate(given):
        # Worse in 12 of 14 that were asked; as good as before in 10 of 20.
        each.verdicts["helpful"] = "a" if n < 10 else "b"
        if n < 14:
            each.verdicts["harmless"] = "a" if n < 2 else "b"
    found = direct_evidence(given, NEW, OLD, "person")
    assert found.sure
    assert found.criteria == {"harmless": Record(2, 12), "helpful": Record(10, 10)}
    assert "; harmless: 2 to 12; helpful: 10 to 10" in found.sentence
    more = [replace(each, pair=f"{each.pair} again") for each in given]
    both = direct_evidence([*given, *more], NEW, OLD, "person")
    assert "harmless: 4 to 24 (warning: surely worse); helpful: 20 to 20" in both.sentence
    assert both.sentence.count("warning") == 1
    assert direct_evidence(wins(20, 0), NEW, OLD, "person").criteria == {}


def test_a_pair_counts_once_by_its_majority():
    # Three judges of four pairs are no twelve pairs.
    votes = [judged(n, "a", who) for n in range(4) for who in ("ann", "bob", "cyd")]
    found = direct_evidence(votes, NEW, OLD, "person")
    assert (found.record.wins, found.judgements, found.judges) == (4, 12, 3)
    assert not found.sure


def test_other_versions_honeypots_doubted_and_second_looks_do_not_count():
    good = wins(20, 0)
    third = wins(20, 0, versions=(NEW, "third"))
    assert direct_evidence(third, NEW, OLD, "person").record.count == 0
    pots = [
        replace(each, truth="a", work=replace(each.work, honeypot=Honeypot("a"))) for each in good
    ]
    doubted = [replace(each, doubt="their assessor is paused") for each in good]
    again = [replace(each, repeat=True) for each in good]
    for left_out in (pots, doubted, again):
        assert direct_evidence(left_out, NEW, OLD, "person").record.count == 0


def test_a_reward_model_speaks_only_for_what_it_did_not_train():
    def by(version: str, kind: str = "model") -> list[Judgement]:
        name = judge_name("ensemble", version)
        return [replace(each, assessor=name, kind=kind) for each in wins(20, 0)]

    other = by("bbbbbbbbbbbbbbbb")
    assert direct_evidence(other, NEW, OLD, "model", TRAINED_BY).sure
    own = direct_evidence(by("aaaaaaaaaaaaaaaa"), NEW, OLD, "model", TRAINED_BY)
    assert not own.sure and own.left_out == 20
    assert "20 judgements by models that are not independent" in own.sentence
    # The same judge invited a second time.
    second = [replace(each, assessor=f"{each.assessor} 2") for each in by("aaaaaaaaaaaaaaaa")]
    assert not direct_evidence(second, NEW, OLD, "model", TRAINED_BY).sure
    # Nothing is known of what trained it, or of who judges.
    assert not direct_evidence(other, NEW, OLD, "model", None).sure
    nameless = [replace(each, assessor="judge") for each in other]
    assert not direct_evidence(nameless, NEW, OLD, "model", TRAINED_BY).sure
    # Kinds are never counted together.
    assert not direct_evidence(other, NEW, OLD, "person", TRAINED_BY).sure


def test_simulated_assessors_are_refused():
    with pytest.raises(PromotionError, match="no evidence"):
        direct_evidence(wins(20, 0), NEW, OLD, "simulated")


def test_a_judges_name_is_one_that_the_store_takes_and_tells_its_version():
    name = judge_name("x" * 200, "0123456789abcdef0")
    assert len(name) <= 80 and name.endswith("@0123456789abcdef")
