"""Errors as clients see them: OpenAI's error object and a status."""

from __future__ import annotations

from typing import Any

from mara_runtime.errors import MaraError, OptionError, PromptError

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered. param: the field at fault. retry_after_s: when another try may succeed."""

    def __init__(
        self, status: int, code: str, message: str, *, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def as_api_error(error: Exception) -> ApiError:
    """The error that a client sees: with its message if the client can act on it, else without details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptError):
        return ApiError(400, "invalid_prompt", str(error))
    if isinstance(error, OptionError):
        return ApiError(400, "invalid_value", str(error))
    if isinstance(error, MaraError):
        return ApiError(500, "decoding_failed", str(error))
    return internal_error()


def internal_error() -> ApiError:
    """The error that a client sees when the server itself is at fault."""
    return ApiError(500, "internal_error", "the server has failed; its log says how")
