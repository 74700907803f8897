"""The section `models`: where a dense checkpoint comes from, and what is known of its sizes now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tasks import architectures, rewritten, sources
from tasks.settings.corpus import SourceText
from tasks.settings.fields import Frozen, Positive, Sha256

FETCHED = Path("data/models")
if TYPE_CHECKING:
    ModelType = str
else:
    ModelType = Literal[tuple(architectures.DENSE)]


class Shape(Frozen):
    """Family and sizes, for plans and checks before anything is downloaded; the names are those of config.json."""

    model_type: ModelType = architectures.LLAMA.model_type
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Annotated[int, Field(gt=0, le=10_000)]
    """Bounded, because checks list the layers in memory."""
    num_attention_heads: Positive
    num_key_value_heads: Positive
    vocab_size: Positive
    tie_word_embeddings: bool = False
    head_dim: Positive | None = None
    max_position_embeddings: Positive | None = None
    """The longest window that a pipeline may have; if absent, known only once the model is fetched."""

    @model_validator(mode="after")
    def _heads(self) -> Self:
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(f"hidden_size = {self.hidden_size} is not a multiple of num_attention_heads = {heads}")
        if heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {self.num_key_value_heads}"
            )
        return self


class Model(Frozen):
    """A dense LLaMA-family checkpoint."""

    source: SourceText
    sha256: Sha256 | None = None
    license: str = Field(min_length=1)
    hub_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """ORG/NAME on the Hugging Face hub, where `source` holds a copy from elsewhere; for the model card alone."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    shape: Shape | None = None


def config(name: str, model: Model) -> tuple[dict[str, Any], str] | None:
    """The fields of a model's config.json that are known now, and where from; None if nothing is.

    Read from data/models/NAME if that is the model of this source, else from the local folder it comes from, else
    from its `shape`.
    """
    source = sources.parse(model.source)
    folders = [FETCHED / name] if _is_fetched(name, model) else []
    folders += [Path(source.path)] if source.kind == "dir" else []
    for folder in folders:
        if (fields := _read(folder / "config.json")) is not None:
            return rewritten.config(fields), str(folder / "config.json")
    if model.shape is not None:
        return model.shape.model_dump(exclude_none=True), f"models.{name}.shape"
    return None


def positions(config: dict[str, Any]) -> int | None:
    """The longest window of a model with this config.json; None if it does not say.

    Rotary scaling that is not in max_position_embeddings yet counts: the original length, or this one, times `factor`.
    """
    limit = config.get("max_position_embeddings")
    if not isinstance(limit, int):
        return None
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = rope.get("factor") if isinstance(rope, dict) else None
    if isinstance(factor, int | float):
        limit = max(limit, int(factor * (rope.get("original_max_position_embeddings") or limit)))
    return limit


def _is_fetched(name: str, model: Model) -> bool:
    """False if what lies there was made from another source, and will be replaced."""
    record = _read(FETCHED / f"{name}.json")
    if record is None:
        return True
    return record.get("source") == model.source and model.sha256 in (None, record.get("source_sha256"))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
