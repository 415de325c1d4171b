"""Model folders as they come, and as somebody might make them to hurt: loaded by one set of rules, or refused."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    PreTrainedConfig,
)

from drafters.proposal import Proposal
from server.targets.checkpoint import INDEX, check_files, context_limit, read_config, stored_weights
from server.targets.context import CacheShape, MemoryPlan, Wanted, cache_shape, plan_memory
from server.targets.native_target import NativeTarget, load_target
from server.targets.target import PrefillChunk, TargetError, VerifyRows
from server.targets.torch_target import TorchTarget

SIZES = dict(
    vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=64, bos_token_id=0, eos_token_id=None,
)  # fmt: skip
ROPES = {
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 16, "factor": 4.0,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}  # fmt: skip


def save(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.to(dtype).save_pretrained(folder)
    return folder


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def first_token(folder: Path, weights: str | None) -> int:
    target = load_target(folder, weights, 1, 32)
    return int(target.prefill(PrefillChunk(0, [3, 1, 4, 1, 5])).logits.argmax())


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_a_head_that_is_stored_wins_over_the_flag_that_ties_it(tmp_path: Path, weights: str) -> None:
    folder = save(tmp_path, tie_word_embeddings=False)
    wanted = first_token(folder, "fp32")
    edit(folder / "config.json", lambda c: c.update(tie_word_embeddings=True))
    target = load_target(folder, weights, 1, 32)
    assert int(target.prefill(PrefillChunk(0, [3, 1, 4, 1, 5])).logits.argmax()) == wanted
    assert not torch.equal(target.lm_head(), target.embedding())


def test_files_beside_the_model_are_not_read(tmp_path: Path) -> None:
    folder = save(tmp_path)
    wanted = first_token(folder, None)
    stray = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(stray, folder / "old_model.safetensors")
    assert first_token(folder, None) == wanted
    (folder / "model.safetensors").unlink()
    with pytest.raises(TargetError, match=r"old_model\.safetensors.* rename"):
        check_files(folder)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_tensors_without_a_place_are_named(tmp_path: Path, weights: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.extra.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        load_target(folder, weights, 1, 32)
    assert "model.layers.0.extra.weight" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "weights"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "bf16")]
)
def test_unset_weights_are_as_stored_and_native(tmp_path: Path, dtype: torch.dtype, weights: str) -> None:
    folder = save(tmp_path, dtype)
    assert stored_weights(folder) == weights
    target = load_target(folder, None, 1, 32)
    assert isinstance(target, NativeTarget)
    assert target.info.weights == weights
    assert target.info.num_parameters == sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**SIZES)).parameters())


def test_a_tied_embedding_is_one_parameter(tmp_path: Path) -> None:
    tied = load_target(save(tmp_path / "tied", tie_word_embeddings=True), "int8", 1, 32).info.num_parameters
    own = load_target(save(tmp_path / "own", tie_word_embeddings=False), "int8", 1, 32).info.num_parameters
    assert own - tied == SIZES["vocab_size"] * SIZES["hidden_size"]


def test_inputs_that_do_not_divide_into_groups_stay_in_bf16(tmp_path: Path) -> None:
    folder = save(tmp_path, intermediate_size=80)
    target = load_target(folder, "int8", 1, 32)
    assert isinstance(target, NativeTarget)
    assert [target.stack.layers[0].down.bits, target.stack.layers[0].output.bits] == [16, 8]


def test_narrow_floats_without_a_word_about_them_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for weights in (None, "fp32", "int8"):
        with pytest.raises(TargetError, match=f"{name}.*quantised already"):
            load_target(folder, weights, 1, 32)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_a_checkpoint_quantised_elsewhere_is_refused_by_every_path(tmp_path: Path, weights: str) -> None:
    folder = save(tmp_path)
    edit(folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(TargetError, match="quantised already"):
        load_target(folder, weights, 1, 32)


@pytest.mark.parametrize("place", ["../../etc/passwd", "/etc/passwd", 7, None, ["a"], "a\0b", "a" * 5000])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, place: Any) -> None:
    folder = save(tmp_path)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
    with pytest.raises(TargetError, match="weight_map"):
        check_files(folder)


def test_a_link_out_of_the_folder_is_refused_but_the_hub_cache_s_own(tmp_path: Path) -> None:
    source = save(tmp_path / "models--a--b" / "blobs")
    for snapshot, refused in ((tmp_path / "models--a--b" / "snapshots" / "0", False), (tmp_path / "folder", True)):
        snapshot.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            os.symlink(source / name, snapshot / name)
        if refused:
            with pytest.raises(TargetError, match="outside"):
                check_files(snapshot)
        else:
            check_files(snapshot)


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "{", "null"])
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_json_that_is_no_object_is_refused_by_name(tmp_path: Path, file: str, content: str) -> None:
    folder = save(tmp_path)
    (folder / file).write_text(content)
    with pytest.raises(TargetError, match=file):
        load_target(folder, None, 1, 32)


@pytest.mark.parametrize(
    "change",
    [
        {"max_position_embeddings": "many"}, {"max_position_embeddings": -5}, {"num_attention_heads": 0},
        {"num_hidden_layers": [1]}, {"hidden_size": 64.5}, {"vocab_size": True}, {"vocab_size": 10**12},
        {"model_type": "no_such"}, {"model_type": None}, {"head_dim": -4}, {"rope_parameters": 3},
        {"num_key_value_heads": 3}, {"eos_token_id": [[1]]}, {"hidden_act": "nope"}, {"layer_types": ["x", "y"]},
        {"quantization_config": []}, {"rope_parameters": {"rope_type": "nope"}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_what_makes_no_sense_is_one_sentence(tmp_path: Path, change: dict[str, Any], weights: str) -> None:
    folder = save(tmp_path)
    edit(folder / "config.json", lambda c: c.update(change))
    with pytest.raises(TargetError) as error:
        load_target(folder, weights, 1, 32)
    told = str(error.value)
    assert str(folder) in told and "\n" not in told
    assert "Validation" not in told and "DefaultCPUAllocator" not in told and "ZeroDivision" not in told


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 0.0},
        {"rope_type": "default", "rope_theta": -1.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": -2.0},
    ],
)
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_frequencies_that_are_no_numbers_are_refused(tmp_path: Path, parameters: dict[str, Any], weights: str) -> None:
    folder = save(tmp_path)
    edit(folder / "config.json", lambda c: c.update(rope_parameters=parameters))
    with pytest.raises(TargetError, match=r"rope_parameters of config\.json"):
        load_target(folder, weights, 1, 32)
    with pytest.raises(TargetError, match=r"rope_parameters of config\.json"):
        TorchTarget.load(folder, "fp32", 1, 32)


def test_a_damaged_weight_is_named_by_its_layer(tmp_path: Path) -> None:
    folder = save(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TargetError, match="layer 1 of the model: a weight holds NaN"):
        load_target(folder, "int8", 1, 32)


def test_weights_that_do_not_fit_are_one_sentence_on_transformers_layers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path)
    edit(folder / "config.json", lambda c: c.update(intermediate_size=80))
    with pytest.raises(
        TargetError, match=r"gate_proj.weight is \[96, 64\], the configuration says \[80, 64\]|down_proj"
    ):
        TorchTarget.load(folder, "fp32", 1, 32)
    edit(folder / "config.json", lambda c: c.update(intermediate_size=96, num_hidden_layers=3))
    with pytest.raises(TargetError, match=r"they lack model\.layers\.2\..* more do not fit"):
        TorchTarget.load(folder, "fp32", 1, 32)
    assert "LOAD REPORT" not in caplog.text


def test_limits_have_many_names(tmp_path: Path) -> None:
    GPT2Config(vocab_size=96, n_positions=48, n_embd=32, n_layer=1, n_head=2).save_pretrained(tmp_path)
    assert context_limit(read_config(tmp_path), tmp_path) == 48


def test_a_context_is_what_positions_allow_and_memory_holds() -> None:
    shape = CacheShape(bytes_per_position=1000, num_slots=4)
    assert plan_memory("m", 8192, Wanted(None, 0), shape, 1e9) == MemoryPlan(8192, 4 * 8192, 0, 1e9 - 4 * 8192e3)
    assert plan_memory("m", 8192, Wanted(4096, 0), shape, 4096 * 4000).pool_rows == 3 * 4096, "the drafter needs some"
    few = plan_memory("m", 8192, Wanted(None, 0), shape, 16e6)
    assert (few.context, few.pool_rows) == (3840, 4000), "a quarter of the memory, in steps of 256, for all together"
    tight = plan_memory("m", 8192, Wanted(4096, 0), shape, 5e6)
    assert (tight.context, tight.pool_rows) == (4096, 4096), "one such request fits, the others wait"
    with pytest.raises(TargetError, match="4000 positions would fit"):
        plan_memory("m", 8192, Wanted(4096, 0), shape, 4e6)
    with pytest.raises(TargetError, match="end at 8192"):
        plan_memory("m", 8192, Wanted(9000, 0), shape, 1e12)
    with pytest.raises(TargetError, match="does not fit"):
        plan_memory("m", 8192, Wanted(None, 0), shape, -5)
    whole = CacheShape(1000, 4, shared=False)
    every = plan_memory("m", 8192, Wanted(None, 0), whole, 16e6)
    assert (every.context, every.pool_rows) == (768, 4 * 768), "llama.cpp takes all slots at once"
    with pytest.raises(TargetError, match=r"4 requests takes .* 2000 positions would fit"):
        plan_memory("m", 8192, Wanted(4096, 0), whole, 8e6)


def test_rows_of_drafts_of_all_requests_are_counted_and_may_take_a_quarter_of_the_memory() -> None:
    shape = CacheShape(bytes_per_position=1000, num_slots=4)
    plan = plan_memory("m", 8192, Wanted(4096, 0, tree_rows=8), shape, 1e8)
    assert (plan.pool_rows, plan.left_bytes) == (4 * (4096 + 8), 1e8 - 4 * (4096 + 8) * 1000)
    many = CacheShape(1000, 100_000)
    with pytest.raises(TargetError, match=r"--max-seqs 100000 with 8 rows .* --max-seqs 3125 would fit"):
        plan_memory("m", 8192, Wanted(None, 0, tree_rows=8), many, 1e8)
    with pytest.raises(TargetError, match=r"; --max-seqs 1 with --rows 25000 would fit"):
        plan_memory("m", 8192, Wanted(None, 0, tree_rows=30_000), CacheShape(1000, 2), 1e8)
    assert plan_memory("m", 8192, Wanted(None, 0, tree_rows=8), CacheShape(1000, 3125), 1e8).context >= 256


def test_a_page_cache_leaves_room_for_a_request() -> None:
    shape = CacheShape(bytes_per_position=1000, num_slots=1)
    assert plan_memory("m", 512, Wanted(), shape, 1e10).cache_bytes == 512 * 2**20
    assert plan_memory("m", 512, Wanted(), shape, 8e6).cache_bytes == 1_000_000, "less where memory is short"
    assert plan_memory("m", 512, Wanted(None, 7 * 10**6), shape, 8e6).context == 256
    with pytest.raises(TargetError, match=r"--cache 8 MiB is asked for, and 8 MiB are free .* 7 MiB would fit"):
        plan_memory("m", 512, Wanted(None, 8 * 10**6), shape, 8e6)
    with pytest.raises(TargetError, match="1000 positions would fit, more with a smaller --cache"):
        plan_memory("m", 8192, Wanted(4096, 7 * 10**6), shape, 8e6)


def test_a_cache_s_shape_counts_scales_of_int8() -> None:
    config = LlamaConfig(**SIZES)
    assert cache_shape(config, 2, "bf16").bytes_per_position == 2 * 2 * 2 * 16 * 2
    assert cache_shape(config, 2, "int8").bytes_per_position == 2 * 2 * 2 * (16 + 4)


@pytest.mark.parametrize("rope", list(ROPES))
@pytest.mark.parametrize("native", [True, False])
def test_rows_turn_by_their_own_position(tmp_path: Path, rope: str, native: bool) -> None:
    """Alone, beside a long neighbour, and in chunks of another size: the same row, whatever the rope."""
    positions = 64 if rope == "longrope" else 16
    folder = save(tmp_path, rope_parameters=ROPES[rope], max_position_embeddings=positions)
    load = load_target if native else TorchTarget.load
    short, long = [7, 8, 9, 10], list(range(1, 41))

    def after(first: list[list[int]], beside: bool) -> torch.Tensor:
        target = load(folder, "fp32", 2, 64)
        if beside:
            target.prefill(PrefillChunk(1, long))
        for chunk in first:
            target.prefill(PrefillChunk(0, chunk))
        rows = [VerifyRows(0, 11, Proposal())] + ([VerifyRows(1, 5, Proposal())] if beside else [])
        return target.verify(rows)[0].logits(0)

    for chunks, other in (([short], [short]), ([long], [long[:9], long[9:30], long[30:]])):
        assert torch.allclose(after(chunks, False), after(other, True), atol=1e-4)


def test_a_short_text_turns_as_transformers_turns_it(tmp_path: Path) -> None:
    folder = save(tmp_path, rope_parameters=ROPES["longrope"])
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = [7, 8, 9, 10]
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0, -1]
    target = load_target(folder, "fp32", 1, 64)
    assert torch.allclose(target.prefill(PrefillChunk(0, ids)).logits, wanted, atol=1e-4)


@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4), "registry"),
        (GPTJConfig(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64, rotary_dim=8), "registry"),
        (NemotronConfig(**(SIZES | {"num_key_value_heads": 4})), "hand the rows' places on"),
        (BloomConfig(vocab_size=96, hidden_size=64, n_layer=1, n_head=4), "max_position_embeddings"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_architectures_that_cannot_be_run_row_by_row_are_one_sentence(
    tmp_path: Path, config: PreTrainedConfig, reason: str, weights: str | None
) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(TargetError, match=reason):
        load_target(tmp_path, weights, 1, 32)
