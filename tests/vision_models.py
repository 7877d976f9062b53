"""Tiny random models that read pictures, of transformers' own classes, with their processors and one tokenizer."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from engine.media import Image, Video
from tests.conftest import VOCAB_SIZE, randomize_constants, save_tokenizer

NUM_TOKENS = VOCAB_SIZE + 16
# Special tokens that the families' prompts have; the tokenizer is the same for all.
PICTURE_TOKENS = (
    "<image>", "<|vision_start|>", "<|vision_end|>", "<video>", "[IMG_BREAK]", "[IMG_END]", "<img>", "</img>",
    "<fake_token_around_image>", "<global-img>", "<|media_pad|>", "<|kimi_k25_video_placeholder|>",
)  # fmt: skip
IMAGE, VISION_START, VISION_END, VIDEO = range(VOCAB_SIZE, VOCAB_SIZE + 4)
# What transformers calls a language model's layers when it saves some models: their towers' names, reached too far.
WRONG = re.compile(r"(language_model\.model\.)(blocks|encoder\.layers)")
MEDIA_PAD = VOCAB_SIZE + PICTURE_TOKENS.index("<|media_pad|>")
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": NUM_TOKENS,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


CLIP = VIT | {"model_type": "clip_vision_model", "num_hidden_layers": 3, "image_size": 28, "patch_size": 7}
PIXTRAL = VIT | {"model_type": "pixtral", "image_size": 64, "patch_size": 8, "head_dim": 16}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
IDEFICS: tuple[dict[str, Any], str, dict[str, Any]] = (
    {
        "vision_config": VIT | {"image_size": 32, "patch_size": 8},
        "text_config": TEXT | {"model_type": "llama"},
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "tie_word_embeddings": False,
    },
    "Idefics3ImageProcessorPil",
    {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
)
QWEN_VIT = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "patch_size": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
HALF_ROTATED = {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
GLM_VIT = QWEN_VIT | {"out_hidden_size": 64, "image_size": 32}
GLM_PROCESSING = {"patch_size": 4, "size": {"shortest_edge": 8 * 8, "longest_edge": 2 * 64 * 48}}
QWEN_VL = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": False,
}
QWEN_PROCESSING = {"patch_size": 4, "min_pixels": 8 * 8, "max_pixels": 64 * 48}


@dataclass(frozen=True)
class TinyFamily:
    """Say what a tiny model of a family is made of: transformers' names, and what the config sets."""

    model: str
    config: str
    settings: dict[str, Any]
    processor: str  # of images; empty: it is ours
    processing: dict[str, Any]


GEMMA_4_PROCESSOR = ("Gemma4ImageProcessorPil", {"patch_size": 4, "pooling_kernel_size": 3, "max_soft_tokens": 70})


def gemma_4(bidirectional: str | None, **text: Any) -> dict[str, Any]:
    """Return the settings of a tiny Gemma 4. bidirectional: config.json's use_bidirectional_attention."""
    sizes = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 80,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": NUM_TOKENS,
        "use_bidirectional_attention": bidirectional,
        "tie_word_embeddings": False,
    }
    return {
        "vision_config": VIT
        | {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 3,
            "position_embedding_size": 256,
        },
        "text_config": TEXT | sizes | text,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "boi_token_id": VISION_START,
        "eoi_token_id": VISION_END,
        "tie_word_embeddings": False,
    }


FAMILIES = {
    "llava": TinyFamily(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": CLIP,
            "text_config": TEXT | {"model_type": "llama"},
            "image_token_index": IMAGE,
        },
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
    ),
    "llava next": TinyFamily(
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        {
            "vision_config": CLIP,
            "text_config": TEXT | {"model_type": "mistral", "sliding_window": None},
            "image_token_index": IMAGE,
            "image_grid_pinpoints": PINPOINTS,
        },
        "LlavaNextImageProcessorPil",
        {
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
            "image_grid_pinpoints": PINPOINTS,
        },
    ),
    "llava next video": TinyFamily(
        "LlavaNextVideoForConditionalGeneration",
        "LlavaNextVideoConfig",
        {
            "vision_config": CLIP,
            "text_config": TEXT | {"model_type": "llama"},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": PINPOINTS,
        },
        "LlavaNextImageProcessorPil",
        {
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
            "image_grid_pinpoints": PINPOINTS,
        },
    ),
    "llava onevision": TinyFamily(
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        {
            "vision_config": VIT | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7},
            "text_config": TEXT | {"model_type": "qwen2"},
            "image_token_index": IMAGE,
            "video_token_index": VIDEO,
            "image_grid_pinpoints": [*PINPOINTS, [112, 112]],
            "tie_word_embeddings": False,
        },
        "LlavaOnevisionImageProcessorPil",
        {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": [*PINPOINTS, [112, 112]]},
    ),
    "pixtral": TinyFamily(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": PIXTRAL,
            "text_config": TEXT | {"model_type": "mistral", "sliding_window": None},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        "PixtralImageProcessorPil",
        {"size": {"longest_edge": 48}, "patch_size": {"height": 8, "width": 8}},
    ),
    "mistral small 3.1": TinyFamily(
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "vision_config": PIXTRAL,
            "text_config": TEXT | {"model_type": "mistral", "sliding_window": None},
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        "PixtralImageProcessorPil",
        {"size": {"longest_edge": 48}, "patch_size": {"height": 8, "width": 8}},
    ),
    "internvl": TinyFamily(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "vision_config": VIT | {"image_size": [28, 28], "patch_size": [7, 7]},
            "text_config": TEXT | {"model_type": "qwen2"},
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        "GotOcr2ImageProcessorPil",
        {"size": {"height": 28, "width": 28}, "crop_to_patches": True, "max_patches": 4},
    ),
    "idefics 3": TinyFamily("Idefics3ForConditionalGeneration", "Idefics3Config", *IDEFICS),
    "smolvlm": TinyFamily(
        "SmolVLMForConditionalGeneration", "SmolVLMConfig", IDEFICS[0], "SmolVLMImageProcessorPil", IDEFICS[2]
    ),
    "gemma 3": TinyFamily(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "vision_config": VIT | {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
            "text_config": TEXT
            | {
                "num_hidden_layers": 3,
                "query_pre_attn_scalar": 16,
                "sliding_window": 12,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": VISION_START,
            "eoi_token_index": VISION_END,
            "tie_word_embeddings": False,
        },
        "Gemma3ImageProcessorPil",
        {"size": {"height": 32, "width": 32}},
    ),
    "gemma 4": TinyFamily("Gemma4ForConditionalGeneration", "Gemma4Config", gemma_4("vision"), *GEMMA_4_PROCESSOR),
    "gemma 4 E2B": TinyFamily(
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        gemma_4(None, hidden_size_per_layer_input=8, num_kv_shared_layers=1),
        *GEMMA_4_PROCESSOR,
    ),
    "glm ocr": TinyFamily(
        "GlmOcrForConditionalGeneration",
        "GlmOcrConfig",
        {
            "vision_config": GLM_VIT,
            "text_config": TEXT
            | {"head_dim": 32, "rope_parameters": ROPE | {"mrope_section": [4, 6, 6]}, "pad_token_id": 0},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "tie_word_embeddings": False,
        },
        "Glm46VImageProcessorPil",
        GLM_PROCESSING,
    ),
    "glm 4.6v": TinyFamily(
        "Glm46VForConditionalGeneration",
        "Glm46VConfig",
        {
            "vision_config": GLM_VIT,
            "text_config": TEXT | {"rope_parameters": ROPE | HALF_ROTATED, "pad_token_id": 0},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "tie_word_embeddings": False,
        },
        "Glm46VImageProcessorPil",
        GLM_PROCESSING,
    ),
    "paddle ocr": TinyFamily(
        "PaddleOCRVLForConditionalGeneration",
        "PaddleOCRVLConfig",
        {
            "vision_config": VIT | {"image_size": 32, "patch_size": 4},
            "text_config": TEXT | {"rope_parameters": ROPE},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "tie_word_embeddings": False,
        },
        "PaddleOCRVLImageProcessorPil",
        {"patch_size": 4, "min_pixels": 8 * 8, "max_pixels": 64 * 48},
    ),
    "lighton ocr": TinyFamily(
        "LightOnOcrForConditionalGeneration",
        "LightOnOcrConfig",
        {
            "vision_config": PIXTRAL,
            "text_config": TEXT | {"model_type": "qwen3"},
            "image_token_id": IMAGE,
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
        },
        "PixtralImageProcessorPil",
        {"size": {"longest_edge": 48}, "patch_size": {"height": 8, "width": 8}},
    ),
    "qianfan ocr": TinyFamily(
        "QianfanOCRForConditionalGeneration",
        "QianfanOCRConfig",
        {
            "vision_config": VIT | {"image_size": [28, 28], "patch_size": [7, 7]},
            "text_config": TEXT | {"model_type": "qwen3"},
            "image_token_id": VIDEO,
            "tie_word_embeddings": False,
        },
        "GotOcr2ImageProcessorPil",
        {"size": {"height": 28, "width": 28}, "max_patches": 4},
    ),
    "exaone 4.5": TinyFamily(
        "Exaone4_5_ForConditionalGeneration",
        "Exaone4_5_Config",
        {
            "vision_config": QWEN_VIT
            | {"num_key_value_heads": 1, "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 16},
            "text_config": TEXT
            | {"model_type": "exaone4", "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "tie_word_embeddings": False,
        },
        "Qwen2VLImageProcessorPil",
        QWEN_PROCESSING,
    ),
    "deepseek ocr": TinyFamily(
        "DeepseekOcr2ForConditionalGeneration",
        "DeepseekOcr2Config",
        {
            "vision_config": {
                "sam_config": VIT
                | {
                    "image_size": 64,
                    "patch_size": 8,
                    "output_channels": 16,
                    "downsample_channels": [24, 32],
                    "window_size": 4,
                    "global_attn_indexes": [1],
                    "mlp_dim": 48,
                },
                "encoder_config": VIT | {"num_key_value_heads": 2},
            },
            "text_config": {name: value for name, value in TEXT.items() if name != "head_dim"}
            | {
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "n_shared_experts": 1,
                "mlp_layer_types": ["dense", "sparse"],
            },
            "image_token_id": IMAGE,
            "tie_word_embeddings": False,
        },
        "DeepseekOcr2ImageProcessorPil",
        {"size": {"height": 64, "width": 64}, "tile_size": 64, "max_patches": 3},
    ),
    "kimi k2.5": TinyFamily(
        "Kimi_K25ForConditionalGeneration",
        "Kimi_K25Config",
        {
            "vision_config": VIT | {"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8},
            "text_config": {name: value for name, value in TEXT.items() if name != "head_dim"}
            | {
                "model_type": "deepseek_v3",
                "num_key_value_heads": 4,
                "q_lora_rank": 24,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "n_shared_experts": 1,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
            },
            "projection_hidden_size": 32,
            "image_token_id": MEDIA_PAD,
            "video_token_id": VIDEO,
            "tie_word_embeddings": False,
        },
        "",
        {"media_proc_cfg": {"in_patch_limit": 150, "patch_limit_on_one_side": 16, "patch_size": 4}},
    ),
    "qwen 2 vl": TinyFamily(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        QWEN_VL
        | {
            "vision_config": {"embed_dim": 32, "hidden_size": 64, "depth": 2, "num_heads": 2, "patch_size": 4},
            "text_config": TEXT | {"rope_parameters": ROPE},
        },
        "Qwen2VLImageProcessorPil",
        QWEN_PROCESSING,
    ),
    "qwen 2.5 vl": TinyFamily(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        QWEN_VL
        | {
            "vision_config": QWEN_VIT
            | {"out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 16, "tokens_per_second": 2},
            "text_config": TEXT | {"rope_parameters": ROPE},
        },
        "Qwen2VLImageProcessorPil",
        QWEN_PROCESSING,
    ),
    "glm 4.1v": TinyFamily(
        "Glm4vForConditionalGeneration",
        "Glm4vConfig",
        {
            "vision_config": GLM_VIT,
            "text_config": TEXT | {"rope_parameters": ROPE | HALF_ROTATED, "pad_token_id": 0},
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "tie_word_embeddings": False,
        },
        "Glm4vImageProcessorPil",
        GLM_PROCESSING,
    ),
    "glm 4.5v": TinyFamily(
        "Glm4vMoeForConditionalGeneration",
        "Glm4vMoeConfig",
        {
            "vision_config": GLM_VIT,
            "text_config": TEXT
            | {
                "rope_parameters": ROPE | HALF_ROTATED,
                "pad_token_id": 0,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "n_shared_experts": 1,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
            },
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "tie_word_embeddings": False,
        },
        "Glm4vImageProcessorPil",
        GLM_PROCESSING,
    ),
    "qwen 3 vl": TinyFamily(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        QWEN_VL
        | {
            "vision_config": QWEN_VIT
            | {"out_hidden_size": 64, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
            "text_config": TEXT | {"num_hidden_layers": 3, "rope_parameters": ROPE | {"mrope_interleaved": True}},
        },
        "Qwen2VLImageProcessorPil",
        QWEN_PROCESSING,
    ),
    "qwen 3 vl with experts": TinyFamily(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        QWEN_VL
        | {
            "vision_config": QWEN_VIT
            | {"out_hidden_size": 64, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
            "text_config": TEXT
            | {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "rope_parameters": ROPE | {"mrope_interleaved": True},
            },
        },
        "Qwen2VLImageProcessorPil",
        QWEN_PROCESSING,
    ),
}


def picture(height: int, width: int, seed: int = 0) -> Image:
    """Return a picture of coarse random patches: every part of it is seen."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8)
    pixels = np.ascontiguousarray(np.kron(coarse, np.ones((4, 4, 1), np.uint8))[:height, :width])
    return Image(pixels, hashlib.sha256(f"image {pixels.shape}".encode() + pixels.tobytes()).digest())


def video(num_frames: int, height: int, width: int, seed: int = 0) -> Video:
    """Return a video of so many pictures, one every half a second."""
    frames = np.stack([picture(height, width, 100 * seed + i).pixels for i in range(num_frames)])
    digest = hashlib.sha256(f"video {frames.shape}".encode() + frames.tobytes()).digest()
    return Video(frames, tuple(i / 2 for i in range(num_frames)), digest)


def make_vision_model(folder: Path, family: str) -> Path:
    """Write a random model of `family` into `folder`, in float32."""
    import transformers

    its = FAMILIES[family]
    save_tokenizer(folder, PICTURE_TOKENS)
    config = getattr(transformers, its.config)(**its.settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, its.model)(config).to(torch.float32)
        randomize_constants(model)
        for tensor in model.parameters():
            if tensor.dim() > 1:  # whatever a class starts them with: answers vary, and pictures count
                torch.nn.init.normal_(tensor, std=0.2)
        with torch.no_grad():
            model.lm_head.weight[IMAGE : IMAGE + len(PICTURE_TOKENS)] = 0.0  # no answer has them
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    if wrong := [name for name in weights if WRONG.search(name)]:
        weights |= {WRONG.sub(r"\1layers", name): weights.pop(name) for name in wrong}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    if its.processor:
        getattr(transformers, its.processor)(**its.processing).save_pretrained(folder)
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(its.processing))
    return folder
