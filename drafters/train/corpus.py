"""Text for a small code model: gather, clean, tokenise, pack.

A corpus is a list of sources. A source is a folder of Python files or a file of records; it says how many characters
of it may be used. Documents are deduplicated, checked against benchmark texts that must stay unseen, shuffled with a
seed and packed into one file of token ids, so that a training run is a walk through that file.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import lzma
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
MAX_FILE_BYTES = 200_000
MIN_FILE_CHARS = 200
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "site-packages", "idle_test", "lib2to3", "autogen", "encodings", "pydoc_data"}
)
SHINGLE_WORDS = 13  # the usual length for finding benchmark text in a training set

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# The longer marks first: that of UTF-16 begins that of UTF-32.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


class CorpusError(ValueError):
    """A source of training text is missing, empty or malformed."""


@dataclass(frozen=True)
class Source:
    """One origin of text.

    kind: ``python`` (a folder of .py files; ``stdlib`` and ``site-packages/NAME`` name the running Python's own),
    ``jsonl`` (records; ``field`` holds the text) or ``chat`` (records rendered as question and answer turns).
    max_chars: how much of it to take, after shuffling its documents.
    """

    kind: str
    path: str
    max_chars: int
    field: str = "text"
    question_field: str = "question"
    answer_field: str = "answer"


def resolve(path: str) -> Path:
    """``stdlib`` and ``site-packages/NAME`` stand for folders of the running Python."""
    if path == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    if path.startswith("site-packages/"):
        return Path(sysconfig.get_path("purelib")) / path.removeprefix("site-packages/")
    return Path(path).expanduser()


def python_files(root: Path) -> Iterator[str]:
    """Texts of the .py files under ``root``: no tests, nothing generated or huge."""
    for file in sorted(root.rglob("*.py")):
        folders = file.relative_to(root).parts[:-1]
        if any(name in SKIPPED_FOLDERS or name.startswith("test") for name in folders):
            continue
        if file.stat().st_size > MAX_FILE_BYTES:
            continue
        text = file.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").strip()
        if len(text) >= MIN_FILE_CHARS and "\ufffd" not in text:
            yield text + "\n"


def records(file: Path) -> Iterator[dict[str, Any]]:
    """JSON objects, one a line; ``.xz`` is unpacked on the way. Errors: CorpusError naming the line that is none."""
    for _, record in numbered_records(file):
        if isinstance(record, CorpusError):
            raise record
        yield record


def numbered_records(file: Path) -> Iterator[tuple[int, Any | CorpusError]]:
    """(line, JSON value) of every line that is not blank; for a line that is not JSON the CorpusError that says so."""
    for number, line in enumerate(text_lines(file), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            yield number, CorpusError(f"{file}, line {number}: not JSON ({error.msg}); mend or remove the line")
        except RecursionError:
            yield number, CorpusError(f"{file}, line {number}: nested too deep; remove the line")


def text_lines(file: Path) -> Iterator[str]:
    """Lines of a text file in UTF-8, or in what its byte-order mark says; ``.xz`` is unpacked on the way.

    Errors: CorpusError naming the file and the line that is neither.
    """
    opener: Callable[..., Any] = lzma.open if file.suffix == ".xz" else open
    number = 0
    try:
        with opener(file, "rb") as beginning:
            first = beginning.read(4)
        encoding = next((name for mark, name in BYTE_ORDER_MARKS if first.startswith(mark)), "utf-8")
        with opener(file, "rt", encoding=encoding) as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007  (the fault's place)
                yield line
    except UnicodeError as error:
        raise CorpusError(
            f"{file} is not UTF-8 text, somewhere after line {number} ({error}); save it as UTF-8"
        ) from error
    except (lzma.LZMAError, EOFError) as error:
        raise CorpusError(f"{file} cannot be unpacked: {error}") from error


def read_text(file: Path) -> str:
    """A whole text file. Errors: as ``text_lines``."""
    return "".join(text_lines(file))


def chat_text(messages: Iterable[tuple[str, str]]) -> str:
    """Turns in the bundled chat template, as ``CHAT_TEMPLATE`` would render them."""
    return "".join(f"{TURN_START}{role}\n{content}{TURN_END}\n" for role, content in messages)


def documents(source: Source) -> Iterator[str]:
    """All documents of one source, in file order."""
    path = resolve(source.path)
    if not path.exists():
        raise CorpusError(f"{path} does not exist; the source {source.path!r} of the recipe names it")
    if source.kind == "python":
        yield from python_files(path)
    elif source.kind == "jsonl":
        yield from (record[source.field].strip() + "\n" for record in records(path))
    elif source.kind == "chat":
        for record in records(path):
            yield chat_text([("user", record[source.question_field]), ("assistant", record[source.answer_field])])
    else:
        raise CorpusError(f"source kind {source.kind!r} is unknown; allowed are python, jsonl and chat")


def shingles(text: str) -> set[int]:
    """Hashes of every run of 13 words, letter case and punctuation aside."""
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(len(words) - SHINGLE_WORDS + 1)}


def collect(sources: Iterable[Source], unseen: Iterable[str], seed: int) -> list[str]:
    """Documents of all sources, shuffled; duplicates and anything that shares 13 words with ``unseen`` are dropped."""
    forbidden: set[int] = set()
    for text in unseen:
        forbidden |= shingles(text)
    chooser = random.Random(seed)
    digests: set[bytes] = set()
    chosen: list[str] = []
    for source in sources:
        candidates = list(documents(source))
        chooser.shuffle(candidates)
        taken = num_repeated = num_forbidden = 0
        for text in candidates:
            if taken >= source.max_chars:
                break
            digest = hashlib.sha256(text.encode()).digest()
            if digest in digests:
                num_repeated += 1
            elif forbidden and not forbidden.isdisjoint(shingles(text)):
                num_forbidden += 1
            else:
                digests.add(digest)
                chosen.append(text)
                taken += len(text)
        logger.info(
            "%s: %d characters; dropped %d repeated and %d that share text with a benchmark",
            source.path, taken, num_repeated, num_forbidden,
        )  # fmt: skip
    chooser.shuffle(chosen)
    return chosen


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer for code: a newline and the indentation after it are one piece, digits stand alone."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    pieces = r"\n+ *| ?_*\p{L}+|\p{N}| ?[^\s\p{L}\p{N}_]+|_+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path, context_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` (chat template included) as transformers reads them."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder)


def pack(texts: list[str], tokenizer: Any, end_id: int) -> NDArray[np.uint16]:
    """Token ids of all documents, each closed by ``end_id``, in one row."""
    pieces: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        pieces.extend(encoding.ids)
        pieces.append(end_id)
    return np.asarray(pieces, dtype=np.uint16)
