"""A GGUF file as a folder: values as safetensors, configuration, tokenizer and template as transformers has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from server.targets.checkpoint import HEAD, INDEX, SINGLE
from server.targets.gguf.configuration import read_configuration
from server.targets.gguf.header import GGUFFile, open_gguf
from server.targets.gguf.tokenizer import read_codec, read_templates, read_tokens, special_tokens
from server.targets.gguf.weights import GGUFWeights
from server.targets.packed_model import model_of
from server.targets.target import TargetError
from server.tokenizer_files import DEFAULT_TEMPLATE

SHARD_BYTES = 2 * 2**30


def write_safetensors(path: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write every weight of the file, dequantised exactly: bf16 where the file holds that, else fp32.

    One shard is in memory at a time. Returns the bytes written. Errors: TargetError naming what is missing, or that the
    folder is not empty.
    """
    file = open_gguf(path)
    model = model_of(read_configuration(file), path)
    source = GGUFWeights(file, model.config)
    write_configuration(file, folder)
    shards: list[dict[str, Tensor]] = [{}]
    places: dict[str, int] = {}
    total = 0
    for name, parameter in model.named_parameters():
        if name == HEAD and HEAD not in source:
            continue
        values = source.read(name, parameter.shape)
        if shards[-1] and sum(map(num_bytes, shards[-1].values())) + num_bytes(values) > shard_bytes:
            write_shard(folder, len(shards), shards[-1])
            shards[-1] = {}
            shards.append({})
        shards[-1][name], places[name] = values, len(shards)
        total += num_bytes(values)
    write_shard(folder, len(shards), shards[-1])
    source.tell_unused()
    name_shards(folder, places, len(shards), total)
    return total


def num_bytes(values: Tensor) -> int:
    """Of a tensor's numbers."""
    return values.numel() * values.element_size()


def write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> None:
    """One file, named for good when their count is known."""
    save_file(
        {name: values.contiguous() for name, values in tensors.items()}, partial(folder, number), {"format": "pt"}
    )


def partial(folder: Path, number: int) -> Path:
    """A shard's name until then."""
    return folder / f"{SINGLE}.{number}.partial"


def name_shards(folder: Path, places: dict[str, int], count: int, total: int) -> None:
    """One file is ``model.safetensors``; several have numbers and an index, as transformers names them."""
    if count == 1:
        partial(folder, 1).rename(folder / SINGLE)
        return
    names = {number: f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)}
    for number, name in names.items():
        partial(folder, number).rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[at] for name, at in places.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def write_configuration(file: GGUFFile, folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer's files, into a new folder."""
    if folder.exists() and any(folder.iterdir()):
        raise TargetError(f"{folder} is not empty; name a new folder")
    codec = read_codec(file.path)
    folder.mkdir(parents=True, exist_ok=True)
    model_configuration(file).save_pretrained(folder)
    codec.tokenizer.save(str(folder / "tokenizer.json"))
    tokens, _ = read_tokens(file)
    special = {f"{role}_token": tokens[token_id] for role, token_id in special_tokens(file, tokens).items()}
    kept = {
        name: text for name, text in special.items() if name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    templates = read_templates(file)
    listed: Any = [{"name": name, "template": text} for name, text in templates.items()]
    chat = {"chat_template": templates.get(DEFAULT_TEMPLATE) if len(templates) == 1 else listed} if templates else {}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | kept | chat)
    write_json(folder / "generation_config.json", {"eos_token_id": sorted(codec.stop_ids)})


def model_configuration(file: GGUFFile) -> Any:
    """transformers' configuration; rotary factors that the file holds as a tensor become its ``longrope``."""
    config = read_configuration(file)
    model = model_of(config, file.path)
    config.architectures = [type(model).__name__]
    factors = GGUFWeights(file, config).rope_factors()
    if factors is not None:
        if (kind := config.rope_parameters["rope_type"]) != "default":
            raise TargetError(
                f"{file.path}: rotary factors beside {kind} scaling have no place in a folder's config.json"
            )
        limit, values = config.max_position_embeddings, factors.tolist()
        config.rope_parameters = config.rope_parameters | {
            "rope_type": "longrope", "short_factor": values, "long_factor": values, "factor": 1.0,
            "attention_factor": 1.0, "original_max_position_embeddings": limit,
        }  # fmt: skip
    return config


def write_json(path: Path, content: dict[str, Any]) -> None:
    """For people too."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
