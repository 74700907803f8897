from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.corpus import manifest
from tasks.corpus.sampling.sampler import Sampler, Slot
from tasks.corpus.sampling.windows import Windows
from tasks.pretrain.job import Job
from tasks.settings import Pretrain
from tasks.tools import inspect_run as inspect
from tests.corpus.handmade import corpus, documents


def test_the_steps_after_a_rollback_are_shown_with_the_batches_that_they_really_saw(tmp_path: Path) -> None:
    splits = {name: [documents([30] * 20, seed=seed)] for seed, name in enumerate(("a", "b"))}
    (tmp_path / "corpus").mkdir()
    folder = corpus(tmp_path / "corpus", splits)
    params = Pretrain(tokens=8 * 4 * 8, seq_len=8, batch=4, learning_rate=1e-3)
    run = tmp_path / "runs/p"
    paths = {name: tmp_path / name for name in ("model", "parent", "mixture")}
    Job(pipeline="p", params=params, corpus=folder, workspace=run / "training", **paths).write()

    sampler = Sampler(
        {name: len(Windows(folder, name, "train", seq_len=8)) for name in splits},
        weights={"a": 2, "b": 1},
        seed=0,
        batch=4,
        corpus_sha256=manifest.load(folder).sha256,
    )
    records: list[dict[str, Any]] = [{"kind": "validation", "step": 0, "sampler": sampler.state()}]
    drawn: list[list[Slot]] = []
    for step in (1, 2):
        drawn.append(sampler.next())
        records.append({"kind": "step", "step": step})
    for _ in range(3):  # steps 3, 4 and 5, which were lost
        sampler.next()
    records.append({"kind": "event", "step": 2, "what": "rollback", "sampler": sampler.state()})
    for step in (3, 4, 5):
        drawn.append(sampler.next())
        records.append({"kind": "step", "step": step})
        records.append({"kind": "event", "step": step, "what": "dead_experts"})
    (run / "training/log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    for step, slots in enumerate(drawn, 1):
        shown = inspect.step(run, number=step)
        assert [(slot["domain"], slot["window"]) for slot in shown["slots"]] == slots
