"""The answer to one request of OpenAI's Responses API: its output items, and the events of a stream."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from engine.engine import TokenizerFacade
from engine.state import Delta, FinishReason, Logprobs
from server.apis.blocks import REASONING, TEXT, TOOL_CALL, Block, BlockAnswer
from server.apis.openai_answers import spell_tokens
from server.apis.text_logprobs import TextLogprobs
from server.http.live import is_failure, new_rid
from server.http.sse import named_event
from server.parsers import AnswerDelta
from server.reading.chat import ChatTurn
from server.reading.chat_messages import chat_call
from server.reading.custom_tools import input_of
from server.reading.protocol import JSON
from server.reading.responses_tools import CUSTOM, FUNCTION, OfferedTool

ITEM_PREFIXES = {REASONING: "rs", TEXT: "msg"}


class ResponseAnswer(BlockAnswer):
    """Blocks are items of the response's output; those of reasoning and of text have one content part each."""

    begins_at_once = True

    def __init__(
        self, turn: ChatTurn, echo: JSON, offered: Mapping[str, OfferedTool], names: Mapping[str, str]
    ) -> None:
        """offered: the client's tools, by the names of the functions that the model calls. names: see `spelled`."""
        super().__init__(f"resp_{new_rid()}", turn)
        self._offered, self.names = offered, names
        self.on_end: Callable[[JSON], None] = _forget  # called with the response, however it ended
        self._echo = echo
        self._created_at = int(time.time())
        self._num_events = 0

    def response(self, status: str, reason: FinishReason | None = None) -> JSON:
        params = self.state.sampling_params
        failure = {"code": "server_error", "message": reason.message} if reason and status == "failed" else None
        return {
            "id": self.state.rid,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": failure,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [self._item(block) for block in self.blocks.all],
            **self._echo,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "usage": None if reason is None else self._usage(),
        }

    def message(self) -> JSON:
        """Return the answer as a message of chat.completions."""
        message: JSON = {"role": "assistant", "content": ""}
        for block in self.blocks.all:
            if block.kind == TOOL_CALL:
                calls = message.setdefault("tool_calls", [])
                calls.append(chat_call(block.call_id, block.name, block.content))
            else:
                name = "content" if block.kind == TEXT else "reasoning_content"
                message[name] = message.get(name, "") + block.content
        return message

    def body(self, reason: FinishReason) -> JSON:
        response = self.response(_status_of(reason), reason)
        self.on_end(response)
        return response

    def _usage(self) -> JSON:
        state = self.state
        return {
            "input_tokens": state.prompt_len,
            "input_tokens_details": {"cached_tokens": state.num_cached_tokens},
            "output_tokens": self.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.num_reasoning_tokens},
            "total_tokens": state.prompt_len + self.num_output_tokens,
        }

    def _item(self, block: Block) -> JSON:
        is_cut = self.is_cut and block is self.blocks.all[-1]
        return self._item_of(block, "incomplete" if is_cut else "completed", block.content)

    def _item_of(self, block: Block, status: str, content: str) -> JSON:
        item: JSON = {"id": self._item_id(block), "status": status}
        if block.kind == TOOL_CALL:
            return item | self._tool(block).call(block.call_id, content)
        if block.kind == REASONING:
            return item | {"type": "reasoning", "summary": [], "content": [self._part(block, content)]}
        return item | {"type": "message", "role": "assistant", "content": [self._part(block, content)]}

    def _part(self, block: Block, text: str) -> JSON:
        """Return the content part of a block of reasoning or text."""
        if block.kind == REASONING:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _tool(self, block: Block) -> OfferedTool:
        """Return the tool that a block calls."""
        return self._offered.get(block.name) or OfferedTool(FUNCTION, block.name)

    def _item_id(self, block: Block) -> str:
        prefix = self._tool(block).prefix if block.kind == TOOL_CALL else ITEM_PREFIXES[block.kind]
        return f"{prefix}_{self.state.rid.removeprefix('resp_')}{block.index:02x}"

    # ---- events ----

    def begin(self) -> bytes:
        response = self.response("in_progress")
        return self._event("created", response=response) + self._event("in_progress", response=response)

    def start(self, block: Block) -> bytes:
        item = self._item_of(block, "in_progress", "")
        has_part = "content" in item
        if has_part:
            item["content"] = []
        added = self._event("output_item.added", output_index=block.index, item=item)
        return added + self._part_event("content_part.added", block, part=self._part(block, "")) if has_part else added

    def grow(self, block: Block, piece: str) -> bytes:
        if block.kind == TOOL_CALL:
            # Other tools' calls stand as a function's in what comes: they are sent once they are whole.
            is_sent = self._tool(block).kind == FUNCTION
            return self._item_event("function_call_arguments.delta", block, delta=piece) if is_sent else b""
        if block.kind == REASONING:
            return self._part_event("reasoning_text.delta", block, delta=piece)
        return self._part_event("output_text.delta", block, delta=piece, logprobs=[])

    def stop(self, block: Block) -> bytes:
        content = block.content
        if block.kind == TOOL_CALL:
            done = self._call_done(block, content)
        else:
            part = self._part(block, content)
            if block.kind == REASONING:
                done = self._part_event("reasoning_text.done", block, text=content)
            else:
                done = self._part_event("output_text.done", block, text=content, logprobs=part["logprobs"])
            done += self._part_event("content_part.done", block, part=part)
        return done + self._event("output_item.done", output_index=block.index, item=self._item(block))

    def _call_done(self, block: Block, content: str) -> bytes:
        tool = self._tool(block)
        if tool.kind == FUNCTION:
            return self._item_event("function_call_arguments.done", block, name=tool.name, arguments=content)
        if tool.kind != CUSTOM:
            return b""  # its item says it all
        text = input_of(content)
        return self._item_event("custom_tool_call_input.delta", block, delta=text) + self._item_event(
            "custom_tool_call_input.done", block, input=text
        )

    def close(self, reason: FinishReason) -> bytes:
        response = self.body(reason)
        return self._event("completed" if response["status"] == "completed" else "incomplete", response=response)

    def fail(self, reason: FinishReason) -> bytes:
        begun = b"" if self.has_begun else self.begin()
        return begun + self._event("failed", response=self.body(reason))

    def _part_event(self, kind: str, block: Block, **values: Any) -> bytes:
        return self._item_event(kind, block, content_index=0, **values)

    def _item_event(self, kind: str, block: Block, **values: Any) -> bytes:
        return self._event(kind, item_id=self._item_id(block), output_index=block.index, **values)

    def _event(self, kind: str, **values: Any) -> bytes:
        number = self._num_events
        self._num_events += 1
        return named_event({"type": f"response.{kind}", "sequence_number": number, **values})


class ScoredResponseAnswer(ResponseAnswer):
    """Texts have the log-probabilities of their tokens."""

    def __init__(
        self,
        turn: ChatTurn,
        echo: JSON,
        offered: Mapping[str, OfferedTool],
        names: Mapping[str, str],
        tokenizer: TokenizerFacade,
    ) -> None:
        super().__init__(turn, echo, offered, names)
        self._tokens = TextLogprobs(lambda logprobs: spell_tokens(logprobs, tokenizer, tokenizer.token_text))
        self._scores: dict[int, list[JSON]] = {}  # by the index of a block of reasoning or text

    def text(self, delta: Delta) -> bytes:
        self._tokens.add(delta.logprobs)
        return super().text(delta)

    def parts(self, parts: AnswerDelta, logprobs: Logprobs | None) -> bytes:
        self._tokens.add(logprobs)
        return super().parts(parts, logprobs)

    def whole(self, delta: Delta) -> JSON:
        self._tokens.add(delta.logprobs)
        return super().whole(delta)

    def grow(self, block: Block, piece: str) -> bytes:
        scores = self._take(block, piece)
        if block.kind != TEXT:
            return super().grow(block, piece)
        return self._part_event("output_text.delta", block, delta=piece, logprobs=scores)

    def _part(self, block: Block, text: str) -> JSON:
        part = super()._part(block, text)
        if text and block.index not in self._scores:  # of an answer that is not streamed, part by part
            self._take(block, text)
        if text and block.kind == TEXT:
            part["logprobs"] = self._scores[block.index]
        return part

    def _take(self, block: Block, piece: str) -> list[JSON]:
        scores = self._tokens.take(piece)
        self._scores.setdefault(block.index, []).extend(scores)
        return scores


def _status_of(reason: FinishReason) -> str:
    if is_failure(reason):
        return "failed"
    return {"stop": "completed", "length": "incomplete"}.get(reason.type, "cancelled")


def _forget(response: JSON) -> None:
    """Forget a response that is not stored."""
