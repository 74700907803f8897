"""A checkpoint that is larger than memory: read from safetensors and run one layer at a time.

    model = Streamed(folder)
    nats_B = model.nll(ids_BL, batch=4)

Shapes: B windows, L their length, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

from tasks import architectures, layout
from tasks.layout import TEXT, Layout
from tasks.moe import allocator, loss, untrusted
from tasks.moe.files import read_json
from tasks.moe.internals import layers as internals
from tasks.moe.writer import DTYPES

_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$")  # stored by old versions; the config determines it


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where and how a tensor is stored, as its file's header has it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Streamed:
    """A checkpoint folder, dense or sparse, of which one layer at a time is in memory."""

    def __init__(self, folder: Path, *, device: torch.device | str = "cpu", names: Layout = TEXT) -> None:
        """Read the config and the headers; `device` is where blocks run, `names` how the files spell the tensors.

        Raises:
            FileNotFoundError: config.json or the safetensors are missing.
            ValueError: a family that is not read here, quantised weights, or a file that is damaged or incomplete.
        """
        self.folder = Path(folder)
        self.device = torch.device(device)
        self.names = names
        self.config = _config(self.folder, names)
        self.layers: int = self.config.num_hidden_layers
        self.stored: dict[str, Stored] = {}
        self.outside: dict[str, Stored] = {}
        """Tensors that are not the text model's, by their names on disk."""
        for name, entry in _stored(self.folder).items():
            if (text := names.in_text(name)) is None:
                self.outside[name] = entry
            elif not _BUFFER.search(name):
                self.stored[text] = entry
        disable_progress_bar()
        allocator.keep_buffers()
        skeleton = internals.skeleton(self._one_layer(0))
        self._family: Any = type(skeleton)
        self._norm: nn.Module = skeleton.model.norm
        self._rotary = internals.rotary(skeleton, self.config).to(self.device)

    def tensor(self, name: str) -> Tensor:
        """A copy in the stored dtype, on the CPU. Raises ValueError if the checkpoint has no such tensor."""
        if name not in self.stored:
            raise ValueError(f"{self.folder}: there is no tensor {name!r} in its safetensors files")
        return _read(self.stored[name], name)

    def outside_tensor(self, name: str) -> Tensor:
        """A copy of a tensor outside of the text model, by its name on disk."""
        return _read(self.outside[name], name)

    def layer_names(self, i: int) -> list[str]:
        """Names on disk of the tensors of layer `i`; none for a layer that is not there."""
        return [name for name in self.stored if layout.layer_of(name) == i]

    def prefetch(self, i: int) -> None:
        """Let the kernel read layer `i` into the page cache while other work goes on."""
        for name in self.layer_names(i):
            entry = self.stored[name]
            with entry.file.open("rb") as file:
                os.posix_fadvise(file.fileno(), entry.offset, entry.size, os.POSIX_FADV_WILLNEED)

    def block(self, i: int) -> nn.Module:
        """transformers' own decoder layer `i` in float32, in eval mode; the caller drops it.

        Raises:
            ValueError: a tensor of the layer is missing, has another shape, or does not belong to it.
        """
        allocator.release()
        width = self.config.hidden_size
        state = {layout.EMBEDDINGS: torch.zeros(1, width), layout.HEAD: torch.zeros(1, width)}
        state[layout.NORM] = torch.zeros(width)
        own, only = f"{layout.block(i)}.", f"{layout.block(0)}."
        state |= {only + name.removeprefix(own): self.tensor(name) for name in self.layer_names(i)}
        options = {}
        if architectures.is_moe(self.config):
            import moe_kernels

            moe_kernels.register()
            options["experts_implementation"] = "moe_kernels"
        model, problems = internals.load(self._family, self._one_layer(i), state=state, **options)
        if problems:
            shown = str(problems).replace(only, own)
            raise ValueError(f"{self.folder}: layer {i} is not that of a {self.config.model_type} model: {shown}")
        layer: nn.Module = model.model.layers[0]
        del model, state
        allocator.release()
        return layer.to(self.device)

    def _one_layer(self, i: int) -> PreTrainedConfig:
        """Config of a model whose only layer is layer `i`, with a vocabulary of one token."""
        config = copy.deepcopy(self.config)
        if hasattr(config, "mlp_only_layers"):
            sparse = i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0
            config.mlp_only_layers, config.decoder_sparse_step = [] if sparse else [0], 1
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i]]
        config.num_hidden_layers, config.vocab_size = 1, 1
        config.pad_token_id, config.tie_word_embeddings = None, False
        return config

    @torch.no_grad()
    def embed(self, ids_BL: Tensor) -> Tensor:
        """What the first layer reads: float32 [B, L, D] on the device."""
        weight_VD = self.tensor(layout.EMBEDDINGS)
        hidden_BLD = F.embedding(ids_BL.cpu(), weight_VD).to(self.device, torch.float32)
        return hidden_BLD * getattr(self.config, "embedding_multiplier", 1.0)

    @torch.no_grad()
    def attention(self, i: int, length: int) -> dict[str, Any]:
        """Keyword arguments of block(i), and of its self_attn, for windows of `length` tokens.

        position_embeddings (cos, sin); attention_mask, None where plain causal attention is meant, else bool
        [1, 1, L, L], True where a token is seen.
        """
        hidden = torch.zeros(1, length, 1, device=self.device)
        sliding = architectures.windows(self.config)[i] is not None
        return {
            "position_embeddings": self.rotary(torch.arange(length)),
            "attention_mask": internals.attention_mask(self.config, hidden, sliding=sliding),
        }

    @torch.no_grad()
    def rotary(self, positions_L: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary embedding at these positions, float32 [1, L, head_dim] each.

        Some kinds depend on the largest position as well.
        """
        cos, sin = self._rotary(torch.zeros(1, device=self.device), positions_L.to(self.device)[None])
        return cos, sin

    @torch.no_grad()
    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """Final norm, output head, logits scaling: float32 [B, L, V]."""
        return self.head()(hidden_BLD)

    def norm(self) -> nn.Module:
        """The final norm, in float32 on the device."""
        norm = copy.deepcopy(self._norm)
        norm.load_state_dict({"weight": self.tensor(layout.NORM).to(self.device, torch.float32)}, assign=True)
        return norm.requires_grad_(False)

    def head(self) -> Callable[[Tensor], Tensor]:
        """What gives the logits: final norm, output head, scaling; gradients pass through it."""
        name = layout.HEAD
        if self.config.tie_word_embeddings and name not in self.stored:
            name = layout.EMBEDDINGS
        weight_VD, norm = self.tensor(name).to(self.device, torch.float32), self.norm()
        scaling = getattr(self.config, "logits_scaling", 1.0)
        return lambda hidden: F.linear(norm(hidden.to(self.device)), weight_VD) / scaling

    @torch.no_grad()
    def forward(
        self, ids_BL: Tensor, *, batch: int = 4, blocks: Callable[[int, nn.Module], None] | None = None
    ) -> Tensor:
        """Hidden states before the final norm, float32 [B, L, D]; each layer is read once.

        Args:
            blocks: sees, and may alter, every block before it runs.
        """
        hidden_BLD = self.embed(ids_BL)
        for i in range(self.layers):
            block = self.block(i)
            self.prefetch(i + 1)
            if blocks is not None:
                blocks(i, block)
            where = self.attention(i, hidden_BLD.shape[1])
            for part in hidden_BLD.split(batch):
                part.copy_(block(part, **where))
            del block
        return hidden_BLD

    @torch.no_grad()
    def nll(self, ids_BL: np.ndarray, *, batch: int) -> np.ndarray:
        """Summed nats of each window's tokens 2 to L, float64 [B]: tasks.moe.loss.window_nll of the whole model."""
        if ids_BL.ndim != 2 or ids_BL.shape[1] < 2:
            raise ValueError(f"windows have the shape {ids_BL.shape}; needed: [B, L] with L >= 2")
        ids = torch.from_numpy(np.ascontiguousarray(ids_BL)).to(self.device)
        hidden_BLD = self.forward(ids, batch=batch)[:, :-1]
        head = self.head()
        parts = zip(hidden_BLD.split(batch), ids[:, 1:].split(batch), strict=True)
        return torch.cat([loss.summed(head, hidden, target) for hidden, target in parts]).cpu().numpy()


def _read(entry: Stored, name: str) -> Tensor:
    content = torch.empty(entry.size, dtype=torch.uint8)
    left, offset = content.numpy().data, entry.offset
    with open(entry.file, "rb", buffering=0) as file:
        while left:
            done = os.preadv(file.fileno(), [left], offset)  # at most 2 GiB
            if not done:
                raise ValueError(f"{entry.file}: ends within tensor {name!r}; bring the file anew")
            left, offset = left[done:], offset + done
    return content.view(entry.dtype).reshape(entry.shape)


def _config(folder: Path, names: Layout) -> PreTrainedConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no checkpoint here (config.json is missing); run the stage that writes it")
    try:
        raw = read_json(path)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    whole = raw
    if names.config is not None:
        if not isinstance(whole.get(names.config), dict):
            raise ValueError(f"{path}: {names.config} is missing; needed: the config of the text tower")
        raw = whole[names.config]
    if raw.get("model_type") not in architectures.ALL:
        raise ValueError(f"{path}: model_type = {raw.get('model_type')!r}; read here: {', '.join(architectures.ALL)}")
    if whole.get("quantization_config") or raw.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config: the weights are quantised; take the model's plain checkpoint")
    if names.config is not None:
        tower: PreTrainedConfig = AutoConfig.for_model(**raw)
        tower._attn_implementation = "sdpa"
        return tower
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, attn_implementation="sdpa"
    )
    return config


def _stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors."""
    index = folder / untrusted.INDEX
    try:
        listed = untrusted.indexed(folder) or {}
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    files = sorted(set(listed.values())) or ["model.safetensors"]
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder}: {', '.join(missing)} is missing; weights are read from safetensors only, never from pickles "
            "(.bin, .pt)"
        )
    tensors: dict[str, Stored] = {}
    for name in files:
        entries = _header(folder / name)
        if twice := sorted(set(tensors) & set(entries)):
            raise ValueError(f"{folder / name}: tensors {twice[:5]} stand in {tensors[twice[0]].file.name} as well")
        tensors |= entries
    if absent := [f"{name} ({listed[name]})" for name in listed if name not in tensors]:
        raise ValueError(f"{index}: these tensors are not in their files: {', '.join(absent[:5])}")
    return tensors


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises ValueError if it is cut short, or no safetensors."""
    total = path.stat().st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size < total else b""
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {
            name: Stored(
                file=path,
                dtype=DTYPES[entry["dtype"]],
                shape=tuple(entry["shape"]),
                offset=8 + size + entry["data_offsets"][0],
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its header is not that of a safetensors file ({error!r}); bring it anew") from None
    for name, entry in tensors.items():
        if entry.offset + entry.size > total:
            raise ValueError(f"{path}: ends within tensor {name!r} ({total} bytes are there); bring the file anew")
    return tensors
