"""What a model folder says of its tokenizer is read as transformers' AutoTokenizer reads it, on made and real ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from server.text import ChatTemplateError, TextCodec, TextError

ASSETS = Path(__file__).resolve().parents[2] / "server" / "assets" / "target"
TEXTS = [
    "Hello, world! It 's fine .", " two  spaces\n\tand a tab", "Grüße 🌍 日本語", "x<|mark|>y", "<s>a</s><extra>", "",
    "def f(x):\n    return x ** 2\n",
]  # fmt: skip
FAST = "PreTrainedTokenizerFast"
CORPUS = ["the quick brown fox jumps over the lazy dog", "def f(x): return x + 1", "Grüße aus 日本"] * 20
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "hello", "reasoning": "a greeting"},
    {"role": "user", "content": "and now?"},
]
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.reasoning_content }}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}"
    "{% endfor %}{% if tools %}{{ tools | tojson(indent=2, sort_keys=True, separators=(',', ': ')) }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LOOPS = (
    "{% set ns = namespace(found=false) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% set ns.found = true %}{{ m.content.strip()[:4] | upper }}{{ dict(a=1) | tojson }}{{ strftime_now('%Y') }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}{{ ns.found }}"
)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|mark|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentence_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=450, special_tokens=pieces, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


MADE = {"byte-level": byte_level, "sentence pieces": sentence_pieces, "unigram": unigram}
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
EXTRA = {
    "content": "<extra>",
    "lstrip": True,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}
FILES: dict[str, dict[str, Any]] = {
    "roles in the configuration": {"tokenizer_config.json": {**NAMED, "tokenizer_class": FAST}},
    "roles in the map only": {
        "special_tokens_map.json": {"bos_token": EXTRA | {"content": "<s>"}, "eos_token": "</s>"}
    },
    "roles that are new tokens": {"tokenizer_config.json": {"eos_token": "<|new end|>", "pad_token": "<pad>"}},
    "a role as an object": {"tokenizer_config.json": {**NAMED, "eos_token": {"content": "</s>"}}},
    "added tokens": {"tokenizer_config.json": {**NAMED, "added_tokens_decoder": {"900": EXTRA}}},
    "special by the configuration": {
        "tokenizer_config.json": {**NAMED, "extra_special_tokens": ["lazy"], "tokenizer_class": "LlamaTokenizer"}
    },
    "begin and end are added": {
        "tokenizer_config.json": {**NAMED, "add_bos_token": True, "add_eos_token": True}, "config.json": "llama",
    },
    "begin is not added": {
        "tokenizer_config.json": {**NAMED, "add_bos_token": False, "tokenizer_class": "LlamaTokenizerFast"}
    },
    "another model's class": {
        "tokenizer_config.json": {**NAMED, "tokenizer_class": "Qwen2Tokenizer"}, "config.json": "qwen2",
    },
    "an unknown class": {
        "tokenizer_config.json": {**NAMED, "tokenizer_class": "OurTokenizer"}, "config.json": "llama",
    },
}  # fmt: skip


def make_folder(folder: Path, tokenizer: Tokenizer, files: dict[str, Any]) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "vocab_size": 1000}
    for name, content in ({"config.json": config} | files).items():
        written = {"model_type": content, "vocab_size": 1000} if isinstance(content, str) else content
        (folder / name).write_text(json.dumps(written))
    return folder


def assert_same(folder: Path) -> None:
    """Ids with and without what is put around a text, the text back, the end of text."""
    codec = TextCodec.from_folder(folder)
    config_file = folder / "tokenizer_config.json"
    if config_file.is_file():  # transformers knows no role that is an object with nothing but a text
        config_file.write_text(config_file.read_text().replace('{"content": "</s>"}', '"</s>"'))
    wanted = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = wanted(text, add_special_tokens=special)["input_ids"]
            assert codec.encode(text, add_special_tokens=special) == ids
            assert codec.decode(ids) == wanted.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert wanted.eos_token_id is None or wanted.eos_token_id in codec.stop_ids


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_made_tokenizers(make: Callable[[], Tokenizer], files: dict[str, Any], tmp_path: Path) -> None:
    assert_same(make_folder(tmp_path, make(), files))


@pytest.mark.parametrize("block", ["truncation", "padding"])
def test_what_training_left_behind_is_reset(block: str, tmp_path: Path) -> None:
    tokenizer = byte_level()
    if block == "truncation":
        tokenizer.enable_truncation(3)
    else:
        tokenizer.enable_padding(length=64, direction="left")
    assert_same(make_folder(tmp_path, tokenizer, FILES["roles in the configuration"]))


def test_the_bundled_tokenizer(tmp_path: Path) -> None:
    assert_same(Path(shutil.copytree(ASSETS, tmp_path / "bundled", ignore=shutil.ignore_patterns("*.safetensors"))))


def test_a_folder_without_any_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(TextError, match=r"tokenizer\.json does not exist"):
        TextCodec.from_folder(tmp_path)


@pytest.mark.parametrize("where", ["file", "configuration", "list", "additional"])
def test_templates_wherever_they_stand(where: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, byte_level(), {})
    config: dict[str, Any] = dict(NAMED)
    if where == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    elif where == "configuration":
        config["chat_template"] = TEMPLATE
    elif where == "list":
        named = {"default": LOOPS, "tool_use": TEMPLATE}
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    else:
        (folder / "chat_template.jinja").write_text(LOOPS)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    wanted, codec = AutoTokenizer.from_pretrained(folder), TextCodec.from_folder(folder)
    for tools in (None, TOOLS):
        ids = wanted.apply_chat_template(
            CONVERSATION, tools=tools, tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert codec.chat(CONVERSATION, tools=tools) == ids


@pytest.mark.parametrize("template", [b"\xff\xfe{{ 1 }}", b"{% if %}", b"{% for m in messages %}"])
def test_a_bad_template_costs_only_the_chat(template: bytes, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, byte_level(), FILES["roles in the configuration"])
    (folder / "chat_template.jinja").write_bytes(template)
    codec = TextCodec.from_folder(folder)
    assert codec.check_templates()
    assert codec.encode("the fox")
    with pytest.raises(ChatTemplateError, match=r"not valid Jinja|cannot be read as UTF-8"):
        codec.chat(CONVERSATION)


def test_a_template_that_is_no_text_costs_only_the_chat(tmp_path: Path) -> None:
    config = {**NAMED, "chat_template": [{"name": "default"}]}
    folder = make_folder(tmp_path, byte_level(), {"tokenizer_config.json": config})
    codec = TextCodec.from_folder(folder)
    assert codec.stop_ids == {1}
    with pytest.raises(ChatTemplateError, match="neither a text nor a list"):
        codec.chat(CONVERSATION)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("special_tokens_map.json", [], "special_tokens_map.json must hold a JSON object"),
        ("special_tokens_map.json", {"eos_token": []}, "eos_token in .*special_tokens_map.json is \\[\\]"),
        ("added_tokens.json", {"<x>": "7"}, "added_tokens.json gives the token '<x>' the id"),
        ("added_tokens.json", None, "added_tokens.json must hold a JSON object"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder in .*tokenizer_config.json"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 5}}, "added_tokens_decoder in .* has 'x': 5"),
        ("tokenizer_config.json", {"bos_token": ["a"]}, "bos_token in .*tokenizer_config.json"),
    ],
)
def test_a_token_that_is_none_is_named_with_its_file(file: str, content: Any, named: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, byte_level(), {file: content})
    with pytest.raises(TextError, match=named):
        TextCodec.from_folder(folder)


def test_an_end_of_text_beyond_the_embeddings_is_told_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(
        tmp_path, byte_level(), {"config.json": {"model_type": "llama", "eos_token_id": [2, -1, 10**9]}}
    )
    codec = TextCodec.from_folder(folder)
    assert codec.stop_ids >= {2, -1, 10**9}
    codec.fit(codec.vocab_size)
    assert 2 in codec.stop_ids and not codec.stop_ids & {-1, 10**9}
    assert "eos_token_id -1, 1000000000 is passed over" in caplog.text


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<late>"])
    codec = TextCodec.from_folder(make_folder(tmp_path, tokenizer, {}))
    size = tokenizer.get_vocab_size(with_added_tokens=False)
    codec.fit(size)
    assert codec.encode("the fox")
    with pytest.raises(TextError, match=f"'<late>', which is token {size}; the model has embeddings for {size}"):
        codec.encode("the <late> fox")
    with pytest.raises(TextError, match=f"{size} tokens and the model's embedding {size - 1}"):
        codec.fit(size - 1)


@pytest.mark.parametrize("value", ['"2"', '{"id": 2}', "[[2]]", "true", "[2, null]"])
def test_an_end_of_text_that_is_no_number_is_named(value: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, byte_level(), {})
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(TextError, match=r"eos_token_id in .*generation_config\.json"):
        TextCodec.from_folder(folder)
