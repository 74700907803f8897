"""What the hub says of a dataset before anything is downloaded."""

from __future__ import annotations

from tasks.sources.syntax import Source, SourceError


class Unreachable(OSError):
    """The hub cannot be asked: offline, or no answer in time."""


def script_of(name: str, *, revision: str | None = None) -> str | None:
    """The loading script of a dataset of the hub; None if it has none.

    `datasets` runs no scripts, and refuses every repository that has one, even beside data files.

    Raises:
        HfHubHTTPError: there is no such dataset, revision or permission.
        Unreachable: the hub cannot be asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().dataset_info(name, revision=revision, timeout=10)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception as error:  # each network and proxy has errors of its own
        raise Unreachable(f"the hub cannot be asked for {name}: {error}") from error
    script = f"{name.rpartition('/')[2]}.py"
    return script if script in {file.rfilename for file in info.siblings or []} else None


def require_data_files(source: Source, *, ask: bool = False) -> None:
    """Raise SourceError if the hub does not give a dataset, or says that it has a loading script.

    Raises Unreachable only if `ask`: else the stage that reads it says so, or finds it in the hub's cache.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        script = script_of(source.name, revision=source.version)
    except Unreachable:
        if ask:
            raise
        return
    except HfHubHTTPError as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"source {source.text!r}: the hub refuses it ({type(error).__name__}: {reason})") from None
    if script:
        raise SourceError(
            f"source {source.text!r}: the dataset has a loading script ({script}), which `datasets` never runs; name "
            f"data files of it (hf://datasets/{source.name}@{source.version}/PATH, format: jsonl or parquet), "
            "or a dataset that is data files alone"
        )
