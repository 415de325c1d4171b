"""A tree over token ids whose nodes are pages of cached rows: what was read once is found again. No torch here.

A page holds what ``page_size`` consecutive positions left behind, and belongs to every text that begins with the tokens
on the way to it, its own included. Texts that begin alike share their pages. Whoever was used longest ago goes first,
and a page never before those behind it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

STREAMED = -1  # before the tokens of a page that a device read


@dataclass(eq=False)
class Page:
    """One node: its content, and the pages of texts that go on behind it, by their tokens."""

    content: Any
    num_bytes: int
    parent: Page | None
    key: tuple[int, ...]
    children: dict[tuple[int, ...], Page] = field(default_factory=dict)


class PageTree:
    """At most ``limit_bytes`` of pages. A salt keeps the texts of one client apart from everybody else's.

    streamed: tokens from a text's beginning whose rows a device read; the pages of those are kept apart from others.
    """

    def __init__(self, page_size: int, limit_bytes: int) -> None:
        self.page_size = page_size
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self.roots: dict[str, Page] = {}
        # Those used longest ago first. Who uses a page uses all before it, and those are put behind it: so the first
        # of all is always the end of a text, and can go.
        self.by_use: OrderedDict[Page, None] = OrderedDict()

    def find(self, token_ids: Sequence[int], salt: str = "", streamed: int = 0) -> list[Page]:
        """The pages of the longest known beginning, in order."""
        found: list[Page] = []
        node = self.roots.get(salt)
        for key in self._keys(token_ids, streamed):
            node = None if node is None else node.children.get(key)
            if node is None:
                break
            found.append(node)
        self._use(found)
        return found

    def add(
        self, token_ids: Sequence[int], read: Callable[[int], tuple[Any, int]], salt: str = "", streamed: int = 0
    ) -> None:
        """Add the whole pages of a text; ``read(start)`` gives content and bytes of a page that is not there yet."""
        node = self.roots.setdefault(salt, Page(None, 0, None, ()))
        path: list[Page] = []
        for number, key in enumerate(self._keys(token_ids, streamed)):
            child = node.children.get(key)
            if child is None:
                content, num_bytes = read(number * self.page_size)
                if num_bytes > self.limit_bytes:
                    break
                child = node.children[key] = Page(content, num_bytes, node, key)
                self.num_bytes += num_bytes
            path.append(child)
            node = child
        self._use(path)
        self._shrink()

    def texts(self) -> list[tuple[str, tuple[Page, ...]]]:
        """Every known text with its salt: its pages in order, up to one that nothing goes on behind.

        Those used longest ago come first.
        """
        found: list[tuple[str, tuple[Page, ...]]] = []
        stack: list[tuple[str, tuple[Page, ...]]] = [
            (salt, (page,)) for salt, root in self.roots.items() for page in root.children.values()
        ]
        while stack:
            salt, pages = stack.pop()
            if not pages[-1].children:
                found.append((salt, pages))
            stack += [(salt, (*pages, page)) for page in pages[-1].children.values()]
        age = {page: number for number, page in enumerate(self.by_use)}
        return sorted(found, key=lambda text: age[text[1][-1]])

    @property
    def num_pages(self) -> int:
        """Pages of all texts."""
        return len(self.by_use)

    def _keys(self, token_ids: Sequence[int], streamed: int) -> Iterator[tuple[int, ...]]:
        for start in range(0, len(token_ids) - self.page_size + 1, self.page_size):
            mark = (STREAMED,) if start + self.page_size <= streamed else ()
            yield (*mark, *token_ids[start : start + self.page_size])

    def _use(self, path: Sequence[Page]) -> None:
        """The pages of a text, from its beginning, are the ones used last."""
        for page in reversed(path):
            self.by_use[page] = None
            self.by_use.move_to_end(page)

    def _shrink(self) -> None:
        """Drop the pages used longest ago, which are the ends of their texts."""
        while self.num_bytes > self.limit_bytes:
            oldest, _ = self.by_use.popitem(last=False)
            assert oldest.parent is not None
            assert not oldest.children
            del oldest.parent.children[oldest.key]
            self.num_bytes -= oldest.num_bytes
        self.roots = {salt: root for salt, root in self.roots.items() if root.children}

    def check_integrity(self) -> None:
        """Raises ValueError where bytes are miscounted, or a page cannot be reached any more."""
        stack, reached = list(self.roots.values()), list[Page]()
        while stack:
            page = stack.pop()
            stack += page.children.values()
            reached += [] if page.parent is None else [page]
        held = sum(page.num_bytes for page in reached)
        if held != self.num_bytes or held > self.limit_bytes:
            raise ValueError(f"pages hold {held} bytes, {self.num_bytes} are counted, {self.limit_bytes} allowed")
        if set(reached) != set(self.by_use):
            raise ValueError(f"{len(reached)} pages hang in the tree, {len(self.by_use)} are ordered by their use")
