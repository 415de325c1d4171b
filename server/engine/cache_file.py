"""Prompts already read, on disk: the prefix cache's pages from one start of the server to the next.

A page is worth something only to the model that wrote it, computed in the same way to the last bit. So the file names
both, every page carries a digest of its tokens and bytes, and before any page is taken over the target reads the first
one again and must come to the same bits. Whatever does not agree, the file is not used, and is written anew at the end.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from server.engine.measure import replaced
from server.engine.prefix_cache import CachedRows, PrefixCache
from server.targets.target import PrefillChunk, Target

logger = logging.getLogger(__name__)

METADATA, FORMAT = "dovetail", "prompts 1"
SLOT = 0


class CacheFileError(ValueError):
    """A file of cached prompts that cannot be used; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A page in the file: the page before it in its text, whose texts it may serve, its tokens, how many tensors it
    holds, and the digest of all that."""

    parent: int | None
    salt: str
    token_ids: list[int]
    num_parts: int
    digest: str


class PromptFile:
    """A prefix cache's file. ``identity``: the model, and all that its rows' bits depend on."""

    def __init__(self, prefixes: PrefixCache, file: Path, identity: str) -> None:
        self.prefixes = prefixes
        self.file = file
        self.identity = identity

    def load(self) -> None:
        """Take over the file's pages where there is one of this very model, and say so. No request may be running."""
        if not self.file.exists():
            return
        try:
            self._take_over(*self._read())
        except CacheFileError as reason:
            logger.warning("%s is not used and will be written anew: %s", self.file, reason)
        else:
            logger.info("%d pages of prompts are known from %s", self.prefixes.pages.num_pages, self.file)

    def save(self) -> None:
        """Write every page, those used longest ago first. The file is replaced whole, or stays, with a warning.

        Nobody but its owner may read it: it holds what clients sent.
        """
        entries, tensors = self._pages()
        header = {"format": FORMAT, "identity": self.identity, "page_size": self.prefixes.pages.page_size}
        header |= {"pages": [list(vars(entry).values()) for entry in entries]}
        try:
            with replaced(self.file) as partial:
                partial.unlink(missing_ok=True)
                partial.touch(mode=0o600)
                save_file(tensors, partial, {METADATA: json.dumps(header)})
        except (OSError, SafetensorError) as error:
            logger.warning("the prompts that were read cannot be kept in %s: %s", self.file, error)
        else:
            logger.info("%d pages of prompts are kept in %s", len(entries), self.file)

    def _pages(self) -> tuple[list[Entry], dict[str, Tensor]]:
        """Every page once, behind the one before it in its text; its tensors are named by its place."""
        places: dict[int, int] = {}
        entries: list[Entry] = []
        tensors: dict[str, Tensor] = {}
        for salt, pages in self.prefixes.pages.texts():
            parent: int | None = None
            for page in pages:
                if id(page) not in places:
                    places[id(page)] = place = len(entries)
                    parts = [part.contiguous() for part in parts_of(page.content)]
                    tensors |= {f"{place}.{index}": part for index, part in enumerate(parts)}
                    known_by = digest(parent, salt, page.key, parts)
                    entries.append(Entry(parent, salt, list(page.key), len(parts), known_by))
                parent = places[id(page)]
        return entries, tensors

    def _read(self) -> tuple[list[Entry], list[CachedRows]]:
        """Errors: CacheFileError for anything but a whole file of this model."""
        try:
            with safe_open(self.file, framework="pt") as stored:
                entries = read_entries(stored.metadata() or {}, self.identity, self.prefixes.pages.page_size)
                return entries, [read_page(stored, place, entry) for place, entry in enumerate(entries)]
        except CacheFileError:
            raise
        except (SafetensorError, OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            raise CacheFileError(f"it is damaged ({type(error).__name__}: {error})") from error

    def _take_over(self, entries: Sequence[Entry], pages: Sequence[CachedRows]) -> None:
        """Errors: CacheFileError where the model does not come to the bits that are in the file."""
        size = self.prefixes.pages.page_size
        if entries and not is_reread(self.prefixes.target, entries[0], pages[0]):
            raise CacheFileError("the model reads its first page otherwise than when it was written")
        parents = {entry.parent for entry in entries}
        for last in (place for place in range(len(entries)) if place not in parents):
            way = way_to(entries, last)

            def read(start: int, way: Sequence[int] = way) -> tuple[CachedRows, int]:
                rows = pages[way[start // size]]
                return rows, rows.num_bytes

            token_ids = [token_id for place in way for token_id in entries[place].token_ids]
            self.prefixes.pages.add(token_ids, read, entries[last].salt)


def parts_of(content: CachedRows) -> tuple[Tensor, ...]:
    """What a page holds, its features last."""
    return *content.rows, content.features


def digest(parent: int | None, salt: str, token_ids: Sequence[int], parts: Sequence[Tensor]) -> str:
    """Of everything that a page is, so that no bit of it changes unseen."""
    kinds = [[str(part.dtype), list(part.shape)] for part in parts]
    total = hashlib.blake2b(json.dumps([parent, salt, list(token_ids), kinds]).encode(), digest_size=16)
    for part in parts:
        total.update(part.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def read_entries(metadata: dict[str, str], identity: str, page_size: int) -> list[Entry]:
    """Errors: CacheFileError for another model's pages; ValueError, TypeError or KeyError for what is no header."""
    header: dict[str, Any] = json.loads(metadata[METADATA])
    if header["format"] != FORMAT:
        raise CacheFileError("another version of the server wrote it")
    if header["identity"] != identity or header["page_size"] != page_size:
        raise CacheFileError("another model wrote it, or this one with other weights, tokenizer or settings")
    entries = [Entry(*fields) for fields in header["pages"]]
    if any(entry.parent is not None and not 0 <= entry.parent < place for place, entry in enumerate(entries)):
        raise CacheFileError("it is damaged: a page stands before the one it goes on from")
    return entries


def read_page(stored: Any, place: int, entry: Entry) -> CachedRows:
    """Errors: CacheFileError for a page that is not what was written; SafetensorError where it is missing."""
    parts = [stored.get_tensor(f"{place}.{index}") for index in range(entry.num_parts)]
    if digest(entry.parent, entry.salt, entry.token_ids, parts) != entry.digest:
        raise CacheFileError(f"it is damaged: page {place} is not what was written")
    return CachedRows(tuple(parts[:-1]), parts[-1])


def is_reread(target: Target, entry: Entry, page: CachedRows) -> bool:
    """Whether the target comes to the same bits for the first page of a text."""
    try:
        features = target.prefill(PrefillChunk(SLOT, entry.token_ids)).features
        again = parts_of(CachedRows(target.read_rows(SLOT, 0, len(entry.token_ids)), features))
    finally:
        target.release(SLOT)
    kept = parts_of(page)
    return len(again) == len(kept) and all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


def way_to(entries: Sequence[Entry], last: int) -> list[int]:
    """The pages of a text, from its first to ``last``."""
    way = [last]
    while (parent := entries[way[0]].parent) is not None:
        way.insert(0, parent)
    return way
