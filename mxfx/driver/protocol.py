"""What transformers' server leaves open of OpenAI's protocol: the list of models, requests that cannot be answered,
where a model's context ends; and in its log what an answer lost.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from mxfx.driver.proof import inexact_told
from mxfx.ground.errors import reason_of

_log = logging.getLogger(__name__)


@contextmanager
def completed(folder: Path) -> Iterator[None]:
    """A server that is made inside names the model that it serves, refuses what no field of a request can be, ends an
    answer where the model's context is full, and logs a warning of the rows of each answer that lost something.

    transformers lists what lies in the hub's cache, and fails where there is none; a value of a wrong type is an error
    of the server there (500, without a word), and so is all that a model or its template refuses; an answer runs past
    the last position that the model knows.
    """
    from transformers.cli.serving import model_manager, server

    class Manager(model_manager.ModelManager):
        @staticmethod
        def get_gen_models(cache_dir: str | None = None) -> list[dict]:
            made = int((folder / "config.json").stat().st_mtime)
            return [{"id": str(folder), "object": "model", "created": made, "owned_by": "mxfx"}]

        def _load_model(self, *args: Any, **options: Any) -> Any:
            model = super()._load_model(*args, **options)
            generate = _told(model.generate, folder)
            model.generate = _in_context(generate, getattr(model.config, "max_position_embeddings", None))
            return model

    theirs = model_manager.ModelManager, server.build_server

    def build_server(*args: Any, **options: Any) -> Any:
        return _checking(theirs[1](*args, **options))

    model_manager.ModelManager, server.build_server = Manager, build_server
    try:
        yield
    finally:
        model_manager.ModelManager, server.build_server = theirs


def wrong_field(path: str, body: object) -> tuple[str, str] | None:
    """The first field of a request that has a wrong type, and what is wrong with it."""
    from pydantic import ValidationError

    if not isinstance(body, Mapping):
        return "body", "expected an object"
    for name, adapter in _fields(path).items():
        try:
            if name in body:
                adapter.validate_python(body[name])
        except ValidationError as error:
            return name, error.errors()[0]["msg"]
    return None


def _checking(app: Any) -> Any:
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError

    async def check(request: Request, call_next: Any) -> Any:
        if request.method == "POST" and _fields(request.url.path):
            try:
                wrong = wrong_field(request.url.path, json.loads(await request.body()))
            except ValueError as error:
                wrong = "body", f"is not JSON: {error}"
            if wrong is not None:
                return refused(f"{wrong[0]}: {wrong[1]}", wrong[0])
        try:
            return await call_next(request)
        except (ValueError, TemplateError) as error:
            return refused(reason_of(error))

    def refused(message: str, field: str | None = None) -> JSONResponse:
        said = {"message": message, "type": "invalid_request_error", "param": field, "code": None}
        return JSONResponse({"error": said}, status_code=400)

    app.middleware("http")(check)
    return app


def _in_context(generate: Callable[..., Any], longest: int | None) -> Callable[..., Any]:
    """``generate`` for prompts with tokens, and not so many that no answer has room; where the room ends, it ends."""

    def within(*, input_ids: Any, generation_config: Any, **options: Any) -> Any:
        given = input_ids.shape[-1]
        if given == 0:
            raise ValueError("the prompt has no tokens; give some text")
        if longest is not None and given >= longest:
            raise ValueError(f"the prompt has {given:,} tokens, the model reads at most {longest:,}")
        if longest is not None:
            # The server compares the answer with this number to say that it was cut.
            generation_config.max_new_tokens = min(generation_config.max_new_tokens or longest, longest - given)
        return generate(input_ids=input_ids, generation_config=generation_config, **options)

    return within


def _told(generate: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """``generate`` that says what was lost in it. One thread of the server makes all calls: rows are no other's."""

    def telling(**options: Any) -> Any:
        warnings: list[str] = []
        with inexact_told(warnings):
            found = generate(**options)
        for warning in warnings:
            _log.warning("%s: %s", folder, warning)
        return found

    return telling


@cache
def _fields(path: str) -> Mapping[str, Any]:
    """What checks each field of a route's requests, by OpenAI's own types; nothing for other routes."""
    from openai.types import completion_create_params as text
    from openai.types.chat import completion_create_params as chat
    from pydantic import TypeAdapter

    routes = {
        "/v1/completions": text.CompletionCreateParamsStreaming,
        "/v1/chat/completions": chat.CompletionCreateParamsStreaming,
    }
    if path not in routes:
        return {}
    hints = get_type_hints(routes[path]) | {"stream": bool | None}
    return {name: TypeAdapter(hint) for name, hint in hints.items()}
