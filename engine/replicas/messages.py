"""Define the messages that the front end and a replica's process send each other.

Requests and reports travel pickled, a request or some twenty reports a second; the deltas in between as plain tuples,
by marshal.
"""

import marshal
import pickle
from dataclasses import dataclass
from typing import Any

from engine.config import EngineConfig
from engine.engine import EngineStats, Health
from engine.ranks.channel import ChannelReader, ChannelWriter
from engine.state import Delta, Logprobs, RequestState

PIECE_BYTES = 4 << 20  # of a long message
SUBMIT, ABORT, FLUSH, PREFIXES, BRANCHES, REQUESTS, START_PROFILE, STOP_PROFILE, REPORT = range(9)  # kinds of message
# Fields of an ended request's state that the front end takes over: what others read, without what deltas bring.
OUTCOME = (
    "max_new_tokens", "seed", "output_ids", "finish_reason", "num_cached_tokens", "num_retractions",
    "num_forced_tokens", "embedding", "hidden_states", "times",
)  # fmt: skip


@dataclass(slots=True)
class Report:
    """The state of a replica at some time."""

    stats: EngineStats
    health: Health
    num_received: int
    """Messages that the replica had received."""


@dataclass(slots=True)
class Ready:
    """Report what a replica is once it has started."""

    config: EngineConfig
    max_total_num_tokens: int
    context_length: int
    report: Report


def send_long(writer: ChannelWriter, message: bytes) -> None:
    """Send `message`, in pieces if it is longer than the channel takes. A piece's first byte is 1 if it is the last."""
    for start in range(0, len(message), PIECE_BYTES):
        is_last = start + PIECE_BYTES >= len(message)
        writer.send(bytes([is_last]), memoryview(message)[start : start + PIECE_BYTES])


def receive_long(reader: ChannelReader, pieces: bytearray) -> bytes | memoryview | None:
    """Return the message that the next piece completes, or None. `pieces` accumulates the pieces received so far."""
    piece = reader.receive()
    if piece[0] and not pieces:
        return piece[1:]
    pieces += piece[1:]
    if not piece[0]:
        return None
    message = bytes(pieces)
    pieces.clear()
    return message


def send_command(writer: ChannelWriter, kind: int, *args: Any) -> None:
    """Send a command to a replica; `pickle.loads` gives (kind, args). `OSError` if nobody reads the channel."""
    send_long(writer, pickle.dumps((kind, args)))


def send_deltas(writer: ChannelWriter, deltas: list[tuple[Any, ...]]) -> None:
    """Send encoded deltas to the front end, which reads them with `decode_answer`."""
    send_long(writer, marshal.dumps((deltas, None)))


def send_answer(writer: ChannelWriter, kind: int, value: Any) -> None:
    """Send what is no delta to the front end, which reads it with `decode_answer`."""
    send_long(writer, marshal.dumps(([], pickle.dumps((kind, value)))))


def decode_answer(message: bytes | memoryview) -> tuple[list[tuple[Any, ...]], tuple[int, Any] | None]:
    """Return the encoded deltas of a replica's message, and the (kind, value) that it has besides."""
    deltas, answer = marshal.loads(message)
    return deltas, None if answer is None else pickle.loads(answer)


def encode_delta(delta: Delta, with_input_logprobs: bool) -> tuple[Any, ...]:
    """Return `delta` for marshal; the last one has the outcome of its request. See `decode_delta`."""
    state, end = delta.state, None
    logprobs = None if delta.logprobs is None else _plain(delta.logprobs)
    input_logprobs = _plain(state.input_logprobs) if with_input_logprobs and state.input_logprobs else None
    if delta.finish_reason is not None:
        end = pickle.dumps((delta.finish_reason, {name: getattr(state, name) for name in OUTCOME}))
    return state.rid, delta.text, delta.token_ids, logprobs, input_logprobs, end


def _plain(logprobs: Logprobs) -> tuple[Any, ...]:
    return logprobs.token, logprobs.top, logprobs.token_ids


def decode_delta(
    state: RequestState, text: str, token_ids: list[int], logprobs: Any, input_logprobs: Any, end: bytes | None
) -> Delta:
    """Return the delta that `encode_delta` wrote, and copy what it brings besides into `state`."""
    if input_logprobs is not None:
        state.input_logprobs = Logprobs(*input_logprobs)
    delta = Delta(state, text, token_ids, None, None if logprobs is None else Logprobs(*logprobs))
    if end is not None:
        delta.finish_reason, outcome = pickle.loads(end)
        for name, value in outcome.items():
            setattr(state, name, value)
    return delta
