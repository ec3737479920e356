"""The application: its paths, and what FastAPI is told about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse
from transformers import PreTrainedTokenizerBase

from ..runtime import Engine
from ..version import __version__
from . import errors, paths
from .answer import GenerationSpec, answer
from .anthropic import add_messages
from .chats import chat_spec
from .described import answers, refusals
from .guard import Guard
from .replies import (
    ChatFormatter,
    ChatReply,
    CompletionFormatter,
    CompletionReply,
    Health,
    ModelCard,
    ModelList,
)
from .requests import ChatBody, CompletionBody
from .responses import add_responses
from .service import Service
from .settings import Settings
from .tokenization import add_tokenization

PLAYGROUND = Path(__file__).with_name("playground.html")
PLAYGROUND_HEADERS = {  # the page may talk to this server and load nothing
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
COMPLETION_TOKENS = 16  # of a completion request that says no number, as at OpenAI


def create_app(engine: Engine, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> FastAPI:
    """The ASGI application that serves `engine`; `app.state.service` is what its parts share.

    The engine stays its maker's, who closes it.
    Raises UnsupportedBitsError or UsageError if settings.bits or a plan is not of the engine's model.
    """
    service = Service(engine, tokenizer, settings)
    # No /docs: FastAPI's page loads its program from another site.
    prefix = [{"url": settings.root_path}] if settings.root_path else None  # the guard takes it off
    app = FastAPI(title="bitstrata", version=__version__, docs_url=None, redoc_url=None, servers=prefix)
    app.state.service = service
    errors.install(app)
    _add_generation(app, service)
    add_responses(app, service)
    add_messages(app, service)
    add_tokenization(app, service)
    _add_information(app, service)
    app.add_middleware(Guard, service=service)
    if settings.allowed_origins:  # outside of the guard: a preflight request carries no key
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.openapi = lambda: _openapi(app, service)  # type: ignore[method-assign]
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    catalog = service.catalog

    @app.post(paths.CHAT, response_model=None, responses=answers(ChatReply))
    async def chat_completions(http: Request, body: ChatBody) -> Response:
        """Answer a conversation, whole or, with `stream`, as server-sent events that end with `[DONE]`."""
        notices = service.notices(body)
        spec = await chat_spec(service, body, notices)
        return await answer(service, http, body, spec, ChatFormatter(body, catalog.name, service.names, notices))

    @app.post(paths.COMPLETIONS, response_model=None, responses=answers(CompletionReply))
    async def completions(http: Request, body: CompletionBody) -> Response:
        """Continue texts or tokens, whole or, with `stream`, as server-sent events that end with `[DONE]`."""
        notices = service.notices(body)
        precision = catalog.precision(body.model, body.bits)
        service.check_choices(len(body.prompt), body.n or 1)
        begun = body.add_special_tokens is not False
        ends: Sequence[int] = ()
        if body.suffix:
            prompts, ends = await service.prompts.infilling(body.prompt, body.suffix, add_special_tokens=begun)
        else:
            prompts = await service.prompts.completion(body.prompt, add_special_tokens=begun)
        spec = GenerationSpec(
            prompts=prompts,
            precision=precision,
            notices=notices,
            continues=True,
            max_tokens=body.max_tokens,
            default_tokens=COMPLETION_TOKENS,
            logprobs=body.logprobs,
            echo=await service.echo(prompts) if body.echo else None,
            constraint=body.constraint,
            ends=ends,
        )
        return await answer(service, http, body, spec, CompletionFormatter(body, catalog.name, service.names, notices))


def _add_information(app: FastAPI, service: Service) -> None:
    @app.get(paths.MODELS, responses=refusals(401))
    async def models() -> ModelList:
        """The model under each of its names: `name` by default, `name:2`, `name:3`, and plans' names."""
        return ModelList(data=service.catalog.cards)

    @app.get(paths.MODELS + "/{model:path}", responses=refusals(401, 404))
    async def model(model: str) -> ModelCard:
        return service.catalog.card(model)

    @app.get("/health", responses={503: {"model": Health, "description": "it takes no more requests"}})
    async def health(response: Response) -> Health:
        """Whether new requests are taken."""
        state = service.state
        response.status_code = 200 if state == "ok" else 503
        return Health(status=state)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **refusals(401)})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    def playground() -> HTMLResponse:
        """A page that asks this server at two precisions side by side; one file without a build step."""
        return HTMLResponse(PLAYGROUND.read_text(encoding="utf-8"), headers=PLAYGROUND_HEADERS)


def _openapi(app: FastAPI, service: Service) -> dict[str, Any]:
    """FastAPI's schema without the 422 that it assumes: wrong bodies get 400 here."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        for methods in schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        if service.settings.api_key is not None:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
        app.openapi_schema = schema
    return app.openapi_schema
