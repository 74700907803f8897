"""The section `deployments`: Prefect's, with the parameters of the flows here and the schedules checked.

Prefect passes over a key that it does not know and refuses a wrong parameter only when the flow runs, at night.
A text with `{{ … }}` is a template, which Prefect fills in; it is not looked at.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

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

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_CRON = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 7, _DAYS),
    ("second", 0, 59, ()),
)
_ALIASES = {"@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"}


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
        given = [field for field in ("cron", "interval", "rrule") if getattr(self, field) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of cron, interval and rrule; given: {', '.join(given) or 'none'}")
        if self.cron is not None and not _template(self.cron) and (fault := cron_fault(self.cron)):
            raise ValueError(f"cron = {self.cron!r}: {fault}")
        if self.timezone and not _template(self.timezone):
            try:
                ZoneInfo(self.timezone)
            except (ValueError, OSError, KeyError):
                raise ValueError(
                    f"timezone = {self.timezone!r} is not known; give a name of the IANA database, such as "
                    "Europe/Berlin or UTC"
                ) from None
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


def cron_fault(text: str) -> str | None:
    """What is wrong with a cron expression as Prefect reads it (croniter's grammar, no R and H); None if nothing is.

    Stricter in one thing: a step longer than its field, and day 0 of a month, are slips.
    """
    fields = text.lower().split()
    if fields in [[alias] for alias in _ALIASES]:
        return None
    if len(fields) not in (5, 6):
        return f"has {len(fields)} fields; write 5: minute, hour, day of month, month, day of week"
    for field, (name, low, high, words) in zip(fields, _CRON, strict=False):
        numbered = field
        for number, word in enumerate(words, low):
            numbered = numbered.replace(word, str(number))
        most = 6 if name == "day of week" and len(fields) == 6 else high
        if not all(_is_part(part, name, low, most) for part in numbered.split(",")):
            also = f" or {words[0]} to {words[-1]}" if words else ""
            return f"{field!r} is no {name}, which is {low} to {high}{also}"
    return None


def _is_part(part: str, name: str, low: int, high: int) -> bool:
    """`*`, `N`, `N-M`, each with or without `/STEP`; L, ? and the weeks of a month where they have a meaning."""
    span, slash, step = part.partition("/")
    if slash and not (step.isdigit() and 1 <= int(step) <= high):
        return False
    if span == "*" or (span == "?" and name.startswith("day")) or (span == "l" and name == "day of month"):
        return True
    if name == "day of week" and re.fullmatch(r"l[0-7]|[0-7]#[1-5]", span):
        return True
    ends = [int(end) if end.isdigit() else -1 for end in span.split("-")]
    return len(ends) <= 2 and all(low <= end <= high for end in ends)


def _parameter_fault(fault: Any) -> str:
    where = ".".join(str(part) for part in ("parameters", *fault["loc"]))
    if fault["type"] == "missing":
        return f"{where} is missing"
    message = "unknown" if fault["type"] == "extra_forbidden" else fault["msg"]
    return f"{where} = {fault['input']!r}: {message}"


def _template(value: Any) -> bool:
    return isinstance(value, str) and "{{" in value
