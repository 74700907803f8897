"""What DVC draws of domain weights: a CSV file beside mixture.json."""

from __future__ import annotations

import csv
import io
from typing import Any


def weights_csv(content: dict[str, Any]) -> str:
    """A row a domain: its weight, standard deviation (empty without one), and its uniform and proportional shares.

    Args:
        content: of mixture.json.
    """
    evidence = content["evidence"]
    spread = evidence.get("spread") or {}
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n")
    table.writerow(["domain", "weight", "spread", "uniform", "proportional"])
    for domain, weight in content["weights"].items():
        others = [evidence[name][domain] for name in ("uniform", "proportional")]
        table.writerow([domain, weight, spread.get(domain, ""), *others])
    return written.getvalue()
