"""The description of a model: what the engine reads of its config.json and generation_config.json.

Parsed by us rather than by transformers, whose import costs seconds at every start. `read_decoder` knows the spellings
that most families share; a family's own `read_config` calls it and says what differs.
"""

import dataclasses
import logging
import os
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.config_file import checked, read_json
from engine.errors import ModelError
from engine.rope_config import NO_ROTATION, RopeConfig, parse_rope, resolve_context_length
from engine.sampling_defaults import read_generation_defaults, read_preferred
from kernels.card import OLDEST_BFLOAT16
from kernels.routing import Routing

logger = logging.getLogger(__name__)

DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}
# Flags of CPUs, on x86 and on ARM, that multiply matrices of a dtype without converting them to float32 first.
MULTIPLIERS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16", "svebf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}
FLOAT32_MEMORY_SHARE = 0.5  # share of the memory that weights may take when they are stored larger than they must be
# Texts of tokens that end an answer, whether or not a model's files say so: the base model's end may be all they name.
TURN_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|end|>", "<|return|>", "<|call|>",
    "<end_of_turn>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|EOT|>", "[|endofturn|]", "<|endofturn|>",
    "<|user|>", "<|observation|>",
)  # fmt: skip


class QKNorm(Enum):
    """Name the norms that queries and keys pass: RMS norms, but for the last."""

    NONE = "none"
    HEADS = "heads"  # of each head, before the rotation
    UNIT_HEADS = "unit heads"  # of each head, without a weight, before or after the rotation: it changes no length
    ROTATED_HEADS = "rotated heads"  # of each head, after the rotation
    ALL_HEADS = "all heads"  # of all heads together, before the rotation
    EACH_HEAD = "each head"  # a layer norm of each head, by a weight of its own, before the rotation


@dataclass(frozen=True)
class AttentionConfig:
    """The attention of one layer; heads are the whole model's."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    scale: float  # of scores
    window: int = -1  # last tokens that a token sees, itself included; -1: all
    is_chunked: bool = False  # of its window, a token sees what comes since the last multiple of its length
    softcap: float = 0.0  # scores become softcap tanh(score / softcap); 0: they do not
    qkv_bias: bool = False
    o_bias: bool = False
    clip_qkv: float = 0.0  # queries, keys and values are clamped to at most that; 0: they are not
    qk_norm: QKNorm = QKNorm.NONE
    v_norm: bool = False  # an RMS norm of each value head, without a weight
    sees_ahead: bool = True  # tokens of a picture see those behind them, in models whose pictures do
    has_sinks: bool = False  # each head has a score of its own in the softmax's denominator
    slopes: tuple[float, ...] = ()  # what each head's scores lose with each token of distance; (): nothing
    kv_owner: int | None = None  # the layer whose keys and values this one reads, instead of having its own


@dataclass(frozen=True)
class LatentConfig(AttentionConfig):
    """Latent attention (DeepSeek-AI 2024); head_dim is that of queries and keys, the rotated part included."""

    kv_lora_rank: int = 0  # of latents
    q_lora_rank: int = 0  # of what queries are made of; 0: they are made of the hidden states
    v_head_dim: int = 0

    @property
    def qk_nope_head_dim(self) -> int:
        """The part of a query's or a key's head that is not rotated."""
        return self.head_dim - self.rope.rotary_dim


@dataclass(frozen=True)
class ExpertsConfig:
    """The mixture of experts in the place of one layer's MLP."""

    routing: Routing
    intermediate_size: int  # of an expert
    shared_size: int = 0  # of the experts that every token goes to, together; 0: there are none
    shared_scale: float = 1.0  # of what the shared experts add
    weighs_inputs: bool = False  # experts' inputs are scaled by their weights, not their outputs
    has_shared_gate: bool = False  # a sigmoid of a product of its own scales the shared experts
    has_correction: bool = False  # the choice of experts has a bias
    router_bias: bool = False
    has_bias: bool = False  # of both of an expert's products
    act: str | None = None  # the kernels' name of the experts' activation; None: by `hidden_act`

    def __post_init__(self) -> None:
        """`ModelError` if no token could be given its experts."""
        routing, groups = self.routing, self.routing.num_groups
        if not 1 <= routing.top_k <= routing.num_experts:
            raise ModelError(f"config.json: each token has {routing.top_k} of {routing.num_experts} experts")
        if self.intermediate_size < 1 or self.shared_size < 0:
            raise ModelError(f"config.json: experts of size {self.intermediate_size}, {self.shared_size} if shared")
        if groups == 1:
            return
        in_group = routing.num_experts // groups if groups > 0 and routing.num_experts % groups == 0 else 0
        least = max(routing.group_score, -(-routing.top_k // max(routing.topk_groups, 1)))
        if not 1 <= routing.topk_groups <= groups or in_group < least:
            raise ModelError(
                f"config.json: {routing.num_experts} experts cannot be chosen from the best {routing.topk_groups} of "
                f"{groups} groups, {routing.top_k} for each token"
            )


ATTENTION_FIELDS = frozenset(field.name for field in dataclasses.fields(AttentionConfig))


@dataclass(frozen=True)
class ModelConfig:
    """A decoder, as its family's `read_config` describes it, and how it is to be served, filled in by `complete`."""

    architectures: tuple[str, ...]
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    attention: tuple[AttentionConfig, ...]  # one entry a layer
    hidden_act: str
    norm_eps: float
    mlp_bias: bool
    tie_word_embeddings: bool
    raw: dict[str, Any]  # config.json with the overrides
    experts: tuple[ExpertsConfig | None, ...] = ()  # one entry a layer, None where it has an MLP; (): all have
    embed_size: int = 0  # of token vectors, where they are projected to hidden_size; 0: they are of that size
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what each branch adds to the residual stream, where the block has it
    logit_scale: float = 1.0
    lm_head_bias: bool = False
    block_kind: str = ""  # which of a family's blocks, where its models differ
    logit_softcap: float = 0.0  # logits become softcap tanh(logit / softcap); 0: they do not

    path: Path = Path()
    dtype: torch.dtype = torch.bfloat16  # of weights and activations
    context_length: int = 0  # longest prompt + answer in tokens
    eos_token_ids: tuple[int, ...] = ()
    sampling_defaults: dict[str, Any] = field(default_factory=dict)  # what requests get that do not say
    vision: str = ""  # what reads its pictures: a name of `engine.vision`; empty: it reads text alone
    pooling: str = "last"  # how a prompt becomes a vector: "last" or "mean"

    @property
    def whole_model_type(self) -> str:
        """The type of the whole model, where `model_type` is that of its language half."""
        name: str = self.raw.get("whole_model_type") or self.model_type
        return name

    @property
    def num_hidden_layers(self) -> int:
        return len(self.attention)

    @property
    def windows(self) -> tuple[int, ...]:
        return tuple(layer.window for layer in self.attention)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Each rotary embedding that some layer has, once."""
        return tuple(dict.fromkeys(layer.rope for layer in self.attention))

    @property
    def rope(self) -> RopeConfig:
        """The first layer's that rotates."""
        return next((rope for rope in self.ropes if rope.rope_type != NO_ROTATION), self.attention[0].rope)

    @property
    def is_classifier(self) -> bool:
        return any(architecture.endswith("ForSequenceClassification") for architecture in self.architectures)

    @property
    def num_labels(self) -> int:
        """Return the number of a classifier's labels.

        transformers 5 writes `id2label` alone, and leaves out its default of two.
        """
        return self.raw.get("num_labels") or len(self.raw.get("id2label") or ()) or 2

    @property
    def labels(self) -> list[str]:
        names = self.raw.get("id2label") or {}
        return [names.get(str(i), f"LABEL_{i}") for i in range(self.num_labels)]

    @property
    def is_generation(self) -> bool:
        """Return whether the model has a head for tokens."""
        return any(
            architecture.endswith(("ForCausalLM", "ForConditionalGeneration")) for architecture in self.architectures
        )

    @property
    def is_language_half(self) -> bool:
        """Return whether the checkpoint's model also reads images or sounds, of which only this decoder is run."""
        is_whole = any(architecture.endswith("ForConditionalGeneration") for architecture in self.architectures)
        return is_whole or bool(self.vision)

    @property
    def num_deep_layers(self) -> int:
        """Return the layers behind which features of pictures are added once more: the first ones (Qwen3-VL)."""
        return len((self.raw.get("vision_config") or {}).get("deepstack_visual_indexes") or ())

    @property
    def context_cost(self) -> float:
        """Return a prompt token's cost for each token that it attends to, as a share of its cost for all products.

        By multiplications, those of attention counted twice: its kernels reach about half the speed.
        """
        layer = self.attention[0]
        attention = 2 * layer.num_heads * layer.head_dim
        projections = 2 * (layer.num_heads + layer.num_kv_heads) * layer.head_dim * self.hidden_size
        return 2 * attention / (projections + 3 * self.hidden_size * self.intermediate_size)

    @property
    def embedding_size(self) -> int:
        return self.num_labels if self.is_classifier else self.hidden_size


def read_decoder(
    raw: dict[str, Any],
    *,
    windows: Sequence[int] | None = None,
    ropes: Sequence[RopeConfig] | None = None,
    **differs: Any,
) -> ModelConfig:
    """Read what most families spell alike. KeyError naming an entry that is missing.

    windows, ropes: one a layer; without windows, all layers see all. differs: fields that a family spells differently,
    those of `AttentionConfig` for all layers, or those of `ModelConfig`.
    """
    num_heads, hidden_size, num_layers = raw["num_attention_heads"], raw["hidden_size"], raw["num_hidden_layers"]
    head_dim = differs.pop("head_dim", None) or head_dim_of(raw)
    has_bias = raw.get("attention_bias", False)
    layer = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads", num_heads),
        head_dim=head_dim,
        rope=parse_rope(raw, head_dim),
        scale=head_dim**-0.5,
        qkv_bias=has_bias,
        o_bias=has_bias,
    )
    layer = replace(layer, **{name: differs.pop(name) for name in ATTENTION_FIELDS & differs.keys()})
    windows = [-1] * num_layers if windows is None else windows
    ropes = [layer.rope] * num_layers if ropes is None else ropes
    fields = {
        "architectures": tuple(raw.get("architectures") or ()),
        "model_type": raw.get("model_type", ""),
        "vocab_size": raw["vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": raw["intermediate_size"],
        "attention": tuple(replace(layer, window=windows[i], rope=ropes[i]) for i in range(num_layers)),
        "hidden_act": raw.get("hidden_act", "silu"),
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "mlp_bias": raw.get("mlp_bias", False),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "raw": raw,
    }
    return ModelConfig(**(fields | differs))


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> tuple[float, ...]:
    """Return the slopes of attention with linear biases (ALiBi, Press et al. 2022), from 1 down to 2 ** -bias_max.

    They are powers of one number for a power of two of heads. Otherwise those of the power of two below come first,
    then every other one of twice as many.
    """
    num_first = 1 << (num_heads.bit_length() - 1)
    exponents = [(i + 1) / num_first for i in range(num_first)]
    exponents += [(i + 0.5) / num_first for i in range(num_heads - num_first)]
    return tuple(2 ** (-bias_max * exponent) for exponent in exponents)


def head_dim_of(raw: dict[str, Any]) -> int:
    """Return the size of a head. KeyError naming an entry that is missing."""
    head_dim: int = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    return head_dim


def complete(model: ModelConfig, raw: dict[str, Any], folder: Path, config: EngineConfig) -> ModelConfig:
    """Return `model` with what does not depend on its family: dtype, context length, end tokens, sampling defaults."""
    generation_file = folder / "generation_config.json"
    generation = checked(read_json(generation_file), generation_file)
    own = generation if config.sampling_defaults == "model" else {}
    defaults = read_generation_defaults(own, model.vocab_size, generation_file)
    context_length = resolve_context_length(config.context_length, model.rope)
    if model.is_language_half and not model.vision:
        logger.warning("%s: only the language model is run, images and sounds are not read", model.architectures[0])
    return replace(
        model,
        path=folder,
        dtype=resolve_dtype(config, raw, folder),
        context_length=context_length,
        # A window over the whole context is none.
        attention=tuple(replace(a, window=-1) if a.window >= context_length else a for a in model.attention),
        eos_token_ids=tuple(dict.fromkeys(_ids(generation) + _ids(raw))),
        sampling_defaults=defaults | read_preferred(config.preferred_sampling_params, model.vocab_size),
        pooling=config.pooling or parse_pooling(folder),
    )


def turn_ends(known: Container[str]) -> list[str]:
    """Return the texts of the vocabulary `known` that end an answer.

    Where <|return|> does, <|end|> only ends one of an answer's messages. <|user|> does in GLM, which alone has
    <|observation|>.
    """
    excluded = {"<|end|>"} if "<|return|>" in known else set()
    excluded |= set() if "<|observation|>" in known else {"<|user|>"}
    return [text for text in TURN_ENDS if text in known and text not in excluded]


def resolve_dtype(config: EngineConfig, raw: dict[str, Any], folder: Path) -> torch.dtype:
    """Return the dtype asked for, or for "auto" the checkpoint's: bfloat16 instead of float32, float16 on old GPUs.

    For "auto" on a CPU that can only emulate that one, float32, if weights of twice the size fit: prompts are then
    computed several times faster. Not with AVX2, where `kernels.widened` multiplies them in float32 all the same. The
    rule depends on the machine alone, so that all ranks follow it alike.
    """
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    stored = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if stored not in DTYPES:
        raise ModelError(f"config.json: dtype {stored!r} is none of {', '.join(DTYPES)}: choose one with --dtype")
    dtype = torch.bfloat16 if DTYPES[stored] is torch.float32 else DTYPES[stored]
    capability = gpu_capability(config)
    if dtype is torch.bfloat16 and capability is not None and capability < OLDEST_BFLOAT16:
        logger.info("dtype float16: a GPU of compute capability %d.%d has no units for bfloat16. Should logits not be "
                    "finite, choose --dtype float32", *capability)  # fmt: skip
        return torch.float16
    flags = cpu_flags() if config.device == "cpu" else set()
    if not flags or flags & MULTIPLIERS[dtype]:
        return dtype
    name = str(dtype).removeprefix("torch.")
    if "avx2" in flags:
        logger.info("this CPU has no units for %s: weights are kept in it and multiplied in float32", name)
        return dtype
    weights_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if weights_bytes * torch.float32.itemsize // dtype.itemsize > FLOAT32_MEMORY_SHARE * memory_bytes():
        logger.warning("this CPU has no units for %s: prompts take several times as long as in float32, which has "
                       "no room here", name)  # fmt: skip
        return dtype
    logger.info("dtype float32: this CPU has no units for %s, in which prompts would take several times as long; "
                "--dtype %s takes half the memory, and makes a single answer faster", name, name)  # fmt: skip
    return torch.float32


def gpu_capability(config: EngineConfig) -> tuple[int, int] | None:
    """Return the compute capability of the GPU that `config`, resolved, is for; None for a CPU."""
    device = torch.device(config.device or "cpu")
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.cuda.is_available() else None


def cpu_flags() -> set[str]:
    """Return what the CPU can do, in Linux's words; nothing if that is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()[2:]}


def memory_bytes() -> int:
    """Return the size of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def parse_windows(raw: dict[str, Any], *, default: bool = True) -> tuple[int, ...]:
    """Return each layer's sliding window, -1: it sees all, as Mistral spells it: all layers have one, if any does.

    Only families whose layers have windows ask for them: files of others may hold a `sliding_window` as well, left by
    the model that they were made of. default: of `use_sliding_window`.
    """
    num_layers: int = raw["num_hidden_layers"]
    has_windows = raw.get("use_sliding_window", default)
    return layer_windows(raw, (True,) * num_layers) if has_windows else (-1,) * num_layers


def upper_windows(raw: dict[str, Any]) -> tuple[int, ...]:
    """Return each layer's sliding window, as Qwen2 spells it: layers from `max_window_layers` on have it, if any do."""
    num_layers: int = raw["num_hidden_layers"]
    if not raw.get("use_sliding_window", False):
        return (-1,) * num_layers
    return layer_windows(raw, [layer >= raw.get("max_window_layers", 28) for layer in range(num_layers)])


def layer_windows(raw: dict[str, Any], is_local: Sequence[bool]) -> tuple[int, ...]:
    """Return the window of each layer: `sliding_window` where `local_layers` says so."""
    window = raw.get("sliding_window")
    if not window:
        return (-1,) * len(is_local)
    return tuple(window if local else -1 for local in local_layers(raw, is_local))


def local_and_global(
    raw: dict[str, Any], period: int, local_rope: RopeConfig, global_rope: RopeConfig
) -> dict[str, Sequence[Any]]:
    """Return `windows` and `ropes` for `read_decoder`: local layers have a window and rotate in a way of their own.

    Global is, where the file does not say which layers are, the last one of every `period`.
    """
    is_local = local_layers(raw, every_nth_global(period, raw["num_hidden_layers"]))
    ropes = [local_rope if local else global_rope for local in is_local]
    return {"windows": layer_windows(raw, is_local), "ropes": ropes}


def of_each_layer(raw: dict[str, Any], name: str, num_layers: int) -> list[Any]:
    """Return the list that `raw` has under `name`, an entry a layer. `ModelError` if it has too few."""
    entries: list[Any] = raw[name]
    if len(entries) < num_layers:
        raise ModelError(f"{name} names {len(entries)} layers, num_hidden_layers is {num_layers}")
    return entries[:num_layers]


def rotated_layers(raw: dict[str, Any]) -> list[Any]:
    """Return which layers rotate: as `no_rope_layers` says, 1 for those that do, else all but each fourth or so."""
    num_layers, interval = raw["num_hidden_layers"], raw.get("no_rope_layer_interval", 4)
    if raw.get("no_rope_layers"):
        return of_each_layer(raw, "no_rope_layers", num_layers)
    return [(i + 1) % interval != 0 for i in range(num_layers)]


def local_layers(raw: dict[str, Any], default: Sequence[bool]) -> tuple[bool, ...]:
    """Return which layers are local, one a layer: as `layer_types` says, else `sliding_window_pattern`, else `default`.

    The pattern is a number n, where every n-th layer is global, or letters that repeat, such as LLLG.
    """
    num_layers = len(default)
    if raw.get("layer_types"):
        return tuple(kind == "sliding_attention" for kind in of_each_layer(raw, "layer_types", num_layers))
    pattern = raw.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern:
        return tuple(pattern[i % len(pattern)] == "L" for i in range(num_layers))
    if isinstance(pattern, int):
        return every_nth_global(pattern, num_layers)
    return tuple(default)


def every_nth_global(n: int, num_layers: int) -> tuple[bool, ...]:
    """Return which layers are local where every n-th is global; n = 0: none is."""
    return tuple(n > 0 and (i + 1) % n > 0 for i in range(num_layers))


def parse_pooling(folder: Path) -> str:
    """Return what sentence-transformers' files say; "last", the custom with decoders, if there are none."""
    return "mean" if read_json(folder / "1_Pooling" / "config.json").get("pooling_mode_mean_tokens") else "last"


def _ids(config: dict[str, Any]) -> list[int]:
    ids = config.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    return [token_id for token_id in ids if token_id >= 0]  # some files say -1 for none
