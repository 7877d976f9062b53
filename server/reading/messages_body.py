"""Bodies of Anthropic's Messages API, each field declared once: what agents send to Anthropic's own servers, too."""

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from engine.declared import MAX_INT, Object, tagged
from engine.request import SamplingFields
from server.reading.openai_body import EXTRAS, OF_CHATS, Effort, StructuredOutputs
from server.reading.protocol import JSON
from server.reading.shared_fields import MAX_OBJECTS, Hint, PrefixFields

# ---- content ----


class TextBlock(Object, tag="text", kw_only=True):
    text: str


class ThinkingBlock(Object, tag="thinking"):
    thinking: str = ""


class RedactedThinking(Object, tag="redacted_thinking"):
    """Thoughts that only Anthropic can read."""


class ToolUse(Object, tag="tool_use", kw_only=True):
    name: str
    id: str = ""
    input: JSON = {}


class ImageSource(Object):
    """`media_type` is not looked at: a file says itself what it is."""

    type: str = ""
    data: Annotated[str, Meta(description="of type base64")] | None = None
    url: Annotated[str, Meta(description="of type url: http(s), of a host that the server allows")] | None = None
    file_id: Annotated[str, Meta(description="of type file: of a picture uploaded to /v1/files")] | None = None


class Passage(Object):
    """A part of a document: a text, or a picture."""

    text: str | None = None
    source: ImageSource | None = None


class Source(Object):
    type: str = ""
    data: str | None = None
    content: str | list[Passage] | None = None


class Document(Object, tag="document"):
    title: str | None = None
    source: Source | None = None


class SearchResult(Object, tag="search_result"):
    title: str | None = None
    content: list[Passage] | None = None


class MessagesTool(Object):
    """A tool of the client's, described; or one that Anthropic knows, by its type."""

    type: str = "custom"
    name: str | None = None
    description: str | None = None
    input_schema: JSON | None = None
    strict: bool | None = None


class ChangedTool(Object):
    """A tool by its name, or described; of other types it is one of a server's that only Anthropic asks."""

    type: Annotated[str, Meta(description="tool_reference, with a name, or tool_definition")] = "tool_reference"
    name: str | None = None
    definition: MessagesTool | None = None


class ToolAddition(Object, tag="tool_addition", kw_only=True):
    tool: ChangedTool


class ToolRemoval(Object, tag="tool_removal", kw_only=True):
    tool: ChangedTool


class Compaction(Object, tag="compaction"):
    content: str | None = None
    tool_changes: list[ToolAddition | ToolRemoval] | None = None


class ImageBlock(Object, tag="image"):
    source: ImageSource | None = None


class Unseen(Object):
    """A block that a text model cannot see, or that only the provider knows what to do with."""

    name: str | None = None
    tool_name: str | None = None


MEDIA_KINDS = ("image", "container_upload")
UNSEEN_KINDS = (
    "container_upload", "tool_reference", "fallback",
    "server_tool_use", "web_search_tool_result", "web_fetch_tool_result",
    "code_execution_tool_result", "bash_code_execution_tool_result", "text_editor_code_execution_tool_result",
    "tool_search_tool_result", "advisor_tool_result", "mcp_tool_use", "mcp_tool_result",
    "mcp_tool_listing",
)  # fmt: skip
if TYPE_CHECKING:
    UnseenBlock = Unseen
else:
    UnseenBlock = tagged(Unseen, UNSEEN_KINDS)

ShownBlock = TextBlock | ImageBlock | Document | SearchResult | Compaction | ToolAddition | ToolRemoval | UnseenBlock
ShownBlocks = Annotated[
    str | Annotated[list[ShownBlock], Meta(max_length=MAX_OBJECTS)],
    Meta(extra={"rule": "a string or a list of blocks"}),
]


class ToolResult(Object, tag="tool_result", kw_only=True):
    tool_use_id: str
    content: ShownBlocks | None = None
    is_error: bool = False


# ---- messages ----


class UserMessage(Object, tag_field="role", tag="user", kw_only=True):
    content: Annotated[
        str | Annotated[list[ShownBlock | ToolResult], Meta(min_length=1, max_length=MAX_OBJECTS)],
        Meta(extra={"rule": "a string or a list of at least one block"}),
    ]


class AssistantMessage(Object, tag_field="role", tag="assistant", kw_only=True):
    content: Annotated[
        str | Annotated[list[ShownBlock | ThinkingBlock | RedactedThinking | ToolUse], Meta(max_length=MAX_OBJECTS)],
        Meta(extra={"rule": "a string or a list of blocks"}),
    ]


class SystemMessage(Object, tag_field="role", tag="system", kw_only=True):
    content: ShownBlocks
    clear_at: Annotated[
        Literal["never", "next_user_message"], Meta(description="from when on the model does not see it")
    ] = "never"


# ---- what is asked of the answer ----


class MessagesToolChoice(Object):
    type: Literal["auto", "any", "tool", "none"] = "auto"
    name: str | None = None
    disable_parallel_tool_use: bool = False


class ThinkingConfig(Object):
    type: Literal["enabled", "adaptive", "disabled"] = "disabled"
    budget_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    display: Literal["summarized", "omitted"] = "summarized"


class OutputFormat(Object, kw_only=True):
    type: Literal["json_schema"] = "json_schema"
    schema: JSON


class OutputConfig(Object):
    effort: Effort | None = None
    format: OutputFormat | None = None


# ---- the bodies ----


class CountTokensRequest(PrefixFields, unsupported=("n",), kw_only=True):
    """`cache_control`, `betas`, `metadata` and `service_tier` change nothing here, and are not worth a word."""

    messages: Annotated[
        list[UserMessage | AssistantMessage | SystemMessage],
        Meta(min_length=1, max_length=MAX_OBJECTS, extra={"rule": "a list of at least one message"}),
    ]
    model: str = ""
    system: ShownBlocks | None = None
    tools: Annotated[list[MessagesTool], Meta(max_length=MAX_OBJECTS)] = []
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingConfig | None = None
    chat_template_kwargs: JSON = {}
    output_config: OutputConfig | None = None
    output_format: Annotated[OutputFormat, Meta(description="an older name of output_config.format")] | None = None
    context_management: Hint | None = None
    container: Hint | None = None
    mcp_servers: Hint | None = None
    inference_geo: Hint | None = None
    speed: Hint | None = None


HINTS = ("context_management", "container", "mcp_servers", "inference_geo", "speed")


class MessagesRequest(
    CountTokensRequest, unsupported=(*OF_CHATS, "stop"), like=SamplingFields, names=EXTRAS, kw_only=True
):
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_INT)]
    stop_sequences: list[str] = []
    stream: bool = False
    structured_outputs: StructuredOutputs | None = None
