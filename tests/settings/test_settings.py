"""A mistake in pipelines.yaml ends in a message with the file, the field, the value and what is allowed."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from tasks import settings
from tasks.plugins.dynamic.settings import Dynamic, Fit
from tasks.settings import __main__ as command
from tasks.settings.corpus import Decontaminate, NearDuplicates
from tasks.settings.pretrain import Balance, Distill, Guard

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "pipelines.yaml").read_text()
GOOD = YAML(typ="safe", pure=True).load(TEXT)
TRAINED = [name for name, domain in GOOD["corpora"]["demo"]["domains"].items() if not domain.get("unseen")]


def changed(where: str, value: Any) -> dict[str, Any]:
    """The project's own settings with one value changed, or removed if it is None."""
    raw = copy.deepcopy(GOOD)
    *path, last = where.split(".")
    node = raw
    for key in path:
        node = node[int(key) if isinstance(node, list) else key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return raw


def fault(raw: Any) -> str:
    with pytest.raises(settings.SettingsError) as caught:
        settings.validate(raw)
    return str(caught.value)


def test_the_projects_own_settings_are_valid() -> None:
    assert "demo" in settings.load(ROOT / "pipelines.yaml").pipelines


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("pipelines.fine.pretrain.learning_rat", 1, "pretrain.learning_rat = 1: unknown key; allowed here: tokens"),
        ("models.smollm2-135m-q4.shape.hidden", 1, "shape.hidden = 1: unknown key; allowed here: model_type, h"),
        ("pipeline", {}, "pipeline: unknown key"),
        ("pipelines.fine.pretrain.batch", "two", "pretrain.batch = 'two': Input should be a valid integer"),
        ("pipelines.fine.pretrain.batch", 2.5, "pipelines.fine.pretrain.batch = 2.5: Input should be a valid integer"),
        ("pipelines.fine.pretrain.dynamic", "yes", "pretrain.dynamic = 'yes': Input should be a valid dict"),
        ("pipelines.fine.pretrain.tokens", 0, "pipelines.fine.pretrain.tokens = 0: Input should be greater than 0"),
        ("pipelines.fine.pretrain.tokens", None, "pipelines.fine.pretrain.tokens: Field required"),
        ("pipelines.fine.pretrain.zero_stage", 4, "pretrain.zero_stage = 4: Input should be 0, 1, 2 or 3"),
        ("pipelines.fine.pretrain.micro_batch", 3, "batch = 2 is not a multiple of micro_batch x processes = 3"),
        ("pipelines.fine.pretrain.warmup_tokens", 48129, "warmup_tokens = 48129 (48 steps) leaves none"),
        ("pipelines.fine.pretrain.train", [{"what": "router"}] * 2, "every phase but the last has `tokens`"),
        ("pipelines.fine.pretrain.train", "gate", "'gate': Input should be 'all', 'router' or 'experts'"),
        ("pipelines.fine.pretrain.expert_parallel", 2, "processes = 1 is not a multiple of expert_parallel = 2"),
        ("pipelines.fine.pretrain.launcher", "hostfile", "launcher: hostfile and `hostfile: FILE` go together"),
        ("pipelines.fine.pretrain.distill", {"top_n": 8}, "distill.top_n needs windows that are known"),
        ("pipelines.fine.pretrain.distill", {"logits": 0.0}, "logits and hidden are both 0; leave `distill` out"),
        ("pipelines.fine.partition.method", "cluster", "partition.method = 'cluster': Input should be 'activation'"),
        ("pipelines.fine.partition.top_k", 145, "top_k = 145 is more than experts = 144; allowed: 1 to 144"),
        ("pipelines.fine.partition.noise", 0.1, "`noise` is an option of method `copy`, not of `activation`"),
        ("pipelines.fine.partition.down_proj", "keep", "fit_passes = 2 goes on from the refit; set down_proj: refit"),
        ("pipelines.fine.partition.layers", [1, 1], "layers = [1, 1] names a layer twice"),
        ("pipelines.fine.partition.layers", [3, 30], "layers: [30] are not there; the model has layers 0 to 29"),
        ("pipelines.fine.partition.expert_size", 9, "expert_size = 9, but method `activation` places every neuron"),
        ("pipelines.fine.partition.method", "random", "partition: method `random` has no shared experts"),
        ("pipelines.fine.mixture.method", "explicit", "pipelines.fine.mixture: method `explicit` needs `weights`"),
        ("pipelines.fine.mixture.method", "temperature", "pipelines.fine.mixture: method `temperature` needs `alpha`"),
        ("pipelines.fine.mixture.alpha", 0.5, "method `reference_loss` takes no `alpha`"),
        ("pipelines.fine.mixture.max_epochs", 0, "mixture.max_epochs = 0: Input should be greater than 0"),
        ("pipelines.fine.mixture.method", "uniform", "pretrain.dynamic.references: parent needs the parent's losses"),
        ("pipelines.fine.mixture.weights", {"cod": 1.0}, "weights must name exactly the domains of corpora.demo, c"),
        ("pipelines.fine.mixture.weights", {"code": 0.0}, "mixture: `weights` must have a positive sum"),
        ("pipelines.fine.mixture.weights", {"code": -1.0}, "mixture.weights.code = -1.0: Input should be greater"),
        ("pipelines.fine.model", "smollm", "pipelines.fine.model = 'smollm' is not defined; defined: smollm2-135m-q4"),
        ("pipelines.fine.corpus", "dem", "pipelines.fine.corpus = 'dem' is not defined; defined: demo"),
        ("corpora.demo.model", "x", "corpora.demo.model = 'x' is not defined"),
        ("corpora.demo.domains", {}, "corpora.demo.domains: Dictionary should have at least 1 item"),
        ("corpora.demo.domains.books.unseen", True, "`heldout` = 0.2 says nothing of an `unseen` domain"),
        ("corpora.demo.domains.code.source", "sympy", "source = 'sympy': source 'sympy' is not understood"),
        ("corpora.demo.domains.code.sha256", "abc", "corpora.demo.domains.code.sha256 = 'abc': String should match"),
        ("corpora.demo.domains.code.format", "csv", "domains.code.format = 'csv': Input should be 'text'"),
        ("corpora.demo.heldout", 1.0, "corpora.demo.heldout = 1.0: Input should be less than 1"),
        ("pipelines.Demo", GOOD["pipelines"]["fine"], "pipelines.Demo"),
        ("deployments.0.parameters", {"pipeline": "x"}, "deployments[0].parameters.pipeline = 'x' is not defined"),
        ("deployments.0.parameters", {"corpus": "demo"}, "deployments.0: parameters.pipeline is missing; parameters."),
        ("deployments.0.parameters", {}, "deployments.0: parameters.pipeline is missing; upcycle takes pipeline, ref"),
        ("deployments.1.parameters", {"pipeline": "x"}, "deployments[1].parameters.pipeline = 'x' is not defined; d"),
        ("deployments.1.parameters.tolerance", math.inf, "parameters.tolerance = inf: Input should be a finite numbe"),
        ("deployments.1.parameters.publish", "yes", "parameters.publish = 'yes': Input should be a valid boolean; re"),
        ("deployments.1.parameters.pubish", True, "parameters.pubish = True: unknown; retrain takes pipeline, publis"),
        ("deployments.1.schedules.0.parameters", {"x": 1}, "deployments.1: parameters.x = 1: unknown; retrain takes"),
        ("deployments.1.schedules.0.cron", None, "schedules.0: give one of cron, interval and rrule; given: none"),
        ("deployments.0.entrypoint", "flows/upcycle.py:run", "entrypoint = 'flows/upcycle.py:run' is no flow; the f"),
        ("deployments.0.shedules", [], "deployments.0.shedules: unknown key; allowed here: name, entrypoint"),
        ("pipelines.fine.mixture.weights", {"code": 1.0}, "encyclopedia: books, encyclopedia, legal missing; give a"),
        ("pipelines.fine.pretrain.dynamic.references", {"code": 2.0}, "dynamic.references must name exactly the doma"),
        ("pipelines.fine.pretrain.learning_rate", math.inf, "learning_rate = inf: Input should be a finite number"),
        ("pipelines.fine.pretrain.learning_rates", {"router": math.nan}, "learning_rates.router = nan: Input should"),
        ("pipelines.fine.pretrain.betas", [0.9, 1.5], "pretrain.betas.1 = 1.5: Input should be less than 1"),
        ("pipelines.fine.pretrain.seed", -1, "pretrain.seed = -1: Input should be greater than or equal to 0"),
        ("pipelines.fine.pretrain.seq_len", 1, "pretrain.seq_len = 1: Input should be greater than or equal to 2"),
        ("pipelines.fine.pretrain.seq_len", 8193, "seq_len = 8193: smollm2-135m-q4 has max_position_embeddings = 819"),
        ("pipelines.fine.evaluate.seq_len", 9000, "evaluate.seq_len = 9000: smollm2-135m-q4 has max_position_embeddi"),
        ("pipelines.fine.pretrain.tokens", 10**30, "Input should be less than or equal to 9007199254740992"),
        ("pipelines.fine.partition.layers", [], "partition.layers"),
        ("pipelines.fine.evaluate.tasks.0.name", "hellaswag", "'hellaswag': files: its description reads no split"),
        ("pipelines.fine.evaluate.tasks", [{"name": "glue"}], "'glue': is a tag of lm-eval 0.4.13 for several tasks;"),
        ("pipelines.fine.evaluate.tasks", [{"name": "helaswag"}], "is no task of lm-eval 0.4.13; did you mean hellas"),
        ("pipelines.fine.evaluate.tasks.0.name", "none", "'none': it has a `source`, so tasks/evaluate/downstream"),
        ("pipelines.fine.evaluate.suites", ["lama"], "pipelines.fine.evaluate.suites: 'lama' is not defined; define"),
        ("pipelines.fine.evaluate.tasks", [{"name": "piqa"}] * 2, "tasks: piqa stands there twice"),
        ("models.smollm2-135m-q4.shape.num_key_value_heads", 2, "num_attention_heads = 9 is not a multiple of num_ke"),
        ("corpora.demo.filters", [{"rule": "gopher_quality", "max_doc_words": 9}], "max_doc_words = 9 is less than m"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_field_value_and_what_is_allowed(where: str, value: Any, message: str) -> None:
    result = fault(changed(where, value))
    assert message in result
    assert result.startswith("pipelines.yaml: ")


def test_experts_that_do_not_divide_the_ffn_list_the_numbers_that_do() -> None:
    result = fault(changed("pipelines.fine.partition.experts", 145))
    assert "experts + shared_experts = 145 + 48 = 193 does not divide the FFN width 1536 (intermediate_size)" in result
    assert "96, 128" in result


@given(width=st.integers(1, 4096), experts=st.integers(1, 64), shared=st.integers(0, 64))
def test_a_width_is_accepted_exactly_if_all_experts_are_of_one_size(width: int, experts: int, shared: int) -> None:
    partition = settings.Partition(method="activation", experts=experts, shared_experts=shared, top_k=1)
    try:
        size = partition.check_width(width)
    except ValueError:
        assert width % (experts + shared)
    else:
        assert size * (experts + shared) == width


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"method": "copy", "experts": 8, "top_k": 2, "expert_size": 100}, "sizes that do: 768, 384"),
        ({"method": "copy", "experts": 8, "top_k": 4, "expert_size": 96}, "sizes that do: 768, 384, 192"),
        ({"method": "moebert", "experts": 4, "top_k": 1, "common_neurons": 256, "expert_size": 600}, "257 to 384 of"),
        ({"method": "importance", "sharing": "inner", "experts": 4, "top_k": 1, "expert_size": 769}, "1 to 768 of"),
    ],
)
def test_a_size_that_a_method_cannot_make_lists_those_that_it_can(options: dict[str, Any], fits: str) -> None:
    with pytest.raises(ValueError, match="expert_size = ") as caught:
        settings.Partition.model_validate(options).check_width(768)
    assert fits in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layers": "alternate"},
            "control = pruned: partition.layers = 'alternate' keeps layers as wide",
        ),
        (
            {"top_k": 144},
            "control = pruned: method `activation` has 1536 active neurons a layer",
        ),
        ({"layers": list(range(30))}, None),
    ],
)
def test_a_dense_child_that_cannot_be_is_refused_with_the_settings(
    changes: dict[str, Any], message: str | None
) -> None:
    raw = changed("pipelines.fine.control", "pruned")
    raw["pipelines"]["fine"]["partition"] |= changes
    if message is None:
        settings.validate(raw)
    else:
        assert message in fault(raw)
        assert "control: none" in fault(raw)
        raw["pipelines"]["fine"]["control"] = "none"
        settings.validate(raw)


def test_all_mistakes_are_told_at_once() -> None:
    raw = changed("pipelines.fine.pretrain.tokens", 0)
    raw["models"]["smollm2-135m-q4"]["licence"] = "x"
    assert len(fault(raw).splitlines()) == 2


def load(text: str, folder: Path) -> settings.Settings:
    (folder / "pipelines.yaml").write_text(text)
    return settings.load(folder / "pipelines.yaml")


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    """2e-4 is a number in YAML 1.2 and a string in 1.1, which PyYAML reads; `no` is a string in 1.2."""
    assert "learning_rate: 2e-4" in TEXT
    assert load(TEXT, tmp_path).pipeline("demo").pretrain.learning_rate == 2e-4
    changed_licence = load(TEXT.replace("license: MIT", "license: no"), tmp_path)
    assert changed_licence.pipeline("fine").evaluate.tasks[0].license == "no"


def test_a_missing_file_and_a_folder_in_its_place_are_named(tmp_path: Path) -> None:
    with pytest.raises(settings.SettingsError, match="not found; run from the project's root"):
        settings.load(tmp_path / "pipelines.yaml")
    with pytest.raises(settings.SettingsError, match="cannot be read: Is a directory"):
        settings.load(tmp_path)


@pytest.mark.parametrize(("name", "suggestion"), [("x", ""), ("dmo", "; did you mean demo?")])
def test_an_unknown_name_lists_the_known_ones_and_suggests_one_that_is_near(name: str, suggestion: str) -> None:
    with pytest.raises(settings.SettingsError) as caught:
        settings.validate(GOOD).pipeline(name)
    assert str(caught.value) == f"pipelines.yaml: pipelines has no {name!r}; it has demo, fine{suggestion}"


def test_settings_do_not_change_after_they_were_read() -> None:
    pipeline = settings.validate(GOOD).pipeline("demo")
    with pytest.raises(ValueError, match="frozen"):
        pipeline.pretrain.tokens = 1  # type: ignore[misc]


def test_every_field_is_read_by_some_stage_or_by_the_plan() -> None:
    """A knob that nothing reads is a lie. Every field's name stands in code outside tasks/settings."""
    code = "\n".join(
        path.read_text()
        for folder in ("tasks", "flows")
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_relative_to(ROOT / "tasks" / "settings")
    )
    classes = [settings.Model, settings.Domain, settings.Corpus, settings.Items, NearDuplicates, Decontaminate,
               settings.Mixture, settings.Proxy, settings.Swarm, settings.Partition, settings.Pretrain, Balance,
               Distill, Fit, Dynamic, Guard,
               settings.Task, settings.Evaluate]  # fmt: skip
    in_steps = {"warmup_tokens": "warmup_steps", "eval_tokens": "eval_every"}
    idle = [
        f"{c.__name__}.{name}"
        for c in classes
        for name in c.model_fields
        if f".{in_steps.get(name, name)}" not in code
    ]
    assert idle == []


def test_the_module_prints_what_is_defined_and_fails_on_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = subprocess.run([sys.executable, "-m", "tasks.settings"], capture_output=True, text=True, cwd=ROOT)
    assert (good.returncode, "models: smollm2-135m-q4" in good.stdout) == (0, True)
    (tmp_path / "p.yaml").write_text(TEXT.replace("tokens: 49152", "tokens: -1"))
    monkeypatch.setattr(sys, "argv", ["settings", str(tmp_path / "p.yaml")])
    assert command.main() == 1
    assert "pipelines.fine.pretrain.tokens = -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("utf-16"), "not UTF-8 (it is UTF-16); save it as UTF-8, such as by `iconv -f UTF-16 -t UTF-8`"),
        (TEXT.encode("utf-32"), "not UTF-8 (it is UTF-32)"),
        ("# für\n".encode("latin-1") + TEXT.encode(), "not UTF-8 (byte 0xfc in line 1); save it as UTF-8"),
        (b"", "is empty; it must hold the sections models, corpora, pipelines and deployments"),
        (b"- a\n- b\n", "is a list; it must hold the sections"),
        (b"models:\n\ta: 1\n", "not valid YAML: line 2, column 1: "),
        (b"models: {}\nmodels: {}\n", 'not valid YAML: line 2, column 1: found duplicate key "models"'),
        (b"models: {a: 2024-13-45}\n", "not valid YAML: "),
        (b"models: " + b"[" * 2_000, "nested too deep"),
        (b"deployments: &a [*a]\n", "its aliases (*name) stand for values without end"),
        (
            b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 1200)),
            "its aliases (*name) stand for values without end",
        ),
        (
            b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 40)),
            "its aliases (*name) stand for 4e+12 values; allowed are 100,000",
        ),
    ],
)
def test_a_file_that_holds_no_settings_is_refused_in_one_line(tmp_path: Path, *, content: bytes, message: str) -> None:
    path = tmp_path / "pipelines.yaml"
    path.write_bytes(content)
    with pytest.raises(settings.SettingsError) as caught:
        settings.load(path)
    assert f"{path}: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_of_utf_8_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "pipelines.yaml").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert "demo" in settings.load(tmp_path / "pipelines.yaml").pipelines


@given(content=st.binary(max_size=200) | st.text("&*[]{}:-?!|>%@`'\"\n\t #,ab01.~=<", max_size=60).map(str.encode))
def test_no_content_ends_in_another_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(settings.SettingsError):
        settings.load(path)


def test_an_unseen_domain_has_no_weight_and_a_corpus_needs_one_that_is_trained_on() -> None:
    raw = changed("corpora.demo.domains.code.unseen", True)
    names = ["books", "legal", "encyclopedia"]
    raw["pipelines"]["demo"]["mixture"] = {"method": "explicit", "weights": dict.fromkeys(names, 1.0)}
    corpus, judge = settings.validate(raw).corpus("demo"), settings.validate(raw).pipeline("demo").evaluate
    assert (corpus.trained, corpus.unseen) == (names, ["code", "docs", "dialogue"])
    assert judge.windows_of(corpus) == 3 * judge.windows + 3 * judge.unseen_windows
    raw["pipelines"]["demo"]["mixture"]["weights"]["code"] = 0.0
    assert "books, legal, encyclopedia: code is unseen, so nothing may be trained on it: leave it out here" in fault(
        raw
    )
    for domain in raw["corpora"]["demo"]["domains"].values():
        domain["unseen"] = True
        domain.pop("heldout", None)
    assert "corpora.demo: domains: all of them are `unseen`; at least one must be trained on" in fault(raw)
