"""The names of the formats in which models reason and call tools, for --help, which should not wait for the parsers."""

REASONING_NAMES = (
    "deepseek-r1", "deepseek-v3", "glm45", "gpt-oss", "hunyuan", "kimi", "kimi_k2", "mistral", "qwen3",
    "qwen3-thinking", "seed_oss", "step3",
)  # fmt: skip
REASONING_ALIASES = {  # vLLM's spellings
    "deepseek_r1": "deepseek-r1",
    "deepseek_v3": "deepseek-v3",
    "hunyuan_a13b": "hunyuan",
    "openai_gptoss": "gpt-oss",
}
TOOL_NAMES = (
    "deepseekv3", "deepseekv31", "glm45", "gpt-oss", "granite", "hunyuan", "kimi_k2", "llama3", "minimax-m2",
    "mistral", "mistral_v11", "pythonic", "qwen25", "qwen3_coder", "seed_oss",
)  # fmt: skip
TOOL_ALIASES = {  # other spellings, SGLang's and vLLM's
    "deepseek_v3": "deepseekv3",
    "deepseek_v31": "deepseekv31",
    "glm": "glm45",
    "glm47": "glm45",
    "hermes": "qwen25",
    "hunyuan_a13b": "hunyuan",
    "llama3_json": "llama3",
    "llama4_pythonic": "pythonic",
    "minimax_m2": "minimax-m2",
    "openai": "gpt-oss",
    "phi4_mini_json": "granite",
    "qwen": "qwen25",
    "qwen3_xml": "qwen3_coder",
}
