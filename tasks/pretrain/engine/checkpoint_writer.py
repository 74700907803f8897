"""Writing a checkpoint while training goes on.

DeepSpeed hands what a checkpoint holds to its checkpoint engine, file by file. `CheckpointCollector` notes the
tensors. A `Write` copies them into the CPU's memory, writes the files and brings them to the disk, in one thread.
Weights and optimizer states stay as they are until the next optimizer step, which waits for the copies: forward and
backward passes run beside the copying, and all of training beside the writing. The copies take the checkpoint's size
in memory until they are written.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, cast

import torch
import xxhash
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_KNOWN = [LossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed's files hold besides tensors and plain values; nothing else is unpickled."""


def load(path: Path | str, *, map_location: Any = "cpu") -> Any:
    """Read one of DeepSpeed's files without running code from it."""
    with torch.serialization.safe_globals(_KNOWN):
        return torch.load(path, map_location=map_location, weights_only=True)


class Copies:
    """Where the tensors of a checkpoint will be copied to, each once."""

    def __init__(self) -> None:
        self._pairs: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
        cuda = torch.cuda.is_available()
        self._device = torch.cuda.current_device() if cuda else None  # a thread has the first one otherwise
        self._event = torch.cuda.current_stream().record_event() if cuda else None

    def stand_in(self, value: Any) -> Any:
        """`value` with empty CPU tensors in place of its tensors, which `fill` fills; containers are new ones."""
        if isinstance(value, torch.Tensor):
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
            if value.numel() == 0 or key not in self._pairs:  # empty ones share no memory, whatever data_ptr says
                copy = torch.empty(value.shape, dtype=value.dtype)
                if value.numel() == 0:
                    return copy
                self._pairs[key] = value.detach(), copy
            return self._pairs[key][1]
        if isinstance(value, dict):
            return {name: self.stand_in(item) for name, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self.stand_in(item) for item in value)
        return value

    def fill(self) -> None:
        if self._event is None:
            self._fill()
            return
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_event(self._event)
            self._fill()

    def _fill(self) -> None:
        for source, copy in self._pairs.values():
            copy.copy_(source)
        self._pairs.clear()


class CheckpointCollector(CheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """A checkpoint engine for DeepSpeed that only collects what is to be written."""

    def __init__(self) -> None:
        super().__init__()
        self.name = type(self).__name__
        self._files: list[tuple[Path, Any]] = []
        self._copies: Copies | None = None
        self._write: Write | None = None
        self.waited = 0.0
        """Seconds that optimizer steps waited for copies."""

    @classmethod
    def install(cls, engine: DeepSpeedEngine) -> Self:
        """Put a new one into an engine, whose optimizer steps then wait for the copies."""
        engine.checkpoint_engine = collector = cls()
        engine.basic_optimizer.register_step_pre_hook(lambda *_: collector._wait_for_copies())
        return collector

    def create(self, info: CheckpointCommitInfo) -> None:
        self._files, self._copies = [], Copies()

    def save(self, state_dict: Any, path: str) -> None:
        assert self._copies is not None
        self._files.append((Path(path), self._copies.stand_in(state_dict)))

    def load(self, path: str, map_location: Any = None) -> Any:
        return load(path, map_location=map_location)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True

    def preserves_storage_sharing(self) -> bool:
        return False  # a view is copied alone, without the buffer that it is cut from

    def write(self, texts: dict[Path, str], *, then: Callable[[dict[str, dict[str, Any]]], None]) -> Write:
        """Begin to write what was collected, and `texts`; see Write."""
        assert self._copies is not None
        self._write = Write(self._files, self._copies, texts, then=then)
        self._files, self._copies = [], None
        return self._write

    def _wait_for_copies(self) -> None:
        if self._write is not None and not self._write.copied.is_set():
            start = time.perf_counter()
            self._write.copied.wait()
            self.waited += time.perf_counter() - start


class Write:
    """Files on their way to the disk, in a thread."""

    def __init__(
        self,
        files: list[tuple[Path, Any]],
        copies: Copies,
        texts: dict[Path, str],
        *,
        then: Callable[[dict[str, dict[str, Any]]], None],
    ) -> None:
        """Begin.

        Args:
            files: torch files.
            copies: what they hold.
            texts: text files.
            then: called in the thread when all of these are on the disk, with {bytes, xxh3_128} of each by name.
        """
        self._files, self._copies, self._texts, self._then = files, copies, texts, then
        self.copied, self.written, self.done = threading.Event(), threading.Event(), threading.Event()
        self.error: Exception | None = None
        """Why it failed; what it had written is gone then."""
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    def _run(self) -> None:
        made: list[Path] = []
        try:
            self._copies.fill()
            self.copied.set()
            written = {}
            while self._files:
                path, content = self._files.pop(0)
                made.append(path)
                with _Hashed(path) as file:
                    torch.save(content, cast("IO[bytes]", file))
                    del content  # a file's copies are dropped as soon as it is written
                    written[path.name] = file.sync()
            for path, text in self._texts.items():
                made.append(path)
                with _Hashed(path) as file:
                    file.write(text.encode())
                    written[path.name] = file.sync()
            self.written.set()
            self._then(written)
        except Exception as error:  # raised again by whoever waits
            self.error = error
            for path in made:
                path.unlink(missing_ok=True)
        finally:
            for event in (self.copied, self.written, self.done):
                event.set()


class _Hashed:
    """A file that is hashed on its way to the disk, so that what was to be written is known whatever becomes of it."""

    def __init__(self, path: Path) -> None:
        self._file, self._hash, self._size = path.open("wb"), xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        size = self._file.write(data)
        self._size += size
        return size

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> dict[str, Any]:
        """Bring it to the disk; returns {bytes, xxh3_128}."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._size, "xxh3_128": self._hash.hexdigest()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
