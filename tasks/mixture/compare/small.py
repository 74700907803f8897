"""A ground that costs minutes: the parent's tokenizer cut to its first merges, the corpus in its ids, a small LLaMA.

A small model spends nearly all of its work on a large vocabulary. The first merges of a byte-pair encoder are an
encoder of their own, which splits the same text into more tokens and loses none of it.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks import scratch
from tasks.corpus import manifest, shards
from tasks.corpus.manifest import Split
from tasks.corpus.tokenizer.encoder import Encoder, load_encoder

VOCABULARY = 1024
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def cut_tokenizer(raw: dict[str, Any], *, size: int) -> dict[str, Any]:
    """A byte-pair tokenizer.json with `size` tokens: special tokens, the alphabet, and the first merges.

    Args:
        raw: tokenizer.json of a byte-pair encoder.

    Raises:
        ValueError: it is another kind of tokenizer, or has no `size` tokens.
    """
    model = raw["model"]
    if model["type"] != "BPE":
        raise ValueError(f"tokenizer.json: model.type = {model['type']}; only a byte-pair encoder (BPE) can be cut")
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    special = [token["content"] for token in raw["added_tokens"]]
    made = {left + right for left, right in pairs}
    kept = dict.fromkeys([*special, *sorted(set(model["vocab"]) - made - set(special))])
    merges = []
    for left, right in pairs:
        if len(kept) == size:
            break
        kept[left + right] = None
        merges.append([left, right])
    if len(kept) != size:
        raise ValueError(f"tokenizer.json: {len(kept)} tokens can be kept, and not {size}")
    vocabulary = {token: i for i, token in enumerate(kept)}
    added = [{**token, "id": vocabulary[token["content"]]} for token in raw["added_tokens"]]
    return {**raw, "added_tokens": added, "model": {**model, "vocab": vocabulary, "merges": merges}}


def write_tokenizer(parent: Path, target: Path) -> None:
    """Write the cut tokenizer of a model folder to `target`, with the special tokens that its config names."""
    raw = cut_tokenizer(json.loads((parent / "tokenizer.json").read_text()), size=VOCABULARY)
    target.mkdir(parents=True, exist_ok=True)
    scratch.write_json(target / "tokenizer.json", raw)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (parent / name).is_file():
            shutil.copyfile(parent / name, target / name)


def write_model(target: Path, *, tokenizer: Path, seed: int) -> None:
    """Write a random LLaMA of SHAPE with a tokenizer, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    encoder = load_encoder(tokenizer)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {**SHAPE}
    config = LlamaConfig(
        **sizes,
        vocab_size=encoder.vocab_size,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=encoder.bos_token_id,
        eos_token_id=encoder.eos_token_id,
    )
    staging = target.with_name(f".{target.name}")
    LlamaForCausalLM(config).save_pretrained(staging)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, staging / path.name)
    scratch.publish(staging, target)


def encode_corpus(corpus: Path, target: Path, *, parent: Path, model: Path, unseen: Collection[str]) -> None:
    """Write the documents of a corpus in the ids of another tokenizer, each in the split where it is.

    Args:
        parent: the model in whose ids `corpus` is.
        model: the folder of the other tokenizer.
        unseen: domains all of whose documents become test text, beside those of `corpus`.

    Raises:
        ValueError: `unseen` names a domain that the corpus lacks, or all of them.
    """
    made, old, new = manifest.load(corpus), load_encoder(parent), load_encoder(model)
    manifest.require_tokenizer(made, parent)
    held_out = {*unseen, *made.unseen}
    if unknown := sorted(held_out - made.domains.keys()):
        raise ValueError(f"--unseen {' '.join(unknown)}: not in {corpus}; it has {', '.join(made.domains)}")
    if not made.domains.keys() - held_out:
        raise ValueError(f"--unseen names all domains of {corpus}; leave some to be trained on")
    staging = target.with_name(f".{target.name}")
    shutil.rmtree(staging, ignore_errors=True)
    domains: dict[str, Any] = {}
    for name, entry in made.domains.items():
        apart = name in held_out
        splits: dict[Split, list[dict[str, Any]]] = {split: [] for split in manifest.SPLITS}
        for split in manifest.SPLITS:
            for shard in entry.splits[split].shards:
                to: Split = "test" if apart else split
                path = staging / name / to / f"part-{len(splits[to]):05}-000.arrow"
                path.parent.mkdir(parents=True, exist_ok=True)
                splits[to].append(_encode(corpus / shard.path, path, old=old, new=new, domain=name, split=to))
        domains[name] = {
            **{split: manifest.split_of(parts) for split, parts in splits.items()},
            "rules": {},
            "license": entry.license,
            "source": entry.source,
            "files": {},
            **({"unseen": True} if apart else {}),
        }
    content = {
        "format": manifest.FORMAT,
        "corpus": target.name,
        "model": model.name,
        "tokenizer": new.fingerprint,
        **{name: getattr(new, name) for name in ("vocab_size", "eos_token_id", "bos_token_id")},
        "separators": "eos",
        "dtype": new.dtype.__name__,
        "seed": made.seed,
        "domains": domains,
    }
    scratch.write_json(staging / manifest.FILE, content)
    scratch.publish(staging, target)


def _encode(source: Path, target: Path, *, old: Encoder, new: Encoder, domain: str, split: str) -> dict[str, Any]:
    """One shard in other ids; its sidecar."""
    batch = shards.open_shard(source)
    flat, places = shards.flat_ids(batch), shards.offsets(batch)
    texts = [old.decode(_bare(flat[a:b], old).tolist()) for a, b in itertools.pairwise(places)]
    ids, offsets = new.encode(texts)
    part = shards.Part()
    part.append(
        ids,
        offsets,
        doc_ids=shards.doc_ids(batch),
        sources=batch.column("source").to_pylist(),
        rows=np.array(batch.column("row").to_pylist(), dtype=np.uint64),
        text_bytes=sum(len(text.encode()) for text in texts),
    )
    metadata = {
        "domain": domain,
        "split": split,
        "tokenizer": new.fingerprint,
        "eos_token_id": str(new.eos_token_id),
        "task_key": scratch.digest(source),
    }
    return shards.write(target, part, order=np.arange(part.documents), dtype=new.dtype, metadata=metadata)


def _bare(ids: NDArray[Any], encoder: Encoder) -> NDArray[Any]:
    """A document without the separators around it."""
    first = int(len(ids) > 0 and ids[0] == encoder.bos_token_id)
    last = len(ids) - int(len(ids) > first and ids[-1] == encoder.eos_token_id)
    return ids[first:last]
