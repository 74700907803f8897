"""One run of the analyses: what is kept of a killed one, what is refused, the command, the pipeline."""

import json

import numpy as np
import pytest
import torch

from tasks import settings
from tasks.evaluate.details import Subject
from tasks.moe.streamed import Streamed
from tasks.plugins.analysis import __main__ as command
from tasks.plugins.analysis import figures, run
from tasks.plugins.analysis.interface import plain
from tasks.plugins.analysis.registry import ANALYSES
from tasks.plugins.analysis.settings import MEASURES
from tasks.settings import Evaluate
from tests import models

LAYERS = 3
WINDOWS = {"prose": np.random.default_rng(0).integers(6, 64, (2, 10))}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two Qwen2Moe checkpoints of one shape, whose second layer is dense."""
    folder = tmp_path_factory.mktemp("pair")
    fields = models.QWEN | {"num_experts": 5, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]}
    model = models.build("qwen2_moe", num_hidden_layers=LAYERS, **fields)
    model.save_pretrained(folder / "moe")
    for weights in model.parameters():
        weights.data += 0.02 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder / "trained")
    return {"split": folder / "moe", "trained": folder / "trained"}


def test_every_file_is_in_the_registry_under_its_name_which_the_settings_take():
    assert sorted(ANALYSES) == sorted({path.stem for path in MEASURES.glob("*.py")} - {"__init__"})
    assert Evaluate(seq_len=10, analyses=list(ANALYSES)).analyses == list(ANALYSES)
    for name, analysis in ANALYSES.items():
        assert analysis.measure.__module__.endswith(f".{name}")


@pytest.mark.parametrize("names", [list(ANALYSES), ["similarity"]])
def test_a_killed_run_goes_on_with_the_next_layer_and_gives_the_same_file(names, pair, tmp_path, monkeypatch):
    whole = run.analyse(pair, names, windows=WINDOWS, folder=tmp_path / "whole")
    read, real = [], Streamed.block

    def watched(self, i):
        read.append(i)
        return real(self, i)

    def killed(line):
        if line == "  layer 0 of 2":
            raise KeyboardInterrupt

    monkeypatch.setattr(Streamed, "block", watched)
    with pytest.raises(KeyboardInterrupt):
        run.analyse(pair, names, windows=WINDOWS, folder=tmp_path / "killed", progress=killed)
    assert set(read) == {0}
    read.clear()
    again = run.analyse(pair, names, windows=WINDOWS, folder=tmp_path / "killed")
    assert 0 not in read
    assert json.dumps(again) == json.dumps(whole)
    assert list(again["analyses"]) == names


def test_what_a_killed_run_left_is_not_believed_if_it_was_changed(pair, tmp_path):
    whole = run.analyse(pair, ["load"], windows=WINDOWS, folder=tmp_path)
    (state, _) = sorted(tmp_path.glob("state-*"))
    (tmp_path / "layer-2.json").unlink()
    assert state.name == "state-0-2.safetensors", "of the last layer alone"
    state.rename(tmp_path / "state-0-1.safetensors")
    assert run.analyse(pair, ["load"], windows=WINDOWS, folder=tmp_path) == whole
    record = tmp_path / "layer-0.json"
    record.write_text(record.read_text().replace("domain", "subject"))
    assert run.analyse(pair, ["load"], windows=WINDOWS, folder=tmp_path) == whole


def test_some_layers_alone_have_the_figures_that_they_have_among_all(pair, tmp_path):
    names = ["router", "norms", "coactivation"]
    every = run.analyse(pair, names, windows=WINDOWS, folder=tmp_path / "all")
    last = run.analyse(pair, names, windows=WINDOWS, folder=tmp_path / "last", layers=[2])
    for name, key in zip(names, ("split", "trained", "split"), strict=True):
        layers = last["analyses"][name]["models"][key]["layers"]
        assert layers == {"2": every["analyses"][name]["models"][key]["layers"]["2"]}


def test_without_text_or_a_second_model_the_rest_is_analysed_and_the_reasons_are_given(pair, tmp_path):
    found = run.analyse({"it": pair["split"]}, ANALYSES, windows=None, folder=tmp_path / "no text")
    assert list(found["analyses"]) == ["similarity", "reordering", "router"]
    assert found["left_out"]["load"] == "needs a text, and there are no windows"
    assert found["text"] is None
    found = run.analyse({"it": pair["split"]}, ["stability"], windows=WINDOWS, folder=tmp_path / "alone")
    assert found["left_out"] == {"stability": "compares two models, and there is one"}
    assert found["analyses"] == {}


def test_what_cannot_be_analysed_is_refused_by_name(pair, tmp_path):
    def analyse(names=("router",), models=pair, **options):
        run.analyse(models, names, **{"windows": None, "folder": tmp_path / "unfinished"} | options)

    with pytest.raises(ValueError, match="analyses: luck is not known; known: similarity, reordering"):
        analyse(["luck"])
    with pytest.raises(ValueError, match=r"moe: layers \[1, 7\] have no experts; those with experts: \[0, 2\]"):
        analyse(layers=[0, 1, 7])
    with pytest.raises(ValueError, match=r"windows: token ids up to 64, and .*moe has 64"):
        analyse(["load"], windows={"prose": np.full((1, 8), 64)})
    with pytest.raises(FileNotFoundError, match="nowhere: no checkpoint here"):
        analyse(models={"it": tmp_path / "nowhere"})
    models.build("qwen2_moe", num_hidden_layers=3, **models.QWEN | {"num_experts": 4}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers = \[0, 1, 2\]; .*trained has \[0, 2\], and only models of the same"):
        analyse(models={"trained": pair["trained"], "other": tmp_path})


def test_the_command_prints_the_means_and_the_change_and_writes_all_figures(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "windows.json").write_text(json.dumps({name: ids.tolist() for name, ids in WINDOWS.items()}))
    options = ["--against", str(pair["split"]), "--windows", "windows.json", "--count", "1", "--json", "out.json"]
    assert command.main([str(pair["trained"]), *options]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["text"]["windows"] == {"prose": 1}
    assert list(written["models"]) == [str(pair["split"]), str(pair["trained"])]
    before, after = (
        each["mean"]["angular similarity"]["routed with routed"]
        for each in written["analyses"]["outputs"]["models"].values()
    )
    (line,) = (line for line in printed.splitlines() if "routed with routed" in line)
    assert line.split()[-3:] == [f"{before:.4f}", f"{after:.4f}", f"{after - before:+z.4f}"]
    assert "  2: undefined in 1 of 2 layers: with the layer below: it is the first" in printed.splitlines()
    assert not list((tmp_path / ".scratch").glob("*/*/*")), "unfinished work is gone"
    assert command.main([str(pair["trained"]), "--index", "x"]) == 1
    assert "give --parent too" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "--against" in capsys.readouterr().out


def test_a_pipeline_analyses_what_its_settings_name_and_nothing_by_default(pair, tmp_path):
    def measure(folder, **settings):
        return figures.measure(
            Subject(
                models={"split": folder / "moe", "trained": folder / "trained"},
                windows=lambda count: {domain: ids[:count] for domain, ids in WINDOWS.items()},
                settings=Evaluate(seq_len=10, **settings),
                folder=tmp_path / "unfinished",
                parent=tmp_path / "dense",
                index=folder / "partition.safetensors",
            )
        )

    assert measure(tmp_path) == {}
    assert not (tmp_path / "unfinished").exists()
    with pytest.raises(ValueError, match="analyses"):
        Evaluate(seq_len=10, analyses=["luck"])
    with pytest.raises(ValueError, match="stands there twice"):
        Evaluate(seq_len=10, analyses=["load", "load"])
    folder = pair["split"].parent
    models.build("qwen2", num_hidden_layers=LAYERS, intermediate_size=96).save_pretrained(tmp_path / "dense")
    write_index(folder / "partition.safetensors", experts=5)
    found = measure(folder, analyses=["stability", "similarity"])
    assert list(found["models"]) == ["split", "trained"]
    assert found["text"]["windows"] == {"prose": 1}
    assert list(found["analyses"]) == ["similarity", "stability"]
    assert "with the parent's neurons at the same places" in found["analyses"]["similarity"]["models"]["split"]["mean"]


def write_index(path, *, experts):
    """An index of 1 shared and some routed experts of 16 neurons."""
    from tasks.partition import index

    partition = settings.Partition(method="activation", experts=experts, shared_experts=1, top_k=2, layers=[0, 2])
    places = np.arange((experts + 1) * 16, dtype=np.int32).reshape(-1, 16)
    index.write(
        index.Index(
            layers={0: places, 2: places},
            scales={0: 1.0, 2: 1.0},
            shared_experts=1,
            meta={"settings": partition.model_dump()},
        ),
        path,
    )


def test_an_index_of_another_model_is_refused(pair, tmp_path):
    models.build("qwen2", num_hidden_layers=LAYERS, intermediate_size=80).save_pretrained(tmp_path / "dense")
    write_index(tmp_path / "index.safetensors", experts=4)
    with pytest.raises(ValueError, match=r"index.safetensors: experts = 4; .* has 5; take the index of this model"):
        run.analyse(
            {"it": pair["split"]},
            ["similarity"],
            windows=None,
            folder=tmp_path / "unfinished",
            parent=tmp_path / "dense",
            index=tmp_path / "index.safetensors",
        )


def test_figures_become_plain_json():
    made = plain({1: np.array([0.1234567, np.nan]), "a": (np.int64(3), float("inf"), None, True)})
    assert made == {"1": [0.123457, None], "a": [3, None, None, True]}
