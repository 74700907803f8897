"""Runs analyses over one or two checkpoints, layer by layer, and keeps each finished layer.

    result = run.analyse({"split": moe, "trained": trained}, names, windows=windows, folder=folder)

What it returns is what details.json has under `analysis`, which the report's section reads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tasks import scratch
from tasks.moe import counts
from tasks.moe.streamed import Streamed
from tasks.partition import index as index_file
from tasks.plugins.analysis import text as texts
from tasks.plugins.analysis.interface import plain
from tasks.plugins.analysis.layer import Layer, Parent
from tasks.plugins.analysis.registry import ANALYSES
from tasks.plugins.analysis.stream import Stream


def analyse(
    models: Mapping[str, Path],
    names: Iterable[str],
    *,
    windows: Mapping[str, np.ndarray] | None,
    folder: Path,
    parent: Path | None = None,
    index: Path | None = None,
    layers: Sequence[int] | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Analyse one sparse checkpoint, or two, the second against the first.

    Args:
        models: {key: checkpoint folder}.
        names: of ANALYSES.
        windows: {domain: int [B, L]}; without it, what needs a text is left out.
        folder: for unfinished work, by which a killed run goes on with the next layer; it must be that of the same
            arguments (scratch.workspace).
        parent: the dense checkpoint that the experts were cut from.
        index: partition.safetensors; without it every expert is taken for a whole FFN of the parent's.
        layers: the numbers of the sparse layers to analyse; all if absent.

    Returns:
        models: {key: model_type, and the sizes of tasks.moe.counts.experts};
        text: Text.summary, or None;
        analyses: {name: {title, note, models: {key: {layers: {number: {figures, undefined, and the analysis's own}},
        mean: {chart: {series: mean over the layers where it is defined, or None}}, undefined: {reason: [layers]},
        maps: [interface.Map]}}}};
        left_out: {name: reason}.

    Raises:
        ValueError: a dense checkpoint, two that cannot be compared, a layer that is not sparse, token ids that are not
            in the vocabulary, or an index that does not fit.
        FileNotFoundError: there is no checkpoint.
    """
    streamed = {key: Streamed(path, device=device) for key, path in models.items()}
    wanted = _sparse(streamed, layers)
    left_out, chosen = _choose(names, text=windows is not None, pair=len(models) > 1)
    needs_text = any(ANALYSES[name].needs != "weights" for name in chosen)
    first = next(iter(streamed.values()))
    text = texts.make(windows, first.folder) if windows is not None and needs_text else None
    if text is not None:
        _check_ids(text, streamed)
    origin = None if parent is None else _parent(parent, index, first)
    streams = {key: Stream(model, text=text, parent=origin) for key, model in streamed.items()}
    found = _run(streams, chosen, wanted, folder=folder, progress=progress)
    return {
        "models": {
            key: {"model_type": model.config.model_type} | counts.experts(model.config)
            for key, model in streamed.items()
        },
        "text": None if text is None else text.summary(),
        "analyses": {
            name: _summary(name, {key: found[key][name] for key in found if found[key][name]}) for name in chosen
        },
        "left_out": left_out,
    }


def _choose(names: Iterable[str], *, text: bool, pair: bool) -> tuple[dict[str, str], list[str]]:
    """What is left out and why, and what is not, in the order of ANALYSES. Raises ValueError for an unknown name."""
    names = list(names)
    if unknown := [name for name in names if name not in ANALYSES]:
        raise ValueError(f"analyses: {', '.join(unknown)} is not known; known: {', '.join(ANALYSES)}")
    left_out = {}
    for name in names:
        if ANALYSES[name].needs != "weights" and not text:
            left_out[name] = "needs a text, and there are no windows"
        elif ANALYSES[name].needs == "another model" and not pair:
            left_out[name] = "compares two models, and there is one"
    return left_out, [name for name in ANALYSES if name in names and name not in left_out]


def _sparse(models: Mapping[str, Streamed], layers: Sequence[int] | None) -> list[int]:
    """The layers to analyse. Raises ValueError if there is none, or the models differ in what is compared."""
    sizes = {key: counts.experts(model.config) for key, model in models.items()}
    for key, model in models.items():
        if not sizes[key]["layers"]:
            raise ValueError(f"{model.folder}: a {model.config.model_type} without sparse layers has no experts")
    (first, *others) = sizes
    for other in others:
        for field in ("layers", "experts", "top_k", "expert_size"):
            if sizes[first][field] != sizes[other][field]:
                raise ValueError(
                    f"{models[other].folder}: {field} = {sizes[other][field]}; {models[first].folder} has "
                    f"{sizes[first][field]}, and only models of the same experts are compared"
                )
    there: list[int] = sizes[first]["layers"]
    if layers is not None and (absent := sorted(set(layers) - set(there))):
        raise ValueError(f"{models[first].folder}: layers {absent} have no experts; those with experts: {there}")
    return there if layers is None else sorted(set(layers))


def _check_ids(text: texts.Text, models: Mapping[str, Streamed]) -> None:
    for model in models.values():
        largest, vocabulary = int(text.ids_BL.max()), model.config.vocab_size
        if not 0 <= int(text.ids_BL.min()) <= largest < vocabulary:
            raise ValueError(
                f"windows: token ids up to {largest}, and {model.folder} has {vocabulary}; take those of its tokenizer"
            )


def _parent(folder: Path, index: Path | None, sparse: Streamed) -> Parent:
    """The parent with the place of each neuron. Raises ValueError if it is not that of the sparse model."""
    dense, sizes = Streamed(folder), counts.experts(sparse.config)
    width = dense.config.intermediate_size
    if index is None:
        if width != sizes["expert_size"]:
            raise ValueError(
                f"{folder}: intermediate_size = {width}, and the experts of {sparse.folder} have "
                f"{sizes['expert_size']} neurons; say by the partition's index which of the parent's they are"
            )
        return Parent(model=dense, places=None)
    read = index_file.read(index)
    if problems := read.problems(width):
        raise ValueError(f"{index}: {problems[0]}")
    for field, given, wanted in (
        ("layers", sorted(read.layers), sizes["layers"]),
        ("experts", read.experts, sizes["experts"]),
        ("neurons of an expert", read.expert_size, sizes["expert_size"]),
    ):
        if given != wanted:
            raise ValueError(f"{index}: {field} = {given}; {sparse.folder} has {wanted}; take the index of this model")
    return Parent(model=dense, places=read.layers)


@torch.no_grad()
def _run(
    streams: Mapping[str, Stream],
    names: Sequence[str],
    wanted: Sequence[int],
    *,
    folder: Path,
    progress: Callable[[str], None],
) -> dict[str, dict[str, dict[int, Any]]]:
    """{model: {analysis: {layer: its figures}}}; from the layer on that a killed run had not finished."""
    found: dict[str, dict[str, dict[int, Any]]] = {key: {name: {} for name in names} for key in streams}
    folder.mkdir(parents=True, exist_ok=True)
    last = max(wanted) if names else -1
    done = [_kept(folder, i) for i in range(last + 1)]
    start = done.index(None) if None in done else last + 1
    if start and start <= last and not _restore(folder, start - 1, streams):
        start = 0
    for i in range(last + 1):
        kept = done[i] if i < start else _layer(streams, names, i, wanted=i in wanted)
        assert kept is not None
        if i >= start:
            _keep(folder, i, streams, figures=kept)
            if i in wanted:
                progress(f"  layer {i} of {last}")
        for key, by_name in kept.items():
            for name, figures in by_name.items():
                found[key][name][i] = figures
    return found


def _layer(streams: Mapping[str, Stream], names: Sequence[str], i: int, *, wanted: bool) -> dict[str, Any]:
    """{model: {analysis: figures}} of one layer, {} for each model where it is not wanted."""
    first: Layer | None = None
    figures: dict[str, dict[str, Any]] = {}
    for key, stream in streams.items():
        layer = stream.layer(i, wanted=wanted)
        figures[key] = {}
        if layer is None:
            continue
        layer = dataclasses.replace(layer, other=first)
        for name in names:
            if ANALYSES[name].needs == "another model" and first is None:
                continue
            measured = ANALYSES[name].measure(layer)
            figures[key][name] = plain(
                {"figures": measured.curves, "undefined": measured.undefined, **measured.detail}
            )
        first = first or layer
    return figures


def _keep(folder: Path, i: int, streams: Mapping[str, Stream], *, figures: dict[str, Any]) -> None:
    """Keep a layer's figures and what the next layer reads; the record is written last."""
    digests = {}
    for n, (key, stream) in enumerate(streams.items()):
        if state := stream.state():
            path = folder / f"state-{n}-{i}.safetensors"
            save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, path)
            digests[key] = scratch.digest(path)
    kept = {"figures": json.dumps(figures), "states": digests}  # as text, which keeps the order of its keys
    scratch.write_sealed(folder / f"layer-{i}.json", kept)
    for path in folder.glob("state-*.safetensors"):
        if not path.stem.endswith(f"-{i}"):
            path.unlink()


def _kept(folder: Path, i: int) -> dict[str, Any] | None:
    """The figures of a finished layer, None if it has to be done."""
    try:
        figures: dict[str, Any] = json.loads(scratch.read_sealed(folder / f"layer-{i}.json")["figures"])
    except (OSError, ValueError):
        return None
    return figures


def _restore(folder: Path, i: int, streams: Mapping[str, Stream]) -> bool:
    """Give the streams what layer `i` left; False if it is not there."""
    digests = scratch.read_sealed(folder / f"layer-{i}.json")["states"]
    paths = {key: folder / f"state-{n}-{i}.safetensors" for n, key in enumerate(streams) if streams[key].state()}
    for key, path in paths.items():
        if not path.is_file() or scratch.digest(path) != digests.get(key):
            return False
    for key, path in paths.items():
        streams[key].restore(load_file(path))
    return True


def _summary(name: str, by_model: Mapping[str, Mapping[int, Any]]) -> dict[str, Any]:
    """One analysis in the file."""
    analysis = ANALYSES[name]
    models = {}
    for key, by_layer in by_model.items():
        reasons: dict[str, list[int]] = {}
        for layer, figures in by_layer.items():
            if figures["undefined"]:
                reasons.setdefault(figures["undefined"], []).append(layer)
        maps = [dataclasses.asdict(drawn) for drawn in analysis.maps(by_layer)]
        models[key] = {"layers": by_layer, "mean": means(by_layer.values()), "undefined": reasons, "maps": maps}
    result: dict[str, Any] = plain({"title": analysis.title, "note": analysis.note, "models": models})
    return result


def means(layers: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """{chart: {series: mean over the layers where it is defined; None where it never is}}."""
    values: dict[str, dict[str, list[float]]] = {}
    for figures in layers:
        for chart, series in figures["figures"].items():
            for label, value in series.items():
                values.setdefault(chart, {}).setdefault(label, []).extend([] if value is None else [value])
    return {
        chart: {label: fmean(each) if each else None for label, each in series.items()}
        for chart, series in values.items()
    }
