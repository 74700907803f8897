"""Measure checkpoints on the same text, and compare the first with the others. A kill costs the part in progress."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import architectures, code, scratch
from tasks.corpus.tokenizer import encoder
from tasks.evaluate import details, likelihood
from tasks.evaluate.downstream import collection, judging
from tasks.moe import counts, device, loss, routing
from tasks.tools.evaluate import checkpoints, comparison
from tasks.tools.evaluate.checkpoints import Checkpoint
from tasks.tools.evaluate.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate(request: Request) -> dict[str, Any]:
    """Judge the checkpoints; what each of them is, where it was measured, and how the first compares.

    Returns:
        text: {source, by: ids or text, seq_len, batch, dtype, domains {domain: {windows, bytes, tokens by ids}},
        unseen: the same of unseen domains}; models: [{path, class, parameters {total, active if known},
        flops_per_token if known, loss and perplexity (by ids alone), bits_per_byte: {domain, mean}, unseen: the
        same, tasks, routing {experts, top_k, balance} and load {domain: [layers][experts]} of a known sparse one,
        changed: of how many texts its tokenizer gives back others, details: what plug-ins measured of a known sparse
        one, seconds}]; difference: [{against, unit, domains {loss, stderr}, unseen, tasks {task: {metric:
        {difference, low, high}}}}], the first minus each other, paired by window and by item; paired {level, draws} of
        the intervals; missing {task: why}; machine.

    Raises:
        ValueError: a checkpoint is damaged, or reads fewer tokens at once than a window has.
    """
    _require_length(request)
    items, missing = collection.versions(request.tasks)
    inputs = {
        "text": scratch.fingerprint(
            [request.passages.source, {d: a.tolist() for d, a in request.passages.ids.items()}]
        ),
        "by_ids": request.by_ids,
        "models": [scratch.digest(one.path) for one in request.checkpoints],
        "tasks": [task.model_dump() for task in request.tasks],
        "items": items,
        "knobs": [request.batch, request.dtype, request.settings.model_dump()],
        "code": code.fingerprint("tasks.tools.evaluate.judge"),
    }
    name = re.sub(r"\W+", "-", str(request.checkpoints[0].path)).strip("-") or "root"
    with scratch.workspace("evaluate-checkpoint", name, inputs=inputs, priority=scratch.last_used) as folder:
        tasks = judging.gather(request.tasks, folder / "tasks", versions=items, missing=missing)
        done = [
            _Judge(request, one, folder=folder / f"model-{i}", tasks=tasks).run()
            for i, one in enumerate(request.checkpoints)
        ]
        result = comparison.summarise(request, done, missing=tasks.missing)
        shutil.rmtree(folder)
    return result


def _require_length(request: Request) -> None:
    for one in request.checkpoints if request.by_ids else ():
        if one.positions is not None and request.passages.seq_len > one.positions:
            raise ValueError(
                f"windows of {request.passages.seq_len} tokens: {one.path} has max_position_embeddings = "
                f"{one.positions}; set --seq-len to {one.positions} or less"
            )


class _Judge:
    """Measures one checkpoint, part by part; a part that is there is not measured again, nor the model loaded."""

    def __init__(self, request: Request, checkpoint: Checkpoint, *, folder: Path, tasks: judging.Judge) -> None:
        self.request, self.checkpoint, self.folder, self.tasks = request, checkpoint, folder, tasks
        self._model: PreTrainedModel | None = None

    def run(self) -> dict[str, Any]:
        """All of its parts: text, and tasks {name: judging.Judge.scores}."""
        print(self.checkpoint.path, flush=True)
        self.folder.mkdir(exist_ok=True)
        text = self._part("text", self._text)
        tasks = self.tasks.scores(self._pair, keep=self.folder / "task", batch=self.request.batch, dtype="auto")
        self._model = None  # a plug-in reads the weights layer by layer
        return {**text, "tasks": tasks, **(self._details() if architectures.is_moe(self.checkpoint.config) else {})}

    def _part(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        try:
            kept = scratch.read_sealed(path)
            print(f"  {name}: already measured, kept", flush=True)
            return kept
        except (FileNotFoundError, ValueError):
            scratch.write_sealed(path, measure())
        return scratch.read_sealed(path)

    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            import torch

            dtype = getattr(torch, self.request.dtype)
            self._model = checkpoints.load(self.checkpoint, dtype=dtype, device=device.default())
        return self._model

    def _text(self) -> dict[str, Any]:
        model, start = self._loaded(), time.perf_counter()
        parameters = {"total": sum(p.numel() for p in model.parameters())}
        known: dict[str, Any] = {}
        if self.checkpoint.known:
            sizes = counts.parameters(model.config)
            parameters = {"total": sizes["total"], "active": sizes["active"]}
            length = self.request.passages.seq_len
            known["flops_per_token"] = counts.flops_per_token(model.config, seq_len=length)["forward"]
            known["experts"] = counts.experts(model.config)
        measured = self._by_ids(model) if self.request.by_ids else self._by_text(model)
        seconds = round(time.perf_counter() - start, 1)
        return {"class": type(model).__name__, "parameters": parameters, **known, **measured, "seconds": seconds}

    def _by_ids(self, model: PreTrainedModel) -> dict[str, Any]:
        ids = self.request.passages.ids
        nats, load = {}, {}
        for domain, ids_BL in ids.items():
            with _counted(model) as load_LE:
                nats[domain] = checkpoints.nats(model, ids_BL, batch=self.request.batch)
            if load_LE is not None:
                load[domain] = load_LE.tolist()
            print(f"  {domain}: {sum(nats[domain]) / likelihood.predicted(ids_BL):.4f} nats/token", flush=True)
        sizes = encoder.token_bytes(self.checkpoint.path)
        return {"nats": nats, "load": load, "counted": likelihood.counts(ids, token_bytes=sizes)}

    def _by_text(self, model: PreTrainedModel) -> dict[str, Any]:
        """The same of the windows' text in its own tokens; `changed` counts texts that its tokenizer alters."""
        own = encoder.load_encoder(self.checkpoint.path)
        starts = [i for i in (own.bos_token_id, own.eos_token_id) if i is not None and i < own.vocab_size]
        if not starts:
            raise ValueError(
                f"{self.checkpoint.path}: its vocabulary has neither a BOS nor an EOS to begin a text with"
            )
        first = starts[0]
        longest = (self.checkpoint.positions or 1 << 30) - 1
        nats: dict[str, list[float]] = {}
        load, counted, changed = {}, {}, 0
        for domain, spans in self.request.passages.spans().items():
            nats[domain] = []
            with _counted(model) as load_LE:
                for texts in spans:
                    total = 0.0
                    for text in texts:
                        tokens = own.encode([text])[0].astype(np.int64)
                        tokens = tokens[(tokens != own.eos_token_id) & (tokens != own.bos_token_id)]
                        changed += own.decode(tokens.tolist()).strip() != text.strip()
                        for start in range(0, len(tokens), longest):
                            row = np.concatenate([[first], tokens[start : start + longest]])
                            total += sum(checkpoints.nats(model, row[None], batch=1))
                    nats[domain].append(total)
            if load_LE is not None:
                load[domain] = load_LE.tolist()
            size = sum(len(text.encode()) for texts in spans for text in texts)
            counted[domain] = {"windows": len(spans), "bytes": size}
            print(f"  {domain}: {loss.bits_per_byte(sum(nats[domain]), num_bytes=size):.4f} bits/byte", flush=True)
        return {"nats": nats, "load": load, "counted": counted, "changed": changed}

    def _details(self) -> dict[str, Any]:
        subject = details.Subject(
            models={str(self.checkpoint.path): self.checkpoint.path},
            windows=lambda count: self.request.passages.windows(self.checkpoint, count=count),
            settings=self.request.settings,
            folder=self.folder,
        )
        return {"details": found} if (found := details.measure(subject)) else {}

    def _pair(self) -> tuple[Any, Any]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.checkpoint.path, local_files_only=True, trust_remote_code=False)
        return self._loaded(), tokenizer


@contextmanager
def _counted(model: PreTrainedModel) -> Iterator[np.ndarray | None]:
    """Yield the array that counts the tokens of each expert while the block runs; None if its class is not known."""
    if not architectures.is_moe(model.config):
        yield None
        return
    with routing.expert_load(model) as load_LE:
        yield load_LE
