from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks import sources
from tasks.corpus import mediawiki, readers, streams
from tasks.corpus.records import CorpusError, Document, Tally

from .texts import sentences

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(path: Path | str, *, format: str = "jsonl", text_field: str = "text") -> tuple[list[Document], Tally]:
    tally = Tally()
    fetched = sources.fetch(f"dir:{path}", Path())
    return list(readers.documents(fetched, format=format, text_field=text_field, tally=tally)), tally


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_lines_are_read_at_any_compression(tmp_path: Path, ending: str) -> None:
    texts = sentences(500, seed=1)
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](lines(texts)))
    found, tally = read(tmp_path)
    assert [document.text for document in found] == texts
    assert [document.row for document in found] == list(range(500))
    assert {document.source for document in found} == {f"a.jsonl{ending}"}
    assert (tally.rules["read"], tally.rules["bad"]) == (500, 0)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_file_of_several_frames_is_read_to_its_end(tmp_path: Path, ending: str) -> None:
    texts = sentences(90, seed=2)
    frames = [COMPRESS[ending](lines(texts[i : i + 30])) for i in (0, 30, 60)]
    (tmp_path / f"a.jsonl{ending}").write_bytes(b"".join(frames))
    found, tally = read(tmp_path)
    assert [document.text for document in found] == texts
    assert tally.rules["bad"] == 0


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
@given(share=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_compressed_stream_cut_anywhere_is_counted_and_never_passes_for_whole(
    tmp_path: Path, ending: str, share: float
) -> None:
    texts = sentences(200, seed=3)
    whole = COMPRESS[ending](lines(texts))
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(whole[: int(share * len(whole))])
    found, tally = read(path)
    assert [document.text for document in found] == texts[: len(found)]
    assert tally.bad == {"corrupt stream": 1}
    assert f"a.jsonl{ending}, row {len(found)}:" in tally.examples["corrupt stream"]


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
def test_a_flipped_byte_in_a_compressed_stream_is_counted(tmp_path: Path, ending: str) -> None:
    texts = sentences(200, seed=4)
    whole = bytearray(COMPRESS[ending](lines(texts)))
    whole[len(whole) // 2] ^= 0xFF
    (tmp_path / f"a.jsonl{ending}").write_bytes(whole)
    _, tally = read(tmp_path)
    assert tally.rules["bad"] >= 1


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (b'{"text": "cut', "invalid JSON"),
        (b'{"text": "\xff\xfe"}', "invalid JSON"),
        (b'{"text": "\\ud800"}', "invalid JSON"),
        (b'["text"]', "not an object"),
        (b'{"body": "a", "id": 1}', "missing field"),
        (b'{"text": null}', "null field"),
        (b'{"text": 5}', "not a string"),
    ],
)
def test_a_bad_line_is_counted_under_its_rule_and_the_rest_is_read(tmp_path: Path, line: bytes, rule: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]) + line + b"\n\n" + lines(["two"]))
    found, tally = read(tmp_path)
    assert [(document.text, document.row) for document in found] == [("one", 0), ("two", 3)]
    assert tally.bad == {rule: 1}
    assert tally.examples[rule].startswith("a.jsonl, row 1: ")
    assert tally.rules["read"] == 3  # the blank line is none


def test_too_many_bad_records_name_file_row_rule_share_and_mend(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["one", "two"]) + b"{\n{\n")
    _, tally = read(tmp_path)
    tally.judge(0.5)
    with pytest.raises(CorpusError, match=r"2 of 4 records are bad \(50.00%\), max_bad allows 49.00%.*") as error:
        tally.judge(0.49)
    for part in ("2 x invalid JSON", "a.jsonl, row 2", "`max_bad`", "`text_field`"):
        assert part in str(error.value)


def test_a_text_file_is_a_document_and_an_invalid_one_is_bad(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffgrün\r\n".encode())
    (tmp_path / "b.txt").write_bytes(b"gr\xfcn")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    found, tally = read(tmp_path, format="text")
    assert [(d.text, d.source, d.row) for d in found] == [("grün\r\n", "a.txt", 0), ("packed", "c.txt.gz", 0)]
    assert tally.bad == {"invalid UTF-8": 1}


def test_parquet_gives_its_text_column_with_nulls_counted(tmp_path: Path) -> None:
    texts = sentences(3000, seed=5)
    column = [None if i == 1500 else text for i, text in enumerate(texts)]
    pq.write_table(pa.table({"id": range(3000), "body": column}), tmp_path / "a.parquet", row_group_size=700)
    found, tally = read(tmp_path, format="parquet", text_field="body")
    assert [document.text for document in found] == texts[:1500] + texts[1501:]
    assert found[-1].row == 2999
    assert tally.bad == {"null field": 1}


def test_parquet_that_lacks_the_column_or_its_tail_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), path)
    with pytest.raises(
        CorpusError, match=r"a.parquet: has no column 'text'; set text_field to one of \['id', 'body'\]"
    ):
        read(path, format="parquet")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CorpusError, match=r"a.parquet: not a readable parquet file .*fetch it again"):
        read(path, format="parquet", text_field="body")


PAGE = "<page><title>{title}</title><ns>{ns}</ns>{extra}<revision><text>{text}</text></revision></page>"


def dump(*pages: str) -> bytes:
    return ("<mediawiki xmlns='http://www.mediawiki.org/xml/export-0.10/'>" + "".join(pages) + "</mediawiki>").encode()


def test_a_dump_gives_articles_without_markup_redirects_and_other_namespaces(tmp_path: Path) -> None:
    markup = (
        "{{Infobox|x=1}}'''Köln''' is a [[city|big city]].&lt;ref&gt;A source&lt;/ref&gt;\n\n\n"
        "[[File:a.jpg|thumb|A caption]]\n== History ==\nOld &amp;amp; grey.\n[[Category:Cities]]\n[[de:Köln]]"
    )
    pages = dump(
        PAGE.format(title="Köln", ns=0, extra="", text=markup),
        PAGE.format(title="Cologne", ns=0, extra="<redirect title='Köln'/>", text="#REDIRECT [[Köln]]"),
        PAGE.format(title="Talk:Köln", ns=1, extra="", text="chatter"),
        PAGE.format(title="Nothing", ns=0, extra="", text="{{stub}}"),
    )
    (tmp_path / "wiki.xml.bz2").write_bytes(bz2.compress(pages))
    found, tally = read(tmp_path, format="mediawiki")
    assert [document.text for document in found] == ["Köln\n\nKöln is a big city.\n\nHistory\nOld & grey.\n", ""]
    assert found[0].row == 0
    assert (tally.rules["read"], tally.rules["redirect"], tally.rules["namespace"]) == (4, 1, 1)


def test_a_dump_cut_short_gives_the_pages_before_and_is_counted(tmp_path: Path) -> None:
    pages = dump(*(PAGE.format(title=f"t{i}", ns=0, extra="", text="some words") for i in range(5)))
    (tmp_path / "wiki.xml").write_bytes(pages[:-60])
    found, tally = read(tmp_path, format="mediawiki")
    assert [document.text for document in found] == [f"t{i}\n\nsome words\n" for i in range(4)]
    assert tally.bad == {"corrupt stream": 1}
    assert "row 4" in tally.examples["corrupt stream"]


def test_entities_that_would_expand_are_refused() -> None:
    doctype = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'
    bomb = doctype + b"<mediawiki><page><title>&b;</title></page></mediawiki>"
    tally = Tally()
    assert list(mediawiki.documents(io.BytesIO(bomb), "wiki.xml", tally=tally)) == []
    assert "document type declaration" in tally.examples["corrupt stream"]


def test_zstd_reads_in_small_pieces_give_the_same_bytes() -> None:
    content = bytes(range(256)) * 9000
    file = streams.decompress(io.BytesIO(COMPRESS[".zst"](content)), "a.zst")
    found = b"".join(iter(lambda: file.read(777), b""))
    assert found == content


@pytest.mark.parametrize(("name", "format"), [("a.jsonl", "jsonl"), ("a.jsonl.gz", "jsonl"), ("a.xml", "mediawiki")])
def test_a_store_that_fails_midway_is_an_error_and_not_a_bad_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, format: str
) -> None:
    class Failing(io.RawIOBase):
        def __init__(self, content: bytes) -> None:
            self._left = content

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            if not self._left:
                raise ConnectionResetError("gone")
            content, self._left = self._left, b""
            return content

    content = COMPRESS[".gz" if name.endswith("gz") else ""](b"<mediawiki>" if format == "mediawiki" else lines(["a"]))
    (tmp_path / name).write_bytes(content)
    fetched = sources.fetch(f"dir:{tmp_path / name}", tmp_path)
    monkeypatch.setattr(type(fetched.fs), "open", lambda *_: Failing(content[:-5]))
    tally = Tally()
    with pytest.raises(streams.ReadError, match=rf"{name}: reading failed \(ConnectionResetError: gone\); run again"):
        list(readers.documents(fetched, format=format, text_field="text", tally=tally))
    assert tally.rules["bad"] == 0
