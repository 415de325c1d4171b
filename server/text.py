"""Text in, token ids out and back, for one model: encode, incremental decode, chat template, stop ids.

Built from the files that stand beside the weights, or by whoever has a tokenizer, its special tokens and its templates
from somewhere else (a GGUF file's metadata).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from server.chat_template import ChatTemplate, TemplateFault
from server.token_bytes import TokenBytes
from server.tokenizer_files import DEFAULT_TEMPLATE, TokenizerFileError, read_tokenizer

logger = logging.getLogger(__name__)

REPLACEMENT = "\ufffd"
# An unfinished character is at most 3 bytes, and a byte-fallback decoder shows every byte of the run it stands in,
# the up to 4 bytes of the character before it included, as one replacement character each.
MAX_HELD_REPLACEMENTS = 8
# Tokens of a prompt that its continuation is decoded behind: a character spans fewer.
NUM_CONTEXT = 16
# Bytes of a text that are read whatever the context is: what tokens it has may be asked of a text that does not fit.
MIN_READ_BYTES = 2**20
TOOLS_TEMPLATE = "tool_use"
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


class TextError(ValueError):
    """Text that this model's codec cannot take, or a codec that cannot be built."""


class InvalidText(TextError):
    """The text is not Unicode that UTF-8 can carry, or holds NUL."""


class TextTooLong(TextError):
    """The text has more bytes than the model's context can hold."""


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

    def __init__(self, tokenizer: Tokenizer, hidden_ids: frozenset[int], prompt_ids: Sequence[int] = ()) -> None:
        """``prompt_ids``: what the text continues."""
        self.tokenizer = tokenizer
        self.hidden_ids = hidden_ids
        shown = [token_id for token_id in prompt_ids if token_id not in hidden_ids]
        self._begin_window(shown[-NUM_CONTEXT:])

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        if token_id in self.hidden_ids:
            return ""
        self.pending.append(token_id)
        text = self._window_text()
        num_held = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_HELD_REPLACEMENTS)
        stable = text[: len(text) - num_held]
        emitted = stable[self.num_emitted :]
        if num_held == 0 and stable:
            self._begin_window(self.pending)
        else:
            self.num_emitted += len(emitted)
        return emitted

    def flush(self) -> str:
        """What is still held, an unfinished character as U+FFFD. The decoder starts afresh."""
        text = self._window_text()[self.num_emitted :]
        self._begin_window([])
        return text

    def _begin_window(self, context: list[int]) -> None:
        self.context = context
        self.pending: list[int] = []
        self.num_emitted = 0
        self.before = self._decode(context) if context else ""

    def _window_text(self) -> str:
        before = self.before
        whole = self._decode(self.context + self.pending)
        if not whole.startswith(before):  # a prompt may end inside a character, which the first tokens complete
            before = before.rstrip(REPLACEMENT)
        return whole[len(before) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))


class TextCodec:
    """One model's tokenizer, chat templates and stop ids. Safe to call from several threads.

    vocab_size: ids below it are usable; stop_ids: every end-of-text id that the model's files name; templates: Jinja by
    name, ``default`` unless it is the only one; template_variables: what a template is given beside the conversation,
    such as ``bos_token``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop_ids: frozenset[int] = frozenset(),
        templates: Mapping[str, str] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = stop_ids
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.hidden_ids = frozenset(special) | stop_ids
        self.special_texts = sorted(special.values(), key=len, reverse=True)
        self.templates = {name: ChatTemplate(source) for name, source in (templates or {}).items()}
        self.template_variables = dict(template_variables or {})
        self.template_fault: str | None = None
        self.model_vocab_size: int | None = None
        self.context_length: int | None = None
        self.max_bytes: int | None = None

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """What bytes each token stands for."""
        return TokenBytes(self.tokenizer)

    @classmethod
    def from_folder(cls, folder: Path) -> TextCodec:
        """Read a model folder. Errors: TextError naming the file that is missing or cannot be read."""
        try:
            files = read_tokenizer(folder)
        except TokenizerFileError as error:
            raise TextError(str(error)) from error
        codec = cls(
            files.tokenizer,
            stop_ids=read_stop_ids(folder, files.eos_id),
            templates=files.templates,
            template_variables=files.special_tokens,
        )
        codec.template_fault = files.template_fault
        return codec

    def fit(self, model_vocab_size: int) -> None:
        """Refuse from now on texts that need a token the model has no embedding for.

        Errors: TextError where the tokenizer's own vocabulary, added tokens aside, is larger than the model's.
        """
        own = max(self.tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        if own > model_vocab_size:
            raise TextError(
                f"the tokenizer has {own} tokens and the model's embedding {model_vocab_size} (vocab_size in "
                "config.json): it is another model's tokenizer; put the model's own tokenizer.json beside the weights"
            )
        self.model_vocab_size = model_vocab_size
        beyond = sorted(token_id for token_id in self.stop_ids if not 0 <= token_id < model_vocab_size)
        if beyond:
            logger.warning(
                "eos_token_id %s is passed over: the model has embeddings for 0 to %d",
                ", ".join(map(str, beyond)), model_vocab_size - 1,
            )  # fmt: skip
            self.stop_ids -= frozenset(beyond)

    def hold_to(self, context_length: int) -> None:
        """Refuse from now on, unread, texts of more bytes than so many of the longest tokens have: reading a text takes
        a second and hundreds of megabytes for each million bytes."""
        longest = max((len(text.encode()) for text in self.tokenizer.get_vocab()), default=1)
        self.context_length = context_length
        self.max_bytes = max(MIN_READ_BYTES, context_length * longest)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can be asked."""
        return bool(self.templates)

    def check_templates(self) -> str | None:
        """What is wrong with a chat template, in a sentence, and None where nothing is."""
        for template in self.templates.values():
            try:
                template.check()
            except TemplateFault as fault:
                return f"the model's chat template {fault}"
        return self.template_fault

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised. Errors: InvalidText, TextTooLong."""
        self._check_length([text])
        return self._checked(self.tokenizer.encode(check_text(text), add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def stream(
        self,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        shown: Sequence[str] = (),
        stop_ids: frozenset[int] = frozenset(),
    ) -> IncrementalDecoder:
        """A decoder for one text as it grows; with ``prompt_ids`` for what continues that prompt, not a new text.

        ``shown``: special tokens that are part of the text all the same, such as those around calls of tools;
        ``stop_ids``: those that never are, where special tokens are not skipped.
        """
        shown_ids = {self.tokenizer.token_to_id(text) for text in shown} - self.stop_ids
        hidden_ids = self.hidden_ids - shown_ids if skip_special_tokens else stop_ids
        return IncrementalDecoder(self.tokenizer, hidden_ids, prompt_ids)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
    ) -> list[int]:
        """Token ids of a conversation in the model's own template; ``variables`` are given to it as well.

        ``continue_final``: the text ends with the last message, for the answer to go on with.

        A special token written inside a message is taken as ordinary text, so that a user cannot end the turn.
        Errors: ChatTemplateError, InvalidText, TextTooLong.
        """
        pieces = self.render_chat(
            messages, tools=tools, variables=variables, add_generation_prompt=add_generation_prompt,
            continue_final=continue_final,
        )  # fmt: skip
        self._check_length(pieces)
        return self._checked(
            [i for piece in pieces for i in self.tokenizer.encode(piece, add_special_tokens=False).ids]
        )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
    ) -> list[str]:
        """The template's text, cut where a special token stands inside a message: each piece is encoded on its own.

        NUL, which no message may hold, marks those places while the template runs. Errors: as ``chat``.
        """
        template = self._template_for(tools)
        given = {
            **self.template_variables,
            **(variables or {}),
            "messages": [with_reasoning_names(self._as_plain_text(message)) for message in messages],
            "tools": self._as_plain_text(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = template.render(given)
        except TemplateFault as fault:
            raise ChatTemplateError(f"the model's chat template {fault}") from fault
        if continue_final:
            text = up_to_last(text, given["messages"][-1].get("content") or "")
        return text.split("\0")

    def _template_for(self, tools: Sequence[Mapping[str, Any]] | None) -> ChatTemplate:
        if self.template_fault is not None:
            raise ChatTemplateError(f"chat is not possible: {self.template_fault}")
        if not self.templates:
            raise ChatTemplateError("this model has no chat template; use /v1/completions, or a model that has one")
        if tools and TOOLS_TEMPLATE in self.templates:
            return self.templates[TOOLS_TEMPLATE]
        if DEFAULT_TEMPLATE in self.templates:
            return self.templates[DEFAULT_TEMPLATE]
        raise ChatTemplateError(
            f"the model has chat templates named {', '.join(sorted(self.templates))} and none named {DEFAULT_TEMPLATE}"
        )

    def _check_length(self, texts: Sequence[str]) -> None:
        num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        if self.max_bytes is not None and num_bytes > self.max_bytes:
            raise TextTooLong(
                f"This model's maximum context length is {self.context_length} tokens, and texts of at most "
                f"{self.max_bytes} bytes are read. However, this one has {num_bytes} bytes; shorten it"
            )

    def _checked(self, token_ids: list[int]) -> list[int]:
        limit = self.model_vocab_size
        if limit is not None and (largest := max(token_ids, default=0)) >= limit:
            text = self.tokenizer.id_to_token(largest)
            raise InvalidText(
                f"the text holds {text!r}, which is token {largest}; the model has embeddings for {limit} tokens only"
            )
        return token_ids

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


def up_to_last(text: str, content: str) -> str:
    """The text as far as the last message's content. Errors: ChatTemplateError where that is empty or not in it."""
    content = content.strip()
    start = text.rfind(content) if content else -1
    if start < 0:
        raise ChatTemplateError("the last message cannot be continued: it is empty, or the template changes its text")
    return text[: start + len(content)]


def with_reasoning_names(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message's reasoning under every name that templates know it by, as transformers gives it."""
    reasoning = next((message[name] for name in REASONING_NAMES if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is absent."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TextError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise TextError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def read_stop_ids(folder: Path, eos_id: int | None) -> frozenset[int]:
    """End-of-text ids of the generation config, the model's config and the tokenizer (``eos_id``) together."""
    found: set[int] = set() if eos_id is None else {eos_id}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        value = read_json(file).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise TextError(f"eos_token_id in {file} is {str(value)[:80]}; a whole number or a list of them is wanted")
        found.update(ids)
    return frozenset(found)
