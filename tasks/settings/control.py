"""The setting `control` of a pipeline: the pruned baseline, and how it is cut (tasks/control)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tasks import plugin
from tasks.settings.fields import Frozen, Positive, choice, extended
from tasks.settings.partition import Partition

if TYPE_CHECKING:
    Method = str
else:
    Method = choice("control.method", "static")


@extended("control.shape")
class Shape(Frozen):
    """Sizes of the pruned baseline, by the fields of config.json. What is left out has the parent's size."""

    intermediate_size: Positive | None = None
    """The neurons that a token passes in the sparse model, if absent."""


@extended("control")
class Control(Frozen):
    method: Method = "static"
    """static: the neurons of each FFN with the largest energy on the calibration text, refitted as the experts are."""
    shape: Shape = Shape()
    parent: bool = False
    """Also train the parent on these batches, and evaluate it: what the text alone gives."""

    def config(self, dense: Mapping[str, Any], partition: Partition) -> dict[str, Any]:
        """The pruned baseline's config.json.

        Args:
            dense: the parent's config.json.

        Raises:
            ValueError: there is no such model; the message begins with the field of `control`, or with `pruned`.
        """
        sizes: dict[str, int] = self.shape.model_dump(exclude_none=True)
        if "intermediate_size" not in sizes:
            width, layers = dense["intermediate_size"], dense["num_hidden_layers"]
            sizes["intermediate_size"] = partition.pruned_width(width, layers=layers)
        owner = plugin.owner("control.method", self.method)
        for field, size in sizes.items():
            own = dense.get(field, size)
            if size > own:
                raise ValueError(f"shape.{field} = {size}: the parent has {own}; set it to that or less")
            if size < own and field != "intermediate_size" and owner is None:
                raise ValueError(
                    f"shape.{field} = {size}: the parent has {own}, and method `{self.method}` cuts FFNs alone; set "
                    f"method: {' or '.join(plugin.choices('control.method')) or 'static'}, or leave it out"
                )
        if all(size == dense.get(field) for field, size in sizes.items()):
            raise ValueError("shape: it is the parent's own, so nothing is cut; lower a size")
        if owner:
            config: dict[str, Any] = plugin.modules("settings")[owner].config(self, dense, sizes)
            return config
        return {**dense, **sizes}
