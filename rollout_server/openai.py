"""OpenAI-compatible completions and chat over an engine that has no such server of its own (transformers)."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rollout_server.calls import CLIENT_GONE, ClientGone, measured, while_connected
from rollout_server.engines.base import Prompt
from rollout_server.engines.generation import Token
from rollout_server.engines.stopping import cut
from rollout_server.engines.transformers import TransformersEngine
from rollout_server.prompts import check_size, encode
from services.contract import Completion, Items, Message, Sampling, Temperature, TokenIds
from services.problem import Problem

SomeTokenIds = Annotated[TokenIds, Field(min_length=1)]
HARMLESS = {"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier"}
"""Fields of other servers that do not change what is generated."""
NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})


class StreamOptions(BaseModel):
    include_usage: bool = False


class Body(BaseModel):
    """What both routes take. A further field is refused unless it is neutral (null, false, 0 or empty)."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    n: int = Field(1, ge=1, le=1024)
    temperature: Temperature = 1.0
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, lt=2**63)
    stop: str | Items[str] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > 16 or "" in stops:
            raise ValueError("at most 16 strings, none of them empty")
        return stop

    @model_validator(mode="after")
    def known_fields(self) -> "Body":
        unknown = [name for name, value in (self.model_extra or {}).items() if value not in NEUTRAL]
        if refused := sorted(set(unknown) - HARMLESS):
            raise ValueError(f"not supported by the transformers engine: {', '.join(refused[:10])}")
        return self

    def sampling(self, max_tokens: int) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            max_tokens=max_tokens,
            seed=self.seed,
            stop=[self.stop] if isinstance(self.stop, str) else self.stop or [],
        )


class CompletionBody(Body):
    prompt: str | Items[str] | SomeTokenIds | Items[SomeTokenIds] = Field(min_length=1)
    max_tokens: int | None = Field(16, ge=1, lt=2**63)
    logprobs: int | None = Field(None, ge=0, le=20)


class ChatBody(Body):
    messages: Items[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, lt=2**63)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**63)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


def attach(app: FastAPI, engine: TransformersEngine) -> None:
    """Add /v1/completions, /v1/chat/completions and /v1/models."""
    started = int(time.time())
    name = engine.settings.served_name

    def check_model(body: Body) -> None:
        if body.model not in (None, name):
            raise Problem(404, "No such model", f"this server serves {name!r} (got {body.model!r})", "model")

    @app.get("/v1/models", tags=["openai"])
    async def models() -> dict[str, Any]:
        """The one model that is served."""
        card = {"id": name, "object": "model", "created": started, "owned_by": "rlif"}
        return {"object": "list", "data": [{**card, "max_model_len": engine.max_model_len}]}

    @app.post("/v1/completions", tags=["openai"], response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Complete one or several prompts (text or token ids)."""
        check_model(body)
        texts = await asyncio.to_thread(_prompts, engine, body.prompt)
        sampling = body.sampling(body.max_tokens or engine.max_model_len)
        prompts = [Prompt("openai", token_ids, body.n, sampling) for token_ids in texts]
        check_size(engine, prompts, "n")
        shape = CompletionShape(engine.tokenizer, body.logprobs is not None, name)
        return await _answer(engine, request, body, prompts, shape, body.logprobs or 0)

    @app.post("/v1/chat/completions", tags=["openai"], response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation, written out by the tokenizer's chat template."""
        check_model(body)
        token_ids = await asyncio.to_thread(encode, engine, "messages", body.messages)
        sampling = body.sampling(body.max_completion_tokens or body.max_tokens or engine.max_model_len)
        prompts = [Prompt("openai", token_ids, body.n, sampling)]
        check_size(engine, prompts, "n")
        shape = ChatShape(engine.tokenizer, body.logprobs, name)
        return await _answer(engine, request, body, prompts, shape, (body.logprobs and body.top_logprobs) or 0)


def _prompts(engine: TransformersEngine, prompt: Any) -> list[list[int]]:
    if isinstance(prompt, str):
        return [encode(engine, "prompt", prompt=prompt)]
    if isinstance(prompt[0], int):
        return [encode(engine, "prompt", token_ids=prompt)]
    return [
        encode(engine, f"prompt[{place}]", prompt=one)
        if isinstance(one, str)
        else encode(engine, f"prompt[{place}]", token_ids=one)
        for place, one in enumerate(prompt)
    ]


# ---- the two shapes of an answer -------------------------------------------------------------------------------


class CompletionShape:
    """Writes choices the way /v1/completions does."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"
    has_opening = False
    """Whether a stream begins with a chunk that has no text."""

    def __init__(self, tokenizer: Any, with_logprobs: bool, model: str):
        self.tokenizer, self.with_logprobs = tokenizer, with_logprobs
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def choice(
        self, index: int, text: str, tokens: list[Token], finish: str | None, start: int = 0, is_chunk: bool = False
    ) -> dict[str, Any]:
        """`start`: characters of this choice that were sent before."""
        logprobs = self.logprobs(tokens, start) if self.with_logprobs else None
        return {"index": index, **self.content(text, is_chunk), "logprobs": logprobs, "finish_reason": finish}

    def content(self, text: str, is_chunk: bool) -> dict[str, Any]:
        del is_chunk
        return {"text": text}

    def logprobs(self, tokens: list[Token], start: int) -> dict[str, Any]:
        texts = [self.tokenizer.decode([token.id]) for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.tokenizer.decode([one]): value for one, value in token.top} for token in tokens],
            "text_offset": list(itertools.accumulate(map(len, texts), initial=start))[:-1],
        }


class ChatShape(CompletionShape):
    """Writes choices the way /v1/chat/completions does."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"
    has_opening = True

    def content(self, text: str, is_chunk: bool) -> dict[str, Any]:
        return {"delta" if is_chunk else "message": {"role": "assistant", "content": text}}

    def logprobs(self, tokens: list[Token], start: int) -> dict[str, Any]:
        del start
        rows = [
            self._token(token.id, token.logprob) | {"top_logprobs": [self._token(*one) for one in token.top]}
            for token in tokens
        ]
        return {"content": rows}

    def _token(self, token_id: int, value: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token_id])
        return {"token": text, "logprob": value, "bytes": list(text.encode())}


def _usage(prompts: list[Prompt], groups: list[list[Completion]]) -> dict[str, int]:
    asked = sum(len(prompt.token_ids) for prompt in prompts)
    made = sum(len(completion.token_ids) for group in groups for completion in group)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


# ---- answering -------------------------------------------------------------------------------------------------


async def _answer(
    engine: TransformersEngine,
    request: Request,
    body: Body,
    prompts: list[Prompt],
    shape: CompletionShape,
    top_logprobs: int,
) -> Response:
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return StreamingResponse(_stream(engine, prompts, shape, top_logprobs, usage), media_type="text/event-stream")
    tokens: dict[int, list[Token]] = {}

    def collect(fresh: list[tuple[int, Token]]) -> None:
        for row, token in fresh:
            tokens.setdefault(row, []).append(token)

    work = engine.generate(prompts, collect if shape.with_logprobs else None, top_logprobs)
    try:
        groups = await while_connected(request, measured(engine, work))
    except ClientGone:
        return Response(status_code=CLIENT_GONE)
    choices = [
        shape.choice(index, completion.text, tokens.get(index, []), completion.finish_reason)
        for index, completion in enumerate(itertools.chain(*groups))
    ]
    answer = {**shape.head, "object": shape.kind, "choices": choices, "usage": _usage(prompts, groups)}
    return Response(orjson.dumps(answer), media_type="application/json")


async def _stream(
    engine: TransformersEngine, prompts: list[Prompt], shape: CompletionShape, top_logprobs: int, usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events: a chunk for every token that adds text, one that says how each choice ended, [DONE]."""
    loop = asyncio.get_running_loop()
    steps: asyncio.Queue[list[tuple[int, Token]]] = asyncio.Queue()

    def emit(fresh: list[tuple[int, Token]]) -> None:
        loop.call_soon_threadsafe(steps.put_nowait, fresh)

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return _event({**shape.head, "object": shape.chunk_kind, "choices": choices, **more})

    stops = prompts[0].sampling.stop
    texts = [RunningText(engine.tokenizer, stops) for prompt in prompts for _ in range(prompt.n)]
    task = asyncio.ensure_future(measured(engine, engine.generate(prompts, emit, top_logprobs)))
    task.add_done_callback(lambda _: emit([]))
    try:
        if shape.has_opening:
            for index in range(len(texts)):
                yield event([shape.choice(index, "", [], None, is_chunk=True)])
        while step := await steps.get():
            for row, token in step:
                start = texts[row].sent
                if text := texts[row].push(token):
                    yield event([shape.choice(row, text, texts[row].take(), None, start, is_chunk=True)])
        groups = task.result()
        for index, completion in enumerate(itertools.chain(*groups)):
            start = texts[index].sent
            rest, tokens = completion.text[start:], texts[index].take()
            yield event([shape.choice(index, rest, tokens, completion.finish_reason, start, is_chunk=True)])
        if usage:
            yield event([], usage=_usage(prompts, groups))
        yield b"data: [DONE]\n\n"
    except Problem as problem:
        # The status line is out already, so the error travels as an event.
        error = {"message": problem.detail or problem.title, "type": problem.title, "code": problem.status}
        yield _event({"error": error})
    finally:
        task.cancel()


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


class RunningText:
    """One choice's text as its tokens arrive: whole characters only, and nothing that may yet become a stop string."""

    def __init__(self, tokenizer: Any, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.held = max((len(stop) for stop in stops), default=1) - 1
        self.token_ids: list[int] = []
        self.untold: list[Token] = []
        self.sent = 0

    def push(self, token: Token) -> str:
        """The text that became certain with this token; often empty."""
        self.token_ids.append(token.id)
        self.untold.append(token)
        text = self.tokenizer.decode(self.token_ids, skip_special_tokens=True)
        if text.endswith("\ufffd"):
            return ""
        text = cut(text, self.stops)
        new = text[self.sent : max(len(text) - self.held, self.sent)]
        self.sent += len(new)
        return new

    def take(self) -> list[Token]:
        """The tokens since the last chunk."""
        taken, self.untold = self.untold, []
        return taken
