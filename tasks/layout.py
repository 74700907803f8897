"""Where the tensors of a causal language model are: the one table of names, and the prefix of a text tower.

All code here uses the names of `TEXT`, which every family has in its stock class. A `Layout` says how a checkpoint
spells them, so the same conversion reads a text model and the text tower of a larger model:

    Layout(body="model.language_model.", config="text_config")                              # Llava in transformers 5
    Layout(body="language_model.model.", head="language_model.lm_head.", config="text_config")       # as published

`Streamed` renames while it reads and `moe_writer` while it writes. Tensors outside of the tower are carried byte for
byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a checkpoint spells the tensors of its text model, and where config.json has that model's fields."""

    body: str = "model."
    head: str = "lm_head."
    config: str | None = None
    """Key in config.json of the tower's config; None: config.json is the text model's."""

    def on_disk(self, name: str) -> str:
        """A name of the text model as this checkpoint spells it."""
        for ours, theirs in (("model.", self.body), ("lm_head.", self.head)):
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def in_text(self, name: str) -> str | None:
        """A tensor's name in the text model; None for a tensor outside of the tower."""
        for ours, theirs in (("model.", self.body), ("lm_head.", self.head)):
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name if self.config is None else None


TEXT = Layout()
"""A text model of its own."""
EMBEDDINGS = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def block(i: int | str) -> str:
    """Prefix of decoder layer `i`, without the dot."""
    return f"model.layers.{i}"


def part(i: int, name: str) -> str:
    """The weight of a module of decoder layer `i`, such as `self_attn.o_proj`."""
    return f"{block(i)}.{name}.weight"


def ffn(i: int) -> tuple[str, str, str]:
    """gate [N, D], up [N, D] and down [D, N] of the dense FFN of layer `i`."""
    gate, up, down = (part(i, f"mlp.{name}_proj") for name in ("gate", "up", "down"))
    return gate, up, down


def ffn_norm(i: int) -> str:
    """The RMSNorm before the FFN of layer `i`."""
    return part(i, "post_attention_layernorm")


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to; None for embeddings, head and the last norm."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None
