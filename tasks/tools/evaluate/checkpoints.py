"""Checkpoints that anybody wrote: what is refused before it is opened, and how it is loaded and run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks import architectures
from tasks.corpus.tokenizer import encoder
from tasks.moe import files, loss, untrusted

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder with config.json, safetensors and a tokenizer.json."""

    path: Path
    config: Any
    """Its transformers config."""
    tokenizer: str
    """Fingerprint of its tokenizer (tasks.corpus.tokenizer.encoder)."""

    @property
    def known(self) -> bool:
        """Whether tasks/architectures.py has its class: sizes, FLOPs and routing are then known."""
        return self.config.model_type in architectures.ALL

    @property
    def positions(self) -> int | None:
        """The longest text that it reads at once; None if its config does not say."""
        limit = getattr(self.config, "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None


def examine(path: Path) -> Checkpoint:
    """Look at a checkpoint without loading it; nothing in it is run.

    Raises:
        FileNotFoundError: no folder, or no config.json in it.
        ValueError: no safetensors (only pickles, or nothing), code of its own, a class that transformers does not
            have, a config or a file of weights that is damaged, or no tokenizer.json. Each names the folder, the file
            and the fix.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give the folder of a checkpoint")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no checkpoint here (config.json is missing)")
    try:
        fields = files.read_json(path / "config.json")
        _require_class(fields)
        shards = sorted(file.name for file in path.glob("*.safetensors"))
        _require_safetensors(path, shards)
        listed = untrusted.indexed(path)
        headers = untrusted.headers(path, shards, listed=listed)
        untrusted.check_config(fields, headers)
        config = untrusted.understood(lambda: _config(path), file="config.json")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Checkpoint(path=path, config=config, tokenizer=encoder.load_encoder(path).fingerprint)


def _config(path: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _require_class(fields: Mapping[str, Any]) -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = fields.get("model_type")
    if kind in CONFIG_MAPPING and kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if own := fields.get("auto_map"):
        code = ", ".join(sorted(map(str, own.values()))) if isinstance(own, dict) else own
        raise ValueError(
            f"config.json: auto_map names code of its own ({code}), which is never run; give a checkpoint of a class "
            "that transformers has. `moeforge import` turns one that LLaMA-MoE released into such"
        )
    raise ValueError(
        f"config.json: model_type = {kind!r} is no causal language model of this transformers; correct it, or give a "
        "checkpoint of a class that it has"
    )


def _require_safetensors(path: Path, shards: list[str]) -> None:
    if shards:
        return
    if pickles := sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES):
        raise ValueError(
            f"holds its weights only as pickles ({', '.join(pickles[:_SHOWN])}), which can run any code when they are "
            "opened; convert them where they come from (`save_pretrained` writes safetensors)"
        )
    raise ValueError("no weights here (*.safetensors is missing); fetch the whole checkpoint")


def load(checkpoint: Checkpoint, *, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Load a checkpoint, in eval mode; a sparse one computes its experts by moe_kernels.

    Raises:
        ValueError: weights are missing in its files, or have other shapes than its config says.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from tasks.moe import allocator

    disable_progress_bar()
    allocator.keep_buffers()
    options: dict[str, Any] = {}
    if architectures.is_moe(checkpoint.config):
        import moe_kernels

        moe_kernels.register()
        options["experts_implementation"] = "moe_kernels"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (RuntimeError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{checkpoint.path}: transformers cannot load it ({said}); fetch it again") from error
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # transformers fills them with random numbers
        raise ValueError(
            f"{checkpoint.path}: its files lack {len(missing)} tensors of its class, such as "
            f"{', '.join(missing[:_SHOWN])}; fetch the whole checkpoint"
        )
    import torch

    torch.nn.Module.to(model, torch.device(device))
    model.eval()
    return model


def nats(model: PreTrainedModel, ids_BL: np.ndarray, *, batch: int) -> list[float]:
    """Summed nats of each window's tokens 2 to L, whatever the class of the model.

    Of a class that is not known here the logits are the model's own, which may scale or cap them.
    """
    if model.config.model_type in architectures.ALL:
        return [float(value) for value in loss.window_nll(model, ids_BL, batch=batch)]
    import torch
    import torch.nn.functional as F

    sums = []
    with torch.no_grad():
        for row in ids_BL:
            ids = torch.from_numpy(np.ascontiguousarray(row[None])).to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            sums.append(float(F.cross_entropy(logits, ids[0, 1:], reduction="none").double().sum()))
    return sums
