"""Models that read pictures through the whole engine: features and greedy answers are transformers'."""

import asyncio
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.engine import Engine
from engine.errors import InvalidRequest
from engine.local import LocalEngine
from engine.media import Image, Media, MediaSize, PromptMedia, Video
from engine.request import Request, SamplingParams
from engine.state import RequestState
from engine.vision import grid, packed
from engine.vision.family import in_words
from kernels.packed_attention import packed_attention, rotated_torch, torch_packed_attention
from kernels.triton_rotation import rotate_triton
from tests.test_engine import collect, running_engine
from tests.vision_models import FAMILIES, make_vision_model, picture, video

NUM_NEW_TOKENS = 8
NUMBERS = itertools.count()
# One, two and five pictures of odd sizes; two prompts begin alike.
SIZES = (
    ((37, 53),),
    ((90, 33), (31, 64)),
    ((90, 33), (41, 47)),
    ((29, 29), (64, 31), (57, 40), (33, 95), (48, 48)),
)
EXTREME_SIZES = ((1, 1), (1, 50), (3, 300), (1000, 9), (2, 900))
QUESTIONS = ("What is it?", "Compare {} and {}!", "Which of {} and {} is larger?", "List: {}, {}, {}, {}, {}.")
MIXES: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    # Chunks and pages of a few tokens, cut through pictures.
    "cramped": {"chunked_prefill_size": 12, "page_size": 4, "max_total_tokens": 700},
    "one at a time": {"disable_radix_cache": True, "disable_overlap_schedule": True, "max_running_requests": 1},
    # Room for the features of one prompt, not of all.
    "little room for features": {"mm_embedding_cache_mb": 0, "schedule_policy": "fcfs"},
    "two replicas": {"dp_size": 2},
    "two ranks": {"tp_size": 2, "chunked_prefill_size": 32},
}
LONG = ("deepseek ocr", "gemma 4")  # whose pictures are longer than chunks, or take more tokens than there are
CASES = [(family, "whole prompts" if family in LONG else "cramped") for family in FAMILIES]
CASES += [("llava", mix) for mix in MIXES if mix != "cramped"]
CASES += [("qwen 3 vl", "two ranks"), ("gemma 3", "whole prompts")]


class Reference:
    """transformers' whole model, and its answers."""

    def __init__(self, folder: Path, family: str) -> None:
        import transformers

        model_class = getattr(transformers, FAMILIES[family].model)
        self.folder, self.name = folder, family
        self.model = model_class.from_pretrained(folder, dtype=torch.float32).eval()

    def most_likely(self, engine: Engine, ids: list[int], media: PromptMedia, answer: list[int]) -> list[int]:
        """Return the most likely token in place of each one of the answer, given all before it."""
        found: list[int] = self.logits(engine, ids, media, answer).argmax(dim=-1).tolist()
        return found

    @torch.inference_mode()
    def logits(self, engine: Engine, ids: list[int], media: PromptMedia, answer: list[int]) -> torch.Tensor:
        """Return the logits in place of each token of the answer, given all before it."""
        reader = engine.media_reader
        assert reader is not None
        family = reader.family
        inputs: dict[str, torch.Tensor] = {}
        taken = [family.inputs(one) for one in media.media]
        for names in {tuple(one) for one in taken}:  # a family's videos may be pictures to its tower
            inputs |= family.joined([one for one in taken if tuple(one) == names])
        whole = torch.tensor([ids + answer])
        kinds = torch.zeros_like(whole, dtype=torch.int32)  # 1: an image's, 2: a video's
        for one, places in zip(media.media, media.places, strict=True):
            kinds[0, torch.from_numpy(places)] = 1 if one.kind == "image" else 2
        types = {}
        if media.rope is not None or self.name.startswith("gemma 4"):
            types = {"mm_token_type_ids": kinds}
        elif media.is_whole:
            types = {"token_type_ids": kinds}
        if self.name == "qwen 2.5 vl" and "video_grid_thw" in inputs:
            types["second_per_grid_ts"] = torch.tensor([1.0, 1.0])
        logits: torch.Tensor = self.model(whole, **inputs, **types, use_cache=False).logits
        return logits[0, len(ids) - 1 : -1]


@pytest.fixture(scope="module")
def references() -> dict[str, Reference]:
    """Return those that are made so far, by family."""
    return {}


@pytest.fixture
def reference(
    request: pytest.FixtureRequest, references: dict[str, Reference], tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    family: str = request.param
    if family not in references:
        references[family] = Reference(make_vision_model(tmp_path_factory.mktemp("vision"), family), family)
    return references[family]


def pictures(sizes: Sequence[tuple[int, int]]) -> list[Image]:
    """Return pictures of these sizes, each of its own; of the same size and number, the same ones."""
    return [picture(height, width, seed=i) for i, (height, width) in enumerate(sizes)]


async def prompt(engine: Engine, number: int, media: Sequence[Image]) -> tuple[list[int], PromptMedia]:
    """Return the tokens of question `number` about pictures."""
    placeholder = engine.media_kinds["image"]
    text = QUESTIONS[number]
    text = text.format(*[placeholder] * len(media)) if "{}" in text else placeholder * len(media) + text
    return await engine.encode_media(text, media)


async def ask(
    engine: Engine, ids: list[int], media: PromptMedia | None, *, num_tokens: int = NUM_NEW_TOKENS, **fields: Any
) -> tuple[list[int], RequestState]:
    """Return what the engine says, which must be `num_tokens` tokens: nothing would equal nothing."""
    params = SamplingParams(max_new_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    state = RequestState(Request(f"r{next(NUMBERS)}", ids, params, media=media, **fields))
    _, tokens = await collect(engine, state)
    assert len(tokens) == num_tokens, state.finish_reason
    return tokens, state


def check_features(engine: LocalEngine, reference: Reference, media: Sequence[Image]) -> None:
    """Assert that features are those of the whole model, bit for bit, and counted without pixels."""
    reader, tower = engine.media_reader, engine.parts.tower
    assert reader is not None and tower is not None
    for one in (*media, *pictures(EXTREME_SIZES)):
        try:
            num_features = reader.write(one.size).num_features
        except InvalidRequest as error:
            assert f"{one.size.width}x{one.size.height}" in str(error)
            continue
        [found] = tower.encode(reader.family.in_context([one, one])[:1])
        # transformers' tower fails where a picture has one feature and is alone.
        is_sole = reference.name in ("mistral small 3.1", "lighton ocr") and num_features == 1
        with torch.inference_mode():
            inputs = reader.family.joined([reader.family.inputs(one)] * (1 + is_sole))
            features = reference.model.model.get_image_features(**inputs).pooler_output
        flat = features.flatten(0, -2) if isinstance(features, torch.Tensor) else torch.cat(list(features))
        assert torch.equal(found[0], flat[: len(flat) // (1 + is_sole)])
        assert num_features == found.shape[1]


@pytest.mark.parametrize(("reference", "mix"), CASES, indirect=["reference"])
async def test_features_and_greedy_answers_equal_transformers_whatever_the_mix(reference: Reference, mix: str) -> None:
    async with running_engine(reference.folder, **MIXES[mix]) as engine:
        prompts = [await prompt(engine, i, pictures(sizes)) for i, sizes in enumerate(SIZES)]
        for _ in range(2):  # the second time all may be cached
            answers = await asyncio.gather(*(ask(engine, *one) for one in prompts))
            for (ids, media), (answer, _) in zip(prompts, answers, strict=True):
                assert answer == await asyncio.to_thread(reference.most_likely, engine, ids, media, answer)
        if mix == "cramped" or reference.name in LONG:
            await asyncio.to_thread(check_features, engine, reference, pictures(SIZES[-1]))


@pytest.mark.parametrize("reference", ["llava next video", "llava onevision"], indirect=True)
async def test_frames_are_squares_and_answers_about_them_equal_transformers(reference: Reference) -> None:
    async with running_engine(reference.folder, **MIXES["cramped"]) as engine:
        image, clip = engine.media_kinds["image"], engine.media_kinds["video"]
        media: list[Media] = [video(5, 44, 37), picture(40, 61)]
        ids, its_media = await engine.encode_media(f"See {clip} and {image}: what moves?", media)
        assert engine.count_media_tokens([one.size for one in media]) == [len(one) for one in its_media.places]
        answer, _ = await ask(engine, ids, its_media)
        assert answer == await asyncio.to_thread(reference.most_likely, engine, ids, its_media, answer)


@pytest.mark.parametrize("reference", ["qwen 2 vl", "qwen 2.5 vl", "qwen 3 vl", "exaone 4.5"], indirect=True)
async def test_videos_stand_beside_pictures_and_answers_equal_transformers(reference: Reference) -> None:
    async with running_engine(reference.folder, **MIXES["cramped"]) as engine:
        image, clip = engine.media_kinds["image"], engine.media_kinds["video"]
        begin, end = "<|vision_start|>", "<|vision_end|>"
        media: list[Media] = [video(5, 44, 37), picture(40, 61), video(2, 30, 30, seed=1)]
        text = f"See {begin}{clip}{end}, {begin}{image}{end} and {begin}{clip}{end}: what moves?"
        ids, its_media = await engine.encode_media(text, media)
        assert engine.count_media_tokens([one.size for one in media]) >= [len(one) for one in its_media.places]
        for _ in range(2):
            answer, _ = await ask(engine, ids, its_media)
            assert answer == await asyncio.to_thread(reference.most_likely, engine, ids, its_media, answer)


@pytest.mark.parametrize(
    "reference",
    ["internvl", "smolvlm", "gemma 4", "gemma 4 E2B", "glm 4.1v", "glm 4.6v", "glm ocr", "kimi k2.5"],
    indirect=True,
)
async def test_frames_stand_one_by_one_beside_pictures_and_answers_equal_transformers(reference: Reference) -> None:
    async with running_engine(reference.folder) as engine:
        image, clip = engine.media_kinds["image"], engine.media_kinds["video"]
        made_for = {"smolvlm": {"fps": 1, "max_frames": 64}, "gemma 4": {"max_frames": 32}, "kimi k2.5": {"fps": 2}}
        assert engine.video_frames == made_for.get(reference.name.removesuffix(" E2B"), {})
        media: list[Media] = [picture(40, 61), video(6, 44, 37), picture(33, 30, seed=1), video(2, 30, 50, seed=1)]
        if reference.name.startswith(
            "glm"
        ):  # transformers tells its videos from its pictures only where it has no others
            image, media = clip, media[1::2] * 2
        text = f"{image} See {clip}, {image} and {clip}: what moves?"
        ids, its_media = await engine.encode_media(text, media)
        _, of_ids = await engine.encode_media(await engine.encode(text), media)
        lens = [len(places) for places in its_media.places]
        assert engine.count_media_tokens([one.size for one in media]) >= lens == [len(one) for one in of_ids.places]
        answer, _ = await ask(engine, ids, its_media)
        assert answer == await asyncio.to_thread(reference.most_likely, engine, ids, its_media, answer)


def test_numbers_are_told_in_words() -> None:
    words = {0: "zero", 13: "thirteen", 20: "twenty", 64: "sixty-four", 300: "three hundred"}
    words[768] = "seven hundred and sixty-eight"
    assert {number: in_words(number) for number in words} == words


@pytest.mark.parametrize("reference", ["qwen 2 vl", "glm 4.1v", "exaone 4.5"], indirect=True)
async def test_two_frames_alike_are_what_the_image_processor_makes_of_one_picture(reference: Reference) -> None:
    async with running_engine(reference.folder) as engine:
        reader, one = engine.media_reader, picture(44, 37)
        assert reader is not None
        of_image = reader.family.inputs(one)
        made = reader.family.processor(
            images=[one.pixels], input_data_format="channels_last", return_tensors="pt", **reader.family.options(one)
        )
        assert all(torch.equal(of_image[name], made[name]) for name in of_image)
        of_video = reader.family.inputs(Video(np.stack([one.pixels] * 2), (0.0, 0.5), b"video"))
        assert of_video["video_grid_thw"].tolist() == of_image["image_grid_thw"].tolist()
        torch.testing.assert_close(of_video["pixel_values_videos"], of_image["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "reference", ["qwen 2 vl", "qwen 2.5 vl", "qwen 3 vl", "glm 4.1v", "glm ocr", "exaone 4.5"], indirect=True
)
async def test_attention_over_all_pictures_at_once_makes_the_same_features(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens: list[list[int]] = []

    def attention(q: torch.Tensor, *args: Any) -> torch.Tensor:
        lens.append(args[2].diff().tolist())
        assert max(lens[-1]) == args[3]
        return packed_attention(q, *args)

    async with running_engine(reference.folder) as engine:
        tower = engine.parts.tower
        assert tower is not None
        media = pictures(SIZES[-1])
        one_by_one = tower.encode(media)
        monkeypatch.setattr(packed, "is_fast", lambda *_: True)
        monkeypatch.setattr(packed, "packed_attention", attention)
        tower.family.prepare(tower._module, torch.device("cpu"), torch.float32)
        at_once = tower.encode(media)
        monkeypatch.setattr(grid, "takes_plans", lambda: False)  # as in versions before transformers' vision_utils
        tower.family.prepare(tower._module, torch.device("cpu"), torch.float32)
        for before, now, later in zip(one_by_one, at_once, tower.encode(media), strict=True):
            torch.testing.assert_close(now, before, rtol=1e-5, atol=1e-5)
            assert torch.equal(later, now)
    assert lens and all(len(one) >= len(media) for one in lens), "several sequences at once"


@pytest.mark.gpu
@pytest.mark.parametrize("reference", ["llava", "qwen 2.5 vl", "qwen 3 vl"], indirect=True)
async def test_on_a_gpu_features_and_answers_are_nearly_transformers_by_graphs_of_steps_and_towers(
    reference: Reference,
) -> None:
    options: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16"}
    always_anew = {"disable_radix_cache": True, "mm_embedding_cache_mb": 0}
    async with running_engine(reference.folder, **options, **always_anew) as engine:
        reader, tower, graphs = engine.media_reader, engine.parts.tower, engine.parts.runner.graphs
        assert reader is not None and tower is not None and tower._graphs is not None and graphs is not None
        assert graphs._has_feature_rows
        for _ in range(3):
            for i, sizes in enumerate(SIZES):
                ids, media = await prompt(engine, i, pictures(sizes))
                answer, _ = await ask(engine, ids, media)
                logits = await asyncio.to_thread(reference.logits, engine, ids, media, answer)
                gaps = logits.amax(dim=-1) - logits[torch.arange(len(answer)), torch.tensor(answer)]
                assert float((gaps / logits.std(dim=-1)).max()) < 0.3
        assert len(tower._graphs._captured) >= 3 and tower._graphs._can_capture
        for one in pictures(SIZES[-1]):
            inputs = reader.family.joined([reader.family.inputs(one)])
            with torch.inference_mode():
                wanted = reference.model.model.get_image_features(**inputs).pooler_output
            wanted = wanted.flatten(0, -2) if isinstance(wanted, torch.Tensor) else torch.cat(list(wanted))
            for _ in range(3):  # without a graph, captured, replayed
                [found] = await asyncio.to_thread(tower.encode, [one])
                assert float((found[0].cpu().float() - wanted).abs().max() / wanted.abs().max()) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
def test_the_kernel_attends_as_its_definition(head_dim: int) -> None:
    bounds = torch.tensor([0, 1, 65, 70, 700], dtype=torch.int32, device="cuda")
    qkv = torch.randn(700, 3, 4, head_dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = qkv.unbind(1)
    found = packed_attention(q, k, v, bounds, 630, head_dim**-0.5)
    wanted = torch_packed_attention(q.float(), k.float(), v.float(), bounds, head_dim**-0.5)
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(4, 80), (3, 8)])
def test_the_kernel_rotates_as_its_definition_bit_for_bit(num_heads: int, head_dim: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float16  # Triton's interpreter cuts bits of bfloat16 off
    qkv = torch.randn(33, 2 * num_heads, head_dim, device=device, dtype=dtype)
    angles = 9 * torch.randn(33, head_dim, device=device)
    heads, others = qkv.clone().split(num_heads, dim=1)
    wanted = rotated_torch(heads, angles.cos(), angles.sin())
    rotate_triton(heads, angles.cos(), angles.sin())
    assert torch.equal(heads, wanted) and torch.equal(others, qkv[:, num_heads:])


def test_wider_hidden_layers_make_the_same() -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

    config = SimpleNamespace(hidden_size=8, intermediate_size=100, hidden_act="silu")
    mlp, wide = Qwen2_5_VLMLP(config, bias=True), Qwen2_5_VLMLP(config, bias=True)
    wide.load_state_dict(mlp.state_dict())
    for _ in range(2):  # once more changes nothing
        packed.widen_products(wide)
    assert wide.down_proj.weight.shape == (8, 128)
    x = torch.randn(5, 8)
    torch.testing.assert_close(wide(x), mlp(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reference", ["qwen 3 vl", "idefics 3"], indirect=True)
async def test_token_ids_stay_as_they_came_and_may_have_their_pictures_written_out(reference: Reference) -> None:
    async with running_engine(reference.folder) as engine:
        [image] = await engine.encode(engine.media_kinds["image"])
        letters = [token_id for letter in "there" for token_id in await engine.encode(letter)]
        assert await engine.encode("there") != letters
        media = pictures(SIZES[1])
        ids, shown = await engine.encode_media([*letters, image, *letters, image, 5], media)
        of_text, _ = await engine.encode_media("<image>", media[:1])
        assert ids == [*letters, *of_text, *letters, *ids[len(of_text) + 2 * len(letters) : -1], 5]
        written, shown_again = await engine.encode_media(ids, media)
        assert written == ids
        assert [one.tolist() for one in shown_again.places] == [one.tolist() for one in shown.places]
        with pytest.raises(InvalidRequest, match="has 1 places for pictures"):
            await engine.encode_media([*letters, image], media)


@pytest.mark.parametrize("reference", ["llava"], indirect=True)
async def test_another_picture_of_the_same_size_has_another_answer(reference: Reference) -> None:
    async with running_engine(reference.folder) as engine:
        answers = []
        for seed in range(3):
            ids, media = await prompt(engine, 0, [picture(37, 53, seed)])
            answer, state = await ask(engine, ids, media)
            answers.append(tuple(answer))
            assert state.num_cached_tokens < 3, "at most what stands before a picture is common"
        assert len(set(answers)) == 3


@pytest.mark.parametrize("reference", ["llava"], indirect=True)
async def test_a_second_turn_and_another_client_compute_neither_tower_nor_prefix(reference: Reference) -> None:
    async with running_engine(reference.folder) as engine:
        assert engine.started.encoder is not None
        stats = engine.started.encoder.stats
        first, its_media = await prompt(engine, 1, pictures(SIZES[1]))
        answer, _ = await ask(engine, first, its_media)
        assert stats.num_encoded == 2
        whole, media = await prompt(engine, 1, pictures(SIZES[1]))  # decoded once more: other objects
        assert (whole, media.keys) == (first, its_media.keys)
        _, again = await ask(engine, whole, media)
        assert again.num_cached_tokens == len(whole) - 1
        more = [*first, *answer[:-1], 5, 6, 7]
        extended = PromptMedia(len(more), media.media, media.keys, media.places)
        _, second_turn = await ask(engine, more, extended)
        assert second_turn.num_cached_tokens == len(more) - 3
        assert stats.num_encoded == 2


@pytest.mark.parametrize("reference", ["llava"], indirect=True)
async def test_features_outlive_a_flushed_cache_and_come_back_without_the_tower(reference: Reference) -> None:
    async with running_engine(reference.folder) as engine:
        assert engine.started.encoder is not None
        ids, media = await prompt(engine, 1, pictures(SIZES[1]))
        answer, _ = await ask(engine, ids, media)
        assert engine.flush_cache()
        again, state = await ask(engine, ids, media)
        assert (again, state.num_cached_tokens) == (answer, 0)
        assert engine.started.encoder.stats.num_encoded == 2


@pytest.mark.parametrize("reference", ["llava"], indirect=True)
async def test_other_weights_bring_their_tower_and_its_features(reference: Reference, tmp_path: Path) -> None:
    shutil.copytree(reference.folder, tmp_path / "other")
    with torch.no_grad():
        projector = reference.model.model.multi_modal_projector.linear_1
        projector.weight.neg_()
        reference.model.save_pretrained(tmp_path / "other")
        projector.weight.neg_()
    async with running_engine(tmp_path / "other") as engine:
        ids, media = await prompt(engine, 1, pictures(SIZES[1]))
        wanted, _ = await ask(engine, ids, media)
    async with running_engine(reference.folder) as engine:
        _, media = await prompt(engine, 1, pictures(SIZES[1]))
        answer, _ = await ask(engine, ids, media)
        assert answer != wanted
        await engine.maintenance.update_weights(str(tmp_path / "other"))
        assert (await ask(engine, ids, media))[0] == wanted
        with pytest.raises(InvalidRequest, match="cannot be served"):
            await engine.maintenance.update_weights("/no/such/folder")
        assert (await ask(engine, ids, media))[0] == wanted


@pytest.mark.parametrize("reference", ["llava"], indirect=True)
async def test_released_weights_take_their_tower_along_and_answers_are_the_same_when_they_are_back(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_engine(reference.folder) as engine:
        tower, moves = engine.parts.tower, list[str]()
        assert tower is not None
        move = tower.move_weights

        def noting(*to: torch.device) -> None:
            moves.append(str(to))
            move(*to)

        monkeypatch.setattr(tower, "move_weights", noting)
        ids, media = await prompt(engine, 1, pictures(SIZES[1]))
        wanted, _ = await ask(engine, ids, media)
        for tags, count in ((["kv_cache"], 0), (["weights", "kv_cache"], 1)):
            await engine.maintenance.release_memory(tags)
            assert len(moves) == count
            asked = asyncio.create_task(ask(engine, ids, media))
            await engine.maintenance.resume_memory(tags)
            answer, state = await asked
            assert (answer, state.num_cached_tokens) == (wanted, 0)
        assert len(moves) == 2


@pytest.mark.parametrize("reference", ["llava"], indirect=True)
async def test_whatever_shows_a_prompts_tokens_shows_placeholders(reference: Reference) -> None:
    async with running_engine(reference.folder) as engine:
        ids, media = await prompt(engine, 1, pictures(SIZES[1]))
        _, state = await ask(engine, ids, media, return_logprob=True, logprob_start_len=0)
        assert state.input_logprobs is not None
        assert [token for _, token in state.input_logprobs.token] == ids
        params = SamplingParams(
            max_new_tokens=NUM_NEW_TOKENS,
            temperature=0.0,
            ignore_eos=True,
            frequency_penalty=0.5,
            repetition_penalty=1.2,
        )
        await collect(engine, RequestState(Request("penalized", ids, params, media=media)))
        [prefix] = engine.top_prefixes(1)
        assert prefix.token_ids.tolist() == ids[: len(prefix.token_ids)]


@pytest.mark.parametrize("reference", ["llava"], indirect=True)
async def test_what_does_not_fit_together_is_refused_with_the_numbers(reference: Reference) -> None:
    async with running_engine(reference.folder) as engine:
        placeholder, [one] = engine.media_kinds["image"], pictures(SIZES[0])
        with pytest.raises(InvalidRequest, match=r"has 2 places for pictures .* and 1 came"):
            await engine.encode_media(f"{placeholder} and {placeholder}", [one])
        with pytest.raises(InvalidRequest, match="reads no video, only image"):
            engine.count_media_tokens([MediaSize("video", 5, 5, 2)])
        ids, media = await engine.encode_media(placeholder, [one])
        with pytest.raises(
            InvalidRequest, match=f"has {len(ids) + 1} tokens, its pictures belong to one of {len(ids)}"
        ):
            await ask(engine, [*ids, 5], media)


@pytest.mark.parametrize("reference", ["llava"], indirect=True)
async def test_a_picture_that_the_tower_fails_on_ends_its_request_and_no_other(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_engine(reference.folder) as engine:
        good, bad = [await prompt(engine, 0, [picture(37, 53, seed)]) for seed in (1, 2)]
        tower = engine.parts.tower
        assert tower is not None
        moved = tower.family.moved

        def fail_on_bad(media: Any) -> Any:
            if media is bad[1].media[0]:
                raise RuntimeError("no pixels")
            return moved(media)

        monkeypatch.setattr(tower.family, "moved", fail_on_bad)
        _, (_, failed) = await asyncio.gather(ask(engine, *good), ask(engine, *bad, num_tokens=0))
        assert failed.finish_reason is not None
        assert (failed.finish_reason.type, failed.finish_reason.status_code) == ("abort", 500)
        assert "no pixels" in (failed.finish_reason.message or "")
