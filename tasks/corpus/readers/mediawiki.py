"""MediaWiki dumps: articles as title and plain text.

Streams the XML through expat, page by page. A dump has no document type declaration; one that has is refused, so no
entity can be defined and expanded. Redirects, other namespaces (talk, templates, …) and empty pages are dropped.
"""

from __future__ import annotations

import re
from typing import IO, Any
from xml.parsers import expat

from tasks.corpus.readers import streams
from tasks.corpus.readers.base import FileReader, Piece, Records
from tasks.corpus.records import Document, Reject

_FIELDS = {"title", "ns", "text"}
_NOT_PROSE_TAGS = {"ref", "references", "table", "gallery", "timeline"}
_NOT_PROSE_LINKS = re.compile(r"\s*(file|image|category|[a-z]{2,3}(-[a-z]+)?)\s*:", re.IGNORECASE)
_LINE_EDGES = re.compile(r"[ \t]*\n[ \t]*")
_BLANK_LINES = re.compile(r"\n{3,}")


class _Pages:
    """expat handlers that collect pages: {"title", "ns", "text"}, and "redirect" and "over-long" if it is so."""

    def __init__(self, max_record_bytes: int) -> None:
        self._max_record_bytes = max_record_bytes
        self._done: list[dict[str, str]] = []
        self._page: dict[str, str] = {}
        self._text: list[str] | None = None
        self._seen = 0
        self._fed = 0
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters
        self._parser.StartDoctypeDeclHandler = self._doctype

    def feed(self, block: bytes) -> None:
        """Parse the next block; an empty one ends the dump."""
        self._parser.Parse(block, not block)
        self._fed += len(block)
        if self._fed - self._parser.CurrentByteIndex > self._max_record_bytes:
            raise ValueError(f"a tag is longer than max_record_bytes = {self._max_record_bytes}")

    def take(self) -> list[dict[str, str]]:
        """The pages finished since the last call."""
        done, self._done = self._done, []
        return done

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "page":
            self._page = {}
            self._seen = 0
        elif name == "redirect":
            self._page["redirect"] = attributes.get("title", "")
        self._text = [] if name in _FIELDS else None

    def _characters(self, data: str) -> None:
        if self._text is None:
            return
        self._seen += len(data.encode())
        if self._seen > self._max_record_bytes:
            self._page["over-long"] = ""
            self._text.clear()
        else:
            self._text.append(data)

    def _end(self, name: str) -> None:
        if name in _FIELDS and self._text is not None:
            self._page[name] = "".join(self._text)
        elif name == "page":
            self._done.append(self._page)
        self._text = None

    def _doctype(self, *_: Any) -> None:
        raise ValueError("it has a document type declaration, which no MediaWiki dump has")


class MediawikiReader(FileReader):
    """The articles of a dump. Rejects `redirect` and `namespace` (pages that are no articles) are no faults of it."""

    def records(self, file: IO[bytes], piece: Piece) -> Records:
        name = piece.path
        pages, row, block = _Pages(self.max_record_bytes), 0, b" "
        while block:
            damage = None
            try:
                block = file.read(streams.BLOCK)
                pages.feed(block)
            except (expat.ExpatError, ValueError, *streams.CORRUPT) as error:
                damage, block = f"{error}; nothing after this page was read", b""
            for page in pages.take():
                yield self._record(page, name, row)
                row += 1
            if damage is not None:
                yield Reject(rule="corrupt stream", source=name, row=row, detail=damage)
                row += 1
        return row

    def _record(self, page: dict[str, str], name: str, row: int) -> Document | Reject:
        markup = page.get("text", "")
        if "redirect" in page or markup[:9].upper() == "#REDIRECT":
            return Reject(rule="redirect", source=name, row=row, bad=False)
        if page.get("ns", "0") != "0":
            return Reject(rule="namespace", source=name, row=row, bad=False)
        if "over-long" in page:
            return self.over_long(name, row)
        body = plain(markup)
        return Document(text=f"{page.get('title', '')}\n\n{body}\n" if body else "", source=name, row=row)


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
