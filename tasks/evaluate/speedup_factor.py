"""The speed-up factor: by how much less one run reaches a loss than another.

factor(t) = c_dense(t) / c_moe(t), where c(t) is the cost of reaching the loss t: tokens, FLOPs or seconds of training
(Artetxe et al. 2022, arXiv 2112.10684, section 4.2). The logarithm of the cost is interpolated linearly in the loss,
between the two neighbouring evaluations. Nothing is extrapolated: a loss that a run did not pass between two
evaluations has no cost. Above 1, the second run needs less.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BY = ("tokens", "flops", "seconds")
"""What a run costs, by the names of a curve's columns."""


class OutsideError(ValueError):
    """No evaluations enclose what was asked for; the message has the range that they enclose."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A run's evaluations in the order of training.

    loss: validation loss at each; costs: {tokens, flops, seconds: what training had cost until then}, those that are
    known.
    """

    name: str
    loss: Sequence[float]
    costs: Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Factor:
    """The factor at the lowest loss that both runs reached, and its range over all losses that both passed."""

    value: float
    loss: float
    lowest: float
    highest: float
    highest_loss: float


def cheapest(curves: Sequence[Curve], *, by: str) -> Curve:
    """Several runs as one, which at each loss costs what the cheapest of them does; a single one as it is."""
    if len(curves) == 1:
        return curves[0]
    best, points = math.inf, []
    for cost, loss in sorted(
        (c, loss) for curve in curves for c, loss in zip(curve.costs[by], curve.loss, strict=True)
    ):
        if loss < best:
            best = loss
            points.append((cost, loss))
    name = " / ".join(curve.name for curve in curves)
    return Curve(name=name, loss=[loss for _, loss in points], costs={by: [cost for cost, _ in points]})


def cost(curve: Curve, loss: float, *, by: str) -> float:
    """What a run had cost when it first reached a loss.

    Raises OutsideError for a loss that no two evaluations enclose. The start of a run costs nothing, has no logarithm
    and encloses nothing; an evaluation that is no better than an earlier one does not count.
    """
    known = _passed(curve, by)
    lowest, highest = _range(curve, by)
    if not lowest <= loss <= highest:
        raise OutsideError(
            f"{curve.name}: a loss of {loss:.3f} is outside of its evaluations, {highest:.3f} down to {lowest:.3f}, "
            "and nothing is extrapolated"
        )
    return math.exp(_between([(at, math.log(spent)) for at, spent in reversed(known)], loss))


def factor(dense: Curve, moe: Curve, *, by: str) -> Factor:
    """By how much less `moe` reaches a loss than `dense`.

    The logarithm of the factor is linear between the evaluations of both, so its range is that at these.

    Raises OutsideError if there is no loss that both passed between two of their evaluations.
    """
    ranges = [_range(curve, by) for curve in (dense, moe)]
    lowest, highest = max(low for low, _ in ranges), min(high for _, high in ranges)
    if lowest > highest:
        ahead, behind = (moe, dense) if ranges[1][1] < ranges[0][0] else (dense, moe)
        best, first = _range(behind, by)[0], _range(ahead, by)[1]
        already = " already before training" if ahead.costs[by][0] == 0 and ahead.loss[0] < best else ""
        raise OutsideError(
            f"no loss was reached in both runs: {behind.name} ends at {best:.3f}, and {ahead.name} is below that"
            f"{already or f' at its first evaluation ({first:.3f})'}; nothing is extrapolated"
        )
    knots = {loss for curve in (dense, moe) for loss, _ in _passed(curve, by) if lowest <= loss <= highest}
    values = {loss: cost(dense, loss, by=by) / cost(moe, loss, by=by) for loss in {lowest, highest, *knots}}
    return Factor(
        value=values[lowest],
        loss=lowest,
        lowest=min(values.values()),
        highest=max(values.values()),
        highest_loss=highest,
    )


def passes(first: Curve, second: Curve, *, by: str) -> float | None:
    """The cost from which on `first` has the lower loss, up to the last cost at which both were evaluated.

    The loss is interpolated linearly in the logarithm of the cost. Evaluations before any training are left out.

    Returns:
        None if `first` is not below at the end; the first common cost if it is below at all of them.

    Raises:
        OutsideError: the two have no cost in common.
    """
    one, other = ([(math.log(c), loss) for c, loss in _trained(curve, by)] for curve in (first, second))
    begin, end = max(one[0][0], other[0][0]), min(one[-1][0], other[-1][0])
    if begin > end:
        raise OutsideError(f"{first.name} and {second.name} have no number of {by} in common")
    at = sorted({begin, end, *(x for x, _ in [*one, *other] if begin <= x <= end)})
    above = [_between(one, x) - _between(other, x) for x in at]
    if above[-1] >= 0:
        return None
    last = max((i for i, value in enumerate(above) if value >= 0), default=None)
    if last is None:
        return math.exp(begin)
    share = above[last] / (above[last] - above[last + 1])
    return math.exp(at[last] + share * (at[last + 1] - at[last]))


def _trained(curve: Curve, by: str) -> list[tuple[float, float]]:
    """(cost, loss) of the evaluations after the start. Raises OutsideError without any."""
    points = [(spent, loss) for spent, loss in zip(curve.costs[by], curve.loss, strict=True) if spent > 0]
    if not points:
        raise OutsideError(f"{curve.name}: was never evaluated after its start")
    return points


def _passed(curve: Curve, by: str) -> list[tuple[float, float]]:
    """(loss, cost) of the evaluations that are better than all before them, from the highest loss down."""
    best, points = math.inf, []
    for spent, loss in sorted(zip(curve.costs[by], curve.loss, strict=True)):
        if loss < best:
            best = loss
            if spent > 0:
                points.append((loss, spent))
    return points


def _range(curve: Curve, by: str) -> tuple[float, float]:
    """The lowest and the highest loss that have a cost. Raises OutsideError without any."""
    points = _passed(curve, by)
    if not points:
        raise OutsideError(f"{curve.name}: no evaluation after its start is better than the one at its start")
    return points[-1][0], points[0][0]


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """y at x, linear between the neighbours of x in `points`, which rise in x and enclose it."""
    i = min(max(bisect.bisect_left(points, (x, -math.inf)), 1), len(points) - 1)
    if i == 0:  # a single point
        return points[0][1]
    (x0, y0), (x1, y1) = points[i - 1], points[i]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
