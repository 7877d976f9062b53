"""Write pictures into a prompt: which tokens stand for each, and by which key its features are known."""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.config import EngineConfig
from engine.config_file import read_json
from engine.errors import InvalidRequest, ModelError, shown
from engine.media import CUT, Media, MediaSize, PromptMedia, Video
from engine.model_config import ModelConfig
from engine.models.architectures import FLAT_LLAVA, KIMI, KIMI_VIDEOS
from engine.text.long_text import COUNTED_CONTEXTS, MAX_TOKENS, too_many_tokens
from engine.vision.families import FAMILIES
from engine.vision.family import Family, Published, Writing, rope_positions
from engine.vision.kimi import KimiFiles
from engine.vision.llava_files import LlavaFiles

logger = logging.getLogger(__name__)

Encode = Callable[..., list[int]]
MAX_WRITINGS = 64  # sizes whose writing is remembered: that of a video may have a million characters
STAND_IN = 0  # the token in the places of features of a model that has none for them


# What reads folders that transformers cannot, by the names that engine.models.architectures has for them.
PUBLISHED: dict[str, Callable[[Path, Mapping[str, Any], EngineConfig, Callable[[str], int | None]], Published]] = {
    FLAT_LLAVA: LlavaFiles,
    KIMI: KimiFiles,
    KIMI_VIDEOS: KimiFiles,
}


class MediaReader:
    """Write the pictures of prompts for one model. Nothing here needs its weights."""

    def __init__(
        self,
        family: Family,
        encode: Encode,
        token_ids: dict[str, int],
        vocab_size: int,
        *,
        has_rope_axes: bool,
        place_ids: Sequence[int | None] = (),
    ) -> None:
        """encode: from a text to token ids. token_ids: of the placeholders of features, by kind; negative: of none.

        vocab_size: of the model. In the places of features no token beyond it is left. place_ids: of the placeholder
        of a whole picture, for each kind; None: it is no single token.
        """
        self.family, self._vocab_size = family, vocab_size
        # A kind whose placeholder the tokenizer does not know is not read: no text would stand everywhere.
        self.kinds = {kind: text for kind, text in family.placeholders().items() if text}
        self.frames = family.frames()
        self._encode, self._has_rope_axes = encode, has_rope_axes
        self._token_of = {kind: token_ids[kind] for kind in self.kinds}
        self._tokens = np.array(list(self._token_of.values()))
        self._texts = {token_id: family.token_text[role] for role, token_id in token_ids.items()}
        self._texts |= {id_: text for id_, text in zip(place_ids, self.kinds.values(), strict=False) if id_ is not None}
        self._absent = {family.token_text[kind]: token_ids[kind] for kind in self.kinds if token_ids[kind] < 0}
        self._no_text = re.compile(f"({'|'.join([CUT, *map(re.escape, self._absent)])})")
        self._placeholders = re.compile("|".join(f"(?P<{kind}>{family.pattern(kind)})" for kind in self.kinds))
        self._num_others = functools.lru_cache(MAX_WRITINGS)(self._count_others)
        self._write = functools.lru_cache(MAX_WRITINGS)(self._write_size)
        fingerprint = [type(family).__name__, family.processor.to_json_string(), str(family.config.to_dict())]
        self._fingerprint = hashlib.sha256("\0".join(fingerprint).encode()).digest()

    def write(self, size: MediaSize, times_s: tuple[float, ...] = ()) -> Writing:
        """Say how a picture of `size` is written. `InvalidRequest` for a kind that is not read."""
        if size.kind not in self.kinds:
            raise InvalidRequest(f"this model reads no {size.kind}, only {' and '.join(self.kinds)}")
        return self._write(size.kind, size.width, size.height, size.num_frames, self._settings(size), times_s)

    def _write_size(
        self,
        kind: Any,
        width: int,
        height: int,
        num_frames: int,
        settings: tuple[tuple[str, int], ...],
        times_s: tuple[float, ...],
    ) -> Writing:
        return self.family.write(MediaSize(kind, width, height, num_frames, dict(settings)), times_s)

    def _settings(self, media: Media | MediaSize) -> tuple[tuple[str, int], ...]:
        """Return those settings that make a difference, in one order."""
        return tuple(sorted((name, media.settings[name]) for name in self.family.settings & media.settings.keys()))

    def count(self, sizes: Sequence[MediaSize]) -> list[int]:
        """Return how many tokens stand for each picture."""
        writings = map(self.write, self.family.in_context(sizes))
        return [writing.num_features + self._num_others(writing.text) for writing in writings]

    def _count_others(self, text: str) -> int:
        """Return the tokens of a picture's text that stand for none of its features."""
        pieces = re.split("|".join(map(re.escape, self.family.feature_texts())), text)
        return sum(len(self._encode(piece, add_special_tokens=False)) for piece in pieces if piece)

    def encode(
        self,
        prompt: str | Sequence[int],
        media: Sequence[Media],
        *,
        add_special_tokens: bool = False,
        context_length: int | None = None,
    ) -> tuple[list[int], PromptMedia]:
        """Return the token ids of a prompt with its pictures written out, and where they are: `Engine.encode_media`.

        Blocks for as long as a long text takes. context_length: see `Tokenizer.encode`.
        """
        media = self.family.in_context(media)
        writings = [self.write(one.size, one.times_s if isinstance(one, Video) else ()) for one in media]
        if isinstance(prompt, str):
            self._check([match.lastgroup or "" for match in self._placeholders.finditer(prompt)], media)
            texts = iter([writing.text for writing in writings])
            written = self._placeholders.sub(lambda _: next(texts), prompt)
            ids = self._encode_written(written, add_special_tokens, context_length)
        else:
            ids = self._write_out(list(prompt), media, writings)
        found = np.flatnonzero(np.isin(ids, self._tokens)).astype(np.int32)
        lens = [writing.num_features for writing in writings]
        if len(found) != sum(lens):
            raise InvalidRequest(
                f"the prompt has {len(found)} tokens that stand for parts of pictures, its pictures have {sum(lens)}"
            )
        places = np.split(found, np.cumsum(lens)[:-1]) if lens else []
        for place in found:
            ids[place] = ids[place] if 0 <= ids[place] < self._vocab_size else STAND_IN
        rope = self._rope(len(ids), places, writings) if self._has_rope_axes else None
        keys = tuple(map(self._key, media))
        return ids, PromptMedia(len(ids), tuple(media), keys, tuple(places), self.family.is_whole, rope)

    def text_of(self, ids: Sequence[int]) -> str:
        """Return a text with the placeholders among token ids; one character stands for each other token."""
        return "".join(self._texts_of(ids))

    def _texts_of(self, ids: Sequence[int]) -> list[str]:
        return [self._texts.get(token_id, "\0") for token_id in ids]

    def _write_out(self, ids: list[int], media: Sequence[Media], writings: Sequence[Writing]) -> list[int]:
        """Return token ids with the pictures among them written out: all others stay, whatever text they came from.

        Ids that a processor of Hugging Face has written out already are returned as they are.
        """
        expected = np.repeat([self._token_of[one.kind] for one in media], [one.num_features for one in writings])
        given = np.array(ids, np.int64)
        if len(expected) > len(media) and np.array_equal(given[np.isin(given, self._tokens)], expected):
            return ids
        texts = self._texts_of(ids)
        starts = np.cumsum([0, *map(len, texts)])
        matches = list(self._placeholders.finditer("".join(texts)))
        self._check([match.lastgroup or "" for match in matches], media)
        written, end = list[int](), 0
        for match, writing in zip(matches, writings, strict=True):
            first, stop = np.searchsorted(starts, match.span()).tolist()
            written += ids[end:first] + self._encode_written(writing.text)
            end = stop
        return written + ids[end:]

    def _encode_written(
        self, text: str, add_special_tokens: bool = False, context_length: int | None = None
    ) -> list[int]:
        """Return the token ids of a prompt. A placeholder that the tokenizer does not know stays a negative id."""
        encode = functools.partial(self._encode, context_length=context_length)
        max_tokens = MAX_TOKENS if context_length is None else COUNTED_CONTEXTS * context_length
        first, *others = self._no_text.split(text, max_tokens)
        ids = encode(first, add_special_tokens=add_special_tokens)
        for piece in others:
            if len(ids) > max_tokens:  # short as each piece is
                raise too_many_tokens(max_tokens, context_length)
            if piece in self._absent:
                ids.append(self._absent[piece])
            elif piece and piece != CUT:
                ids += encode(piece, add_special_tokens=False)
        return ids

    def _check(self, kinds: Sequence[str], media: Sequence[Media]) -> None:
        """Raise `InvalidRequest` if the placeholders in a text are not those of its pictures."""
        if len(kinds) != len(media):
            raise InvalidRequest(
                f"the prompt has {len(kinds)} places for pictures ({' '.join(self.kinds.values())}), "
                f"and {len(media)} came with it"
            )
        for i, (kind, one) in enumerate(zip(kinds, media, strict=True)):
            if kind != one.kind:
                raise InvalidRequest(f"place {i} of the prompt is for {kind}s, not for {one.kind}s")

    @staticmethod
    def _rope(prompt_len: int, places: Sequence[np.ndarray], writings: Sequence[Writing]) -> np.ndarray:
        blocks = []
        for its_places, writing in zip(places, writings, strict=True):
            start = 0
            for grid in writing.grids:
                blocks.append((int(its_places[start]), grid, writing.interval))
                start += grid[0] * grid[1] * grid[2]
        return rope_positions(prompt_len, blocks)

    def _key(self, media: Media) -> bytes:
        look = json.dumps(self.family.look(media)).encode()
        return hashlib.sha256(self._fingerprint + media.digest + media.kind.encode() + look).digest()


class TokenizerPart(Protocol):
    """The part of a tokenizer that a reader calls."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def token_text(self, token_id: int) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...


def load_reader(
    folder: Path, model_config: ModelConfig, tokenizer: TokenizerPart, config: EngineConfig
) -> MediaReader | None:
    """Return what reads pictures for the model in `folder`; None if nothing does.

    A folder without the files of a processor is served as a model of text. `ModelError` if its tower is elsewhere and
    cannot be found.
    """
    if not model_config.vision:
        return None
    if (read := PUBLISHED.get(model_config.vision)) is not None:
        files = read(folder, model_config.raw, config, tokenizer.token_to_id)
        family = FAMILIES[files.kind](files.config, files.processor, files.token_text, files.video_config)
        family.published = files
    else:
        try:
            family = load_family(folder, model_config, tokenizer.token_text)
        except ModelError as error:
            logger.warning("only text is read: %s", error)
            return None
    return MediaReader(
        family,
        tokenizer.encode,
        family.token_ids(family.config),
        model_config.vocab_size,
        has_rope_axes=bool(model_config.rope.sections),
        place_ids=[tokenizer.token_to_id(text) for text in family.placeholders().values()],
    )


def load_family(folder: Path, model_config: ModelConfig, token_text: Callable[[int], str]) -> Family:
    """Return how the model in `folder` reads pictures. `ModelError` if what says so is not there."""
    from transformers import AutoConfig, AutoImageProcessor

    try:
        config = AutoConfig.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{folder} does not say how pictures are read: {shown(str(error))}") from None
    name = model_config.vision
    if name == "llava" and config.vision_config.model_type == "pixtral":  # one class of transformers is both
        name = "pixtral"
    family = FAMILIES[name]
    texts = {role: token_text(token_id) for role, token_id in family.token_ids(config).items()}
    return family(config, processor, texts, video_config(folder))


def video_config(folder: Path) -> dict[str, Any]:
    """Return what a folder's processor does with videos: in an entry or a file of its own, else with images too."""
    found: dict[str, Any] = read_json(folder / "processor_config.json").get("video_processor") or {}
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        found = found or read_json(folder / name)
    if "min_pixels" in found and "max_pixels" in found:
        found = found | {"size": {"shortest_edge": found["min_pixels"], "longest_edge": found["max_pixels"]}}
    return found
