"""The section `pipelines`: which model and corpus, and the knobs of each stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Tag

from tasks.settings.control import Control
from tasks.settings.evaluate import Evaluate
from tasks.settings.fields import Frozen, Name
from tasks.settings.mixture import Mixture
from tasks.settings.partition import Partition
from tasks.settings.pretrain import Pretrain


class Pipeline(Frozen):
    model: Name
    corpus: Name
    mixture: Mixture
    partition: Partition
    pretrain: Pretrain
    control: Annotated[
        Annotated[Literal["pruned", "none"], Tag("name")] | Annotated[Control, Tag("mapping")],
        Discriminator(lambda value: "name" if isinstance(value, str) else "mapping"),
    ] = "none"
    """pruned: also make, train and evaluate the parent pruned to the same active size (tasks/control). A mapping: the
    same, with settings of its own."""
    evaluate: Evaluate

    @property
    def pruned(self) -> Control | None:
        """The settings of the pruned baseline; None without one."""
        if isinstance(self.control, Control):
            return self.control
        return None if self.control == "none" else Control()
