"""The corpora that the corpus tools look at, as in tests/corpus."""

from tests.corpus.conftest import byte_level, corpus, project, sentencepiece

__all__ = ["byte_level", "corpus", "project", "sentencepiece"]
