"""The model card's front matter, with the Hub's ids of licences, models and datasets."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tasks.evaluate.report.results import Results

_IDS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 gemma unknown
"""
LICENCES = frozenset(_IDS.split())
"""Licence ids that the Hub knows: https://huggingface.co/docs/hub/repositories-licenses."""
_LLAMA = re.compile(r"(?:meta[ -])?llama[ -]?(\d(?:\.\d)?)(?:[ -]community)?(?:[ -]licen[cs]e)?(?:[ -]agreement)?")
_DATASET = re.compile(r"(?:hub:|hf://datasets/)([\w.-]+/[\w.-]+?)(?:@[^/]*)?(?:/.*)?")


def front_matter(results: Results) -> str:
    """YAML between the card's `---` lines."""
    from huggingface_hub import ModelCardData

    return (
        ModelCardData(
            base_model=base_model(results),
            datasets=datasets(results) or None,
            library_name="transformers",
            metrics=["perplexity", *(["accuracy"] if results.evaluation["dense"]["tasks"] else [])],
            pipeline_tag="text-generation",
            tags=["mixture-of-experts", results.config["model_type"], "moeforge"],
            **licence(results.model.license, file=results.licence_file),
        )
        .to_yaml()
        .strip()
    )


def licence(text: str, *, file: str | None) -> dict[str, Any]:
    """The Hub's id of a licence; if it has none, `other` with the name and the file in the checkpoint."""
    name = re.sub(r"[^a-z0-9.+]+", "-", text.lower()).strip("-")
    if match := _LLAMA.fullmatch(text.lower().strip()):
        name = f"llama{match[1]}"
    known = {name, name.removesuffix("-only").removesuffix("-or-later"), re.sub(r"^(odc-by|odbl)-1\.0$", r"\1", name)}
    if ids := known & LICENCES:
        return {"license": min(ids)}
    return {"license": "other", "license_name": name} | ({"license_link": file} if file else {})


def base_model(results: Results) -> str | None:
    """The Hub's id of the dense parent, from its source or from `hub_id` in pipelines.yaml; None if it has none."""
    if results.model.source.startswith("hub:"):
        return results.model.source.removeprefix("hub:").partition("@")[0]
    return results.model.hub_id


def datasets(results: Results) -> list[str]:
    """The Hub's ids of the datasets that the trained domains come from; other sources are left out."""
    domains = results.corpus.domains
    matches = [_DATASET.fullmatch(domains[name].source) for name in results.corpus.trained]
    return list(dict.fromkeys(match[1] for match in matches if match))
