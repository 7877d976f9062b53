"""The half of a model that sees: transformers' own modules, without a single layer of the language model."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.checkpoint.dequantized import plain_tower
from engine.errors import ModelError
from engine.media import Image, Media
from engine.model_config import ModelConfig
from engine.vision.family import Family
from engine.vision.graphs import TowerGraphs
from engine.vision.pixels import MAX_MOVED

MAX_BATCH = 4096  # features made in one go at most, of several pictures: a GPU is busy with as many
MAX_CAPTURED = 2048  # features of a call that may have a graph: of more, the device is busy longer than the host
LARGE = 2048  # pixels in a row of a picture, and rows: more are rare, and resized by most models
PER_LAYER = ("num_kv_shared_layers", "hidden_size_per_layer_input")  # entries that mean nothing without layers
SOUND = ("audio_tower", "embed_audio")
LANGUAGE = ("language_model", "text_model")  # what a whole model calls its other half


class Tower:
    """Make features of pictures, on a thread of the caller's."""

    def __init__(self, family: Family, module: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.family, self._module, self._dtype, self._device = family, module, dtype, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arguments, self._features = partial(family.arguments, module), partial(family.features, module)
        self._graphs: TowerGraphs | None = None
        if self._stream is not None and family.is_captured:
            self._graphs = TowerGraphs(self._arguments, self._features, family.on_host)

    def encode(self, media: Sequence[Media]) -> list[torch.Tensor]:
        """Return the features of each, [1 + L, features, hidden] (see `Family.features`), wholly computed."""
        found: dict[int, torch.Tensor] = {}
        for kind in {one.kind for one in media}:
            which = [i for i, one in enumerate(media) if one.kind == kind]
            for group in [which] if self.family.joins(kind) else [[i] for i in which]:
                found |= zip(group, self._encode([media[i] for i in group]), strict=True)
        if self._stream is not None:
            self._stream.synchronize()
        return [found[i] for i in range(len(media))]

    def _encode(self, media: Sequence[Media]) -> list[torch.Tensor]:
        """Do `encode` for pictures of one kind, perhaps without waiting for the device."""
        moved = {id(one): self.family.moved(one) for one in {id(one): one for one in media}.values()}  # each once
        lens = [self.family.write(one.size).num_features for one in media]
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            joined = self.family.joined([self._on_device(moved[id(one)]) for one in media])
            if self._graphs is not None and sum(lens) <= MAX_CAPTURED:
                layers = self._graphs(joined)
            else:
                layers = self._features(self._arguments(joined))
            if layers.shape[1] != sum(lens):
                raise RuntimeError(f"the tower made {layers.shape[1]} features of pictures that have {sum(lens)}")
            found = layers.to(self._dtype).split(list(lens), dim=1)
            return [one.clone() if len(lens) > 1 else one for one in found]

    def adopt(self, other: "Tower") -> None:
        """Take over the weights of another tower of this model, which may lie on another device."""
        self._module.load_state_dict(other._module.state_dict())
        if self._stream is not None:
            torch.cuda.synchronize(self._device)

    def move_weights(self, device: torch.device | None = None) -> None:
        """Move the weights to `device`, or back to that of the model: None. Nothing may be encoded elsewhere."""
        self._module.to(device or self._device)
        if self._graphs is not None:
            self._graphs.clear()
        if self._stream is not None:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()

    def largest_bytes(self) -> int:
        """Return the bytes that large pictures take on the device beside their features. 0 on a CPU: not counted."""
        if self._stream is None:
            return 0
        large = Image(np.zeros((LARGE, LARGE, 3), np.uint8), b"")
        num_features = self.family.write(large.size).num_features
        num_pictures = max(MAX_BATCH // num_features, 1) if self.family.joins("image") else 1
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self.encode(self.family.in_context([large] * num_pictures))
        peak = torch.cuda.max_memory_allocated(self._device) - before
        torch.cuda.empty_cache()
        needed = max(peak, 2 * MAX_MOVED)  # one that is resized, and what of it is used
        if self._graphs is None:
            return needed
        return needed + peak * MAX_CAPTURED // max(num_pictures * num_features, MAX_CAPTURED)  # graphs have their own

    def _on_device(self, moved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = self.family.made(moved, self._device)
        return {name: value.to(self._dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def load_tower(
    family: Family, folder: Path, model_config: ModelConfig, load_format: str, device: torch.device
) -> Tower:
    """Load the tower of the model in `folder`, and what leads from it to the language model.

    transformers loads it, as it knows the names of old files and buffers that no file has. `ModelError` if a weight is
    missing.
    """
    import transformers

    published = family.published
    name = model_config.architectures[0] if published is None else published.model_class
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ModelError(f"transformers {transformers.__version__} has no {name}, whose tower would read pictures")
    config, dtype = family.config, model_config.dtype
    text = config.get_text_config()
    text.num_hidden_layers, text.layer_types = 0, []
    for entry in PER_LAYER:
        if hasattr(text, entry):
            setattr(text, entry, 0)
    config.quantization_config = None
    state_dict = None
    if load_format != "dummy":
        quantized = model_config.raw.get("quantization_config")
        state_dict = plain_tower(folder, quantized, dtype) if published is None else published.weights(folder)
    with _quiet_transformers():
        if load_format == "dummy":
            with torch.device(device):
                whole = model_class._from_config(config, dtype=dtype)
        else:
            whole, info = model_class.from_pretrained(
                folder if state_dict is None else None,
                config=config,
                dtype=dtype,
                state_dict=state_dict,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )
            others = (*LANGUAGE, "lm_head", *(() if published is None else published.others))
            missing = [key for key in info["missing_keys"] if not any(half in key for half in others)]
            if missing:
                raise ModelError(f"the weights in {folder} lack {', '.join(sorted(missing))}")
            for key, found, wanted in sorted(info["mismatched_keys"]):
                if not any(half in key for half in others):
                    raise ModelError(f"{key} has shape {list(found)}, the model wants {list(wanted)}")
    module = whole.model
    if published is not None:
        published.complete(module, None if load_format == "dummy" else folder, dtype)
    for part in (*LANGUAGE, *SOUND):
        if hasattr(module, part):
            setattr(module, part, None)
    family.prepare(module, device, dtype)
    return Tower(family, module.to(device).eval(), dtype, device)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers from reporting the weights that it does not read: the language model's."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
