"""Distillation losses of real (tiny) models against the same losses written out."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from tasks.corpus.sampling.loader import IGNORED, Batch
from tasks.moe.internals import layers
from tasks.pretrain import batches
from tasks.pretrain.job import Job, TrainingError
from tasks.pretrain.loss.distil import Distiller
from tasks.pretrain.loss.teacher import Teacher
from tasks.settings import Pretrain
from tasks.settings.pretrain import Distill

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
STUDENTS: dict[str, Any] = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"intermediate_size": 16, "num_local_experts": 4}),
    "granitemoeshared": (
        GraniteMoeSharedForCausalLM,
        GraniteMoeSharedConfig,
        {"intermediate_size": 16, "num_local_experts": 4, "shared_intermediate_size": 16, "logits_scaling": 2.0},
    ),
}
LENGTH = 16
CPU = torch.device("cpu")
EVERYTHING = slice(0, 2)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48)).save_pretrained(folder)
    return folder


def student(family: str) -> PreTrainedModel:
    kind, config, sizes = STUDENTS[family]
    torch.manual_seed(1)
    return kind(config(**SIZES, **sizes, num_experts_per_tok=2)).train()


def job(parent: Path, tmp_path: Path, **distill: Any) -> Job:
    """A job whose split model is a config file alone."""
    model = tmp_path / "moe"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({**SIZES, "model_type": "mixtral"}))
    params = Pretrain(
        tokens=1, seq_len=LENGTH, batch=2, learning_rate=1.0, distill=Distill(**distill) if distill else None
    )
    return Job(
        pipeline="p", params=params, corpus=tmp_path, model=model, parent=parent, mixture=tmp_path, workspace=tmp_path
    )


def packed(*, masked: bool) -> Batch:
    """Two windows: documents of 5 and 11 tokens; documents of 9 and 3 and 4 of padding."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, SIZES["vocab_size"], (2, LENGTH))
    starts = [[0, 5], [0, 9, 12]]
    positions = np.stack([np.arange(LENGTH) - np.repeat(s, np.diff([*s, LENGTH])) for s in starts])
    labels = ids.copy()
    labels[1, 12:] = IGNORED
    if masked:
        labels[positions == 0] = IGNORED
    cuts = [0, 5, 16, 25, 28, 32] if masked else [0, 16, 32]
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions if masked else None,
        cu_seqlens=np.array(cuts, dtype=np.int32),
        domains=["prose"] * 2,
        windows=[0, 1],
        step_targets=int((labels[:, 1:] != IGNORED).sum()),
    )


def targets(batch: Batch) -> torch.Tensor:
    return F.pad(torch.from_numpy(batch.labels)[:, 1:], (0, 1), value=IGNORED)


def forward(model: PreTrainedModel, batch: Batch, rows: slice = EVERYTHING) -> Any:
    ids = torch.from_numpy(batch.input_ids[rows])
    documents = batches.documents(batch, rows, CPU)
    return model(input_ids=ids, use_cache=False, output_hidden_states=True, **documents)


def load(*given: Any, **settings: Any) -> Distiller:
    result = Distiller.load(job(*given, **settings), device=CPU, dtype=torch.float32)
    assert result is not None
    return result


def after_each_layer(model: PreTrainedModel, batch: Batch) -> list[torch.Tensor]:
    """What each decoder layer gives, the last one's normed: by hooks of our own."""
    seen: list[torch.Tensor] = []
    watched = [*model.model.layers[:-1], model.model.norm]
    hooks = [module.register_forward_hook(lambda *args: seen.append(args[-1])) for module in watched]
    forward(model, batch)
    for hook in hooks:
        hook.remove()
    return [x[0] if isinstance(x, tuple) else x for x in seen]


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_without_the_setting_there_is_no_distiller(parent: Path, tmp_path: Path) -> None:
    assert Distiller.load(job(parent, tmp_path), device=CPU, dtype=torch.float32) is None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", STUDENTS)
def test_kl_and_cross_entropy_are_those_of_the_parents_logits_on_the_same_documents(
    family: str, masked: bool, parent: Path, tmp_path: Path
) -> None:
    model, batch = student(family), packed(masked=masked)
    distiller = load(parent, tmp_path, temperature=2.0)
    assert not distiller.needs_hidden
    target = targets(batch)
    out = forward(model, batch)
    result = distiller.losses(batch, rows=EVERYTHING, out=out, target_BL=target)
    assert result.keys() == {"cross_entropy", "kl"}
    teacher = LlamaForCausalLM.from_pretrained(parent)
    for b, cuts in enumerate([[0, 5, 16], [0, 9, 12]] if masked else [[0, 16], [0, 12]]):
        kl, nats = 0.0, 0.0
        for start, stop in itertools.pairwise(cuts):  # every document by itself
            ids = torch.from_numpy(batch.input_ids[b : b + 1, start:stop])
            with torch.no_grad():
                own, theirs = (m(input_ids=ids).logits[0, :-1].double() for m in (model, teacher))
            p, q = (F.log_softmax(x / 2, -1) for x in (theirs, own))
            kl += 4 * float(F.kl_div(q, p, log_target=True, reduction="sum"))
            nats += float(F.cross_entropy(own, ids[0, 1:], reduction="sum"))
        assert result["kl"][b].item() == pytest.approx(kl, rel=1e-5)
        assert result["cross_entropy"][b].item() == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("family", STUDENTS)
def test_the_error_of_the_states_is_relative_to_the_parents_after_the_layers_asked_for(
    family: str, layers: str, parent: Path, tmp_path: Path
) -> None:
    model, batch = student(family), packed(masked=True)
    distiller = load(parent, tmp_path, logits=0.0, hidden=1.0, layers=layers)
    assert distiller.needs_hidden
    result = distiller.losses(batch, rows=EVERYTHING, out=forward(model, batch), target_BL=targets(batch))
    assert result.keys() == {"hidden"}
    own = after_each_layer(model, batch)
    theirs = after_each_layer(LlamaForCausalLM.from_pretrained(parent), batch)
    assert len(own) == len(theirs) == SIZES["num_hidden_layers"]
    if layers == "last":
        own, theirs = own[-1:], theirs[-1:]
    a, b = torch.stack(own).double(), torch.stack(theirs).double()
    error_BL = ((a - b).norm(dim=-1) / b.norm(dim=-1)).square().mean(0)
    wanted = (error_BL * (targets(batch) != IGNORED)).sum(1)
    torch.testing.assert_close(result["hidden"].double(), wanted, rtol=1e-5, atol=0)


def test_a_student_that_is_its_parent_has_no_loss_and_no_gradient(parent: Path, tmp_path: Path) -> None:
    model, batch = LlamaForCausalLM.from_pretrained(parent), packed(masked=True)
    distiller = load(parent, tmp_path, cross_entropy=0.0, hidden=1.0, layers="all")
    result = distiller.losses(batch, rows=EVERYTHING, out=forward(model, batch), target_BL=targets(batch))
    assert result["hidden"].tolist() == [0, 0]
    assert result["kl"].abs().max() < 1e-6
    for name, gradient in gradients(model, (result["kl"] + result["hidden"]).sum()).items():
        assert gradient.abs().max() < 1e-5, name


@pytest.mark.filterwarnings("error")
def test_gradient_checkpointing_changes_no_gradient(parent: Path, tmp_path: Path) -> None:
    model, batch = student("mixtral"), packed(masked=True)
    distiller = load(parent, tmp_path, hidden=1.0, layers="all")

    def total() -> torch.Tensor:
        result = distiller.losses(batch, rows=EVERYTHING, out=forward(model, batch), target_BL=targets(batch))
        return torch.stack(list(result.values())).sum()

    wanted = gradients(model, total())
    layers.recompute_activations(model)
    for name, gradient in gradients(model, total()).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_the_parent_gets_no_gradient_and_is_not_in_the_graph(parent: Path, tmp_path: Path) -> None:
    model, batch = student("mixtral"), packed(masked=False)
    distiller = load(parent, tmp_path, hidden=1.0)
    result = distiller.losses(batch, rows=EVERYTHING, out=forward(model, batch), target_BL=targets(batch))
    (result["cross_entropy"] + result["kl"] + result["hidden"]).sum().backward()
    assert isinstance(distiller._parent, Teacher)
    assert all(p.grad is None and not p.requires_grad for p in distiller._parent._model.parameters())


def test_a_window_without_targets_has_losses_of_0(parent: Path, tmp_path: Path) -> None:
    model, batch = student("mixtral"), packed(masked=False)
    distiller = load(parent, tmp_path, hidden=1.0)
    batch = replace(batch, labels=np.full_like(batch.labels, IGNORED))
    result = distiller.losses(batch, rows=EVERYTHING, out=forward(model, batch), target_BL=targets(batch))
    assert [loss.tolist() for loss in result.values()] == [[0, 0]] * 3
    assert all(
        gradient.isfinite().all() for gradient in gradients(model, torch.stack(list(result.values())).sum()).values()
    )


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_parent_of_another_size_is_refused_by_the_name_of_both(field: str, parent: Path, tmp_path: Path) -> None:
    run = job(parent, tmp_path, logits=1.0)
    (run.model / "config.json").write_text(json.dumps({**SIZES, field: 128}))
    with pytest.raises(TrainingError, match=rf"{parent} has {field} = {SIZES[field]}, {run.model} has 128"):
        Distiller.load(run, device=CPU, dtype=torch.float32)


def test_a_granite_teachers_logits_are_scaled_as_its_own() -> None:
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**SIZES, intermediate_size=48, logits_scaling=4.0)).eval()
    ids = torch.arange(LENGTH)[None]
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        expected = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(Teacher(model).logits(hidden), expected)
