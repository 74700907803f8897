"""Write a checkpoint, dense or sparse, as one GGUF file for llama.cpp and Ollama.

    python -m tasks.engines.gguf runs/NAME/trained FILE.gguf [--quantise Q8_0]

Beside FILE.gguf, FILE.Modelfile is written for Ollama. One tensor at a time is in memory.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
    quant_shape_to_byte_shape,
    quants,
)
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoConfig

from tasks import architectures, scratch
from tasks.engines import gguf_tensors, gguf_vocabulary, limits
from tasks.moe import families, untrusted
from tasks.moe.files import read_json
from tasks.moe.internals import rope

KINDS = ("F32", "F16", "BF16", "Q8_0")
"""Types that matrices are stored in; norms, biases and routers are always F32."""


def export(folder: Path, target: Path, *, kind: str = "F16") -> dict[str, Any]:
    """Write a checkpoint as `target`, and a Modelfile of its name beside it; both appear whole or not at all.

    Args:
        folder: the checkpoint, with its tokenizer.
        target: the file; an older one is replaced.
        kind: one of KINDS. A matrix whose rows are no multiple of 32 stays F16 in Q8_0.

    Returns:
        The architecture, and the number of tensors and bytes by type.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: llama.cpp cannot express the model or its tokenizer, or a tensor is missing, damaged or left over.
    """
    if kind not in KINDS:
        raise ValueError(f"--quantise {kind}: not known; choose one of {', '.join(KINDS)}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no checkpoint here (config.json is missing); run the stage that writes it")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if reason := limits.llama_cpp(config):
        raise ValueError(f"{folder}: llama.cpp cannot run it: {reason}")
    written_as = architectures.llama_cpp(config)
    assert written_as
    listed = untrusted.indexed(folder)
    shards = sorted(set(listed.values())) if listed else ["model.safetensors"]
    stored = untrusted.headers(folder, shards, listed=listed)
    plan = gguf_tensors.plan(config)
    wanted = {name: shape for made in plan.values() for name, shape in made.sources.items()}
    families.account({name: header.shape for name, header in stored.items()}, wanted)
    kinds = {name: _kind(name, made.shape, kind=kind) for name, made in plan.items()}
    files: dict[str, Any] = {shard: safe_open(folder / shard, framework="pt") for shard in shards}

    def read(name: str) -> torch.Tensor:
        tensor: torch.Tensor = files[stored[name].file].get_tensor(name)
        untrusted.require_finite(tensor, name=name, file=stored[name].file)
        return tensor

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    writer = GGUFWriter(partial, written_as.name)
    try:
        _add_metadata(writer, config, kind=kind, scales=written_as.scales, name=folder.resolve().parent.name)
        gguf_vocabulary.add(writer, folder, size=config.vocab_size)
        for name, made in plan.items():
            of_bytes = quant_shape_to_byte_shape(made.shape, kinds[name])
            plain = {"F32": np.float32, "F16": np.float16}.get(kinds[name].name)  # else stored as bytes
            shape, dtype = (made.shape, plain) if plain else (of_bytes, np.uint8)
            writer.add_tensor_info(name, shape, np.dtype(dtype), int(np.prod(of_bytes)), raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, made in tqdm(plan.items(), desc=target.name, unit="tensor", disable=None, file=sys.stderr):
            values = made.make([read(source) for source in made.sources]).float().contiguous().numpy()
            writer.write_tensor_data(quants.quantize(values, kinds[name]))
        writer.close()
        scratch.fsync(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    template = "" if _has_template(folder) else 'TEMPLATE """{{ .Prompt }}"""\n'  # a base model continues the text
    scratch.write_text(
        target.with_suffix(".Modelfile"),
        f"FROM ./{target.name}\nPARAMETER num_ctx {limits.context('llama.cpp', config)}\n{template}",
    )
    count = dict(Counter(each.name for each in kinds.values()))
    return {"architecture": written_as.name, "bytes": target.stat().st_size, "tensors": count}


def _has_template(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    return any(folder.glob("chat_template*")) or (settings.is_file() and "chat_template" in read_json(settings))


def _kind(name: str, shape: tuple[int, ...], *, kind: str) -> GGMLQuantizationType:
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    if kind == "Q8_0" and shape[-1] % 32:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[kind]


def _add_metadata(writer: GGUFWriter, config: Any, *, kind: str, scales: bool, name: str) -> None:
    row, head_dim = architectures.row(config), architectures.head_dim(config)
    writer.add_name(name)
    writer.add_file_type(getattr(LlamaFileType, "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"))
    writer.add_quantization_version(2)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(limits.context("llama.cpp", config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    _add_rope(writer, config)
    width = getattr(config, row.expert_size) if isinstance(row, architectures.Sparse) else config.intermediate_size
    writer.add_feed_forward_length(width)
    if isinstance(row, architectures.Sparse):
        writer.add_expert_count(getattr(config, row.experts))
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(width)
        if row.shared_size and (shared := getattr(config, row.shared_size)):
            writer.add_expert_shared_feed_forward_length(shared)
            writer.add_expert_shared_count(shared // width)
    if scales:
        multipliers = architectures.multipliers(config)
        writer.add_logit_scale(multipliers["logits_scaling"])  # required
        for field, add in (
            ("embedding_multiplier", writer.add_embedding_scale),
            ("residual_multiplier", writer.add_residual_scale),
        ):
            if multipliers[field] != 1:  # each scale is an operation of the graph
                add(multipliers[field])
        writer.add_attention_scale(multipliers["attention_multiplier"])


def _add_rope(writer: GGUFWriter, config: Any) -> None:
    parameters = config.rope_parameters
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    if parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(parameters["factor"])
        context = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(context)
        _, attention = rope.frequencies(config)
        if (share := attention / (1 + 0.1 * math.log(parameters["factor"]))) != 1:  # it multiplies by the divisor
            writer.add_rope_scaling_attn_factors(share)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.engines.gguf", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="CHECKPOINT")
    parser.add_argument("target", type=Path, metavar="FILE", help="FILE.gguf; FILE.Modelfile is written beside it")
    parser.add_argument("--quantise", choices=KINDS, default="F16", help="type of the matrices (default: F16)")
    arguments = parser.parse_args()
    try:
        written = export(arguments.folder, arguments.target, kind=arguments.quantise)
    except (ValueError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    kinds = ", ".join(f"{count} {name}" for name, count in written["tensors"].items())
    print(f"{arguments.target}: {written['architecture']}, {written['bytes'] / 1e6:.1f} MB, tensors: {kinds}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
