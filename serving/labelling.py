"""The labelling service over HTTP: the assessor's page, and the same as JSON for programs.

| path                           | who       | does                                               |
|--------------------------------|-----------|----------------------------------------------------|
| /health                        | anybody   | 200 when the database answers                      |
| /, /signin, /signout           | anybody   | a cookie for a token, and back                     |
| /task, /task/{id}/judge, /skip | assessors | the page: two answers, a verdict for each criterion|
| /task/{id}/missed              | assessors | the explanation of a honeypot that was missed      |
| /me                            | assessors | one's own figures                                  |
| /project                       | owners    | everybody's; pausing, letting go on, honeypots     |
| /api/next, /judgements, /skip  | assessors | the same with `Authorization: Bearer TOKEN`        |
| /api/me, /api/report           | as above  | figures as JSON                                    |

Everything is made on the server; nothing comes from other hosts, and the browser is told to refuse
it. A judgement is on disk before its answer is sent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from labelling.database import Database
from labelling.honeypots import honeypots, make_honeypot, retire_honeypot
from labelling.queue import SHOWN, Queue, Receipt, Shown, Task
from labelling.report import assessor_figures, report
from labelling.review import Reviewer, let_go_on, review
from labelling.store import Assessor, State, Store
from rlhf.config.label import LabelConfig
from rlhf.errors import DataError, PavlovError, ResourceError
from rlhf.records import OVERALL
from serving.pages import add_pages, page

COOKIE = "pavlov_token"
_TOLD_EVERY = 10
_PROGRESS_S = 10.0
BODY_LIMIT_BYTES = 64 * 1024
_HERE = Path(__file__).parent
_STOPS: dict[str, tuple[State, bool]] = {
    "pause": ("paused", True),
    "revoke": ("revoked", False),
    "discard": ("revoked", True),
}
"""What an owner does to somebody: their state, and whether nothing that they said counts."""

_LABELS = {"first": "First", "second": "Second", "tie": "Equal", "bad": "Both bad"}
_log = logging.getLogger(__name__)


class Judged(BaseModel):
    """The body of /api/judgements."""

    model_config = ConfigDict(extra="forbid")
    task: str
    verdicts: dict[str, Shown]
    seconds: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] | None = None
    comment: str = ""


class Skipped(BaseModel):
    """The body of /api/skip."""

    model_config = ConfigDict(extra="forbid")
    task: str


def labelling_app(
    config: LabelConfig, guidelines: str | None = None, project: str | None = None
) -> FastAPI:
    """The service on the configured database.

    Args:
        guidelines: Markdown beside the task; the shipped ones where there are none.
        project: whose assessors alone are let in.

    Raises:
        DataError, ResourceError: the database cannot be used.
    """
    store = Store(Database(config.label.url))
    return _Service(config, store, guidelines, project).app


class _Service:
    def __init__(
        self, config: LabelConfig, store: Store, guidelines: str | None, project: str | None
    ) -> None:
        self.config, self.store, self.project = config, store, project
        self.queue = Queue(store, config.label)
        self.reviewer = Reviewer(store, config.label.attention)
        self.limit = RateLimitItemPerMinute(config.label.requests_per_minute)
        self.limiter = MovingWindowRateLimiter(MemoryStorage())
        # Until when it is good, and per cent done, by project and kind.
        self.progress: dict[tuple[int, str], tuple[float, int]] = {}
        self.guidelines = guidelines or (_HERE / "guidelines.md").read_text()
        self.app = self._app()

    def _app(self) -> FastAPI:
        # Their own pages would fetch scripts from other hosts.
        app = FastAPI(title="Pavlov labelling", docs_url=None, redoc_url=None, openapi_url=None)
        app.middleware("http")(self._guard)
        app.exception_handler(HTTPException)(self._refused)
        app.exception_handler(RequestValidationError)(self._malformed)
        app.exception_handler(PavlovError)(self._mistaken)
        app.exception_handler(ResourceError)(self._busy)
        add_pages(app)
        signed_in = Depends(self.assessor)

        @app.get("/health")
        def health() -> dict[str, str]:
            self.store.signed_in("")
            return {"status": "ok"}

        @app.get("/", response_class=HTMLResponse)
        def home(request: Request) -> Response:
            who = self._who(request)
            return _to(request, "task") if who else self.page(request, "signin.html")

        @app.post("/signin", response_class=HTMLResponse)
        def signin(request: Request, token: Annotated[str, Form()] = "") -> Response:
            self._count(f"address {request.client.host if request.client else ''}")
            if self._known(token) is None:
                said = "No assessor has this token. Copy it whole, or ask for a new invitation."
                return self.page(request, "signin.html", said=said, status=403)
            answer = _to(request, "task")
            answer.set_cookie(
                COOKIE,
                token.strip(),
                max_age=30 * 24 * 3600,
                httponly=True,
                samesite="strict",
                secure=self.config.label.secure_cookie,
            )
            return answer

        @app.post("/signout")
        def signout(request: Request) -> Response:
            answer = _to(request, "")
            answer.delete_cookie(COOKIE)
            return answer

        @app.get("/task", response_class=HTMLResponse)
        def task(request: Request, who: Assessor = signed_in) -> Response:
            if who.state != "active":
                return self.page(
                    request, "message.html", who=who, heading="Paused", said=_paused(who), on=""
                )
            found = self.queue.next(who)
            if found is None:
                said = "Nothing is left for you to judge at the moment. Thank you!"
                return self.page(
                    request, "message.html", who=who, heading="All done", said=said, on="task"
                )
            return self.task_page(request, who, found)

        @app.post("/task/{name}/judge", response_class=HTMLResponse)
        async def judge(
            request: Request, name: str, later: BackgroundTasks, who: Assessor = signed_in
        ) -> Response:
            form = await request.form()
            return await _in_thread(self._judged_in_page, request, who, name, form, later)

        @app.post("/task/{name}/skip")
        def skip(request: Request, name: str, who: Assessor = signed_in) -> Response:
            self.queue.skip(who, name)
            return _to(request, "task")

        @app.get("/task/{name}/missed", response_class=HTMLResponse)
        def missed(request: Request, name: str, who: Assessor = signed_in) -> Response:
            found, _, said = self.queue.task(who, name)
            if said is None:
                return _to(request, "task")
            return self.page(request, "missed.html", who=who, task=found, missed=said)

        @app.get("/me", response_class=HTMLResponse)
        def me(request: Request, who: Assessor = signed_in) -> Response:
            return self.page(request, "me.html", who=who, found=self._own_figures(who))

        @app.get("/project", response_class=HTMLResponse)
        def project(request: Request, who: Assessor = signed_in) -> Response:
            _owner(who)
            found = report(self.store, who.project, self.config)
            return self.page(
                request,
                "project.html",
                who=who,
                found=found,
                everybody={each.id: each for each in self.store.assessors(who.project)},
                honeypots=honeypots(self.store.database, who.project),
            )

        @app.post("/project/assessors/{key}/{action}")
        def act(request: Request, key: int, action: str, who: Assessor = signed_in) -> Response:
            _owner(who)
            self._act(who, key, action)
            return _to(request, "project")

        @app.post("/project/honeypots/{pair}/retire")
        def retire(request: Request, pair: int, who: Assessor = signed_in) -> Response:
            _owner(who)
            retire_honeypot(self.store.database, who.project, pair, who.name)
            return _to(request, "project")

        @app.post("/api/next")
        def api_next(who: Assessor = signed_in) -> dict[str, Any]:
            if who.state != "active":
                raise HTTPException(403, _paused(who))
            found = self.queue.next(who)
            return {"task": None if found is None else _as_json(found, who)}

        @app.post("/api/judgements")
        def api_judge(
            body: Judged, later: BackgroundTasks, who: Assessor = signed_in
        ) -> dict[str, Any]:
            receipt = self._judge(
                who, body.task, body.verdicts, later, seconds=body.seconds, comment=body.comment
            )
            return {"stored": True, "repeated": receipt.repeated, "missed": receipt.missed}

        @app.post("/api/skip")
        def api_skip(body: Skipped, who: Assessor = signed_in) -> dict[str, bool]:
            self.queue.skip(who, body.task)
            return {"skipped": True}

        @app.get("/api/me")
        def api_me(who: Assessor = signed_in) -> dict[str, Any]:
            return self._own_figures(who)

        @app.get("/api/report")
        def api_report(who: Assessor = signed_in) -> dict[str, Any]:
            _owner(who)
            return report(self.store, who.project, self.config)

        return app

    # Who asks, and how often

    def _who(self, request: Request) -> Assessor | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            token = request.cookies.get(COOKIE, "")
        return self._known(token)

    def _known(self, token: str) -> Assessor | None:
        who = self.store.signed_in(token.strip()) if token.strip() else None
        return who if who and self.project in (None, who.project.name) else None

    def assessor(self, request: Request) -> Assessor:
        """Who is signed in; a dependency of the routes."""
        address = f"address {request.client.host if request.client else ''}"
        who = self._who(request)
        if who is None:
            self._count(address)
            raise HTTPException(401, "sign in with your token")
        self._count(f"assessor {who.id}")
        return who

    def _own_figures(self, who: Assessor) -> dict[str, Any]:
        """Their own figures as of so many tens of judgements: figures that change with each would
        tell which ones were honeypots."""
        found = self.store.judgements(who.project)
        theirs = [each.id for each in found if each.assessor == who.name]
        known = set(theirs[: len(theirs) // _TOLD_EVERY * _TOLD_EVERY])
        told = [each for each in found if each.assessor != who.name or each.id in known]
        return assessor_figures(told, [who])[0]

    def _count(self, whose: str) -> None:
        if not self.limiter.hit(self.limit, whose):
            reset, _ = self.limiter.get_window_stats(self.limit, whose)
            wait = max(1, round(reset - time.time()))
            raise HTTPException(
                429, f"too many requests; go on in {wait} s", headers={"Retry-After": str(wait)}
            )

    async def _guard(
        self, request: Request, go_on: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Bodies are small, and forms come from our own page."""
        length = request.headers.get("content-length", "0")
        origin = request.headers.get("origin")
        if "transfer-encoding" in request.headers or not length.isdecimal():
            return JSONResponse({"error": "say how long the body is"}, 411)
        if int(length) > BODY_LIMIT_BYTES:
            return JSONResponse({"error": f"at most {BODY_LIMIT_BYTES} bytes"}, 413)
        if origin and request.method == "POST" and not _same(origin, request):
            return JSONResponse({"error": f"a form of another site, {origin[:80]}"}, 403)
        return await go_on(request)

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        # What was sent may be quoted, and need not be text that can be sent back.
        said = str(error.detail).encode(errors="replace").decode()
        if not _wants_page(request):
            return JSONResponse({"error": said}, error.status_code, error.headers)
        if error.status_code == 401:
            return self.page(request, "signin.html", status=401)
        return self.page(
            request,
            "message.html",
            heading="That did not work",
            said=said,
            on="task",
            status=error.status_code,
            headers=dict(error.headers or {}),
        )

    async def _malformed(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        return await self._refused(request, HTTPException(422, f"{place}: {first['msg']}"))

    async def _busy(self, request: Request, error: Exception) -> Response:
        # An import holds the database, or it is away: nothing was stored, and nothing is lost.
        _log.warning("the database did not answer: %s", error)
        busy = HTTPException(503, "the database is busy; send it again", {"Retry-After": "2"})
        return await self._refused(request, busy)

    async def _mistaken(self, request: Request, error: Exception) -> Response:
        return await self._refused(request, HTTPException(400, str(error)))

    # Pages

    def page(
        self,
        request: Request,
        template: str,
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        **values: Any,
    ) -> HTMLResponse:
        """A page with what every page needs."""
        known = {"who": None, "said": None} | values
        return page(request, template, status=status, headers=headers, **known)

    def task_page(
        self,
        request: Request,
        who: Assessor,
        task: Task,
        said: str | None = None,
        given: dict[str, str] | None = None,
    ) -> HTMLResponse:
        """The page on which two answers are judged; `given` is what a refused form held."""
        return self.page(
            request,
            "task.html",
            who=who,
            task=task,
            said=said,
            criteria=[*who.project.criteria, OVERALL],
            shown=list(_LABELS.items()),
            judged=self.queue.judged(who),
            done=self._done(who),
            given=given or {},
            tired=self.store.tired(who),
            guidelines=self.guidelines,
            status=200 if said is None else 400,
        )

    def _done(self, who: Assessor) -> int:
        """Per cent of the project, in steps: a figure that moves with work alone would tell work
        from honeypots. It is of all pairs, and so counted anew but now and then."""
        key, now = (who.project.id, who.kind), time.monotonic()
        until, done = self.progress.get(key, (0.0, 0))
        if now >= until:
            counts = self.store.counts(who.project, who.kind)
            done = 5 * int(20 * counts["taken"] / max(1, counts["wanted"]))
            self.progress[key] = now + _PROGRESS_S, done
        return done

    def _judged_in_page(
        self, request: Request, who: Assessor, name: str, form: Any, later: BackgroundTasks
    ) -> Response:
        given = {key: str(value) for key, value in form.items()}
        verdicts = {
            key.removeprefix("verdict-"): value
            for key, value in given.items()
            if key.startswith("verdict-")
        }
        try:
            seconds = float(given.get("seconds") or "nan")
        except ValueError:
            seconds = float("nan")
        task, state, _ = self.queue.task(who, name)
        explanation = given.get("explanation", "").strip()
        try:
            receipt = self._judge(
                who,
                name,
                verdicts,  # type: ignore[arg-type]  # the queue checks them
                later,
                seconds=None if seconds != seconds else seconds,
                comment=given.get("comment", ""),
            )
            if explanation and self.queue.unknown(who, name):
                make_honeypot(self.store.database, who, name, explanation)
        except DataError as error:
            if state != "open":
                raise
            return self.task_page(request, who, task, str(error), given)
        answer = _to(request, f"task/{name}/missed" if receipt.missed else "task")
        answer.background = later
        return answer

    def _judge(
        self,
        who: Assessor,
        task: str,
        verdicts: dict[str, Shown],
        later: BackgroundTasks,
        *,
        seconds: float | None,
        comment: str,
    ) -> Receipt:
        receipt = self.queue.judge(who, task, verdicts, seconds=seconds, comment=comment)
        if not receipt.repeated:
            later.add_task(self.reviewer.run, who.project, who.kind)
        return receipt

    def _act(self, who: Assessor, key: int, action: str) -> None:
        found = [each for each in self.store.assessors(who.project) if each.id == key]
        if not found or action not in {*_STOPS, "resume"}:
            raise HTTPException(404, f"project {who.project.name} has no such assessor")
        if found[0].id == who.id:
            raise HTTPException(400, "you cannot do this to yourself")
        if action == "resume":
            let_go_on(self.store, found[0], who.name)
            return
        state, doubted = _STOPS[action]
        self.store.set_state(found[0], state, "by the owner", who.name, doubted=doubted)
        if doubted:
            review(self.store, who.project, self.config.label.attention)


def _to(request: Request, path: str) -> RedirectResponse:
    return RedirectResponse(f"{request.scope.get('root_path', '').rstrip('/')}/{path}", 303)


def _same(origin: str, request: Request) -> bool:
    return origin.partition("://")[2] == request.headers.get("host", "")


def _wants_page(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")


def _owner(who: Assessor) -> None:
    if who.role != "owner":
        raise HTTPException(403, f"{who.name} is {who.role} here; this is the owner's")


def _paused(who: Assessor) -> str:
    return (
        f"Your judging is paused: {who.reason}. Nothing that you did is lost; please ask the owner "
        "of the project how to go on."
    )


def _as_json(task: Task, who: Assessor) -> dict[str, Any]:
    return {
        "id": task.id,
        "prompt": [{"role": turn.role, "content": turn.content} for turn in task.prompt],
        "first": task.first,
        "second": task.second,
        "criteria": [*who.project.criteria, OVERALL],
        "verdicts": list(SHOWN),
    }


async def _in_thread(function: Callable[..., Response], *arguments: Any) -> Response:
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(function, *arguments)
