"""The analyses in the order of the page, each by the name of its file, which is what settings call it."""

from __future__ import annotations

from collections.abc import Mapping

from tasks.plugins.analysis.interface import Analysis
from tasks.plugins.analysis.measures import (
    coactivation,
    load,
    norms,
    outputs,
    reordering,
    router,
    similarity,
    stability,
)

ANALYSES: Mapping[str, Analysis] = {
    "similarity": similarity.ANALYSIS,
    "reordering": reordering.ANALYSIS,
    "router": router.ANALYSIS,
    "outputs": outputs.ANALYSIS,
    "norms": norms.ANALYSIS,
    "load": load.ANALYSIS,
    "coactivation": coactivation.ANALYSIS,
    "stability": stability.ANALYSIS,
}
