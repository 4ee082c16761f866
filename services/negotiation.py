"""msgpack beside JSON: bodies are read, and answers written, in the one that the client names."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException

from services import codec
from services.body import SMALL, NotPlain, TooMuch, read_json, read_msgpack
from services.problem import Problem, field_name

MSGPACK = "application/msgpack"


class _BodyRequest(Request):
    """Reads msgpack where the client sent it, else strict JSON (the standard library would accept NaN)."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            return await _in_thread(len(body), read_msgpack if self.scope.get("rlif.msgpack") else read_json, body)
        except TooMuch as error:
            raise Refused(Problem(413, "The body is too large", str(error))) from error
        except NotPlain as error:
            field = field_name(error.path)
            raise Refused(Problem(422, "The request is not valid", str(error), field)) from error
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            raise json.JSONDecodeError(f"not a msgpack message: {error}", "", 0) from error


class Refused(HTTPException):
    """FastAPI lets HTTPException through while it reads a body, and hides any other error."""

    def __init__(self, problem: Problem):
        super().__init__(problem.status, problem.detail)
        self.problem = problem


async def _in_thread(size: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Work on so many bytes; not in a thread where that is less than a thread's wake-up."""
    return await asyncio.to_thread(work, *arguments) if size > SMALL else work(*arguments)


class NegotiatedRoute(APIRoute):
    def _packed(self, body: bytes) -> bytes:
        """The JSON of an answer as msgpack; its model knows what in it are arrays."""
        answer = orjson.loads(body)
        if isinstance(self.response_model, type) and issubclass(self.response_model, BaseModel):
            answer = self.response_model.model_validate(answer)
        return codec.pack(answer, exclude_none=self.response_model_exclude_none)

    def get_route_handler(self) -> Callable:
        handle = super().get_route_handler()

        async def negotiated(request: Request) -> Response:
            if request.headers.get("content-type", "").split(";")[0].strip() == MSGPACK:
                request.scope["rlif.msgpack"] = True
                MutableHeaders(scope=request.scope)["content-type"] = "application/json"
            response = await handle(_BodyRequest(request.scope, request.receive))
            wanted = MSGPACK in request.headers.get("accept", "")
            if wanted and response.media_type == "application/json" and response.body:
                packed = await _in_thread(len(response.body), self._packed, bytes(response.body))
                return Response(packed, response.status_code, media_type=MSGPACK)
            return response

        return negotiated
