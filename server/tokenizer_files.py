"""The tokenizer files of a model folder, read as transformers' AutoTokenizer reads them, because it reads them.

What a folder means is spread over ``tokenizer.json``, ``tokenizer_config.json``, ``special_tokens_map.json``,
``added_tokens.json``, ``chat_template.jinja``, ``additional_chat_templates/`` and the model type in ``config.json``,
by rules that change with transformers; so they are asked of it instead of being written down a second time.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT_TEMPLATE = "default"


class TokenizerFileError(ValueError):
    """The folder's tokenizer cannot be read; the message names the file and what to do."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files say.

    special_tokens: by role, such as ``bos_token``; eos_id: the tokenizer's own end of text; templates: chat templates
    by name, ``default`` among them; template_fault: why there is none although the folder has one.
    """

    tokenizer: Tokenizer
    special_tokens: dict[str, Any] = field(default_factory=dict)
    eos_id: int | None = None
    templates: dict[str, str] = field(default_factory=dict)
    template_fault: str | None = None


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read a model folder. Errors: TokenizerFileError."""
    fault, config = template_fault(folder), read_config(folder)
    check_tokens(folder, config)
    plain = {name: token_text(value) if name.endswith("_token") else value for name, value in config.items()}
    if fault is None and plain == config:
        loaded = load(folder)
    else:
        with tempfile.TemporaryDirectory() as copies:
            # Some rules go by the last two names of the path.
            copy = Path(copies, *folder.resolve().parts[-2:])
            copy_readable(folder, copy, plain, with_templates=fault is None)
            loaded = load(copy, named=folder)
    tokenizer: Tokenizer = loaded.backend_tokenizer
    # What a file says of truncation and padding is how it was last used in training; transformers resets both.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(loaded.split_special_tokens)
    template = loaded.chat_template
    templates = template if isinstance(template, dict) else {} if template is None else {DEFAULT_TEMPLATE: template}
    return TokenizerFiles(tokenizer, dict(loaded.special_tokens_map), loaded.eos_token_id, dict(templates), fault)


def load(folder: Path, named: Path | None = None) -> Any:
    """AutoTokenizer's tokenizer, or the plain reading of ``tokenizer.json`` where it has no class for the folder."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    named = named or folder
    file = named / TOKENIZER_FILE
    readers: list[Callable[[], Any]] = [
        lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    ]
    if file.is_file():
        readers.append(lambda: PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
    reasons: list[str] = []
    for reader in readers:
        try:
            loaded = reader()
        except Exception as error:  # transformers raises what its many readers raise
            reasons.append(f"{type(error).__name__}: {error}".split("\n")[0])
            continue
        if getattr(loaded, "backend_tokenizer", None) is not None:
            if reasons:
                logger.info("%s is read as it stands: %s", file, reasons[0])
            return loaded
        reasons.append(f"{type(loaded).__name__} has no fast form")
    if not file.is_file():
        raise TokenizerFileError(
            f"{file} does not exist; a model folder needs the tokenizer in that form, or in one that transformers "
            f"turns into it ({reasons[-1]})"
        )
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers package raises bare Exception
        raise TokenizerFileError(f"{file} cannot be read as a tokenizer: {error}") from error
    raise TokenizerFileError(f"the tokenizer files beside {file} cannot be read: {reasons[-1]}")


def template_fault(folder: Path) -> str | None:
    """Why the folder's chat templates cannot even be read as text; None where they can, or where there are none."""
    for file in (folder / TEMPLATE_FILE, *sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))):
        if file.is_file():
            try:
                file.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError) as error:
                return f"{file} cannot be read as UTF-8 text: {error}"
    template = read_config(folder).get("chat_template")
    if template is None or isinstance(template, str):
        return None
    is_named = isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in template
    )
    if is_named:
        return None
    return f"chat_template in {folder / CONFIG_FILE} is neither a text nor a list of objects with name and template"


def check_tokens(folder: Path, config: dict[str, Any]) -> None:
    """Errors: TokenizerFileError naming file and key of a token that is none, which transformers would not name."""
    added = config.get("added_tokens_decoder", {})
    if not isinstance(added, dict):
        raise TokenizerFileError(
            f"added_tokens_decoder in {folder / CONFIG_FILE} is {shown(added)}, which is no object"
        )
    for name, value in added.items():
        if not name.removeprefix("-").isdecimal() or not isinstance(token_text(value), str | dict):
            raise TokenizerFileError(
                f"added_tokens_decoder in {folder / CONFIG_FILE} has {name!r}: {shown(value)}; an id and a token are "
                "wanted"
            )
    for file, fields in ((CONFIG_FILE, config), (SPECIAL_FILE, read_object(folder / SPECIAL_FILE))):
        for name, value in fields.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name in SPECIAL_TOKENS and value is not None and not isinstance(text, str):
                raise TokenizerFileError(f"{name} in {folder / file} is {shown(value)}; a token's text is wanted")
    for name, value in read_object(folder / ADDED_FILE).items():
        if not isinstance(value, int):
            raise TokenizerFileError(f"{folder / ADDED_FILE} gives the token {name!r} the id {shown(value)}")


def shown(value: Any) -> str:
    """The beginning of a JSON value."""
    return json.dumps(value)[:80]


def read_config(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``; empty where it is absent. Errors: TokenizerFileError."""
    return read_object(folder / CONFIG_FILE)


def read_object(file: Path) -> dict[str, Any]:
    """A file's JSON object; empty where it is absent. Errors: TokenizerFileError."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerFileError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerFileError(f"{file} must hold a JSON object, not {type(content).__name__}")
    return content


def token_text(value: Any) -> Any:
    """A token that is written as an object with nothing but a text, which transformers refuses, as that text."""
    is_plain = isinstance(value, dict) and isinstance(value.get("content"), str) and "__type" not in value
    return value["content"] if is_plain else value


def copy_readable(folder: Path, copy: Path, config: dict[str, Any], *, with_templates: bool) -> None:
    """The folder's small files with another ``tokenizer_config.json``, and without chat templates that are no text."""
    copy.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file() and file.suffix in {".json", ".model", ".txt"} and not file.name.endswith(".index.json"):
            shutil.copyfile(file, copy / file.name)
    if with_templates:
        for file in (folder / TEMPLATE_FILE, *(folder / TEMPLATE_FOLDER).glob("*.jinja")):
            if file.is_file():
                (copy / file.relative_to(folder)).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy / file.relative_to(folder))
    else:
        config = {name: value for name, value in config.items() if name != "chat_template"}
    (copy / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
