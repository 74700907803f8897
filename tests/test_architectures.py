"""The table of model classes: complete, read by everything, and held against transformers' own classes."""

import ast
from pathlib import Path

import pytest
import transformers

from tasks import architectures
from tasks.engines import table
from tasks.partition import exporters

ROOT = Path(__file__).parent.parent
OTHER_MEANINGS = {
    ("tasks/settings/pretrain.py", "mixtral"),  # a balance loss
    ("tasks/pretrain/loss/balance.py", "mixtral"),
    ("tasks/evaluate/report/hub_metadata.py", "llama"),  # a licence
    ("tasks/mixture/published.py", "llama"),  # a published mix of domains
    ("tasks/settings/mixture.py", "llama"),
    ("tasks/engines/gguf_vocabulary.py", "llama"),  # kinds of tokenizers
    ("tasks/engines/gguf_vocabulary.py", "gpt2"),
    ("tasks/engines/gguf_vocabulary.py", "qwen2"),
}


def literals():
    """Every string of the product that is a model_type, without docstrings: (file, string)."""
    kinds = {*architectures.ALL, *architectures.REFUSED}
    for file in sorted(path for room in ("flows", "tasks") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and node.value in kinds:
                yield file.relative_to(ROOT).as_posix(), node.value


def test_no_other_file_names_a_model_class():
    others = {each for each in literals() if each[0] != "tasks/architectures.py"} - OTHER_MEANINGS
    assert not others, "read tasks/architectures.py instead, and add a column there if it lacks one"


def test_every_class_that_is_written_has_an_exporter_and_a_place_in_the_table_of_every_engine():
    assert list(exporters.EXPORTERS) == list(architectures.SPARSE)
    for engine in table.ENGINES.values():
        assert set(architectures.SPARSE) <= set(engine.classes)
    assert not architectures.REFUSED.keys() & architectures.DENSE.keys()


@pytest.mark.parametrize("kind", architectures.ALL)
def test_a_row_has_the_names_of_its_class_in_transformers(kind):
    row = architectures.ALL[kind]
    config = transformers.CONFIG_MAPPING[kind]()
    assert getattr(transformers, row.architecture).config_class is type(config)
    named = [row.bias_field, *(architectures.MULTIPLIERS if row.multipliers else ())]
    if isinstance(row, architectures.Sparse):
        named += [row.experts, row.expert_size, row.shared_size, *row.names_in_4.values()]
        named += ["mlp_only_layers", "decoder_sparse_step"] if row.dense_layers else []
    assert not [field for field in named if field and not hasattr(config, field)]
    assert row.multipliers == hasattr(config, "residual_multiplier")
    assert len(architectures.windows(config)) == config.num_hidden_layers


def test_the_documentation_lists_the_classes():
    text = (ROOT / "docs/model.md").read_text()
    for kind in (*architectures.DENSE, *architectures.REWRITTEN):
        assert f"| `{kind}` | " in text
