"""Load what the front end of several replicas needs of the model: no weights."""

from dataclasses import dataclass

import torch

from engine.checkpoint.folder import resolve_model, resolve_tokenizer
from engine.config import EngineConfig
from engine.machine import check_gpus, resolve_config
from engine.model_config import ModelConfig
from engine.model_files import load_model_files, new_grammars, new_reader
from engine.text.grammar import GrammarCompiler
from engine.text.tokenizer import Tokenizer
from engine.vision.reader import MediaReader


@dataclass(frozen=True, slots=True)
class FrontEnd:
    model_config: ModelConfig
    tokenizer: Tokenizer
    grammars: GrammarCompiler | None  # None: --grammar-backend none
    reader: MediaReader | None  # of pictures, where the model reads any
    replica_config: EngineConfig
    """For every replica: the model's files are on this machine, converted."""


def load_front_end(config: EngineConfig) -> FrontEnd:
    """Download and convert the model once, not in every replica, and load what requests are checked against. Blocks.

    `ModelError` if the model cannot be served, or if there are too few GPUs.
    """
    resolved = resolve_config(config)
    if torch.device(resolved.device or "cpu").type == "cuda":
        check_gpus(resolved.base_gpu_id, resolved.dp_size * resolved.tp_size)
    folder = resolve_model(resolved)
    model_config, tokenizer = load_model_files(folder, resolved)
    replica_config = resolved.replace(
        model_path=str(folder),
        tokenizer_path=str(resolve_tokenizer(resolved, folder)),
        load_format="dummy" if resolved.load_format == "dummy" else "auto",
        device=config.device and torch.device(config.device).type,
    )
    reader = new_reader(resolved, model_config, folder, tokenizer)
    return FrontEnd(model_config, tokenizer, new_grammars(resolved, model_config, tokenizer), reader, replica_config)


def config_of_replica(config: EngineConfig, i: int) -> EngineConfig:
    """Return the configuration of replica `i`, from that for all: its GPUs and its seed."""
    return config.replace(
        base_gpu_id=config.base_gpu_id + i * config.tp_size,
        random_seed=(config.random_seed or 0) + i,
        max_queued_requests=None,  # the queue's limits are for all replicas together
        max_queued_tokens=None,
    )
