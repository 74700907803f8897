"""The checkpoint that a proxy begins with: a small random LLaMA, or a trained model, whole or its first layers."""

from __future__ import annotations

import copy
import re
import uuid
from pathlib import Path

from tasks import layout, scratch
from tasks.moe import files
from tasks.settings import Proxy

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
POSITIONS = 2048
"""Of a model from scratch, unless its windows are longer."""


def make(proxy: Proxy, *, parent: Path, student: Path, folder: Path) -> Path:
    """The folder of the proxy's checkpoint: the trained model's own, or one in `folder`, named by what it is made of.

    Args:
        parent: the dense checkpoint, whose tokenizer a model from scratch has.
        student: the split model.
        folder: several processes may make the same in it. The same settings and models give the same bytes.

    Raises:
        FileNotFoundError: the parent or the student is not there; the message names the stage that makes it.
        ValueError: the model has fewer layers than `proxy.layers`.
    """
    source, stage = (student, "partition") if proxy.model == "student" else (parent, "model")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source}: not found; run the stage `{stage}` first")
    if proxy.model != "scratch" and proxy.layers is None:
        return source
    told = proxy.model_dump(include={"model", "layers", "shape", "seq_len", "seed"})
    made = folder / f"proxy-{scratch.fingerprint([told, scratch.digest(source)])}"
    if made.exists():
        return made
    staging = made.with_name(f"{made.name}.tmp-{uuid.uuid4().hex}")
    staging.mkdir(parents=True)
    if proxy.model == "scratch":
        _scratch(proxy, source, staging)
    else:
        first_layers(source, proxy.layers or 0, staging)
    try:
        staging.rename(made)
    except OSError:
        if not made.exists():
            raise
        scratch.discard(staging)  # another process was faster
    return made


def first_layers(source: Path, layers: int, folder: Path) -> None:
    """Write a dense or sparse checkpoint with the first layers of another, its norm, head and tokenizer.

    Tensors are copied one by one, so that the model need not fit into memory. Raises ValueError: it has fewer layers.
    """
    from tasks.moe import gate
    from tasks.moe.streamed import Streamed
    from tasks.moe.writer import ShardWriter

    model = Streamed(source)
    if layers > model.layers:
        raise ValueError(
            f"mixture.proxy.layers = {layers}: {source} has {model.layers}; set it to that or less, or leave it out"
        )
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    for field in ("layer_types", "mlp_only_layers"):
        if (listed := getattr(config, field, None)) is not None:
            kept = listed[:layers] if field == "layer_types" else [i for i in listed if i < layers]
            setattr(config, field, kept)
    plan = {
        name: (entry.dtype, entry.shape)
        for name, entry in model.stored.items()
        if (found := _LAYER.match(name)) is None or int(found[1]) < layers
    }
    with ShardWriter(folder, plan) as writer:
        for name in plan:
            writer.write(name, model.tensor(name))
    files.write_config(config, folder)
    files.copy_tokenizer(source, folder)
    if gates := {i: each for i, each in gate.read(source).items() if i < layers}:
        gate.write(folder, gates)


def _scratch(proxy: Proxy, parent: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    from tasks.moe.writer import ShardWriter

    own = AutoConfig.from_pretrained(parent, local_files_only=True)
    config = LlamaConfig(
        **proxy.sizes.model_dump(),
        vocab_size=own.vocab_size,
        max_position_embeddings=max(POSITIONS, proxy.seq_len),
        tie_word_embeddings=True,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        dtype="float32",
        architectures=[LlamaForCausalLM.__name__],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(proxy.seed)
        model = LlamaForCausalLM(config).float()
    state = model.state_dict()
    del state[layout.HEAD]  # tied
    with ShardWriter(folder, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
    files.write_config(config, folder)
    files.copy_tokenizer(parent, folder)
