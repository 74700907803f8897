"""The section `deployments`: Prefect's, with the keys, the flows of this project and their parameters checked.

Prefect passes over a key that it does not know and refuses a wrong parameter only when the flow runs, at night. It
refuses a wrong cron expression or time zone when one deploys. A text with `{{ … }}` is a template, which Prefect fills
in; nothing checks it here.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from tasks.settings.fields import Frozen, NotNegative, Positive


class Upcycle(Frozen):
    """Parameters of flows/upcycle.py."""

    pipeline: str
    refresh: bool = False
    force: list[str] | None = None


class Retrain(Frozen):
    """Parameters of flows/retrain.py."""

    pipeline: str
    publish: bool = False
    force: bool = False
    tolerance: NotNegative = 0.0
    code: bool = False


class Tokenise(Frozen):
    """Parameters of flows/tokenise.py."""

    corpus: str
    runner: Literal["process", "thread", "dask"] = "process"
    workers: Positive | None = None
    address: str | None = None


class Weigh(Frozen):
    """Parameters of flows/weigh.py."""

    pipeline: str = "demo"
    runner: Literal["process", "thread", "dask"] = "process"
    workers: Positive | None = None
    address: str | None = None


FLOWS: dict[str, type[Frozen]] = {"upcycle": Upcycle, "retrain": Retrain, "tokenise": Tokenise, "weigh": Weigh}
_ENTRYPOINT = re.compile(r"(?:\./)?flows[./](?P<module>\w+)(?:\.py)?:(?P<flow>\w+)")


class Schedule(Frozen):
    """When a deployment runs: one of cron, interval (seconds, or ISO 8601) and rrule."""

    cron: str | None = None
    interval: Any = None
    rrule: str | None = None
    timezone: str | None = None
    anchor_date: Any = None
    active: bool | str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    slug: str | None = None
    replaces: str | None = None
    day_or: bool | str | None = None

    @model_validator(mode="after")
    def _when(self) -> Self:
        fields = [field for field in ("cron", "interval", "rrule") if getattr(self, field) is not None]
        if len(fields) != 1:
            raise ValueError(f"give one of cron, interval and rrule; given: {', '.join(fields) or 'none'}")
        return self


class Deployment(Frozen):
    """An entry of Prefect's; the keys are those that Prefect 3 reads."""

    name: str = Field(min_length=1)
    entrypoint: str = Field(min_length=1)
    description: str | None = None
    version: str | None = None
    version_type: str | None = None
    tags: str | list[Any] | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    enforce_parameter_schema: bool | None = None
    flow_name: str | None = None
    work_pool: dict[str, Any] | None = None
    concurrency_limit: Annotated[int, Field(gt=0)] | dict[str, Any] | None = None
    schedule: Schedule | None = None
    schedules: list[Schedule] | None = None
    paused: bool | None = None
    build: Any = None
    push: Any = None
    pull: Any = None
    triggers: Any = None
    sla: Any = None

    @property
    def flow(self) -> str | None:
        """Which flow of this project it runs, if it is one."""
        match = _ENTRYPOINT.fullmatch(self.entrypoint)
        return match["flow"] if match else None

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The parameters of every way in which it is run: by hand, and by each schedule that overrides some."""
        schedules = [*(self.schedules or []), *([self.schedule] if self.schedule else [])]
        return [self.parameters, *(self.parameters | each.parameters for each in schedules if each.parameters)]

    @model_validator(mode="after")
    def _parameters(self) -> Self:
        match = _ENTRYPOINT.fullmatch(self.entrypoint)
        if match is None:
            return self  # a flow of the user's own
        if match["flow"] not in FLOWS or match["flow"] != match["module"]:
            known = ", ".join(f"flows/{name}.py:{name}" for name in FLOWS)
            raise ValueError(f"entrypoint = {self.entrypoint!r} is no flow; the flows are {known}")
        parameters = FLOWS[match["flow"]]
        for call in self.calls:
            try:
                parameters.model_validate({key: value for key, value in call.items() if not _template(value)})
            except ValidationError as error:
                faults = [fault for fault in error.errors() if not _template(call.get(str(fault["loc"][0])))]
                if faults:
                    text = "; ".join(_parameter_fault(fault) for fault in faults)
                    raise ValueError(f"{text}; {match['flow']} takes {', '.join(parameters.model_fields)}") from None
        return self


def _parameter_fault(fault: Any) -> str:
    where = ".".join(str(part) for part in ("parameters", *fault["loc"]))
    if fault["type"] == "missing":
        return f"{where} is missing"
    message = "unknown" if fault["type"] == "extra_forbidden" else fault["msg"]
    return f"{where} = {fault['input']!r}: {message}"


def _template(value: Any) -> bool:
    return isinstance(value, str) and "{{" in value
