"""What the hub says of a dataset before anything is downloaded."""

from __future__ import annotations

from tasks.sources.syntax import Source, SourceError


def require_data_files(source: Source) -> None:
    """Raise SourceError if a dataset of the hub cannot be had or has a loading script, as far as the hub can be asked.

    `datasets` runs no scripts and refuses every repository that has one, even beside data files.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        listed = HfApi().list_repo_files(source.name, revision=source.version, repo_type="dataset")
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"source {source.text!r}: the hub refuses it ({type(error).__name__}: {reason})") from None
    except Exception:  # offline or out of reach: the stage that reads it says so, or finds it in the hub's cache
        return
    script = f"{source.name.rpartition('/')[2]}.py"
    if script in listed:
        raise SourceError(
            f"source {source.text!r}: the dataset has a loading script ({script}), which `datasets` never runs; name "
            f"data files of it (hf://datasets/{source.name}@{source.version}/PATH, format: jsonl or parquet), "
            "or a dataset that is data files alone"
        )
