from __future__ import annotations

import bz2
from pathlib import Path

from tests.corpus.readers.reading import read

PAGE = "<page><title>{title}</title><ns>{ns}</ns>{extra}<revision><text>{text}</text></revision></page>"


def dump(*pages: str) -> bytes:
    return ("<mediawiki xmlns='http://www.mediawiki.org/xml/export-0.10/'>" + "".join(pages) + "</mediawiki>").encode()


def test_a_dump_gives_articles_without_markup_and_says_what_is_none(tmp_path: Path) -> None:
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
    result, rejects = read(tmp_path, format="mediawiki")
    assert [(document.text, document.row) for document in result] == [
        ("Köln\n\nKöln is a big city.\n\nHistory\nOld & grey.\n", 0),
        ("", 3),
    ]
    assert [(r.rule, r.row, r.bad) for r in rejects] == [("redirect", 1, False), ("namespace", 2, False)]


def test_a_dump_cut_short_gives_the_pages_before_and_is_counted(tmp_path: Path) -> None:
    pages = dump(*(PAGE.format(title=f"t{i}", ns=0, extra="", text="some words") for i in range(5)))
    (tmp_path / "wiki.xml").write_bytes(pages[:-60])
    result, rejects = read(tmp_path, format="mediawiki")
    assert [document.text for document in result] == [f"t{i}\n\nsome words\n" for i in range(4)]
    assert [(reject.rule, reject.row, reject.bad) for reject in rejects] == [("corrupt stream", 4, True)]


def test_entities_that_would_expand_are_refused(tmp_path: Path) -> None:
    doctype = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'
    (tmp_path / "wiki.xml").write_bytes(doctype + b"<mediawiki><page><title>&b;</title></page></mediawiki>")
    result, (reject,) = read(tmp_path, format="mediawiki")
    assert (result, reject.rule) == ([], "corrupt stream")
    assert "document type declaration" in reject.detail


def test_an_over_long_page_is_rejected_and_the_next_one_read(tmp_path: Path) -> None:
    texts = ["a", "word " * 1000, "b"]
    pages = [PAGE.format(title=f"t{i}", ns=0, extra="", text=text) for i, text in enumerate(texts)]
    (tmp_path / "wiki.xml").write_bytes(dump(*pages))
    result, rejects = read(tmp_path, format="mediawiki", max_record_bytes=4000)
    assert [document.text for document in result] == ["t0\n\na\n", "t2\n\nb\n"]
    assert [(reject.rule, reject.row) for reject in rejects] == [("over-long record", 1)]


def test_a_tag_without_end_is_damage_and_is_not_kept_in_memory(tmp_path: Path) -> None:
    page = PAGE.format(title="t", ns=0, extra="", text="a")
    (tmp_path / "wiki.xml").write_bytes(b"<mediawiki>" + page.encode() + b"<page x='" + b"a" * (5 << 20))
    result, (reject,) = read(tmp_path, format="mediawiki", max_record_bytes=1 << 20)
    assert len(result) == 1
    assert (reject.rule, reject.row) == ("corrupt stream", 1)
    assert "a tag is longer than max_record_bytes" in reject.detail
