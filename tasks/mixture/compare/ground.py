"""What the methods are compared on: a corpus, the model that is trained on it, and how.

A ground is a folder with the layout of a project (pipelines.yaml, data/, runs/): the stage `mixture` runs in it as
anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import scratch, settings
from tasks.corpus import manifest
from tasks.settings import Pretrain

NAME = "small"
WINDOWS = 32
"""Test windows of each domain, and of each domain never trained on."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Paths are relative to `folder`."""

    folder: Path
    what: str
    """For the table: which model and corpus."""
    corpus: Path
    domains: list[str]
    """That are trained on."""
    parent: Path
    models: dict[int, Path]
    """The model that is trained, by seed."""
    params: Pretrain
    sections: dict[str, Any]
    """`models` and `corpora` of pipelines.yaml, and `pipeline`: an entry without `mixture`."""
    proxy: dict[str, Any]
    """`mixture.proxy` of the methods that train one, without `tokens` and `seed`."""
    identity: str
    """Of model and corpus, by their content."""
    has_parent: bool
    """The model was split from a dense one, which has losses to reach."""
    windows: int = WINDOWS
    """Test windows of each domain."""

    def model(self, seed: int) -> Path:
        """The checkpoint that training with this seed begins with."""
        return self.models[seed]

    def write_settings(self, name: str, *, mixture: dict[str, Any], tokens: int) -> None:
        """Write pipelines.yaml with one pipeline, whose training reads so many tokens."""
        entry = self.sections["pipeline"]
        made = {**entry, "mixture": mixture, "pretrain": {**entry["pretrain"], "tokens": tokens}}
        content = {"models": self.sections["models"], "corpora": self.sections["corpora"], "pipelines": {name: made}}
        scratch.write_text(self.folder / "pipelines.yaml", json.dumps(content, indent=1) + "\n")  # JSON is YAML


def scratch_model(folder: Path, *, corpus: Path, unseen: Collection[str], seeds: Iterable[int], tokens: int) -> Ground:
    """A small LLaMA from scratch, in the cut tokenizer (small.py); each seed begins with its own weights.

    Args:
        corpus: data/corpora/NAME of a project, whose model lies in data/models.
        unseen: its domains that are held out altogether.
        seeds: of weights and batches.
        tokens: of one training.

    Raises:
        ValueError: the corpus or the tokenizer does not fit.
    """
    from tasks.mixture.compare import small

    seeds = list(seeds)
    parent = corpus.parents[1] / "models" / manifest.load(corpus).model
    target = folder / "data/corpora" / NAME
    models = {seed: Path("data/models") / f"{NAME}-{seed}" for seed in seeds}
    inputs = {"corpus": scratch.digest(corpus / manifest.FILE), "unseen": sorted(unseen), "size": small.VOCABULARY}
    mark = folder / "made_from.json"
    if mark.exists() and json.loads(mark.read_text()) != inputs:
        raise ValueError(f"{folder}: made from another corpus or with other --unseen; name another folder")
    small.write_tokenizer(parent, folder / "tokenizer")
    for seed, model in models.items():
        if not (folder / model / "config.json").exists():
            small.write_model(folder / model, tokenizer=folder / "tokenizer", seed=seed)
    first = next(iter(models.values()))
    if not (target / manifest.FILE).exists():
        small.encode_corpus(corpus, target, parent=parent, model=folder / first, unseen=unseen)
    scratch.write_json(mark, inputs)
    made = manifest.load(target)
    params: dict[str, Any] = {
        "tokens": tokens,
        "seq_len": 256,
        "batch": 4,
        "micro_batch": 4,
        "learning_rate": 4e-3,
        "warmup_tokens": tokens // 10,
        "balance": {"loss": "none"},
        "eval_windows": 8,
        "save_every": 1 << 20,
        "precision": "float32",
        "trackers": [],
    }
    domains = {
        name: {
            "source": f"dir:data/corpora/{NAME}/{name}",
            "format": "text",
            "license": entry.license,
            **({"unseen": True} if entry.unseen else {}),
        }
        for name, entry in made.domains.items()
    }
    return Ground(
        folder=folder,
        what=f"a LLaMA of {small.SHAPE['num_hidden_layers']} x {small.SHAPE['hidden_size']} from scratch on "
        f"{', '.join(made.trained)}; a vocabulary of {small.VOCABULARY}",
        corpus=Path("data/corpora") / NAME,
        domains=list(made.trained),
        parent=first,
        models=models,
        params=Pretrain(**params),
        sections={
            "models": {first.name: {"source": f"dir:{first}", "license": "none"}},
            "corpora": {NAME: {"model": first.name, "domains": domains}},
            "pipeline": {
                "model": first.name,
                "corpus": NAME,
                "partition": {"method": "random", "experts": 2, "top_k": 1},
                "pretrain": params,
                "evaluate": {"seq_len": params["seq_len"], "windows": WINDOWS},
            },
        },
        proxy={"model": "scratch", "shape": dict(small.SHAPE), **_as_proxy(params)},
        identity=scratch.fingerprint({**inputs, "shape": small.SHAPE}),
        has_parent=False,
    )


def student(folder: Path, *, pipeline: str, seeds: Iterable[int], tokens: int) -> Ground:
    """The split model of a pipeline of this project, trained by its own settings.

    Args:
        pipeline: its stages `corpus` and `partition` have run.
        seeds: of the batches.
        tokens: of one training.

    Raises:
        ValueError: the pipeline is not known, or its split model is not there.
    """
    loaded = settings.load()
    entry = loaded.pipeline(pipeline)
    split = Path("runs") / pipeline / "moe"
    if not (split / "config.json").exists():
        raise ValueError(f"{split}: not found; run the stage `partition` of {pipeline} first")
    corpus, parent = Path("data/corpora") / entry.corpus, Path("data/models") / entry.model
    for path in (corpus, parent):
        _link(path, folder / path)
    model = Path("data/models") / f"{pipeline}-split"
    _link(split, folder / model)
    share = tokens / entry.pretrain.tokens
    params = entry.pretrain.model_copy(
        update={
            "tokens": tokens,
            "warmup_tokens": int(entry.pretrain.warmup_tokens * share),
            "save_every": max(1, 25 * 512 // entry.pretrain.step_tokens),
            "dynamic": None,
            "trackers": (),
        }
    )
    raw = params.model_dump(mode="json", exclude_unset=True)
    return Ground(
        folder=folder,
        what=f"the split model of {pipeline} on {', '.join(loaded.corpus(entry.corpus).trained)}",
        corpus=corpus,
        domains=list(loaded.corpus(entry.corpus).trained),
        parent=parent,
        models=dict.fromkeys(seeds, model),
        params=params,
        sections={
            "models": {entry.model: loaded.model(entry.model).model_dump(mode="json", exclude_unset=True)},
            "corpora": {
                entry.corpus: loaded.corpus(entry.corpus).model_dump(mode="json", exclude_unset=True),
            },
            "pipeline": {
                "model": entry.model,
                "corpus": entry.corpus,
                "partition": entry.partition.model_dump(mode="json", exclude_unset=True),
                "pretrain": raw,
                "evaluate": {"seq_len": entry.pretrain.seq_len, "windows": entry.evaluate.windows},
            },
        },
        proxy={"model": "student", **_as_proxy(raw)},
        windows=entry.evaluate.windows,
        has_parent=True,
        identity=scratch.fingerprint(
            {"model": scratch.digest(split), "corpus": scratch.digest(corpus / manifest.FILE)}
        ),
    )


def _as_proxy(params: dict[str, Any]) -> dict[str, Any]:
    return {name: params[name] for name in ("seq_len", "batch", "learning_rate")}


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    os.symlink(source.resolve(), target)
