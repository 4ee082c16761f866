"""The id of the request being served: in its log lines, its error answers, and the calls made on its behalf."""

from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="-")
