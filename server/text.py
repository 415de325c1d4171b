"""Text in, token ids out and back, for one model: encode, incremental decode, chat template, stop ids.

Reads the files that stand beside the weights (``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``,
``generation_config.json``, ``config.json``); neither torch nor transformers is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
# An unfinished character is at most 3 bytes, and a byte-fallback decoder shows every byte of the run it stands in,
# the up to 4 bytes of the character before it included, as one replacement character each.
MAX_HELD_REPLACEMENTS = 8


class TextError(ValueError):
    """Text that this model's codec cannot take, or a codec that cannot be built."""


class InvalidText(TextError):
    """The text is not Unicode that UTF-8 can carry, or holds NUL."""


class ChatTemplateError(TextError):
    """The model has no chat template, or its template refuses these messages."""


def check_text(text: str) -> str:
    """Return ``text``; raise InvalidText for lone surrogates and NUL."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidText(
            f"the text holds a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}; "
            "send whole Unicode characters"
        ) from error
    if (position := text.find("\0")) >= 0:
        raise InvalidText(f"the text holds a NUL character at character {position}; remove it")
    return text


class IncrementalDecoder:
    """Token ids in, text out, token by token; never gives half a character.

    Decodes a window that begins one emission back, because a decoder may treat the first token of a text in its own
    way (a leading space, say). Replacement characters at the window's end may be the beginning of a character and are
    held back until they are disproved.
    """

    def __init__(self, tokenizer: Tokenizer, hidden_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.hidden_ids = hidden_ids
        self.context: list[int] = []
        self.pending: list[int] = []
        self.num_emitted = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """The text these tokens complete; may be empty."""
        return "".join(self._push_one(token_id) for token_id in token_ids if token_id not in self.hidden_ids)

    def flush(self) -> str:
        """What is still held, an unfinished character as U+FFFD. The decoder starts afresh."""
        text = self._window_text()[self.num_emitted :]
        self.context, self.pending, self.num_emitted = [], [], 0
        return text

    def _push_one(self, token_id: int) -> str:
        self.pending.append(token_id)
        text = self._window_text()
        num_held = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_HELD_REPLACEMENTS)
        stable = text[: len(text) - num_held]
        emitted = stable[self.num_emitted :]
        if num_held == 0 and stable:
            self.context, self.pending, self.num_emitted = self.pending, [], 0
        else:
            self.num_emitted += len(emitted)
        return emitted

    def _window_text(self) -> str:
        before = self._decode(self.context) if self.context else ""
        return self._decode(self.context + self.pending)[len(before) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))


class TextCodec:
    """One model's tokenizer, chat template and stop ids. Safe to call from several threads.

    vocab_size: ids below it are usable; stop_ids: every end-of-text id that the model's files name.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop_ids: frozenset[int] = frozenset(),
        chat_template: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.hidden_ids = frozenset(special) | stop_ids
        self.special_texts = sorted(special.values(), key=len, reverse=True)
        self.template_variables = dict(template_variables or {})
        self.template = None
        if chat_template is not None:
            try:
                self.template = template_environment().from_string(chat_template)
            except TemplateError as error:
                raise ChatTemplateError(f"the model's chat template is not valid Jinja: {error}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> TextCodec:
        """Read a model folder. Errors: TextError naming the file that is missing or cannot be read."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise TextError(f"{file} does not exist; a model folder needs the tokenizer in that form")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the tokenizers package raises bare Exception
            raise TextError(f"{file} cannot be read as a tokenizer: {error}") from error
        config = read_json(folder / "tokenizer_config.json")
        template_file = folder / "chat_template.jinja"
        template = template_file.read_text(encoding="utf-8") if template_file.is_file() else named_template(config)
        specials = {name: token_text(value) for name, value in config.items() if name.endswith("_token")}
        return cls(
            tokenizer,
            stop_ids=read_stop_ids(folder, tokenizer, specials.get("eos_token")),
            chat_template=template,
            template_variables={name: text for name, text in specials.items() if text is not None},
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can be asked."""
        return self.template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised. Errors: InvalidText."""
        return list(self.tokenizer.encode(check_text(text), add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def stream(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for one text as it grows."""
        return IncrementalDecoder(self.tokenizer, self.hidden_ids if skip_special_tokens else frozenset())

    def chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation in the model's own template.

        A special token written inside a message is taken as ordinary text, so that a user cannot end the turn: NUL,
        which no message may hold, marks the places where the rendered text is cut before it is encoded.
        Errors: ChatTemplateError, InvalidText.
        """
        if self.template is None:
            raise ChatTemplateError("this model has no chat template; use /v1/completions, or a model that has one")
        turns = [self._as_plain_text(message) for message in messages]
        try:
            rendered = self.template.render(
                messages=turns,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.template_variables,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error
        pieces = (self.tokenizer.encode(piece, add_special_tokens=False).ids for piece in rendered.split("\0"))
        return [token_id for ids in pieces for token_id in ids]

    def _as_plain_text(self, value: Any) -> Any:
        if isinstance(value, str):
            text = check_text(value)
            for special in self.special_texts:
                if len(special) > 1:
                    text = text.replace(special, f"{special[0]}\0{special[1:]}")
            return text
        if isinstance(value, Mapping):
            return {name: self._as_plain_text(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._as_plain_text(inner) for inner in value]
        return value


def template_environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it: no attribute of an object can be reached that could run code."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment


def raise_exception(message: str) -> NoReturn:
    """What a template calls to refuse a conversation."""
    raise TemplateError(message)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is absent."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TextError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TextError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def token_text(value: Any) -> str | None:
    """A token's text as ``tokenizer_config.json`` writes it: a string, or an object with ``content``."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def named_template(config: Mapping[str, Any]) -> str | None:
    """The chat template kept in ``tokenizer_config.json``; of several, the one named ``default``."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def read_stop_ids(folder: Path, tokenizer: Tokenizer, eos_token: str | None) -> frozenset[int]:
    """End-of-text ids of the generation config, the model's config and the tokenizer together."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    if eos_token is not None and (token_id := tokenizer.token_to_id(eos_token)) is not None:
        found.add(token_id)
    return frozenset(found)
