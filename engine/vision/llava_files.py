"""Read LLaVA as its authors publish it: a flat config.json, and a tower in the model's files or in a folder of its own.

LLaVA 1.5, 1.6, NeXT and OneVision, Yi-VL. transformers has classes for all of them; here a folder becomes the config,
the image processor and the weights that such a class takes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint.hub import CONFIG_FILES, WEIGHT_FILES, download
from engine.checkpoint.weights import checkpoint_files, tensors_of
from engine.config import EngineConfig
from engine.config_file import read_json
from engine.errors import ModelError, shown
from engine.vision.family import NO_TEXT

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
NAMES = {  # of transformers' classes, by what runs them in engine.vision.families
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", "LlavaImageProcessorPil"),
    "llava next": ("LlavaNextForConditionalGeneration", "LlavaNextConfig", "LlavaNextImageProcessorPil"),
    "llava onevision": (
        "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig", "LlavaOnevisionImageProcessorPil",
    ),
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip
# Towers that most models have in their own files: no other folder is looked for.
TOWERS = {
    "clip-vit-large-patch14": CLIP | {"image_size": 224},
    "clip-vit-large-patch14-336": CLIP | {"image_size": 336},
    "siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "patch_size": 14, "image_size": 384,
    },
}  # fmt: skip
HALVES = [0.5, 0.5, 0.5]
IN_MODEL = re.compile(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)")
IN_TOWER = re.compile(r"(?:vision_model\.)?(.+)")
PROJECTOR = re.compile(r"(?:model\.)?mm_projector\.(.+)")
NEWLINE = re.compile(r"(?:model\.)?(image_newline)")


class LlavaFiles:
    """See `engine.vision.family.Published`."""

    token_text: Mapping[str, str] = PLACEHOLDERS
    others: tuple[str, ...] = ("multi_modal_projector",)

    def __init__(
        self, folder: Path, raw: Mapping[str, Any], config: EngineConfig, token_id: Callable[[str], int | None]
    ) -> None:
        """raw: the entries of config.json. token_id: of a text, None if it is no token.

        `ModelError` if the tower cannot be found, or if what config.json describes is not served.
        """
        import transformers

        if not isinstance(raw.get("mm_vision_tower"), str):
            raise ModelError(f"config.json: mm_vision_tower must name a tower, got {shown(raw.get('mm_vision_tower'))}")
        self._raw, self._config, self._tower_name = raw, config, raw["mm_vision_tower"]
        self.kind = kind_of(raw)
        vision = self._vision_config(folder)
        # Negative: there is no such token, and places are found without one.
        ids = {kind: token_id(text) for kind, text in PLACEHOLDERS.items()}
        ids = {kind: -1 - i if found is None else found for i, (kind, found) in enumerate(ids.items())}
        self.model_class, config_class, processor_class = NAMES[self.kind]
        self.config = getattr(transformers, config_class)(
            vision_config=vision,
            text_config=NO_TEXT | {"hidden_size": raw["hidden_size"]},
            image_token_index=ids["image"],
            projector_hidden_act="gelu",
            **self._choice_of_features(vision),
            **({} if self.kind == "llava" else {"image_grid_pinpoints": pinpoints_of(raw)}),
            **(
                {"video_token_index": ids["video"], "vision_aspect_ratio": raw["image_aspect_ratio"]}
                if self.kind == "llava onevision"
                else {}
            ),
        )
        processing = self._processing(folder, vision)
        self.processor = getattr(transformers, processor_class)(**processing)
        self.video_config: Mapping[str, Any] = processing | {"do_center_crop": False}

    def _vision_config(self, folder: Path) -> Any:
        """Return the config of the tower, as much of it as is run."""
        from transformers import AutoConfig

        name = Path(self._tower_name).name
        if (local := local_tower(self._tower_name, folder)) is None and name in TOWERS:
            config = AutoConfig.for_model(**TOWERS[name])
        else:
            tower = local or self._fetch(CONFIG_FILES)
            try:
                config = AutoConfig.from_pretrained(tower)
            except (OSError, ValueError) as error:
                raise ModelError(f"{tower} does not say what the tower is: {shown(str(error))}") from None
            config = getattr(config, "vision_config", config)
        if config.model_type == "siglip_vision_model":  # LLaVA's authors drop what is above the chosen layer
            config.num_hidden_layers -= 1
            config.vision_use_head = False
        elif config.model_type != "clip_vision_model":
            raise ModelError(f"a tower of type {config.model_type} is not served, only CLIP's and SigLIP's")
        return config

    def _fetch(self, patterns: Sequence[str]) -> Path:
        """Return the folder of the tower, which is not on this machine, or in the hub's cache."""
        try:
            return download(self._tower_name, self._config.replace(revision=None), patterns)
        except ModelError as error:
            raise ModelError(
                f"config.json's mm_vision_tower is not to be had: {error}. Say where it is with "
                """--json-model-override-args '{"mm_vision_tower": "/folder/of/the/tower"}'"""
            ) from error

    def _choice_of_features(self, vision: Any) -> dict[str, Any]:
        """Return which of the tower's features are used."""
        if vision.model_type == "siglip_vision_model":
            return {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        strategies = {"patch": "default", "cls_patch": "full"}
        chosen = self._raw.get("mm_vision_select_feature", "patch")
        if chosen not in strategies:
            raise ModelError(
                f"config.json: mm_vision_select_feature {shown(chosen)} is none of {', '.join(strategies)}"
            )
        return {
            "vision_feature_layer": self._raw.get("mm_vision_select_layer", -2),
            "vision_feature_select_strategy": strategies[chosen],
        }

    def _processing(self, folder: Path, vision: Any) -> dict[str, Any]:
        """Return the entries of the image processor."""
        side, is_siglip = vision.image_size, vision.model_type == "siglip_vision_model"
        entries: dict[str, Any] = {"image_mean": HALVES, "image_std": HALVES} if is_siglip else {}
        if (tower := local_tower(self._tower_name, folder)) is not None:
            file = read_json(tower / "preprocessor_config.json")
            entries |= {name: file[name] for name in ("image_mean", "image_std") if file.get(name)}
        is_square = is_siglip or self.kind == "llava onevision"
        entries["size"] = {"height": side, "width": side} if is_square else {"shortest_edge": side}
        if self.kind == "llava":
            entries |= {"do_pad": self._raw.get("image_aspect_ratio") == "pad", "do_center_crop": not is_siglip}
        else:
            entries["image_grid_pinpoints"] = pinpoints_of(self._raw)
        return entries | {"crop_size": {"height": side, "width": side}}

    def weights(self, folder: Path) -> dict[str, torch.Tensor]:
        """Return the weights of the tower, and of the end of a row of tiles, by the names of transformers' files."""
        files = checkpoint_files(folder)
        found = {f"vision_tower.vision_model.{name}": one for name, one in tensors_of(files, IN_MODEL).items()}
        if not found:
            tower = local_tower(self._tower_name, folder) or self._fetch(CONFIG_FILES + WEIGHT_FILES)
            weights = tensors_of(checkpoint_files(tower), IN_TOWER)
            found = {f"vision_tower.vision_model.{name}": one for name, one in weights.items()}
        return found | tensors_of(files, NEWLINE)

    def complete(self, module: Any, folder: Path | None, dtype: torch.dtype) -> None:
        """Give `module` what leads from the tower to the language model. See `Published.complete`."""
        kind, raw = self._raw.get("mm_projector_type") or "linear", self._raw
        projector = new_projector(kind, self.config.vision_config.hidden_size, raw["hidden_size"])
        if folder is not None:
            weights = tensors_of(checkpoint_files(folder), PROJECTOR)
            if {"weight", "bias"} == weights.keys():  # of a single layer
                weights = {f"0.{name}": one for name, one in weights.items()}
            found, wanted = (
                {name: list(one.shape) for name, one in sorted(state.items())}
                for state in (weights, projector.state_dict())
            )
            if found != wanted:
                raise ModelError(f"mm_projector in {folder} has weights {found}, an {kind} of config.json's {wanted}")
            projector.load_state_dict(weights)
        module.multi_modal_projector = projector.to(dtype)


def kind_of(raw: Mapping[str, Any]) -> str:
    """Return which family of engine.vision.families a config.json describes."""
    ratio, merge = raw.get("image_aspect_ratio") or "square", raw.get("mm_patch_merge_type") or "flat"
    if ratio in ("square", "pad"):
        return "llava"
    if ratio.startswith("anyres") and merge == "spatial_unpad":
        return "llava next" if ratio == "anyres" else "llava onevision"
    raise ModelError(
        f"config.json: image_aspect_ratio {shown(ratio)} with mm_patch_merge_type {shown(merge)} is not served: only "
        "square and pad, and anyres and anyres_max_N with spatial_unpad"
    )


def pinpoints_of(raw: Mapping[str, Any]) -> list[list[int]]:
    """Return the sizes that tiles make together, heights first: config.json has widths first."""
    pinpoints = raw.get("image_grid_pinpoints")
    try:
        return [[int(height), int(width)] for width, height in pinpoints or ()]
    except (TypeError, ValueError):
        raise ModelError(
            f"config.json: image_grid_pinpoints must be a list of [width, height], got {shown(pinpoints)}"
        ) from None


def local_tower(name: str, folder: Path) -> Path | None:
    """Return the folder that `mm_vision_tower` names: inside the model's, or any on this machine; None: neither."""
    paths = (folder / name, Path(name).expanduser())
    return next((path for path in paths if path.is_dir()), None)


def new_projector(kind: str, num_inputs: int, num_outputs: int) -> nn.Sequential:
    """Return layers with GELUs between them; in Yi-VL each has a norm behind it. kind: `mm_projector_type`."""
    match = re.fullmatch(r"mlp(\d+)x_gelu(_Norm)?", "mlp1x_gelu" if kind == "linear" else kind)
    if match is None:
        raise ModelError(f"config.json: mm_projector_type {shown(kind)} is not served, only linear and mlpNx_gelu")
    layers: list[nn.Module] = []
    for i in range(int(match[1])):
        layers += [nn.GELU()] if i else []
        layers.append(nn.Linear(num_outputs if i else num_inputs, num_outputs))
        layers += [nn.LayerNorm(num_outputs)] if match[2] else []
    return nn.Sequential(*layers)
