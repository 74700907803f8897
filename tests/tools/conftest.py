"""The corpora that the corpus tools look at, as in tests/corpus."""

from tests.corpus.conftest import (
    _no_waiting,
    byte_level,
    corpus,
    finished_project,
    project,
    sentencepiece,
)

__all__ = ["_no_waiting", "byte_level", "corpus", "finished_project", "project", "sentencepiece"]
