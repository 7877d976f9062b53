"""Bodies of OpenAI's completions and chats, with SGLang's and vLLM's fields, each declared once."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from engine.declared import Count, Object
from engine.request import SamplingFields
from server.media.limits import MAX_SETTING
from server.reading.protocol import JSON
from server.reading.shared_fields import MAX_OBJECTS, Prompts, RequestFields, Text, described_as

MAX_TOP_LOGPROBS = 128  # of a token: OpenAI has 20, students of a model want more; each takes 1 us of the loop

# OpenAI's, SGLang's and vLLM's. They would change the answer: better refused than ignored.
UNSUPPORTED = (
    "functions", "function_call", "audio", "web_search_options",
    "lora_path", "session_params", "custom_logit_processor", "custom_params", "watermark", "bootstrap_host",
    "bootstrap_room", "return_routed_experts", "return_sampling_mask",
    "return_prompt_token_ids", "sampling_logprobs_mode",
    "use_beam_search", "allowed_token_ids", "bad_words", "logits_processors", "logprob_token_ids", "vllm_xargs",
    "truncate_prompt_tokens", "prompt_embeds", "documents", "chat_template",
    "kv_transfer_params", "repetition_detection", "guided_whitespace_pattern", "media_io_kwargs",
)  # fmt: skip

# Fields that go into SamplingParams, under the engine's name where that differs.
SAMPLING_FIELDS = {
    name: name
    for name in (
        "temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids", "stop_regex", "frequency_penalty",
        "presence_penalty", "repetition_penalty", "logit_bias", "ignore_eos", "skip_special_tokens",
        "spaces_between_special_tokens", "no_stop_trim",
    )
} | {
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "include_stop_str_in_output": "no_stop_trim",  # vLLM's
}  # fmt: skip
MAX_TOKENS = {"max_tokens": "max_new_tokens"}
OWN_CONSTRAINTS = {name: name for name in ("json_schema", "regex", "ebnf", "structural_tag")}  # SGLang's
# vLLM's names within `structured_outputs`, and before that `guided_...`, under the engine's.
STRUCTURED_OUTPUTS = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "ebnf",
    "structural_tag": "structural_tag",
}
GUIDED = {f"guided_{name}": STRUCTURED_OUTPUTS[name] for name in ("json", "regex", "choice", "grammar")}
# What every API takes whose requests become chats: the fields of those that its own have no other name for.
EXTRAS = {
    theirs: ours for theirs, ours in (SAMPLING_FIELDS | OWN_CONSTRAINTS | GUIDED).items() if theirs not in ("n", "stop")
}
# Fields of a chat that such an API spells otherwise: better refused than ignored.
OF_CHATS = (
    "response_format", "reasoning_effort", "max_completion_tokens", "logprobs", "input_ids", "continue_final_message",
    "add_generation_prompt",
)  # fmt: skip

TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]
Effort = Annotated[
    Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | Annotated[float, Meta(ge=0, le=0.99)],
    Meta(extra={"rule": "a level's name, or a number from 0 to 0.99"}),
]


# ---- the form of the answer ----


class JsonSchemaFormat(Object):
    schema: JSON | None = None
    strict: bool | None = None


class ResponseFormat(Object):
    """Beside the fields of a structural tag, which are the grammar's to read."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"] = "text"
    json_schema: JsonSchemaFormat | None = None
    schema: Annotated[JSON, Meta(description="of json_object, too")] | None = None
    strict: bool | None = None


class StructuredOutputs(
    Object,
    unsupported=("whitespace_pattern", "disable_additional_properties"),
    like=SamplingFields,
    names=STRUCTURED_OUTPUTS,
):
    json_object: bool = False


# ---- messages and tools, which are shown to the template as the client wrote them ----
# Classes of what there is much of have no defaults but None: no null is to be looked for.


Pixels = Annotated[int, Meta(ge=1, le=MAX_SETTING)]


class MediaFields(Object):
    """Say how a picture or video is read, as far as its model can be told."""

    detail: (
        Annotated[
            Literal["auto", "low", "high", "original"], Meta(description="low: at most 512 x 512 pixels are looked at")
        ]
        | None
    ) = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    min_dynamic_patch: Pixels | None = None
    max_dynamic_patch: Pixels | None = None
    fps: Annotated[Pixels, Meta(description="frames a second that are taken of a video")] | None = None
    max_frames: Pixels | None = None
    num_frames: Pixels | None = None


class MediaUrl(MediaFields):
    url: Annotated[str, Meta(description="a data URI, or an http(s) URL of a host that the server allows")] | None = (
        None
    )


class FilePart(Object):
    file_id: Annotated[str, Meta(description="of a picture that was uploaded to /v1/files")] | None = None
    file_data: Annotated[str, Meta(description="a picture's data URI")] | None = None


class Part(MediaFields):
    type: str | None = None
    text: str | None = None
    refusal: str | None = None
    image_url: MediaUrl | str | None = None
    image: Annotated[str, Meta(description="as image_url")] | None = None
    video_url: MediaUrl | str | None = None
    video: Annotated[str | list[str], Meta(description="as video_url, or the frames one by one")] | None = None
    url: Annotated[str, Meta(description="as image or video, beside such a type (Hugging Face's)")] | None = None
    file: FilePart | None = None
    uuid: Annotated[str, Meta(description="has no effect: equal files are found by what they hold")] | None = None


class CalledFunction(Object):
    name: str = ""
    arguments: Annotated[str | JSON, Meta(extra={"rule": "a JSON object, or one as text"})] | None = None


class CalledCustom(Object):
    name: str = ""
    input: str = ""


class MessageToolCall(Object):
    id: str = ""
    function: CalledFunction | None = None
    custom: CalledCustom | None = None


class Message(Object, kw_only=True):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str | list[Part], Meta(extra={"rule": "a string or a list of parts"})] | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None


class Parameters(Object):
    type: Literal["object"] = "object"
    properties: JSON = {}
    required: list[str] = []


class FunctionTool(Object):
    name: str = ""
    description: str = ""
    parameters: Annotated[Parameters, Meta(description="JSON schema of an object")] | None = None
    strict: bool = False


class ToolGrammar(Object, kw_only=True):
    definition: str
    syntax: Literal["lark", "regex"] = "lark"


class CustomFormat(Object):
    type: Literal["text", "grammar"] = "text"
    grammar: ToolGrammar | None = None


class CustomTool(Object):
    """A tool that takes a text in place of arguments."""

    name: str = ""
    description: str = ""
    format: CustomFormat | None = None


class ChatTool(Object):
    type: Literal["function", "custom"] = "function"
    function: FunctionTool | None = None
    custom: CustomTool | None = None


class Named(Object):
    name: str = ""


class ChosenTool(Object):
    type: Literal["function", "custom"] = "function"
    function: Named | None = None
    custom: Named | None = None


class AllowedTools(Object):
    mode: Literal["auto", "required"] = "auto"
    tools: list[ChosenTool] = []


class ToolChoiceBody(Object):
    type: Literal["function", "custom", "allowed_tools"] = "function"
    function: Named | None = None
    custom: Named | None = None
    allowed_tools: AllowedTools | None = None


# ---- the bodies ----


class StreamOptions(Object):
    include_usage: bool = False
    continuous_usage_stats: Annotated[bool, Meta(description="with include_usage: in each chunk")] = False


class OpenAIFields(
    RequestFields,
    unsupported=UNSUPPORTED,
    like=SamplingFields,
    names=SAMPLING_FIELDS | MAX_TOKENS | OWN_CONSTRAINTS | GUIDED,
):
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    add_special_tokens: Annotated[bool, Meta(description="to texts; default: prompts yes, conversations no")] | None = (
        None
    )
    return_token_ids: Annotated[bool, Meta(description="`prompt_token_ids` and `token_ids` of each choice")] = False
    return_tokens_as_token_ids: Annotated[bool, Meta(description="in log-probabilities: token_id:17")] = False
    return_meta_info: Annotated[bool, Meta(description="with each choice, /generate's `meta_info`")] = False
    return_hidden_states: Annotated[bool, Meta(description="the last token's, with --enable-return-hidden-states")] = (
        False
    )
    response_format: Annotated[JSON, Meta(extra_json_schema=described_as("ResponseFormat"))] | None = None
    structured_outputs: StructuredOutputs | None = None
    modalities: list[Literal["text"]] = []
    verbosity: Annotated[
        Literal["low", "medium", "high"], Meta(description="a wish that no open model was taught to read")
    ] = "medium"
    prompt_logprobs: Annotated[Any, Meta(description="not supported")] = None


class CompletionRequest(OpenAIFields, unsupported=("thinking_token_budget",), kw_only=True):
    prompt: Prompts
    suffix: str = ""
    echo: bool = False
    logprobs: TopLogprobs | None = None
    best_of: Annotated[int, Meta(ge=1)] = 1


MESSAGES = Meta(max_length=MAX_OBJECTS)
AnyMessage = Annotated[JSON, Meta(extra_json_schema=described_as("Message"))]


class Thinking(Object):
    type: Literal["enabled", "adaptive", "disabled"] = "enabled"


class ChatFields(OpenAIFields, like=SamplingFields, names={"max_completion_tokens": "max_new_tokens"}):
    """Declare the fields that a conversation is made of."""

    tools: Annotated[
        list[Annotated[JSON, Meta(extra_json_schema=described_as("ChatTool"))]], Meta(max_length=MAX_OBJECTS)
    ] = []
    tool_choice: Literal["auto", "none", "required"] | ToolChoiceBody | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Effort | None = None
    max_thinking_tokens: Annotated[Count, Meta(description="of reasoning, which is ended after so many")] | None = None
    thinking_token_budget: Annotated[Count, Meta(description="as max_thinking_tokens")] | None = None
    include_reasoning: Annotated[bool, Meta(description="false: reasoning is left out")] = True
    separate_reasoning: Annotated[bool, Meta(description="reasoning in `reasoning_content`")] = True
    stream_reasoning: Annotated[bool, Meta(description="as it comes, not when it has ended")] = True
    chat_template_kwargs: JSON = {}
    mm_processor_kwargs: (
        Annotated[MediaFields, Meta(description="how pictures and videos are read that say nothing themselves")] | None
    ) = None
    thinking: Thinking | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    messages: Annotated[list[AnyMessage], MESSAGES] = []


class ChatRequest(ChatFields, unsupported=("echo",), kw_only=True):
    messages: Annotated[list[AnyMessage], MESSAGES]
    input_ids: Annotated[list[int], Meta(description="in place of what the template makes of the messages")] | None = (
        None
    )
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0


class TokenizeRequest(ChatFields):
    """Texts, or a conversation."""

    prompt: str | list[Text] | None = None
    text: str | list[Text] | None = None


class DetokenizeRequest(Object):
    tokens: list[int | list[int]] | None = None
    skip_special_tokens: bool = True
