"""The page's beginning: who is better at equal active size, by how much, at which speed, and the few figures of it."""

from __future__ import annotations

from tasks.evaluate import answer
from tasks.evaluate.report.results import Results
from tasks.evaluate.report.section import Section, Table


def section(results: Results) -> Section:
    """The sentences of answer.py, those on quality and speed as the lead, and its table."""
    evaluation = results.evaluation
    lead = " ".join(filter(None, (answer.quality(evaluation), answer.speed(evaluation))))
    notes = [sentence for sentence in answer.sentences(evaluation) if sentence not in lead]
    columns, rows = answer.table(results.evaluation)
    group = {"title": "", "basis": "", "rows": rows}
    return Section(title="The answer", lead=lead, notes=notes, tables=[Table(columns=columns, groups=[group])])
