"""The routes. Each reads a checked body, hands requests to the engine and turns its updates into an answer."""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from persimmon import __version__, chat
from persimmon.errors import InputError
from persimmon.infer.engine import Failure, Update
from persimmon.serve import protocol
from persimmon.serve.answers import ChatAnswer, CompletionAnswer, token_text
from persimmon.serve.connected import ClientDisconnected, EventStream, until_disconnected
from persimmon.serve.guard import CLIENT_GONE
from persimmon.serve.metrics import CONTENT_TYPE as METRICS_TYPE
from persimmon.serve.protocol import ErrorResponse, UnsupportedField, error_body, sse
from persimmon.serve.service import ApiError, Service, invalid
from persimmon.serve.submission import Submission

WEB = Path(__file__).parent / "web"
WEB_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 403, 404, 405, 413, 429, 503)
}
_EVENT = {
    "type": "object",
    "description": "A server-sent event: its data is the JSON of a chunk or of an error, at the end [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}

Answer = ChatAnswer | CompletionAnswer


def build_app(service: Service) -> FastAPI:
    """The application; wrap it in `guard.Guard` to serve it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.worker.start()
        yield
        await service.worker.stop()

    app = FastAPI(
        title="Persimmon", version=__version__, summary="OpenAI-compatible server for Persimmon models",
        docs_url=None, redoc_url=None, lifespan=lifespan, responses=ERRORS,
    )  # fmt: skip
    app.state.service = service
    _add_error_handlers(app)
    _add_generation(app, service)
    _add_information(app, service)
    _add_page(app)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def _api_error(_: Request, error: ApiError) -> Response:
        headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else None
        body = error_body(error.message, error.kind, error.param, error.code)
        return JSONResponse(body, error.status, headers)

    @app.exception_handler(InputError)
    async def _input_error(_: Request, error: InputError) -> Response:
        return JSONResponse(error_body(str(error), "invalid_request_error"), 400)

    @app.exception_handler(RequestValidationError)
    async def _validation_error(_: Request, error: RequestValidationError) -> Response:
        message, param = describe_validation(error.errors())
        return JSONResponse(error_body(message, "invalid_request_error", param), 400)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(error_body(message, "invalid_request_error"), error.status_code, error.headers)


def describe_validation(errors: Any) -> tuple[str, str | None]:
    """(message, field) of the first thing that is wrong with a body."""
    first: Mapping[str, Any] = errors[0]
    path = [str(part) for part in first["loc"] if part != "body"]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UnsupportedField):
        return str(cause), cause.name
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first.get('ctx', {}).get('error', '')}", None
    # Alternatives of a field (text or list) appear as path parts with the names of types; the field itself is enough.
    field = path[0] if path else None
    if first["type"] == "extra_forbidden":
        return f"unknown field {'.'.join(path)!r}: it is not supported", path[-1]
    if field is None:
        return str(first["msg"]).removeprefix("Value error, "), None
    return f"{'.'.join(path)}: {str(first['msg']).removeprefix('Value error, ')}", field


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=protocol.ChatResponse, responses=STREAMED)
    async def chat_completions(body: protocol.ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.check_model(body.model)
        requests = await service.chat_requests(body)
        submission = service.submit(requests, body.conversation)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        answer = ChatAnswer(_new_id("chatcmpl"), service.model, service.tokenizer, requests, with_usage=with_usage)
        return await _respond(service, request, body, submission, answer)

    @app.post("/v1/completions", response_model=protocol.CompletionResponse, responses=STREAMED)
    async def completions(body: protocol.CompletionRequest, request: Request) -> Response:
        """Continue texts or token ids."""
        service.check_model(body.model)
        requests = await service.completion_requests(body)
        submission = service.submit(requests, body.prompt_cache_key)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        answer = CompletionAnswer(
            _new_id("cmpl"), service.model, service.tokenizer, requests,
            with_usage=with_usage, echo=bool(body.echo), answer=body.max_tokens != 0,
        )  # fmt: skip
        return await _respond(service, request, body, submission, answer)


async def _respond(
    service: Service, request: Request, body: protocol.Sampling, submission: Submission, answer: Answer
) -> Response:
    """The whole answer, or a stream once every request is accepted."""
    log = request.scope["state"]["log"] if "log" in request.scope.get("state", {}) else {}
    try:
        if body.stream:
            options = body.stream_options or protocol.StreamOptions()
            accepting = asyncio.wait_for(submission.accepted(), service.settings.request_seconds)
            await until_disconnected(request.receive, accepting)
            if (failure := submission.refusal()) is not None:
                raise _as_error(failure)
            events = _events(service, submission, answer, options)
            return EventStream(events, submission, functools.partial(_note_end, log, answer))
        collecting = _collect(submission, answer)
        deadline = service.settings.request_seconds
        await until_disconnected(request.receive, asyncio.wait_for(collecting, deadline))
        _note_end(log, answer)
        return JSONResponse(answer.whole())
    except TimeoutError:
        submission.close()
        _note_end(log, answer, "timeout")
        raise ApiError(503, "the answer took too long", "server_error", code="timeout") from None
    except BaseException as error:
        submission.close()
        _note_end(log, answer, CLIENT_GONE if isinstance(error, ClientDisconnected) else None)
        raise


async def _collect(submission: Submission, answer: Answer) -> None:
    while not submission.finished:
        item = await submission.next()
        assert item is not None, "without a limit it waits"
        if item[1].failure is not None:
            raise _as_error(item[1].failure)
        answer.note(*item)


async def _events(
    service: Service, submission: Submission, answer: Answer, options: protocol.StreamOptions
) -> AsyncIterator[bytes]:
    """The events of a stream; an error after its beginning is one of them."""
    deadline = time.monotonic() + service.settings.request_seconds
    progress = _Progress(service, submission.prompt_tokens)
    events: list[bytes] = []
    while not submission.finished:
        item = await submission.next(service.settings.ping_seconds)
        if time.monotonic() > deadline:
            yield b"".join([*events, sse(error_body("the answer took too long", "server_error", code="timeout"))])
            return
        if item is None:
            yield b": ping\n\n"
            continue
        index, update = item
        if update.failure is not None:
            error = _as_error(update.failure)
            yield b"".join([*events, sse(error_body(error.message, error.kind, code=error.code))])
            return
        answer.note(index, update)
        events += [sse(chunk) for chunk in answer.chunks(index, update)]
        if options.include_progress and (report := progress.report(update)) is not None:
            events.append(sse(answer.chunk([], progress=report)))
        if events and not submission.waiting:  # what has gathered goes out in one piece
            yield b"".join(events)
            events.clear()
    if options.include_usage:
        events.append(sse(answer.chunk([]) | {"usage": answer.usage()}))
    yield b"".join([*events, b"data: [DONE]\n\n"])


class _Progress:
    """Speed and sparsity of a stream, at most five times per second, for people who watch."""

    _SECONDS_BETWEEN = 0.2

    def __init__(self, service: Service, prompt_tokens: int) -> None:
        self._service, self._prompt_tokens = service, prompt_tokens
        self._first = self._reported = 0.0
        self._tokens = 0

    def report(self, update: Update) -> dict[str, Any] | None:
        """What to tell now, if anything."""
        now = time.monotonic()
        if update.piece is not None:
            self._first = self._first or now
            self._tokens += len(update.piece.token_ids)
        due = now - self._reported >= self._SECONDS_BETWEEN or update.finish_reason is not None
        if not due or not (update.prompt_done or update.piece):
            return None
        self._reported = now
        active = self._service.worker.state.active_fraction
        elapsed = now - self._first
        return {
            "prompt_done": update.prompt_done,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
            "tokens_per_second": round((self._tokens - 1) / elapsed, 1) if self._tokens > 1 and elapsed > 0 else None,
            "zeros": round(1 - sum(active) / len(active), 4) if active else None,
        }


def _as_error(failure: Failure) -> ApiError:
    if failure.kind == "engine":
        return ApiError(503, failure.message, "server_error", code="engine_failure", retry_after=1)
    code = "context_length_exceeded" if failure.kind == "context" else None
    return invalid(failure.message, code=code)


def _note_end(log: dict[str, Any], answer: Answer, ended: str | None = None) -> None:
    """For the access log: tokens up to here, and what ended an answer before its end."""
    if ended is not None:
        log.setdefault("ended", ended)
    usage = answer.usage()
    log["prompt_tokens"], log["completion_tokens"] = usage["prompt_tokens"], usage["completion_tokens"]
    log["cached_tokens"] = usage["prompt_tokens_details"]["cached_tokens"]


def _new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _add_information(app: FastAPI, service: Service) -> None:
    _add_models(app, service)
    _add_tokenizer(app, service)
    _add_state(app, service)


def _add_models(app: FastAPI, service: Service) -> None:
    model = {
        "id": service.model, "object": "model", "created": service.created, "owned_by": "persimmon",
        "max_model_len": service.context,
    }  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """One model."""
        service.check_model(name)
        return model


def _add_tokenizer(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", response_model=protocol.TokenizeResponse)
    async def tokenize(body: protocol.TokenizeRequest) -> Response:
        """Token ids of a text or a conversation."""
        service.check_model(body.model)
        if body.messages is not None:
            ids = await asyncio.to_thread(service.encode_messages, body.messages)
        else:
            ids = await asyncio.to_thread(service.tokenizer.encode, body.prompt or "", bos=body.add_special_tokens)
        found: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": service.context}
        if body.return_token_strs:
            found["token_strs"] = [token_text(service.tokenizer, i) for i in ids]
        return JSONResponse(found)

    @app.post("/detokenize", response_model=protocol.DetokenizeResponse)
    async def detokenize(body: protocol.DetokenizeRequest) -> Response:
        """The text of token ids."""
        service.check_model(body.model)
        limit = service.tokenizer.vocab_size
        outside = [i for i in body.tokens if i >= limit]
        if outside:
            raise invalid(f"token id {outside[0]} is outside the vocabulary of {limit}", "tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens)})

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """What remote users of the tokenizer need to know."""
        end = service.tokenizer.piece(service.tokenizer.eos_id)
        start = service.tokenizer.piece(service.tokenizer.bos_id)
        return {"bos_token": start, "eos_token": end, "pad_token": None, "chat_template": chat.CHAT_TEMPLATE}


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    @app.get("/livez", include_in_schema=False)
    async def health() -> dict[str, Any]:
        """The server lives; needs no key."""
        return {"status": "ok"}

    @app.get("/ready")
    @app.get("/readyz", include_in_schema=False)
    async def ready() -> dict[str, Any]:
        """Answers can be given; 503 while loading, restarting and draining."""
        service.check_ready()
        if not service.worker.ready.is_set():
            raise ApiError(503, "the engine is starting again", "server_error", code="unavailable", retry_after=2)
        return {"status": "ready", "model": service.model, "engine": service.worker.engine_name}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.render(), media_type=METRICS_TYPE)


def _add_page(app: FastAPI) -> None:
    files = {f"/web/{path.relative_to(WEB).as_posix()}": path for path in WEB.rglob("*") if path.suffix in WEB_TYPES}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(WEB / "index.html", media_type="text/html", headers={"cache-control": "no-cache"})

    @app.get("/web/{path:path}", include_in_schema=False)
    async def web_file(path: str, request: Request) -> Response:
        found = files.get(request.url.path)
        if found is None:
            raise HTTPException(404, "no such file")
        return FileResponse(found, media_type=WEB_TYPES[found.suffix], headers={"cache-control": "no-cache"})
