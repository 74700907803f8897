"""MediaWiki dumps: articles as title and plain text.

Streams the XML through expat, page by page. A dump has no document type declaration; one that has is refused, so no
entity can be defined and expanded. Redirects, other namespaces (talk, templates, …) and empty pages are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import IO, Any
from xml.parsers import expat

from tasks.corpus import streams
from tasks.corpus.records import Document, Tally

BLOCK = 1 << 20
_FIELDS = {"title", "ns", "text"}
_NOT_PROSE_TAGS = {"ref", "references", "table", "gallery", "timeline"}
_NOT_PROSE_LINKS = re.compile(r"\s*(file|image|category|[a-z]{2,3}(-[a-z]+)?)\s*:", re.IGNORECASE)
_LINE_EDGES = re.compile(r"[ \t]*\n[ \t]*")
_BLANK_LINES = re.compile(r"\n{3,}")


class _Pages:
    """expat handlers that collect pages: {"title", "ns", "text", "redirect"}."""

    def __init__(self) -> None:
        self.done: list[dict[str, str]] = []
        self._page: dict[str, str] = {}
        self._text: list[str] | None = None
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters
        self.parser.StartDoctypeDeclHandler = self._doctype

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "page":
            self._page = {}
        elif name == "redirect":
            self._page["redirect"] = attributes.get("title", "")
        self._text = [] if name in _FIELDS else None

    def _characters(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def _end(self, name: str) -> None:
        if name in _FIELDS and self._text is not None:
            self._page[name] = "".join(self._text)
        elif name == "page":
            self.done.append(self._page)
        self._text = None

    def _doctype(self, *_: Any) -> None:
        raise ValueError("it has a document type declaration, which no MediaWiki dump has")


def documents(file: IO[bytes], path: str, *, tally: Tally) -> Iterator[Document]:
    """The articles of a dump. Counts `redirect` and `namespace` (pages that are no articles) and bad records."""
    for row, page in enumerate(_pages(file, path, tally=tally)):
        tally.rules["read"] += 1
        markup = page.get("text", "")
        if "redirect" in page or markup[:9].upper() == "#REDIRECT":
            tally.rules["redirect"] += 1
        elif page.get("ns", "0") != "0":
            tally.rules["namespace"] += 1
        else:
            body = plain(markup)
            yield Document(text=f"{page.get('title', '')}\n\n{body}\n" if body else "", source=path, row=row)


def plain(markup: str) -> str:
    """Wikitext without its markup: no templates, tables, references, files or categories."""
    import mwparserfromhell
    from mwparserfromhell.nodes import Node, Tag, Wikilink

    def is_prose(node: Node) -> bool:
        if isinstance(node, Tag):
            return str(node.tag).strip().lower() not in _NOT_PROSE_TAGS
        return not (isinstance(node, Wikilink) and _NOT_PROSE_LINKS.match(str(node.title)))

    code = mwparserfromhell.parse(markup)
    code.nodes = [node for node in code.nodes if is_prose(node)]
    text = code.strip_code(normalize=True, collapse=True)
    return _BLANK_LINES.sub("\n\n", _LINE_EDGES.sub("\n", text)).strip()


def _pages(file: IO[bytes], path: str, *, tally: Tally) -> Iterator[dict[str, str]]:
    pages, count = _Pages(), 0
    while True:
        try:
            block = file.read(BLOCK)
            pages.parser.Parse(block, not block)
        except (expat.ExpatError, ValueError, *streams.CORRUPT) as error:
            yield from pages.done
            count += len(pages.done)
            tally.rules["read"] += 1
            tally.reject("corrupt stream", path, count, detail=f"{error}; nothing after this page was read")
            return
        yield from pages.done
        count += len(pages.done)
        pages.done = []
        if not block:
            return
