"""The page's beginning: who is better at equal active size, by how much, at which speed, and the few figures of it."""

from __future__ import annotations

from tasks.evaluate import answer
from tasks.evaluate.report.results import Results
from tasks.evaluate.report.section import Section, Table


def section(results: Results) -> Section:
    """The sentences of answer.py, the first one as the lead, and its table."""
    lead, *notes = answer.sentences(results.evaluation) or [""]
    columns, rows = answer.table(results.evaluation)
    group = {"title": "", "basis": "", "rows": rows}
    return Section(title="The answer", lead=lead, notes=notes, tables=[Table(columns=columns, groups=[group])])
