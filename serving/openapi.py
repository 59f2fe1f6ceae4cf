"""The routes that go past FastAPI in the gateway's own OpenAPI document, /openapi.json.

FastAPI does not serve them, so it cannot describe them; what is said here of a request is what the
gateway itself asks for. The rest of a body is the model server's to judge.
"""

from typing import Any

from fastapi import FastAPI

from serving.compare.request import MAX_MODELS

MODEL = {"type": "string", "minLength": 1, "description": "one of /v1/models"}
STREAM = {"type": "boolean", "description": "answer with server-sent events"}
TEXT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {}}]}

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/completions": ("Complete a prompt", {"prompt": TEXT, "stream": STREAM}),
    "/v1/chat/completions": (
        "Answer messages",
        {"messages": {"type": "array", "items": {"type": "object"}}, "stream": STREAM},
    ),
    "/v1/embeddings": ("Embed text, with a model that can", {"input": TEXT}),
}

COMPARISON = {
    "type": "object",
    "required": ["reference"],
    "oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}],
    "properties": {
        "reference": {**MODEL, "description": "writes the answer; one of /v1/models"},
        "models": {
            "type": "array",
            "items": MODEL,
            "minItems": 1,
            "maxItems": MAX_MODELS,
            "uniqueItems": True,
            "description": "read it; by default every other one of the configuration",
        },
        "prompt": {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            ]
        },
        "messages": {"type": "array", "items": {"type": "object"}, "minItems": 1},
        "max_tokens": {"type": "integer", "minimum": 1, "default": 16},
        "top_k": {"type": "integer", "minimum": 1, "default": 10},
        "generate": {"type": "boolean", "default": True},
    },
}

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def describe_proxied(app: FastAPI) -> None:
    """Have the document of `app` describe the routes that go past it."""
    own = app.openapi

    def with_proxied() -> dict[str, Any]:
        document = own()
        for path, (summary, fields) in BODIES.items():
            document["paths"].setdefault(path, {"post": operation(summary, body_of(fields))})
        comparison = operation("Compare models on the same tokens", COMPARISON)
        document["paths"].setdefault("/v1/compare", {"post": comparison})
        return document

    app.openapi = with_proxied  # type: ignore[method-assign]  # FastAPI's own way to extend it


def body_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a proxied route."""
    needed = [name for name in fields if name != "stream"]
    return {
        "type": "object",
        "required": ["model", *needed],
        "properties": {"model": MODEL, **fields},
    }


def operation(summary: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the description of one POST."""
    answer = {"description": "The model server's answer", "content": {"application/json": {}}}
    if "stream" in body["properties"]:
        answer["content"] = {"application/json": {}, "text/event-stream": {}}
    error = {"description": "An error", "content": {"application/json": {"schema": ERROR}}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": answer, "default": error},
    }
