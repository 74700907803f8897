"""What is asked of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tasks.corpus.tokenizer import encoder
from tasks.settings import Evaluate, Task
from tasks.tools.evaluate.checkpoints import Checkpoint
from tasks.tools.evaluate.passages import Passages

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for."""

    checkpoints: list[Checkpoint]
    """The first is compared with each of the others."""
    passages: Passages
    tasks: Sequence[Task] = field(default_factory=list)
    settings: Evaluate = field(default_factory=lambda: Evaluate(seq_len=2))
    """Plug-ins read their own fields of it."""
    batch: int = 4
    dtype: Dtype = "float32"

    @property
    def by_ids(self) -> bool:
        """Whether all of them have the tokenizer of the windows; if not, they are given the windows' text."""
        made = self.passages.reference.fingerprint
        return all(encoder.same_ids(one.tokenizer, made) for one in self.checkpoints)
