"""Bodies of OpenAI's Responses API, each field declared once: what agents send to OpenAI's own servers, too."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from msgspec import Meta

from engine.declared import MAX_INT, Count, Object, tagged
from engine.request import SamplingFields
from server.reading.openai_body import EXTRAS, OF_CHATS, Effort, StructuredOutputs, TopLogprobs
from server.reading.protocol import JSON
from server.reading.shared_fields import MAX_OBJECTS, Hint, PrefixFields, described_as

MAX_METADATA = 16
UNSUPPORTED = (
    "conversation", "prompt", "moderation", "image", "n", "max_tokens", *OF_CHATS
)  # fmt: skip

# ---- items of the input, which are kept as the client wrote them; null is a default here, which is quick to read ----

UnseenPart = Literal["input_image", "input_file", "input_audio", "computer_screenshot"]
UNSEEN_PARTS = get_args(UnseenPart)  # by a text model
IMAGE_PARTS = ("input_image", "computer_screenshot")


class ContentPart(Object):
    type: (
        Annotated[
            Literal["input_text", "output_text", "text", "refusal"] | UnseenPart,
            Meta(extra={"rule": "input_text, output_text, refusal, or a kind of image or file"}),
        ]
        | None
    ) = None
    text: str | None = None
    refusal: str | None = None
    image_url: Annotated[str, Meta(description="a data URI, or a URL of a host that the server allows")] | None = None
    file_id: Annotated[str, Meta(description="of a picture that was uploaded to /v1/files")] | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None


Content = Annotated[
    str | Annotated[list[ContentPart], Meta(max_length=MAX_OBJECTS)],
    Meta(extra={"rule": "a string or a list of parts"}),
]


class InputMessage(Object, kw_only=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: Content | None = None


class MessageItem(InputMessage, tag="message"):
    pass


class ReasoningText(Object, tag="reasoning_text"):
    text: str | None = None


class ReasoningItem(Object, tag="reasoning"):
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None


class FunctionCall(Object, tag="function_call", kw_only=True):
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class FunctionCallOutput(Object, tag="function_call_output", kw_only=True):
    call_id: str
    output: Content | None = None


class ClientItem(Object):
    """Part of a call of a tool that the client ran, and that is no function."""

    call_id: str | None = None
    id: str | None = None


class ToolCall(ClientItem):
    """One of the last four fields holds what the tool was called with."""

    name: str | None = None
    input: Any = None
    action: Any = None
    arguments: Any = None
    operation: Any = None


class ToolOutput(ClientItem):
    output: Any = None
    tools: Any = None


class UnseenItem(Object):
    """An item of the provider's own tools, or of a conversation that it alone can read."""

    name: str | None = None


class ItemReference(Object, tag="item_reference", kw_only=True):
    id: Annotated[str, Meta(description="of an item of a stored response")]


CALLS = {
    "custom_tool_call": "input", "local_shell_call": "action", "shell_call": "action", "tool_search_call": "arguments",
    "apply_patch_call": "operation", "computer_call": "action",
}  # fmt: skip
OUTPUTS = {
    "custom_tool_call_output": "output", "local_shell_call_output": "output", "shell_call_output": "output",
    "tool_search_output": "tools", "apply_patch_call_output": "output", "computer_call_output": "output",
}  # fmt: skip
UNSEEN_ITEMS = (
    "web_search_call", "file_search_call", "image_generation_call", "code_interpreter_call", "mcp_list_tools",
    "mcp_approval_request", "mcp_approval_response", "mcp_call", "compaction", "compaction_summary",
    "context_compaction", "ghost_snapshot", "agent_message", "program", "program_output",
)  # fmt: skip
if TYPE_CHECKING:
    ToolItem = ToolCall | ToolOutput | UnseenItem
else:
    ToolItem = tagged(ToolCall, CALLS) | tagged(ToolOutput, OUTPUTS) | tagged(UnseenItem, UNSEEN_ITEMS)


class AdditionalTools(Object, tag="additional_tools", kw_only=True):
    """Tools that the model is offered beside those of the body, in place of any of the same name."""

    tools: Annotated[
        list[JSON],
        Meta(max_length=MAX_OBJECTS, extra_json_schema={"items": described_as("ResponsesTool")}),
    ]


class ConfigurationUpdate(Object, tag="configuration_update"):
    """Fields in place of the body's, until another item has some."""

    reasoning: Annotated[JSON, Meta(extra_json_schema=described_as("ReasoningConfig"))] | None = None
    text: Annotated[JSON, Meta(extra_json_schema=described_as("TextConfig"))] | None = None


Item = (
    MessageItem | ReasoningItem | FunctionCall | FunctionCallOutput | AdditionalTools | ConfigurationUpdate | ToolItem
)
INPUT_ITEMS = (InputMessage, ItemReference, *get_args(Item))  # what may be sent: of messages the type may be left out

# ---- tools, and the form of the answer, which the answer repeats ----


OWN_TOOLS = ("function", "custom", "namespace", "local_shell", "shell", "apply_patch")  # those of the client


class CustomToolFormat(Object):
    type: Literal["text", "grammar"] = "text"
    definition: str | None = None
    syntax: Literal["lark", "regex"] = "lark"


class Environment(Object):
    type: str = ""


class ResponsesTool(Object, kw_only=True):
    """A tool of the client's, or one that OpenAI knows, by its type."""

    type: Annotated[
        str,
        Meta(
            min_length=1,
            description="others are left out",
            extra={"rule": "a kind of tool"},
            extra_json_schema={"anyOf": [{"enum": [*OWN_TOOLS]}, {"type": "string"}]},
        ),
    ]
    name: str | None = None
    description: str | None = None
    parameters: JSON | None = None
    strict: bool | None = None
    format: Annotated[CustomToolFormat, Meta(description="of a custom tool's input")] | None = None
    environment: Annotated[Environment | str, Meta(description="of a shell: local, or the provider's")] | None = None
    tools: Annotated[list[JSON], Meta(description="of a namespace")] | None = None


class NamedTool(Object):
    type: str = ""
    name: str = ""
    namespace: str = ""


class ResponsesToolChoice(Object, kw_only=True):
    type: Literal["function", "custom", "local_shell", "shell", "apply_patch", "allowed_tools"]
    name: str = ""
    namespace: str = ""
    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedTool] = []


class ReasoningConfig(Object):
    effort: Effort | None = None


class TextFormat(Object):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema: JSON | None = None
    strict: bool | None = None


class TextConfig(Object):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] = "medium"


# ---- the body ----


def described(kind: type[Object]) -> Meta:
    return Meta(extra_json_schema=described_as(kind.__name__))


class ResponsesRequest(
    PrefixFields,
    unsupported=UNSUPPORTED,
    like=SamplingFields,
    names=EXTRAS | {"stop": "stop"},
    kw_only=True,
):
    input: Annotated[
        str
        | Annotated[
            list[JSON],
            Meta(
                max_length=MAX_OBJECTS,
                extra_json_schema={"items": {"anyOf": [described_as(kind.__name__) for kind in INPUT_ITEMS]}},
            ),
        ],
        Meta(extra={"rule": "a string or a list of items"}),
    ]
    model: str = ""
    stream: bool = False
    instructions: str = ""
    max_output_tokens: Annotated[int, Meta(ge=1, le=MAX_INT)] | None = None
    previous_response_id: str = ""
    store: Annotated[bool, Meta(description="keep the answer in memory, as long as there is room")] = True
    background: Annotated[bool, Meta(description="answer at once, with an id to ask for later")] = False
    tools: Annotated[
        list[Annotated[JSON, Meta(extra_json_schema=described_as("ResponsesTool"))]], Meta(max_length=MAX_OBJECTS)
    ] = []
    tool_choice: Literal["auto", "none", "required"] | Annotated[JSON, described(ResponsesToolChoice)] | None = None
    parallel_tool_calls: bool = True
    reasoning: Annotated[JSON, described(ReasoningConfig)] = {}
    text: Annotated[JSON, described(TextConfig)] = {}
    chat_template_kwargs: JSON = {}
    max_thinking_tokens: Annotated[Count, Meta(description="of reasoning, which is ended after so many")] | None = None
    thinking_token_budget: Annotated[Count, Meta(description="as max_thinking_tokens")] | None = None
    include: list[str] = []
    top_logprobs: TopLogprobs | None = None
    truncation: Annotated[Literal["disabled", "auto"], Meta(description="nothing is cut, whichever it says")] = (
        "disabled"
    )
    metadata: Annotated[
        dict[str, str],
        Meta(max_length=MAX_METADATA, extra={"rule": f"an object of at most {MAX_METADATA} strings"}),
    ] = {}
    user: str = ""
    structured_outputs: StructuredOutputs | None = None
    context_management: Hint | None = None


KEPT_AS_WRITTEN = (*INPUT_ITEMS, ResponsesTool, ResponsesToolChoice, ReasoningConfig, TextConfig)
