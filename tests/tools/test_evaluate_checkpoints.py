"""`python -m tasks.tools.evaluate`: checkpoints of any class and tokenizer, on the same text; and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.corpus.tokenizer import encoder
from tasks.evaluate.downstream import accuracy, paired, task_table
from tasks.tools.evaluate import __main__ as command
from tasks.tools.evaluate import checkpoints, page, passages, table
from tasks.tools.evaluate.request import Request
from tests.conftest import SETTINGS, documents
from tests.evaluate.downstream.test_accuracy import ITEMS
from tests.evaluate.report.test_page import Page

TEXT = "\n\n".join(documents("prose")[:40]) + "\nKöln, 東京, 🙂 and more.\n" * 20
VERBS = ("sorts", "reads", "opens", "flies")
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def save(kind: str, folder: Path, tokenizer: Path, **fields: Any) -> Path:
    """A checkpoint with random weights of a stock class, and the tokenizer of another folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A Qwen3Moe."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 32}
    return save("qwen3_moe", tmp_path_factory.mktemp("qwen"), tiny_model, **SIZES, **experts, head_dim=16)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A GPT-2, whose class is not known here, with a character-like tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("other")
    save("gpt2", folder, tiny_model, vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=128, eos_token_id=0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(["<end>", *alphabet])}
    one = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    one.pre_tokenizer, one.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    one.add_special_tokens(["<end>"])
    one.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    return folder


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text file; the test runs in its folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(TEXT)
    return Path("book.txt")


def test_a_dense_and_a_sparse_checkpoint_of_one_tokenizer_are_compared_window_by_window(
    text: Path, tiny_model: Path, qwen: Path
) -> None:
    result = command.run([qwen, tiny_model], Path("out"), text=text, seq_len=64, windows=5, measure=["analyses=all"])
    assert json.loads(Path("out/evaluation.json").read_text()) == result
    assert result["text"] | {"domains": None} == {
        "source": "book.txt", "by": "ids", "seq_len": 64, "batch": 4, "dtype": "float32", "domains": None
    }  # fmt: skip
    assert result["text"]["domains"]["book"]["tokens"] == 5 * 63
    sparse, dense = result["models"]
    assert (sparse["class"], dense["class"]) == ("Qwen3MoeForCausalLM", "LlamaForCausalLM")
    assert sparse["parameters"]["active"] < sparse["parameters"]["total"]
    (difference,) = result["difference"]
    assert difference["against"] == str(tiny_model)
    assert difference["domains"]["loss"] == pytest.approx(sparse["loss"]["mean"] - dense["loss"]["mean"])
    assert difference["domains"]["stderr"] > 0
    assert [sum(layer) for layer in sparse["load"]["book"]] == [5 * 64 * 2] * 2
    assert "routing" not in dense
    assert "details" not in dense
    assert sparse["details"]["analysis"]["text"]["windows"] == {"book": 1}
    assert set(sparse["details"]["analysis"]["left_out"]) == {"stability"}
    html = Path("out/index.html").read_text()
    seen = Page(html)
    assert seen.references == []
    assert "Qwen3MoeForCausalLM" in seen.text
    assert f"{sparse['bits_per_byte']['mean']:.3f}" in seen.text
    assert "Experts and routers in depth" in seen.text
    assert "2 sparse layers × 4 experts" in " ".join(seen.text.split())
    assert any("compared with tiny-model, paired by window: +" in note for note in table.notes(result))
    assert not list(Path(".scratch").rglob("*.json"))


def test_scores_are_compared_item_by_item_whatever_the_tokenizers(
    text: Path, tiny_model: Path, qwen: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = "{name: hellaswag_100, source: dir:cases.jsonl}"
    settings = SETTINGS.format(model=tiny_model, data=".").replace("batch: 4}", f"batch: 4, tasks: [{task}]}}")
    Path("pipelines.yaml").write_text(settings)
    alike = [item | {"endings": [f"{verb} {i}." for verb in VERBS]} for i, item in enumerate(ITEMS)]
    Path("cases.jsonl").write_text("".join(json.dumps(item) + "\n" for item in alike))
    values: list[dict[str, list[float]]] = []
    score = accuracy.score

    def noted(*arguments: Any, **options: Any) -> dict[str, Any]:
        found = score(*arguments, **options)
        values.append(found["items"]["values"])
        return found

    monkeypatch.setattr(accuracy, "score", noted)
    result = command.run(
        [tiny_model, qwen, other], Path("out"), text=text, seq_len=64, windows=1, tasks=["hellaswag_100"]
    )
    scores = [model["tasks"]["hellaswag_100"] for model in result["models"]]
    seen = " ".join(Page(page.render(result)).text.split())
    assert "on the same items, 95% interval of the bootstrap; undecided: 0 is in it" in seen
    for i, difference in enumerate(result["difference"], 1):
        for metric in ("acc", "acc_norm"):
            found = difference["tasks"]["hellaswag_100"][metric]
            assert found["difference"] == pytest.approx(scores[0][metric] - scores[i][metric])
            assert (found["low"], found["high"]) == paired.interval(np.subtract(values[0][metric], values[i][metric]))
            assert found["low"] < found["high"]
            assert task_table.interval(found) in seen
            assert f"hellaswag_100 {metric} {task_table.interval(found)}" in table.on_items(result)[i - 1]
    assert [line.partition(", ")[0] for line in table.on_items(result)] == [
        f"Scores of tiny-model compared with {title}" for title in table.titles(result)[1:]
    ]


def test_the_loss_of_a_window_is_the_one_that_transformers_computes(text: Path, qwen: Path, other: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = np.random.default_rng(0).integers(1, 250, (2, 48))
    for folder in (qwen, other):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        loaded = checkpoints.load(checkpoints.examine(folder), dtype=torch.float32, device="cpu")
        for row, nats in zip(ids, checkpoints.nats(loaded, ids, batch=2), strict=True):
            with torch.no_grad():
                logits = model(torch.from_numpy(row[None])).logits[0, :-1]
            expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(row[1:]), reduction="sum")
            assert nats == pytest.approx(float(expected), rel=1e-5)


def test_another_tokenizer_is_compared_by_bits_per_byte_alone_on_the_same_characters(
    text: Path, tiny_model: Path, other: Path
) -> None:
    import torch

    result = command.run([other, tiny_model], Path("out"), text=text, seq_len=64, windows=3)
    assert result["text"]["by"] == "text"
    assert set(result["text"]["domains"]["book"]) == {"windows", "bytes"}
    assert "loss" not in result["models"][0]
    assert result["models"][0]["parameters"].keys() == {"total"}
    assert result["difference"][0]["unit"] == "bits/byte"
    bits = [model["bits_per_byte"]["mean"] for model in result["models"]]
    assert result["difference"][0]["domains"]["loss"] == pytest.approx(bits[0] - bits[1])
    wanted = passages.of_file(text, seq_len=64, windows=3, tokenizer=other)
    rows = wanted.windows(checkpoints.examine(tiny_model), count=2)["book"]
    assert rows.shape[1] == 64
    assert encoder.load_encoder(tiny_model).decode(rows[0].tolist()).startswith(TEXT[:30])
    notes = table.notes(result)
    assert any("compared by bits per byte alone" in note for note in notes)
    assert any(f"({result['text']['domains']['book']['bytes']:,} bytes)" in note for note in notes)
    assert "not known" in Page(page.render(result)).text
    # by hand: every byte of the text is one token of the other tokenizer, and the context is 128 of them
    spans = passages.of_file(text, seq_len=64, windows=3, tokenizer=other).spans()["book"]
    model = checkpoints.load(checkpoints.examine(other), dtype=torch.float32, device="cpu")
    own, nats, size = encoder.load_encoder(other), 0.0, 0
    for (span,) in spans:
        ids = own.encode([span])[0][:-1].astype(np.int64)
        assert len(ids) == len(span.encode())
        size += len(ids)
        for start in range(0, len(ids), 127):
            row = np.concatenate([[own.eos_token_id], ids[start : start + 127]])
            nats += checkpoints.nats(model, row[None], batch=1)[0]
    assert size == result["text"]["domains"]["book"]["bytes"]
    assert bits[0] == pytest.approx(nats / math.log(2) / size)


def test_the_text_of_windows_loses_separators_and_cut_characters_and_nothing_else(
    tmp_path: Path, tiny_model: Path
) -> None:
    one = encoder.load_encoder(tiny_model)
    ids, _ = one.encode(["Köln and 東京.", "A second document, of 🙂."])
    split = next(i for i in range(1, len(ids)) if one.decode(ids[:i].tolist()).endswith("\ufffd"))
    whole = passages.Passages(source="", tokenizer=tiny_model, ids={"a": ids[None].astype(np.int64)})
    assert whole.spans()["a"] == [["Köln and 東京.", "A second document, of 🙂."]]
    cut = passages.Passages(source="", tokenizer=tiny_model, ids={"a": ids[None, :split].astype(np.int64)})
    ((text,),) = cut.spans()["a"]
    assert "\ufffd" not in text
    assert "Köln and 東京.".startswith(text)


def test_a_killed_evaluation_goes_on_with_the_part_that_it_was_at(
    text: Path, tiny_model: Path, qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    load = checkpoints.load

    def once(checkpoint: checkpoints.Checkpoint, **options: Any) -> Any:
        seen.append(checkpoint.path)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return load(checkpoint, **options)

    monkeypatch.setattr(checkpoints, "load", once)
    with pytest.raises(KeyboardInterrupt):
        command.run([tiny_model, qwen], Path("out"), text=text, seq_len=64, windows=2)
    assert not Path("out").exists()
    command.run([tiny_model, qwen], Path("out"), text=text, seq_len=64, windows=2)
    assert seen == [tiny_model, qwen, qwen]


def test_folders_of_one_name_are_told_apart_by_their_paths() -> None:
    models = [{"path": path} for path in ("a/model", "b/model", "c", "x/runs/demo/trained")]
    assert table.titles({"models": models}) == ["a/model", "b/model", "c", "demo/trained"]


def _config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _lacking(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "model: no such folder; give the folder of a checkpoint"),
        (lambda folder: (folder / "config.json").unlink(), r"no checkpoint here \(config.json is missing\)"),
        (lambda folder: (folder / "config.json").write_text("{"), "model: config.json is not valid JSON"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: not found; the model directory needs"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no weights here \(\*.safetensors is missing\)"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "model.safetensors is damaged or cut short"),
        (_pickled, r"holds its weights only as pickles \(pytorch_model.bin\), which can run any code"),
        (_lacking, "lack 1 tensors of its class, such as model.layers.1.mlp.down_proj.weight; fetch the whole"),
        (lambda folder: _config(folder, model_type="mine"), "model_type = 'mine' is no causal language model"),
        (
            lambda folder: _config(folder, model_type="mine", auto_map={"AutoModelForCausalLM": "own.Model"}),
            r"auto_map names code of its own \(own.Model\), which is never run",
        ),
        (lambda folder: _config(folder, max_position_embeddings=32), "max_position_embeddings = 32; set --seq-len to"),
    ],
)
def test_what_cannot_be_judged_is_one_message_and_nothing_of_it_is_run(
    text: Path, tiny_model: Path, damage: Callable[[Path], Any], message: str
) -> None:
    shutil.copytree(tiny_model, "model")
    damage(Path("model"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command.run([Path("model")], Path("out"), text=text, seq_len=64)
    assert not Path("out").exists()


def test_text_that_cannot_be_judged_on_is_one_message(text: Path, tiny_model: Path) -> None:
    bad = {
        "short.txt": b"too short",
        "latin.txt": "Köln".encode("latin-1"),
        "list.json": b"[1, 2]",
        "heldout.json": b'{"a": [[1, 2]]}',
    }
    for name, content in bad.items():
        Path(name).write_bytes(content)
    for options, message in (
        ({}, "has no heldout.json; say on what to judge it: --corpus NAME or --text FILE"),
        ({"corpus": "demo", "text": text}, "--corpus and --text: give one of them"),
        ({"corpus": "demo"}, "python -m tasks.corpus demo"),
        ({"text": Path("none.txt")}, "none.txt: no such file"),
        ({"text": Path("short.txt")}, "tokens, not one window of 64; give more text, or lower --seq-len"),
        ({"text": Path("latin.txt")}, "latin.txt: not UTF-8 text"),
        ({"text": Path("list.json")}, "list.json: no table of domains and their windows"),
        ({"text": Path("heldout.json")}, "the tokenizer of its ids is not beside it"),
        (
            {"text": text, "measure": ["analyses=luck"]},
            "analyses: Value error, luck is not known; known: all",
        ),
        ({"text": text, "measure": ["luck=1"]}, "--measure luck=1: no plug-in has it; they have: analyses"),
        ({"text": text, "tasks": ["hellaswog"]}, "--tasks hellaswog: is no task of lm-eval"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            command.run([tiny_model], Path("out"), seq_len=64, **options)
    with pytest.raises(ValueError, match="5 checkpoints; at most 4"):
        command.run([tiny_model] * 5, Path("out"), text=text)
    assert Request(
        checkpoints=[checkpoints.examine(tiny_model)],
        passages=passages.of_file(text, seq_len=8, windows=1, tokenizer=tiny_model),
    ).by_ids
