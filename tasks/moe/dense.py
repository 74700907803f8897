"""The model stage: bring a dense checkpoint into data/models/NAME as safetensors, with its tokenizer.

    python -m tasks.moe.dense smollm2-135m-q4

Reads safetensors and GGUF and no other format: a pickle runs code when it is opened. Tensors pass one by one; the
model is never in memory. Writes data/models/NAME/ whole or not at all, and its size, origin and digest to
data/models/NAME.json.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import architectures, layout, rewritten, scratch, settings, sources
from tasks.moe import counts, families, files, gguf, untrusted

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

ROOT = Path("data/models")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_FLOPS_SEQ_LEN = 2048


def build(entry: settings.Model, work: Path) -> dict[str, Any]:
    """Write the checkpoint `work/model` from a source, and return the stage's metrics.

    Args:
        entry: the model's entry in pipelines.yaml.
        work: scratch folder, emptied of what an earlier attempt left.

    Raises:
        SourceError: the source cannot be had, is damaged, is a pickle, is of no known family, or is not what the entry
            says.
    """
    target = work / "model"
    for folder in (target, work / "source"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    fetched = _fetch(entry, work / "source")
    with fetched.unchanged():  # else the checkpoint would be of other bytes than its digest says
        config = _build(entry, work, fetched)
        digest = fetched.digest(anew=True)
    if entry.sha256 not in (None, digest):
        raise sources.SourceError(f"source {entry.source!r} changed while it was read: sha256 is {digest}; run again")
    config.dtype = entry.dtype
    files.write_config(config, target)
    shutil.rmtree(work / "source")
    return {
        "parameters": counts.parameters(config),
        "flops_per_token": {"seq_len": _FLOPS_SEQ_LEN} | counts.flops_per_token(config, seq_len=_FLOPS_SEQ_LEN),
        "source": entry.source,
        "source_sha256": digest,
        "license": entry.license,
        "dtype": entry.dtype,
    }


def _build(entry: settings.Model, work: Path, fetched: sources.Fetched) -> PreTrainedConfig:
    """Write tensors, tokenizer and documents of fetched files to `work/model`, and return the config."""
    import torch

    target = work / "model"
    top = {Path(path).name: path for path in fetched.paths if _beside(path, fetched.paths)}
    weights = _weight_files(entry.source, top)
    for name, path in top.items():
        here = work / "source" / name
        if Path(name).suffix in _PICKLES or here.exists():
            continue
        if fetched.source.kind == "dir":
            here.symlink_to(Path(path).resolve())
        else:
            with fetched.fs.open(path, "rb") as source, here.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    try:
        if weights[0].endswith(".gguf"):
            config = untrusted.understood(
                lambda: gguf.convert(work / "source" / weights[0], target, dtype=getattr(torch, entry.dtype)),
                file=weights[0],
            )
            _check_shape(config, entry)
        else:
            config = _convert(work / "source", weights, target=target, entry=entry)
    except ValueError as error:
        raise sources.SourceError(f"source {entry.source!r} {error}") from error
    return config


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
        *files.DOCUMENTS,
    ]
    try:
        listed = HfApi().list_repo_files(source.name, revision=source.version)
        _weight_files(entry.source, [name for name in listed if "/" not in name])
        local = snapshot_download(
            source.name, revision=source.version, allow_patterns=patterns, ignore_patterns="consolidated*"
        )
    except (OSError, ValueError) as error:  # huggingface_hub's network, authentication and offline errors
        if isinstance(error, sources.SourceError):
            raise
        raise sources.SourceError(f"source {entry.source!r} could not be fetched from the hub: {error}") from None
    for path in Path(local).iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path.resolve())
    return sources.fetch(f"dir:{folder}", scratch.ROOT / "sources", sha256=entry.sha256, anywhere=True)


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


def _convert(folder: Path, weights: list[str], *, target: Path, entry: settings.Model) -> PreTrainedConfig:
    """Copy the tensors, tokenizer, card and licence of a checkpoint folder, and return its config.

    Raises ValueError: no config of a known family, a damaged file, or other tensors than the config's.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig

    from tasks.moe.writer import ShardWriter

    if not (folder / "config.json").is_file():
        raise ValueError("holds safetensors but no config.json; name the folder of the whole checkpoint")
    fields = files.read_json(folder / "config.json")
    families.check(fields)
    shards, listed = _shards(folder, weights)
    headers = untrusted.headers(folder, shards, listed=listed)
    untrusted.check_config(fields, headers)

    def read_config() -> tuple[PreTrainedConfig, PreTrainedConfig, dict[str, tuple[int, ...]]]:
        own = config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if fields["model_type"] in architectures.REWRITTEN:
            config = AutoConfig.for_model(**rewritten.config(fields))
        return own, config, families.expected(config)

    own, config, wanted = untrusted.understood(read_config, file="config.json")
    _check_shape(config, entry)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError("holds no tokenizer (tokenizer.json or tokenizer.model); add it to the source")
    dtype = getattr(torch, entry.dtype)
    tied = config.tie_word_embeddings and layout.HEAD in headers
    families.account(
        {name: entry.shape for name, entry in headers.items() if not (tied and name == layout.HEAD)},
        wanted if own is config else families.expected(own),
    )

    def read(name: str) -> torch.Tensor:
        # Opened anew each time: what a mapping has read stays in memory until the mapping ends.
        with safe_open(folder / headers[name].file, framework="pt") as file:
            stored: torch.Tensor = file.get_tensor(name)
            untrusted.require_fits(stored, stored.to(dtype), name=name, file=headers[name].file)
            return stored

    if tied and not read(layout.HEAD).to(dtype).equal(read(layout.EMBEDDINGS).to(dtype)):
        raise ValueError(
            f"config.json: tie_word_embeddings = true, but {layout.HEAD} is not {layout.EMBEDDINGS}; set it to "
            f"false, or drop {layout.HEAD}"
        )
    with ShardWriter(target, {name: (dtype, shape) for name, shape in wanted.items()}) as writer:
        for name in wanted:
            writer.write(name, rewritten.tensor(name, fields, read).to(dtype))
    files.copy_tokenizer(folder, target)
    files.copy_documents(folder, target)
    return config


def _shards(folder: Path, weights: list[str]) -> tuple[list[str], dict[str, str] | None]:
    """The files that make up the checkpoint: those that transformers would read, or all where it would read none.

    With them what the index says, where it is what names the files.
    """
    if "model.safetensors" in weights:
        return ["model.safetensors"], None
    listed = untrusted.indexed(folder)
    if listed is None:
        return weights, None
    shards = sorted(set(listed.values()))
    if absent := [name for name in shards if name not in weights]:
        raise ValueError(f"lacks {', '.join(absent)}, which {untrusted.INDEX} lists; fetch the whole checkpoint")
    return shards, listed


def _check_shape(config: Any, entry: settings.Model) -> None:
    wanted = entry.shape.model_dump(exclude_none=True) if entry.shape else {}
    wrong = [
        f"{field} = {value} in pipelines.yaml, {getattr(config, field)} in config.json"
        for field, value in wanted.items()
        if getattr(config, field) != value
    ]
    if wrong:
        raise ValueError(f"has another shape than its entry: {'; '.join(wrong)}. Correct `shape` or the source")


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
    except (settings.SettingsError, sources.SourceError, scratch.BusyError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{ROOT / name}: {metrics['parameters']['total']:,} parameters from {entry.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
