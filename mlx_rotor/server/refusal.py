"""An answer that is an error, in OpenAI's form."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """What a client is told instead of an answer: an HTTP status and the fields of OpenAI's error object."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Unanswered(BaseException):
    """Carries a refusal through mlx_lm's handler, which would turn any `Exception` into a 404."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal
