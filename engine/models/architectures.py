"""List the architectures that are served, as config.json names them: which class runs each, and which models it is.

Data, so that `radixloop models` can show it without importing torch. `engine.models.registry` reads it.
"""

from typing import Any, NamedTuple


class Served(NamedTuple):
    """Say what runs an architecture."""

    family: str  # module of this package : class; `BY_TEXT`: the language model that `text_config` describes
    note: str  # the models that have it, and what of them is left out
    vision: str = ""  # what reads pictures: a name of `engine.vision.family`; empty: only text is read


BY_TEXT = ""
FLAT_LLAVA = "llava as published"  # in a flat config.json, which says which of LLaVA's families reads
KIMI, KIMI_VIDEOS = "kimi", "kimi k2.5"
READ_VIDEOS = {  # of what reads pictures, what reads videos too
    "gemma 4", "glm", "glm 4.6", "grid", "internvl", KIMI_VIDEOS, "llava next video", "llava onevision", "plain grid",
    "smolvlm", "timed grid",
}  # fmt: skip
# What runs the language half of a model, by the model_type of its text_config.
LANGUAGE_MODELS = {
    "cohere2": "cohere:Cohere2",
    "exaone4": "exaone4:Exaone4",
    "exaone4_5_text": "exaone4:Exaone4",
    "gemma": "gemma:Gemma",
    "gemma2": "gemma:Gemma2",
    "gemma3_text": "gemma:Gemma3",
    "glm4v_moe_text": "glm_v:Glm4vMoe",
    "glm4v_text": "glm_v:Glm4v",
    "llama": "llama:Llama",
    "ministral3": "llama:Mistral",
    "mistral": "llama:Mistral",
    "phi": "phi:Phi",
    "phi3": "phi3:Phi3",
    "qwen2": "llama:Qwen2",
    "qwen3": "llama:Qwen3",
    "qwen3_moe": "moe:Qwen3Moe",
}
# Entries that files leave out of a text_config: transformers' defaults.
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "mistral": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 131072,
    },
}  # fmt: skip

ARCHITECTURES = {
    "ApertusForCausalLM": Served("apertus:Apertus", "Apertus"),
    "AquilaForCausalLM": Served("llama:Llama", "Aquila 1 and 2"),
    "ArceeForCausalLM": Served("llama:Arcee", "Arcee AFM 4.5B"),
    "BaiChuanForCausalLM": Served("baichuan:Baichuan", "Baichuan 7B and 13B"),
    "BaichuanForCausalLM": Served("baichuan:Baichuan", "Baichuan 2 7B and 13B"),
    "BloomForCausalLM": Served("bloom:Bloom", "BLOOM, BLOOMZ"),
    "ChatGLMForCausalLM": Served("chatglm:ChatGLM", "ChatGLM 2 and 3, GLM-4-9B as first published"),
    "Cohere2ForCausalLM": Served("cohere:Cohere2", "Command R7B, Command A"),
    "CohereForCausalLM": Served("cohere:Cohere", "Command-R and R+, Aya 23 and Expanse"),
    "DbrxForCausalLM": Served("dbrx:Dbrx", "DBRX"),
    "DeepseekForCausalLM": Served("deepseek:DeepseekMoe", "DeepSeek MoE 16B"),
    "DeepseekOcr2ForConditionalGeneration": Served(
        "deepseek:DeepseekMoe", "DeepSeek-OCR 2 as transformers has it", "deepseek ocr"
    ),
    "DeepseekV2ForCausalLM": Served("deepseek:DeepseekV2", "DeepSeek V2, V2-Lite, V2.5 and Coder-V2"),
    "DeepseekV32ForCausalLM": Served(
        "deepseek:DeepseekV32", "DeepSeek V3.2; without its indexer: attention is to all tokens, not to 2,048"
    ),
    "DeepseekV3ForCausalLM": Served(
        "deepseek:DeepseekV3", "DeepSeek V3, V3.1, R1, Kimi-K2; layers for several tokens at once are left out"
    ),
    "Ernie4_5_MoeForCausalLM": Served("moe:Ernie45Moe", "ERNIE 4.5 21B-A3B and 300B-A47B"),
    "Ernie4_5ForCausalLM": Served("ernie:Ernie45", "ERNIE 4.5, the dense 0.3B"),
    "Exaone4ForCausalLM": Served("exaone4:Exaone4", "EXAONE 4"),
    "Exaone4_5_ForConditionalGeneration": Served(BY_TEXT, "EXAONE 4.5 33B", "plain grid"),
    "ExaoneForCausalLM": Served("exaone3:Exaone3", "EXAONE 3 and 3.5, EXAONE Deep"),
    "FalconForCausalLM": Served("falcon:Falcon", "Falcon 7B, 11B, 40B, 180B and RW"),
    "Gemma2ForCausalLM": Served("gemma:Gemma2", "Gemma 2"),
    "Gemma3ForCausalLM": Served("gemma:Gemma3", "Gemma 3 270M and 1B"),
    "Gemma3ForConditionalGeneration": Served("gemma:Gemma3", "Gemma 3 4B to 27B, MedGemma", "gemma 3"),
    "Gemma4ForCausalLM": Served("gemma4:Gemma4", "Gemma 4, the dense ones and 26B-A4B"),
    "Gemma4ForConditionalGeneration": Served(
        "gemma4:Gemma4", "Gemma 4 E2B, E4B, the dense ones and 26B-A4B", "gemma 4"
    ),
    "GemmaForCausalLM": Served("gemma:Gemma", "Gemma 1, CodeGemma"),
    "Glm4ForCausalLM": Served("glm:Glm4", "GLM-4-0414, GLM-Z1"),
    "Glm4MoeForCausalLM": Served("moe:Glm4Moe", "GLM-4.5 to 4.7, Air; layers for several tokens at once are left out"),
    "Glm4MoeLiteForCausalLM": Served(
        "deepseek:DeepseekV3", "GLM-4.7-Flash; layers for several tokens at once are left out"
    ),
    "GlmMoeDsaForCausalLM": Served(
        "deepseek:DeepseekV32", "GLM-5; without its indexer: attention is to all tokens, not to 2,048"
    ),
    "Glm4vForConditionalGeneration": Served("glm_v:Glm4v", "GLM-4.1V", "glm"),
    "Glm4vMoeForConditionalGeneration": Served("glm_v:Glm4vMoe", "GLM-4.5V", "glm"),
    "Glm46VForConditionalGeneration": Served(BY_TEXT, "GLM-4.6V", "glm 4.6"),
    "GlmForCausalLM": Served("glm:Glm", "GLM-4-9B, GLM-Edge"),
    "GlmOcrForConditionalGeneration": Served("glm_v:GlmOcr", "GLM-OCR", "glm 4.6"),
    "GPT2ForCausalLM": Served("gpt2:GPT2", "GPT-2"),
    "GPTNeoXForCausalLM": Served("gpt_neox:GPTNeoX", "GPT-NeoX 20B, Pythia, Dolly, RedPajama-INCITE"),
    "GptOssForCausalLM": Served("gpt_oss:GptOss", "gpt-oss 20b and 120b, in MXFP4 or bf16"),
    "GraniteForCausalLM": Served("granite:Granite", "Granite 3, the dense ones"),
    "GraniteMoeForCausalLM": Served("moe:GraniteMoe", "Granite 3, 1B-A400M and 3B-A800M"),
    "GraniteMoeSharedForCausalLM": Served("moe:GraniteMoe", "Granite 4 previews with a shared expert"),
    "Grok1ForCausalLM": Served("grok:Grok", "Grok 1, Grok 2 up to 1,024 tokens; from files that are not cut for ranks"),
    "HeliumForCausalLM": Served("ernie:Helium", "Helium 1"),
    "HunYuanDenseV1ForCausalLM": Served("hunyuan:HunYuan", "Hunyuan 0.5B to 7B"),
    "HunYuanMoEV1ForCausalLM": Served("moe:HunYuanMoe", "Hunyuan-A13B"),
    "Idefics3ForConditionalGeneration": Served(BY_TEXT, "Idefics 3, SmolVLM 1", "idefics 3"),
    "InternLM2ForCausalLM": Served("internlm:InternLM2", "InternLM 2 and 2.5"),
    "InternLM3ForCausalLM": Served("internlm:InternLM3", "InternLM 3"),
    "InternLMForCausalLM": Served("internlm:InternLM", "InternLM 1"),
    "InternVLForConditionalGeneration": Served(BY_TEXT, "InternVL 2.5 to 3.5 as transformers has it", "internvl"),
    "KimiK25ForConditionalGeneration": Served("deepseek:DeepseekV3", "Kimi K2.5 and K2.6", KIMI_VIDEOS),
    "KimiVLForConditionalGeneration": Served("deepseek:DeepseekV3", "Kimi-VL-A3B, Thinking too", KIMI),
    "LightOnOcrForConditionalGeneration": Served(BY_TEXT, "LightOnOCR 1 and 2", "lighton ocr"),
    "Llama4ForCausalLM": Served("llama4:Llama4", "Llama 4 Scout and Maverick"),
    "Llama4ForConditionalGeneration": Served("llama4:Llama4", "Llama 4 Scout and Maverick; text only"),
    "LlamaForCausalLM": Served(
        "llama:Llama",
        "Llama 1 to 3.3, and its likes: SmolLM 1 and 2, DeepSeek LLM, Yi, TinyLlama, Vicuna, Falcon 3, ...",
    ),
    "LlavaLlamaForCausalLM": Served("llama:Llama", "LLaVA 1.5 to NeXT as its authors publish it, Yi-VL", FLAT_LLAVA),
    "LlavaMistralForCausalLM": Served("llama:Mistral", "LLaVA 1.6 Mistral as its authors publish it", FLAT_LLAVA),
    "LlavaQwenForCausalLM": Served(
        "llama:Qwen2", "LLaVA-NeXT with Qwen, OneVision (its videos too), as their authors publish them", FLAT_LLAVA
    ),
    "LlavaForConditionalGeneration": Served(BY_TEXT, "LLaVA 1.5 and its likes, Pixtral 12B", "llava"),
    "LlavaNextForConditionalGeneration": Served(BY_TEXT, "LLaVA 1.6 (NeXT)", "llava next"),
    "LlavaNextVideoForConditionalGeneration": Served(BY_TEXT, "LLaVA-NeXT-Video", "llava next video"),
    "LlavaOnevisionForConditionalGeneration": Served(BY_TEXT, "LLaVA-OneVision", "llava onevision"),
    "MiMoForCausalLM": Served("llama:MiMo", "MiMo 7B; its layers for several tokens at once are left out"),
    "MiniCPM3ForCausalLM": Served("minicpm:MiniCPM3", "MiniCPM 3"),
    "MiniCPMForCausalLM": Served("minicpm:MiniCPM", "MiniCPM 1, 2 and 4, the dense ones"),
    "MiniMaxM2ForCausalLM": Served("moe:MiniMaxM2", "MiniMax M2"),
    "Ministral3ForCausalLM": Served("llama:Mistral", "Ministral 3"),
    "MinistralForCausalLM": Served("llama:Mistral", "Ministral 8B"),
    "Mistral3ForConditionalGeneration": Served(BY_TEXT, "Mistral Small 3.1, 3.2, Ministral 3", "pixtral"),
    "MistralForCausalLM": Served("llama:Mistral", "Mistral 7B, Nemo, Small 3, Large 2, Codestral, Zephyr"),
    "MixtralForCausalLM": Served("moe:Mixtral", "Mixtral 8x7B and 8x22B"),
    "MptForCausalLM": Served("mpt:Mpt", "MPT 7B and 30B"),
    "NemotronForCausalLM": Served("nemotron:Nemotron", "Nemotron-4 and Minitron"),
    "Olmo2ForCausalLM": Served("olmo2:Olmo2", "OLMo 2"),
    "Olmo3ForCausalLM": Served("olmo2:Olmo3", "OLMo 3"),
    "OlmoeForCausalLM": Served("moe:Olmoe", "OLMoE"),
    "OlmoForCausalLM": Served("olmo:Olmo", "OLMo 1"),
    "OPTForCausalLM": Served("opt:OPT", "OPT, Galactica"),
    "OrionForCausalLM": Served("stablelm:Orion", "Orion 14B"),
    "PaddleOCRVLForConditionalGeneration": Served("qwen_vl:PaddleOCR", "PaddleOCR-VL", "paddle ocr"),
    "Phi3ForCausalLM": Served("phi3:Phi3", "Phi-3 mini and medium, Phi-3.5-mini, Phi-4, Phi-4-mini"),
    "PhiForCausalLM": Served("phi:Phi", "Phi-1, 1.5 and 2"),
    "PhiMoEForCausalLM": Served("phi_moe:PhiMoe", "Phi-3.5-MoE"),
    "QianfanOCRForConditionalGeneration": Served(BY_TEXT, "Qianfan-OCR as transformers has it", "qianfan ocr"),
    "Qwen2_5_VLForConditionalGeneration": Served("qwen_vl:Qwen2VL", "Qwen2.5-VL", "grid"),
    "Qwen2ForCausalLM": Served("llama:Qwen2", "Qwen 1.5 to 2.5, the dense ones; QwQ, DeepSeek-R1-Distill-Qwen"),
    "Qwen2MoeForCausalLM": Served("moe:Qwen2Moe", "Qwen1.5-MoE, Qwen2-57B-A14B"),
    "Qwen2VLForConditionalGeneration": Served("qwen_vl:Qwen2VL", "Qwen2-VL, QVQ", "grid"),
    "Qwen3ForCausalLM": Served("llama:Qwen3", "Qwen 3, the dense ones; Qwen3-Embedding and -Reranker"),
    "Qwen3MoeForCausalLM": Served("moe:Qwen3Moe", "Qwen3-30B-A3B, 235B-A22B and Coder"),
    "Qwen3VLForConditionalGeneration": Served("qwen_vl:Qwen3VL", "Qwen3-VL, the dense ones", "timed grid"),
    "Qwen3VLMoeForConditionalGeneration": Served("qwen_vl:Qwen3VLMoe", "Qwen3-VL-30B-A3B and 235B-A22B", "timed grid"),
    "QWenForCausalLM": Served("qwen1:Qwen1", "Qwen 1"),
    "SeedOssForCausalLM": Served("llama:SeedOss", "Seed-OSS 36B"),
    "SkyworkForCausalLM": Served("llama:Llama", "Skywork 13B"),
    "SmolLM3ForCausalLM": Served("smollm3:SmolLM3", "SmolLM3"),
    "SmolVLMForConditionalGeneration": Served(BY_TEXT, "SmolVLM 2", "smolvlm"),
    "StableLmForCausalLM": Served("stablelm:StableLM", "StableLM 2, StableLM 3B, Stable Code"),
    "Starcoder2ForCausalLM": Served("starcoder2:Starcoder2", "StarCoder2"),
    "XverseForCausalLM": Served("llama:Llama", "XVERSE, the dense ones"),
    "YiForCausalLM": Served("llama:Yi", "Yi of the first release"),
    "YoutuForCausalLM": Served("deepseek:Youtu", "Youtu-LLM"),
}  # fmt: skip
# Other names of the same, among them those that do not end as a model's with a head for tokens does.
ALIASES = {
    "ChatGLMForConditionalGeneration": "ChatGLMForCausalLM",
    "ChatGLMModel": "ChatGLMForCausalLM",
    "Gemma3TextForCausalLM": "Gemma3ForCausalLM",
    "Gemma4TextForCausalLM": "Gemma4ForCausalLM",
    "GPT2LMHeadModel": "GPT2ForCausalLM",
    "Kimi_K25ForConditionalGeneration": "KimiK25ForConditionalGeneration",
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "Llama4TextForCausalLM": "Llama4ForCausalLM",
    "MPTForCausalLM": "MptForCausalLM",
    "Grok1ModelForCausalLM": "Grok1ForCausalLM",
    "PhimoeForCausalLM": "PhiMoEForCausalLM",
    "QWenLMHeadModel": "QWenForCausalLM",
    "RWForCausalLM": "FalconForCausalLM",
    "StableLMEpochForCausalLM": "StableLmForCausalLM",
    "YiVLForCausalLM": "LlavaLlamaForCausalLM",
}

# What is left out, and what would do.
ITS_SIZE = "Qwen2.5-VL 3B, Qwen3-VL 4B, Gemma 3 4B and SmolVLM 2 read images and are of about its size"
REFUSED = {
    "MllamaForConditionalGeneration": "its layers attend to images apart from the text; Qwen2.5-VL does not",
    "Phi3VForCausalLM": f"transformers has no class that sees as Phi-3.5-vision does; {ITS_SIZE}",
    "Phi4MMForCausalLM": f"its weights change with what a prompt shows, by LoRA; {ITS_SIZE}",
    "Phi4MultimodalForCausalLM": f"its weights change with what a prompt shows, by LoRA; {ITS_SIZE}",
}
# Entries of config.json, one of which the models have that read images.
IMAGE_ENTRIES = ("img_processor", "mm_vision_tower", "vision_config", "vision_tower", "visual")


HEADS = "Of each, ...ForSequenceClassification and a bare ...Model are served as well: they classify and embed."


def notes() -> dict[str, str]:
    """Return the note on each architecture, its other names included."""
    of_each: dict[str, str] = {}
    for name, served in ARCHITECTURES.items():
        others = [alias for alias, own in ALIASES.items() if own == name]
        seen = "images and videos" if served.vision in READ_VIDEOS else "images"
        note = f"{served.note}; reads {seen}" if served.vision else served.note
        of_each[name] = f"{note} (also {', '.join(others)})" if others else note
    return of_each


def describe() -> str:
    """Return what `radixloop models` prints: each architecture with its note."""
    width = max(map(len, notes()))
    return "\n".join([*(f"{name:<{width}}  {note}" for name, note in notes().items()), HEADS])
