"""The chat page in a real browser, before a server whose engine does as it is told."""

import hashlib
import json
from functools import partial

import pytest

from labelling.database import Database
from labelling.feedback import CONSENT, reactions
from labelling.store import Store
from models.chat import ChatTokenizer
from rlhf.records import Message
from serving.ensemble import Verdict
from tests.browser import WIDTHS, chromium
from tests.chat_page import Engine, Scorer, ask, chat_page
from tests.label_service import HOSTILE

pytestmark = pytest.mark.skipif(chromium() is None, reason="Chromium is not installed")

TEXTS = ("Stir **once**.", "Add oil.", "Use a large pot.", "Pasta is a dish.")
VERDICTS = (
    Verdict(1.0, (0.75, 1.25), 0.25, False, "reward-1"),
    Verdict(2.0, (0.0, 4.0), 2.0, True, "reward-1"),
    Verdict(1.5, (1.25, 1.75), 0.25, False, "reward-1"),
    Verdict(-1.0, (-1.0, -1.0), 0.0, False, "reward-1"),
)
"""Lower bounds 0.75, 0, 1.25, -1: the third is best."""


def scorer() -> Scorer:
    return Scorer(dict(zip(TEXTS, VERDICTS, strict=True)))


@pytest.fixture
def labels(tmp_path) -> str:
    """A labelling database for feedback."""
    return f"sqlite:///{tmp_path / 'labels.db'}"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def fits(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_an_answer_grows_is_copied_and_goes_with_the_next_question(tiny_model):
    engine = Engine(TEXTS[0])
    engine.go.clear()
    with chat_page(tiny_model, engine) as page:
        page.keyboard.type("A pot")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("boils?")
        page.keyboard.press("Enter")
        page.locator(".text", has_text="Stir **").wait_for()
        assert page.locator("#log").get_attribute("aria-busy") == "true"
        engine.go.set()
        page.locator("strong", has_text="once").wait_for()
        assert page.locator(".told").inner_text() == "version 3f9a52c0"
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.locator(".copy").click()
        page.locator(".copy", has_text="Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == TEXTS[0]
        assert page.locator("#best_of").count() == 0 and page.locator(".more").is_hidden()
        ask(page, "And then?")
        read = ChatTokenizer(tiny_model).decode(engine.read[1])
        turns = ["A pot\nboils?", TEXTS[0], "And then?"]
        assert [read.index(turn) for turn in turns] == sorted(read.index(turn) for turn in turns)
        page.locator("#new").click()
        ask(page, "Anew")
        assert "pot" not in ChatTokenizer(tiny_model).decode(engine.read[2])
        assert page.locator(".turn").count() == 1
        assert page.errors == [] and page.elsewhere == []


@pytest.mark.parametrize("width", WIDTHS)
def test_candidates_stand_by_rank_on_one_axis(tiny_model, width):
    engine = Engine(*TEXTS)
    with chat_page(tiny_model, engine, scorer(), width, best_of=4) as page:
        ask(page, "Pasta?")
        assert page.locator(".answer .text").inner_text() == TEXTS[2]
        assert "reward +1.50 · disagreement 0.25" in page.locator(".told").inner_text()
        page.locator(".more", has_text="Candidates (4)").focus()
        page.keyboard.press("Enter")
        page.locator("#candidates strong").wait_for()
        shown = page.locator(".candidate")
        texts = [each.locator(".text").inner_text() for each in shown.all()]
        assert texts == [TEXTS[2], "Stir once.", TEXTS[1], TEXTS[3]]
        assert "lower bound +1.25" in shown.first.inner_text()
        assert "does not know" in shown.nth(2).inner_text()
        assert [each.is_visible() for each in page.locator(".candidate h3 small").all()] == [
            True,
            False,
            False,
            False,
        ]
        chart = shown.nth(2).locator("svg")
        label = "Rewards of 2 members: +0.00, +4.00; mean +2.00, disagreement 2.00."
        assert chart.get_attribute("aria-label") == label
        # 1.25 is a member of the first and of the second: at the same place on both charts.
        dots = [page.locator(f".candidate >> nth={at} >> circle").all() for at in (0, 1)]
        assert dots[0][0].get_attribute("cx") == dots[1][1].get_attribute("cx")
        assert dots[0][0].get_attribute("cx") != dots[0][1].get_attribute("cx")
        # From -1 to 4: 2 ± 2 is the bar from the member at 0 to the one at 4.
        bar = chart.locator("rect")
        edges = [each.get_attribute("cx") for each in chart.locator("circle").all()]
        assert bar.get_attribute("x") == edges[0] == "22.4%" and edges[1] == "96%"
        assert fits(page)
        page.keyboard.press("Escape")
        assert page.locator("#drawer").is_hidden()
        assert page.locator(".more:focus").count() == 1
        assert engine.asked[0].candidates == 4
        page.locator("#best_of").focus()
        page.keyboard.press("ArrowLeft")
        ask(page, "Again?")
        assert engine.asked[1].candidates == 3
        assert page.errors == [] and page.elsewhere == []


def test_stopping_ends_the_writing_and_keeps_what_is_written(tiny_model):
    engine = Engine("Stir it once and use enough water.")
    engine.go.clear()
    with chat_page(tiny_model, engine) as page:
        for number, stop in enumerate(("Escape", "button"), 1):
            page.keyboard.type("Pasta?")
            page.keyboard.press("Enter")
            page.locator(".turn >> nth=-1 >> .text", has_text="Stir it").wait_for()
            if stop == "Escape":
                page.keyboard.press(stop)
            else:
                page.locator("#stop").click()
            page.locator(".turn >> nth=-1 >> text=Stopped.").wait_for()
            assert page.locator("#question:focus").count() == 1
            for _ in range(500):
                if engine.left == number:
                    break
                page.wait_for_timeout(10)
            assert engine.left == number
        assert "Stir it" in ChatTokenizer(tiny_model).decode(engine.read[1])
        assert page.locator("#trouble").is_hidden() and page.errors == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_hostile_answer_does_nothing_while_it_is_written_and_after(tiny_model, width):
    engine = Engine(HOSTILE, piece=len(HOSTILE))
    engine.go.clear()
    with chat_page(tiny_model, engine, width=width, max_prompt_tokens=100_000) as page:

        def harmless() -> None:
            text = page.locator(".answer .text").inner_text()
            assert "<script>" in text and "<img" in text
            assert page.locator(".answer :is(script, img)").count() == 0
            assert page.title() == "pavlov" and fits(page)

        page.keyboard.type("Pasta?")
        page.keyboard.press("Enter")
        page.locator(".answer .text", has_text="<script>").wait_for()
        harmless()
        engine.go.set()
        page.locator(".answer .text:not(.raw)").wait_for()
        harmless()
        for link in page.locator(".answer a").all():
            assert link.get_attribute("target") == "_blank"
            assert (link.get_attribute("href") or "").startswith("https://")
        # Were markup to get onto the page, the browser would still run none of it.
        page.evaluate(
            "text => { document.querySelector('#welcome').innerHTML = text; }",
            "<img src=x onerror=\"document.title = 'run'\">",
        )
        page.wait_for_timeout(200)
        assert page.title() == "pavlov"
        assert page.errors == [] and page.elsewhere == []


def test_too_many_requests_say_how_long_to_wait_and_the_text_stays(tiny_model):
    with chat_page(tiny_model, Engine(TEXTS[0]), requests_per_minute=1) as page:
        ask(page, "One?")
        assert page.locator(".answer .text").inner_text() == TEXTS[0]
        ask(page, "Two?")
        said = page.locator("#trouble").inner_text()
        assert said == "Too many requests; try again in 5 s."
        assert page.locator("#question").input_value() == "Two?"
        assert page.locator(".turn").count() == 1


def test_a_failure_is_one_sentence_and_what_was_written_stays(tiny_model):
    class Failing(Engine):
        async def write(self, prompt_ids, sampling):
            async for piece in super().write(prompt_ids, sampling):
                if self.fail_at == 0 or self.read[1:]:
                    raise RuntimeError("secret")
                self.fail_at -= 1
                yield piece

    engine = Failing(TEXTS[0])
    engine.fail_at = 1
    with chat_page(tiny_model, engine) as page:
        ask(page, "One?")
        sentence = "The assistant is away for a moment; ask again."
        assert page.locator("#trouble").inner_text() == sentence
        assert page.locator(".answer .text").inner_text() == TEXTS[0][: engine.piece]
        assert page.locator(".ended").inner_text() == "Broken off."
        ask(page, "Two?")
        assert page.locator("#trouble").inner_text() == sentence
        assert page.locator("#question").input_value() == "Two?"
        page.route("**/v1/**", lambda route: route.abort())
        page.keyboard.press("Enter")
        page.locator("#trouble", has_text="The server cannot be reached.").wait_for()
        assert page.locator("#question").input_value() == "Two?"


def test_a_key_is_asked_for_and_kept_out_of_addresses(tiny_model):
    keys = [hashlib.sha256(b"mine").hexdigest()]
    addresses: list[str] = []
    with chat_page(tiny_model, Engine(TEXTS[0]), keys=keys) as page:
        page.on("request", lambda request: addresses.append(request.url))
        ask(page, "Pasta?")
        assert page.locator("#trouble").inner_text() == "No such API key."
        assert page.locator("#key:focus").count() == 1
        page.keyboard.type("mine")
        page.keyboard.press("Enter")
        page.locator("strong", has_text="once").wait_for()
        assert page.locator("#trouble").is_hidden()
        assert addresses and not [each for each in addresses if "mine" in each]
        assert "mine" not in page.url


def test_events_are_read_wherever_their_bytes_are_cut(tiny_model):
    lines = [
        {"choices": [{"index": 0, "delta": {"content": piece}}]}
        for piece in ("Käse ", "🧀\r\n", "und Brot")
    ]
    # Over several lines, as an event's data may be.
    data = [json.dumps(line, ensure_ascii=False, indent=1) for line in lines] + ["[DONE]"]
    with chat_page(tiny_model, Engine("")) as page:
        page.evaluate(
            """() => {
                const before = window.fetch;
                window.fetch = (address, ...rest) => address.includes("completions")
                    ? Promise.resolve(new Response(new ReadableStream({ start(to) {
                        const bytes = new TextEncoder().encode(window.body);
                        for (const byte of bytes) to.enqueue(Uint8Array.of(byte));
                        to.close();
                    } })))
                    : before(address, ...rest);
            }"""
        )
        for end in ("\n", "\r\n", "\r"):
            events = ("".join(f"data: {line}{end}" for line in each.split("\n")) for each in data)
            body = f": a comment{end}" + "".join(f"{event}{end}" for event in events)
            page.evaluate("body => { window.body = body; }", body)
            page.locator("#new").click()
            ask(page, "Bread?")
            page.locator(".answer .text:not(.raw)").wait_for()
            said = page.locator(".answer .text").inner_text()
            assert said.split() == ["Käse", "🧀", "und", "Brot"]
            assert page.locator("#trouble").is_hidden() and page.errors == []
        page.evaluate("() => { window.body = window.body.replace('[DONE]', '{'); }")
        ask(page, "Cheese?")
        said = page.locator("#trouble").inner_text()
        assert said == "The connection to the server broke."


@pytest.mark.parametrize("chance", [0, 1])
def test_a_choice_of_two_arrives_in_the_labelling_store_after_consent(tiny_model, labels, chance):
    engine = Engine(*TEXTS)
    width = 390 if chance else 1280
    with chat_page(tiny_model, engine, scorer(), width, feedback=labels) as page:
        page.evaluate("n => { crypto.getRandomValues = (to) => to.fill(n); }", chance)
        shown = [TEXTS[chance], TEXTS[1 - chance]]

        # By keyboard alone.
        page.keyboard.press("Tab")
        while not page.locator("#compare:focus").count():
            page.keyboard.press("Tab")
        page.keyboard.press("Space")
        ask(page, "Pasta?")
        assert (engine.asked[0].candidates, page.locator(".answer").count()) == (2, 2)
        page.locator(".verdicts:focus").wait_for()
        words = page.locator(".turn").inner_text()
        assert "reward" not in words and "version" not in words and "Candidates" not in words
        assert page.locator(".shift").first.is_hidden() and fits(page)
        places = [each.bounding_box() for each in page.locator(".answer").all()]
        assert (places[0]["y"] < places[1]["y"]) == bool(chance)  # one below the other on a phone
        page.keyboard.press("2")
        page.locator("#consent button[value=send]:focus").wait_for()
        assert CONSENT in page.locator("#consent").inner_text() and page.feedback == []
        page.keyboard.press("Enter")
        page.locator(".settled", has_text="The second answer goes on. Thank you.").wait_for()
        [body] = page.feedback
        assert [each["text"] for each in body["answers"]] == shown
        assert (body["verdict"], body["consent"]) == ("second", True)
        store = Store(Database(labels))
        [judged] = store.judgements(store.project("feedback"), with_work=True)
        assert judged.work.prompt == (Message("user", "Pasta?"),)
        answers = {"a": judged.work.a, "b": judged.work.b}
        assert answers[judged.first].text == shown[0]
        assert answers[judged.verdicts["overall"]].text == shown[1]
        assert judged.work.a.checkpoint == judged.work.b.checkpoint == "3f9a52c07be1"
        assert "reward" in page.locator(".turn").inner_text()

        # The chosen one goes on; consent is not asked for again.
        ask(page, "And rice?")
        read = ChatTokenizer(tiny_model).decode(engine.read[1])
        assert shown[1] in read and shown[0] not in read
        page.locator(".verdicts:focus").wait_for()
        page.keyboard.press("4")
        page.locator(".settled >> nth=1", has_text="Thank you.").wait_for()
        assert page.feedback[1]["verdict"] == "bad" and len(page.feedback[1]["messages"]) == 3
        assert page.locator("#question").input_value() == "And rice?"
        page.locator("#compare").uncheck()
        page.locator("#question").fill("")
        ask(page, "Bread?")
        assert "rice" not in ChatTokenizer(tiny_model).decode(engine.read[2])
        assert page.errors == [] and page.elsewhere == []


def test_thumbs_are_sent_only_by_those_who_agree(tiny_model, labels):
    with chat_page(tiny_model, Engine(*TEXTS), feedback=labels) as page:
        ask(page, "Pasta?")
        page.get_by_label("Bad answer").click()
        page.get_by_text("Not now").click()
        page.locator(".thumb[value=down]:enabled").wait_for()
        page.get_by_label("Good answer").click()
        page.keyboard.press("Escape")
        page.locator(".thumb[value=up]:enabled").wait_for()
        assert page.feedback == []
        page.get_by_label("Good answer").click()
        page.locator("#consent button[value=send]").click()
        page.locator(".thumb[value=up][aria-pressed=true]").wait_for()
        store = Store(Database(labels))
        thumbs = partial(reactions, store, store.project("feedback"))
        assert thumbs() == {"3f9a52c07be1": {"up": 1, "down": 0}}
        ask(page, "Rice?")
        page.get_by_label("Bad answer").last.click()
        page.locator(".thumb[value=down][aria-pressed=true]").wait_for()
        assert [each["verdict"] for each in page.feedback] == ["up", "down"]
        assert thumbs() == {"3f9a52c07be1": {"up": 1, "down": 1}}
        assert page.errors == []


def test_where_no_feedback_is_kept_there_is_none_to_give(tiny_model):
    with chat_page(tiny_model, Engine(*TEXTS)) as page:
        ask(page, "Pasta?")
        assert page.locator(".thumb").first.is_hidden()
        page.locator("#compare").check()
        ask(page, "Rice?")
        page.locator(".verdicts:focus").wait_for()
        page.keyboard.press("1")
        page.locator(".settled", has_text="The first answer goes on.").wait_for()
        assert page.locator("#consent").is_hidden() and page.feedback == []
