"""What table, page and card say about speed, from the `speed` of evaluation.json; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PARENT = "dense"
_TOLD = ("transformers", "moe_kernels", "llama.cpp")


def groups(measured: Mapping[str, Any], models: Sequence[str]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """For each engine its title, and its `cells`."""
    return [(title(row), cells(row, models)) for row in measured.get("engines", [])]


def cells(row: Mapping[str, Any], models: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The rows of an engine: a label with its unit, and a cell for each of `models`.

    A cell of speed has tokens per second, and how many times the dense parent's that is; `–` for a model that was not
    measured or that the engine does not run.
    """
    found = [(key, row["models"].get(key, {})) for key in models]
    shown = [
        (f"{what}, tokens/s", [_cell(figures, what, ratio=key != PARENT) for key, figures in found])
        for what in ("prompt", "decode")
    ]
    for what, label, text in (("first_token", "first token, s", _seconds), ("memory", "peak memory", _bytes)):
        if any(what in figures for _, figures in found):
            shown.append((label, [text(figures[what]) if what in figures else "–" for _, figures in found]))
    return shown


def _seconds(value: float) -> str:
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB" if value < 1e10 else f"{value / 1e9:,.1f} GB"


def rows(measured: Mapping[str, Any], models: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Speed in all engines, and peak memory once for each, with the engine in the label."""
    shown: dict[str, list[str]] = {}
    for row in measured.get("engines", []):
        for label, values in cells(row, models):
            what, _, unit = label.partition(", ")
            if unit == "tokens/s":
                shown[f"{unit}, {what}: {title(row)}"] = values
            elif not unit:
                shown[f"{what}: {row['engine']} {row['dtype']}"] = values
    return list(shown.items())


def by_top_k(measured: Mapping[str, Any], models: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Rows of an elastic model at each other value of top_k that it serves, beside the parent."""
    return [
        (
            f"tokens/s, {what}, top_k {top_k}: {title(row)}",
            [
                _cell(row["models"][key] if key == PARENT else of_model.get(key, {}), what, ratio=key != PARENT)
                for key in models
            ],
        )
        for row in measured.get("engines", [])
        for top_k, of_model in row.get("elastic", {}).items()
        for what in ("prompt", "decode")
    ]


def title(row: Mapping[str, Any]) -> str:
    """Engine, dtype and threads of a row."""
    count = row["threads"]
    threads = "GPU" if row["device"] == "cuda" else f"{count} thread" + "s" * (count > 1)
    return f"{row['engine']} {row['dtype']}, {threads}"


def _cell(figures: Mapping[str, Any], what: str, *, ratio: bool) -> str:
    if what not in figures:
        return "–"
    rate = figures[what]["median"]
    shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
    return f"{shown} ({figures['ratio'][what]['median']:.2f} ×)" if ratio and "ratio" in figures else shown


def headline(measured: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The engine by which speed is shown where there is room for one: the first of llama.cpp with all threads,
    moe_kernels and transformers that runs the parent and the trained model."""
    for engine in reversed(_TOLD):
        for row in reversed(measured.get("engines", [])):
            if row["engine"] == engine and all("decode" in row["models"][key] for key in (PARENT, "trained")):
                found: Mapping[str, Any] = row
                return found
    return None


def basis(measured: Mapping[str, Any], *, machine: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """How the speeds were measured, how far single repeats are apart, and what does not run and why; "" if none were.

    Args:
        measured: `speed` of evaluation.json.
        machine: its `machine`.
        titles: {model: how it is called}.
    """
    engines = measured.get("engines", [])
    if not engines:
        return ""
    on = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores"
    found = [(row, key, model) for row in engines for key, model in row["models"].items()]
    least = min((model["repeats"] for _, _, model in found if "repeats" in model), default=0)
    text = (
        f"tokens/s and × the dense parent's, on {on}; prompt: {measured['prompt']} tokens at once; decode: one "
        f"sequence, token by token, after {measured['after']} tokens. The models take turns; medians of {least} "
        "repeats"
    )
    apart = [
        abs(spread[end] / spread["median"] - 1)
        for _, key, model in found
        for spread in model.get("ratio", {}).values()
        for end in ("min", "max")
        if key != PARENT
    ]
    text += f", whose ratios differ from it by at most {max(apart):.0%}. " if apart else ". "
    stock = {model["experts"] for row, _, model in found if row["engine"] == "transformers" and "experts" in model}
    text += (
        f"transformers is AutoModelForCausalLM as it comes{''.join(f' (experts: {each})' for each in sorted(stock))}"
    )
    if any("experts" in model for row, _, model in found if row["engine"] == "moe_kernels"):
        text += ", moe_kernels the same with this project's experts_implementation='moe_kernels'"
    text += "; llama.cpp reads the file that `python -m tasks.engines.gguf` writes."
    if "eager" in stock:
        text += (
            " transformers' default, grouped_mm, cannot run these experts: load the model with "
            "experts_implementation='eager'."
        )
    reasons: dict[tuple[str, str], list[str]] = {}
    for row, key, model in found:
        if "reason" in model:
            reasons.setdefault((row["engine"], model["reason"].rstrip(".")), []).append(titles[key])
    for (engine, reason), names in reasons.items():
        text += f" {engine} does not run: {', '.join(dict.fromkeys(names))} ({reason})."
    return text
