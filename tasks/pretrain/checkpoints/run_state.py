"""Where a run stands: what a checkpoint holds besides DeepSpeed's files and the random states."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.pretrain.step_result import StepResult


@dataclass(kw_only=True)
class RunState:
    """JSON-able, the same on every rank."""

    weights: dict[str, float]
    """Of the domains, in use from the next step on."""
    windows_seen: dict[str, int]
    step: int = 0
    predicted: int = 0
    """Tokens that the loss was over."""
    load_before: list[list[int]] = field(default_factory=list)
    load_after: list[list[int]] = field(default_factory=list)
    """Tokens per sparse layer and expert on the validation windows."""
    seconds: dict[str, float] = field(default_factory=lambda: {"steps": 0.0, "saving": 0.0, "total": 0.0})
    resumed_from: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def restore(self, saved: dict[str, Any]) -> None:
        """Become the state in what a checkpoint holds; its other entries are left."""
        for entry in fields(self):
            setattr(self, entry.name, saved[entry.name])

    def add(self, result: StepResult, *, seconds: float) -> None:
        """Count a step that was taken or left out."""
        for domain, count in result.windows_by_domain().items():
            self.windows_seen[domain] += count
        self.predicted += result.predicted
        self.seconds["steps"] += seconds
