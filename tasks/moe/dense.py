"""The model stage: bring a dense LLaMA into data/models/NAME as safetensors, with its tokenizer.

    python -m tasks.moe.dense smollm2-135m-q4

Reads safetensors and GGUF and no other format: a pickle runs code when it is opened. Writes data/models/NAME/ whole
or not at all, and its size, origin and digest to data/models/NAME.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import scratch, settings, sources
from tasks.moe import counts, files

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROOT = Path("data/models")
ARCHITECTURES = ("LlamaForCausalLM",)
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_FLOPS_SEQ_LEN = 2048

# GGUF's names of a LLaMA's tensors, and this model's.
_GGUF = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def build(entry: settings.Model, work: Path) -> dict[str, Any]:
    """Write the checkpoint `work/model` from a source, and return the stage's metrics.

    Args:
        entry: the model's entry in pipelines.yaml.
        work: scratch folder, emptied of what an earlier attempt left.

    Raises:
        SourceError: the source cannot be had, is damaged, is a pickle, is no LLaMA, or is not what the entry says.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    target = work / "model"
    for folder in (target, work / "source"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    fetched = _fetch(entry, work / "source")
    top = {Path(path).name: path for path in fetched.paths if _beside(path, fetched.paths)}
    weights = _weight_files(entry.source, top)
    for name, path in top.items():
        if Path(name).suffix not in _PICKLES and not (work / "source" / name).exists():
            with fetched.fs.open(path, "rb") as source, (work / "source" / name).open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    load = _load_gguf if weights[0].endswith(".gguf") else _load_safetensors
    model = load(work / "source", weights, entry)
    _check_shape(model.config, entry)
    files.save(model, target)
    if not any((target / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise _error(entry, "holds no tokenizer (tokenizer.json or tokenizer.model); add it to the source")
    shutil.rmtree(work / "source")
    return {
        "parameters": counts.parameters(model.config),
        "flops_per_token": {"seq_len": _FLOPS_SEQ_LEN} | counts.flops_per_token(model.config, seq_len=_FLOPS_SEQ_LEN),
        "source": entry.source,
        "source_sha256": fetched.digest(),
        "license": entry.license,
        "dtype": entry.dtype,
    }


def _fetch(entry: settings.Model, folder: Path) -> sources.Fetched:
    source = sources.parse(entry.source)
    if source.kind != "hub":
        return sources.fetch(entry.source, scratch.ROOT / "sources", sha256=entry.sha256)
    from huggingface_hub import HfApi, snapshot_download

    patterns = [
        "*.safetensors",
        "*.safetensors.index.json",
        "config.json",
        "generation_config.json",
        *files.TOKENIZER_FILES,
    ]
    try:
        listed = HfApi().list_repo_files(source.name, revision=source.version)
        _weight_files(entry.source, [name for name in listed if "/" not in name])
        local = snapshot_download(source.name, revision=source.version, allow_patterns=patterns)
    except (OSError, ValueError) as error:  # huggingface_hub's network, authentication and offline errors
        if isinstance(error, sources.SourceError):
            raise
        raise _error(entry, f"could not be fetched from the hub: {error}") from None
    for path in Path(local).iterdir():
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    return sources.fetch(f"dir:{folder}", scratch.ROOT / "sources", sha256=entry.sha256)


def _beside(path: str, paths: Iterable[str]) -> bool:
    """True for a file in the source's top folder."""
    return path.count("/") == min(other.count("/") for other in paths)


def _weight_files(source: str, names: Iterable[str]) -> list[str]:
    suffixes = {name: Path(name).suffix for name in names}
    gguf = sorted(name for name, suffix in suffixes.items() if suffix == ".gguf")
    tensors = sorted(name for name, suffix in suffixes.items() if suffix == ".safetensors")
    pickles = sorted(name for name, suffix in suffixes.items() if suffix in _PICKLES)
    if tensors:
        return tensors
    if len(gguf) == 1:
        return gguf
    if gguf:
        raise sources.SourceError(f"source {source!r} holds {len(gguf)} GGUF files; name one: {', '.join(gguf)}")
    if pickles:
        raise sources.SourceError(
            f"source {source!r} holds its weights only as pickles ({', '.join(pickles)}), which can run any code when "
            "they are opened; convert them to safetensors where you trust them, and point `source` there"
        )
    raise sources.SourceError(f"source {source!r} holds neither safetensors nor GGUF: {', '.join(suffixes)}")


def _load_safetensors(folder: Path, weights: list[str], entry: settings.Model) -> LlamaForCausalLM:
    """Load a checkpoint folder, and copy its tokenizer beside the result."""
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, LlamaForCausalLM

    if not (folder / "config.json").is_file():
        raise _error(entry, "holds safetensors but no config.json; name the folder of the whole checkpoint")
    try:
        fields = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise _error(entry, f"config.json is not valid JSON: {error}") from None
    _check_architecture(fields, entry)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    found: set[str] = set()
    for name in weights:
        try:
            with safe_open(folder / name, framework="pt") as file:
                found.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise _error(entry, f"{name} is damaged or cut short ({error}); fetch it again") from None
    _account(found, _expected(config), entry, known=lambda name: name.endswith("rotary_emb.inv_freq"))
    model = LlamaForCausalLM.from_pretrained(
        folder, config=config, dtype=getattr(torch, entry.dtype), local_files_only=True, use_safetensors=True
    )
    files.copy_tokenizer(folder, folder.parent / "model")
    return model


def _load_gguf(folder: Path, weights: list[str], entry: settings.Model) -> LlamaForCausalLM:
    """Dequantise a GGUF file, and write its tokenizer beside the result."""
    import copy

    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    name = weights[0]
    try:
        reader = GGUFReader(folder / name)
        field = reader.get_field("general.architecture")
        architecture = str(field.contents()) if field else "unknown"
        # The reader maps the file, so a tensor that ends behind it fails only here.
        found = {_from_gguf(tensor.name) for tensor in reader.tensors if tensor.data.nbytes == tensor.n_bytes}
    except (ValueError, OSError, IndexError) as error:
        raise _error(entry, f"{name} is damaged or cut short ({error}); fetch it again") from None
    if architecture != "llama":
        raise _error(entry, f"is a GGUF of architecture {architecture!r}; supported: llama")
    config = copy.deepcopy(AutoConfig.from_pretrained(folder, gguf_file=name))
    _check_architecture(config.to_dict(), entry)
    _account(found, _expected(config), entry)
    dtype = getattr(torch, entry.dtype)
    loaded = LlamaForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
    # A model read from GGUF refuses to be saved, because its config calls it quantised.
    vars(config).pop("quantization_config", None)
    model = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict(), strict=True)
    model.tie_weights()
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(folder.parent / "model")
    return model


def _from_gguf(name: str) -> str:
    """A GGUF tensor's name in this model; an unknown one stays as it is, and is reported."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{_GGUF[part]}.{kind}" if part in _GGUF else name
    return f"{_GGUF[stem]}.{kind}" if stem in _GGUF else name


def _expected(config: Any) -> set[str]:
    """Names of the tensors that a checkpoint of this config stores."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        names = set(LlamaForCausalLM(config).state_dict())
    return names - {"lm_head.weight"} if config.tie_word_embeddings else names


def _account(
    found: set[str], expected: set[str], entry: settings.Model, *, known: Callable[[str], bool] = lambda name: False
) -> None:
    missing = sorted(expected - found)
    extra = sorted(name for name in found - expected - {"lm_head.weight"} if not known(name))
    if missing or extra:
        raise _error(
            entry,
            f"does not hold the tensors of its config: {len(missing)} missing ({', '.join(missing[:5]) or 'none'}), "
            f"{len(extra)} unknown ({', '.join(extra[:5]) or 'none'})",
        )


def _check_architecture(fields: dict[str, Any], entry: settings.Model) -> None:
    found = fields.get("architectures") or []
    if fields.get("model_type") != "llama" or (found and found[0] not in ARCHITECTURES):
        raise _error(
            entry,
            f"config.json: architectures = {found}, model_type = {fields.get('model_type')!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}",
        )


def _check_shape(config: Any, entry: settings.Model) -> None:
    wanted = entry.shape.model_dump(exclude_none=True) if entry.shape else {}
    wrong = [
        f"{field} = {value} in pipelines.yaml, {getattr(config, field)} in config.json"
        for field, value in wanted.items()
        if getattr(config, field) != value
    ]
    if wrong:
        raise _error(entry, f"has another shape than its entry: {'; '.join(wrong)}. Correct `shape` or the source")


def _error(entry: settings.Model, message: str) -> sources.SourceError:
    return sources.SourceError(f"source {entry.source!r} {message}")


def main() -> int:
    """Run the stage for the model named on the command line."""
    if len(sys.argv) != 2:
        print("usage: python -m tasks.moe.dense MODEL", file=sys.stderr)
        return 2
    name = sys.argv[1]
    try:
        entry = settings.load().model(name)
        with scratch.workspace("model", name, inputs=entry.model_dump()) as work:
            metrics = build(entry, work)
            scratch.publish(work / "model", ROOT / name)
            scratch.write_json(ROOT / f"{name}.json", metrics)
    except (settings.SettingsError, sources.SourceError, scratch.BusyError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{ROOT / name}: {metrics['parameters']['total']:,} parameters from {entry.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
