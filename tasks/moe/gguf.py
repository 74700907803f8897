"""Reads a GGUF file into safetensors: dequantised tensor by tensor, every tensor accounted for by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import architectures, layout
from tasks.moe import families, files, untrusted
from tasks.moe.internals import gguf_reader, rope

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFReader, ReaderTensor
    from transformers import PreTrainedConfig

_CLASSES = {row.model_type: row.architecture for row in architectures.DENSE.values() if row.gguf}
"""By GGUF's name. Mistral models are written as LLaMAs, and become such: without a sliding window, as llama.cpp runs
them."""
_ROPE_FREQS = "rope_freqs.weight"

_DIGIT_BY_DIGIT = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
"""llama.cpp's names of byte-level tokenizers that split digits off first; transformers 5.22 leaves that out."""

_NAMES = {
    "token_embd": layout.EMBEDDINGS.removesuffix(".weight"),
    "output_norm": layout.NORM.removesuffix(".weight"),
    "output": layout.HEAD.removesuffix(".weight"),
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAMES = {ours: theirs for theirs, ours in _NAMES.items()}


def convert(file: Path, target: Path, *, dtype: torch.dtype) -> PreTrainedConfig:
    """Write the weights and the tokenizer of a GGUF file into a folder, and return the model's config.

    One tensor is in memory at a time, in float32 and in `dtype`.

    Raises:
        ValueError: the file is damaged or cut short, of another architecture, or does not hold its config's tensors.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    from tasks.moe.writer import ShardWriter

    try:
        reader = GGUFReader(file)
        # The reader maps the file, so a tensor that ends behind it fails only here.
        tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.data.nbytes == tensor.n_bytes}
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"{file.name} is damaged or cut short ({error}); fetch it again") from None
    architecture = _field(reader, "general.architecture") or "unknown"
    if architecture not in _CLASSES:
        raise ValueError(f"is a GGUF of architecture {architecture!r}; supported: {', '.join(_CLASSES)}")
    frequencies = tensors.pop(_ROPE_FREQS, None)
    config = _config(file, reader, architecture=architecture, frequencies=frequencies)
    wanted = families.expected(config)
    families.account({rename(name): _shape(tensor) for name, tensor in tensors.items()}, wanted)
    # llama.cpp interleaves the rows of a LLaMA's q and k.
    restore = gguf_reader.restore(architecture, config)
    by_name = {rename(name): tensor for name, tensor in tensors.items()}
    with ShardWriter(target, {name: (dtype, shape) for name, shape in wanted.items()}) as writer:
        for name in wanted:
            tensor = by_name[name]
            try:
                weights = dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                raise ValueError(
                    f"{file.name}: {tensor.name} is stored as {tensor.tensor_type.name}, which the gguf package does "
                    "not dequantise; take another quantisation of the model"
                ) from None
            stored = torch.tensor(restore(weights, tensor.name))  # a copy: the file is mapped
            converted = stored.to(dtype)
            untrusted.require_fits(stored, converted, name=tensor.name, file=file.name)
            writer.write(name, converted)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if _field(reader, "tokenizer.ggml.pre") in _DIGIT_BY_DIGIT:
        digits = pre_tokenizers.Digits(individual_digits=True)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.save_pretrained(target)
    files.share_tokenizer(target)
    return config


def rename(name: str) -> str:
    """A GGUF tensor's name in transformers; an unknown one stays as it is, and is reported."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        return f"{layout.block(layer)}.{_NAMES[part]}.{kind}" if part in _NAMES else name
    return f"{_NAMES[stem]}.{kind}" if stem in _NAMES else name


def to_gguf(name: str) -> str | None:
    """The name in GGUF of a tensor that every class has, or of a dense FFN; None for a router or experts."""
    stem, _, kind = name.rpartition(".")
    if (layer := layout.layer_of(name)) is not None:
        part = stem.removeprefix(f"{layout.block(layer)}.")
        return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}" if part in _GGUF_NAMES else None
    return f"{_GGUF_NAMES[stem]}.{kind}" if stem in _GGUF_NAMES else None


def _config(
    file: Path, reader: GGUFReader, *, architecture: str, frequencies: ReaderTensor | None
) -> PreTrainedConfig:
    from transformers import AutoConfig

    if (scaling := _field(reader, f"{architecture}.rope.scaling.type")) not in {None, "none"}:
        raise ValueError(
            f"{file.name}: {architecture}.rope.scaling.type = {scaling!r} is not read from GGUF; take the model's "
            "safetensors"
        )
    fields: dict[str, Any] = gguf_reader.config_fields(file)
    fields |= {"model_type": architecture, "architectures": [_CLASSES[architecture]]}
    fields.setdefault("rope_theta", 10_000.0)  # llama.cpp's; transformers has another for every family
    if head_dim := _field(reader, f"{architecture}.attention.key_length"):
        fields["head_dim"] = head_dim
    if frequencies is not None:
        fields["rope_parameters"] = _llama3(fields, frequencies.data)
    return AutoConfig.for_model(**fields)


def _llama3(fields: dict[str, Any], divisors: np.ndarray) -> dict[str, Any]:
    """The rope parameters behind rope_freqs.weight [head_dim / 2], which divides the base frequencies (Llama 3.1)."""
    import numpy as np
    from transformers import LlamaConfig

    parameters = {
        "rope_type": "llama3",
        "rope_theta": fields["rope_theta"],
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(**fields | {"rope_parameters": parameters})
    scaled, _ = rope.frequencies(config)
    base = 1 / parameters["rope_theta"] ** (np.arange(len(divisors)) / len(divisors))
    if not np.allclose(base / scaled.numpy(), divisors, rtol=1e-4):
        raise ValueError(
            f"{_ROPE_FREQS} is not the rope scaling of Llama 3.1 to 3.3 (frequency factors 1 and 4, context 8192); "
            "take the model's safetensors"
        )
    return parameters


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return field.contents() if field else None


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))
