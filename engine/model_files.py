"""What a model's folder holds beside the weights: its configuration, and what reads and writes for it."""

import logging
from dataclasses import replace
from pathlib import Path

from engine.checkpoint.folder import resolve_tokenizer
from engine.config import EngineConfig
from engine.config_file import parse_overrides
from engine.errors import ModelError
from engine.model_config import TURN_ENDS, ModelConfig, turn_ends
from engine.models.registry import load_config
from engine.text.grammar import GrammarCompiler
from engine.text.no_tokenizer import NoTokenizer
from engine.text.tokenizer import Tokenizer
from engine.vision.reader import MediaReader, load_reader

logger = logging.getLogger(__name__)


def load_model_files(folder: Path, config: EngineConfig) -> tuple[ModelConfig, Tokenizer]:
    """Load all that the model in `folder` is but its weights; its tokenizer, unless --tokenizer-path names another."""
    model_config = load_config(folder, config)
    if config.skip_tokenizer_init:
        return model_config, NoTokenizer()
    tokenizer = Tokenizer.load(resolve_tokenizer(config, folder), config.trust_remote_code)
    if "eos_token_id" not in parse_overrides(config.json_model_override_args):
        model_config = with_tokenizers_ends(model_config, tokenizer)
    if model_config.is_generation and not model_config.eos_token_ids:
        logger.warning(
            "no token is known to end an answer: answers go on to their longest. "
            """Name one with --json-model-override-args '{"eos_token_id": ID}'"""
        )
    return model_config, tokenizer


def with_tokenizers_ends(model_config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Return `model_config` with the tokenizer's eos token, and those that end a turn, among its end tokens.

    Fine-tuned models often keep config.json's end of the base model, which they never generate.
    """
    known = {text: tokenizer.token_to_id(text) for text in TURN_ENDS}
    found = [tokenizer.eos_token_id]
    found += [known[text] for text in turn_ends({text for text, token_id in known.items() if token_id is not None})]
    ids = [token_id for token_id in found if token_id is not None and token_id < model_config.vocab_size]
    return replace(model_config, eos_token_ids=tuple(dict.fromkeys([*model_config.eos_token_ids, *ids])))


def new_reader(
    config: EngineConfig, model_config: ModelConfig, folder: Path, tokenizer: Tokenizer
) -> MediaReader | None:
    """Return what reads pictures; None if nothing does. It writes them with a tokenizer, also where texts have none."""
    if config.skip_tokenizer_init and model_config.vision:
        try:
            tokenizer = Tokenizer.load(resolve_tokenizer(config, folder), config.trust_remote_code)
        except ModelError as error:
            logger.warning("no pictures are read: %s", error)
            return None
    return load_reader(folder, model_config, tokenizer, config)


def new_grammars(config: EngineConfig, model_config: ModelConfig, tokenizer: Tokenizer) -> GrammarCompiler | None:
    """Return the compiler that --grammar-backend names, or None for "none", and without a tokenizer."""
    if config.grammar_backend == "none" or config.skip_tokenizer_init:
        return None
    compiler_class: type[GrammarCompiler] = GrammarCompiler
    if config.grammar_backend == "xgrammar":
        from engine.text.xgrammar import XGrammarCompiler  # its library takes seconds to import

        compiler_class = XGrammarCompiler
    return compiler_class(
        tokenizer.to_json(),
        max(model_config.vocab_size, tokenizer.vocab_size),
        [token for token in model_config.eos_token_ids if token < tokenizer.vocab_size],
        tokenizer.backend.special_tokens,
        tokenizer.token_bytes,
    )
