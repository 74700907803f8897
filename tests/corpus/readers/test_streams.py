from __future__ import annotations

import io

import pytest
import zstandard

from tasks.corpus.readers import streams


@pytest.mark.parametrize("ending", ["zst", "zstd"])
def test_zstd_reads_in_small_pieces_give_the_same_bytes(ending: str) -> None:
    content = bytes(range(256)) * 9000
    file = streams.decompress(io.BytesIO(zstandard.ZstdCompressor().compress(content)), f"a.{ending}")
    result = b"".join(iter(lambda: file.read(777), b""))
    assert result == content


def test_skippable_zstd_frames_are_passed_over_and_other_bytes_after_a_frame_are_damage() -> None:
    frame = zstandard.ZstdCompressor().compress(b"text")
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    assert streams.decompress(io.BytesIO(skippable + frame + skippable + frame), "a.zst").read() == b"texttext"
    with pytest.raises(streams.CORRUPT):
        streams.decompress(io.BytesIO(frame + b"something else"), "a.zst").read()


def test_memory_that_runs_out_does_not_make_a_file_a_damaged_one() -> None:
    class Full(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise MemoryError

    error = streams._read_error("a.jsonl", MemoryError())
    assert "Cannot allocate memory" in str(error)
    assert "nothing is known to be wrong with it: free memory" in str(error)
    with pytest.raises(streams.ReadError, match="free memory"):
        io.BufferedReader(streams._Guarded(Full(), "a.jsonl")).read(4)  # type: ignore[arg-type]


def test_the_codec_is_told_by_the_name_before_a_url_s_query() -> None:
    names = {"a.gz": "gzip", "a.zst": "zstd", "a.jsonl": None, "a.what?.gz": "gzip"}
    urls = {"https://host/a.gz?signature=b.c": "gzip", "https://host/a.jsonl?x=b.gz": None}
    for name, codec in (names | urls).items():
        assert streams.codec_of(name) == codec
