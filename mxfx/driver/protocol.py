"""What transformers' server leaves open of OpenAI's protocol: the list of models, and requests of the wrong types."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints


@contextmanager
def completed(folder: Path) -> Iterator[None]:
    """A server that is made inside names the model that it serves, and refuses what no field of a request can be.

    transformers lists what lies in the hub's cache, and fails where there is none; a value of a wrong type is an error
    of the server there (500, without a word).
    """
    from transformers.cli.serving import model_manager, server

    class Manager(model_manager.ModelManager):
        @staticmethod
        def get_gen_models(cache_dir: str | None = None) -> list[dict]:
            made = int((folder / "config.json").stat().st_mtime)
            return [{"id": str(folder), "object": "model", "created": made, "owned_by": "mxfx"}]

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

    async def check(request: Request, call_next: Any) -> Any:
        if request.method == "POST" and _fields(request.url.path):
            try:
                wrong = wrong_field(request.url.path, json.loads(await request.body()))
            except ValueError as error:
                wrong = "body", f"is not JSON: {error}"
            if wrong is not None:
                said = {"message": f"{wrong[0]}: {wrong[1]}", "type": "invalid_request_error", "param": wrong[0]}
                return JSONResponse({"error": said | {"code": None}}, status_code=400)
        return await call_next(request)

    app.middleware("http")(check)
    return app


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
