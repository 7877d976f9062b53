"""Every error the engine raises on purpose.

EngineError
├── InvalidRequest      400  the request is wrong; says which field and the numbers
│   └── PromptTooLong   400  can never fit the context or the KV pool
├── QueueFull           429  try again after `retry_after_s`
├── EngineStopped       503  shutting down, or the step loop is dead
├── StepFailed          500  a step raised; only the requests in it see this
└── ModelError               the model folder, its config or its weights cannot be used (at start-up)
"""


class EngineError(Exception):
    status_code = 500


class InvalidRequest(EngineError):
    status_code = 400

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLong(InvalidRequest):
    pass


class QueueFull(EngineError):
    status_code = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStopped(EngineError):
    status_code = 503


class StepFailed(EngineError):
    pass


class ModelError(EngineError):
    pass


def shown(value: object) -> str:
    """`value` as an error message quotes it: never long."""
    text = repr(value)
    return text if len(text) <= 64 else text[:60] + " ..."
