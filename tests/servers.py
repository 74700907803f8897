"""A web server of a folder on this machine, with or without byte ranges."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Whole(SimpleHTTPRequestHandler):
    """Sends whole files, whatever is asked for, and notes the ranges asked for."""

    ranges: list[str]

    def do_GET(self) -> None:
        self.ranges.append(self.headers.get("Range", ""))
        super().do_GET()

    def log_message(self, format: str, *_: object) -> None:
        """Nothing is logged."""


class Ranges(Whole):
    """Sends the bytes asked for."""

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted is None:
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
        self.ranges.append(wanted[0])
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        self.wfile.write(content[start:stop])
        return None


@contextmanager
def serving(folder: Path, handler: type[Whole] = Whole) -> Iterator[str]:
    """Serve a folder, which has no ETags, while the block runs; yields its address."""
    folder.mkdir(exist_ok=True)
    handler.ranges = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
