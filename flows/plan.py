"""What a pipeline will cost, from its settings alone: parameters, FLOPs, memory, disk, time. Nothing is downloaded.

Parameters and FLOPs are exact counts. Memory, disk and time are estimates; each says from what.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import plan_mixture
from flows.plan_mixture import MixturePlan
from tasks import plugin, scratch
from tasks.control import training
from tasks.moe import counts, families
from tasks.pretrain.checkpoints import branch
from tasks.pretrain.log import cost_curve, meters
from tasks.settings import Corpus, Partition, Pipeline, Pretrain, Settings, SettingsError
from tasks.settings import model as models
from tasks.tools import estimate
from tasks.tools.estimate import Memory

if TYPE_CHECKING:
    from tasks.partition.shapes import Verdict

UTILISATION = 0.4
"""Share of the matrix-product speed that training reaches: 0.4 is usual on A100s."""
_DENSE, _CONVERTED, _TRAINED = "dense checkpoint", "converted MoE", "trained MoE"
_PRUNED = "pruned baseline, as cut and as trained"
_SHAPE = ("num_hidden_layers", "num_key_value_heads", "hidden_size", "intermediate_size", "num_attention_heads")


@dataclass(frozen=True, kw_only=True)
class DenseTraining:
    """Figures of a training of a dense model."""

    steps: int
    flops: int
    memory: Memory
    """Of rank 0, with the ZeRO stage of the settings."""
    scratch: dict[str, float]
    """Bytes in .scratch while it is trained, by what takes them."""


@dataclass(frozen=True, kw_only=True)
class PrunedPlan(DenseTraining):
    """Figures of the pruned baseline; `flops` are those of its cut, training and evaluation."""

    parameters: int
    shape: dict[str, int]
    """Its sizes that are not the parent's."""
    beside: dict[str, DenseTraining]
    """Trainings of the parent, by title: before the cut, and on the same batches if the settings ask for it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Figures of one pipeline; sizes in bytes."""

    pipeline: str
    dense: dict[str, int]
    sparse: dict[str, int]
    model_type: str
    """Class of the sparse model."""
    engines: list[Verdict]
    """What each inference engine makes of it."""
    expert_width: int
    sparse_layers: int
    layers: int
    steps: int
    tokens: int
    train_flops: int
    other_flops: int
    dtype: str
    memory: dict[int, tuple[Memory, Memory]]
    """Of rank 0 and of another rank, by ZeRO stage; without the stages that do not go with the settings."""
    disk: dict[str, float]
    checkpoint: float
    """A training checkpoint."""
    pruned: PrunedPlan | None
    """The pruned baseline; None without one."""
    mixture: MixturePlan | None
    """The estimate of domain weights; None where it trains nothing."""

    def seconds(self, flops_per_second: float) -> float:
        """Time for all FLOPs at UTILISATION of a matrix-product speed over all processes."""
        baselines = (self.pruned, *self.pruned.beside.values()) if self.pruned else ()
        flops = self.train_flops + self.other_flops + sum(each.flops for each in baselines)
        return (flops + (self.mixture.flops if self.mixture else 0)) / (UTILISATION * flops_per_second)


def plan(settings: Settings, name: str, *, bfloat16: bool, cuda: bool = False) -> Plan:
    """Compute the figures of one pipeline.

    Args:
        settings: pipelines.yaml or a recipe, validated.
        name: the pipeline.
        bfloat16: what `precision: auto` means on the machine that will train.
        cuda: it has GPUs.

    Raises:
        SettingsError: no such pipeline, or the model has neither a `shape` nor been fetched.
    """
    from tasks.partition import shapes

    pipeline = settings.pipeline(name)
    dense = dense_config(settings, pipeline.model)
    sparse = sparse_config(dense, pipeline.partition)
    train = pipeline.pretrain
    tokens = train.steps * train.batch * train.seq_len
    is_bfloat16 = train.precision == "bfloat16" or (train.precision == "auto" and bfloat16)
    experts = counts.experts(sparse)
    sizes = {"dense": counts.parameters(dense), "sparse": counts.parameters(sparse)}
    corpus = settings.corpus(pipeline.corpus)
    pruned = pruned_plan(dense, pipeline, corpus=corpus, bfloat16=is_bfloat16, cuda=cuda)
    train_flops = cost_curve.flops(sparse, train, step=train.steps)
    return Plan(
        pipeline=name,
        dense=sizes["dense"],
        sparse=sizes["sparse"],
        model_type=sparse["model_type"],
        engines=shapes.verdicts(sparse),
        expert_width=experts["expert_size"],
        sparse_layers=len(experts["layers"]),
        layers=sparse["num_hidden_layers"],
        steps=train.steps,
        tokens=tokens,
        train_flops=train_flops,
        other_flops=_other_flops(settings, pipeline, dense=dense, sparse=sparse),
        dtype="bfloat16" if is_bfloat16 else "float32",
        memory=_memory(sparse, train, bfloat16=is_bfloat16, cuda=cuda, parent=dense),
        disk=_disk(settings, name, sizes=sizes, pruned=pruned) | estimate.disk(sparse, train, bfloat16=is_bfloat16),
        checkpoint=estimate.checkpoint_bytes(sparse, train, bfloat16=is_bfloat16),
        pruned=pruned,
        mixture=plan_mixture.plan(
            name, pipeline, dense=dense, sparse=sparse, corpus=corpus, training_flops=train_flops
        ),
    )


def dense_config(settings: Settings, model: str) -> dict[str, Any]:
    """The dense model's config.json as far as it is known. Raises SettingsError where nothing is."""
    known = models.config(model, settings.model(model))
    if known is None:
        raise SettingsError(
            f"pipelines.yaml: models.{model}.shape is missing and {models.FETCHED / model}/config.json is not there "
            f"yet; give its sizes under `shape`, or run `dvc repro model@{model}` first"
        )
    return known[0] | {"dtype": settings.model(model).dtype}


def sparse_config(dense: dict[str, Any], partition: Partition) -> dict[str, Any]:
    """The config.json of the MoE that the partition stage will build.

    Raises SettingsError, naming every target class and why it does not fit, if there is none.
    """
    from transformers import AutoConfig

    from tasks.partition import exporters

    try:
        families.check(dense)
        parent = AutoConfig.for_model(**dense)
        sparse: dict[str, Any] = exporters.choose(parent, partition).config(parent, partition).to_dict()
    except ValueError as error:
        raise SettingsError(f"partition: {error}") from None
    return sparse


def pruned_plan(
    dense: dict[str, Any], pipeline: Pipeline, *, corpus: Corpus, bfloat16: bool, cuda: bool = False
) -> PrunedPlan | None:
    """Compute the figures of the stage `control`; None without a pruned baseline.

    Args:
        dense: the parent's config.json.
        corpus: what it is trained and evaluated on.
        bfloat16: the training dtype; float32 if not.
        cuda: train on GPUs.

    Raises:
        SettingsError: the settings ask for a baseline that cannot be.
    """
    control = pipeline.pruned
    if control is None:
        return None
    partition, evaluation = pipeline.partition, pipeline.evaluate
    try:
        config = control.config(dense, partition)
    except ValueError as error:
        raise SettingsError(f"control: {error}") from None
    train = training.dense(pipeline.pretrain)

    def trained(of: dict[str, Any], params: Pretrain) -> DenseTraining:
        validated = estimate.evaluated_windows(params, domains=len(corpus.trained))
        step = params.step_tokens * meters.flops(of, seq_len=params.seq_len, what="all")
        return DenseTraining(
            steps=params.steps,
            flops=params.steps * step + _forward(of, windows=validated, seq_len=params.seq_len),
            memory=estimate.memory(of, params, bfloat16=bfloat16, cuda=cuda, parent=dense),
            scratch=estimate.disk(of, params, bfloat16=bfloat16),
        )

    trainings = {
        title: params
        for module in plugin.modules("cost").values()
        for title, params in module.trainings(pipeline).items()
    }
    if control.parent:
        trainings["parent trained alike"] = train
    own = trained(config, train)
    read = train.steps * train.batch if train.distill else 0  # by the parent, which distils
    if control.method == "static":
        read += partition.calibration_windows
    flops = own.flops + _forward(dense, windows=read, seq_len=train.seq_len)
    flops += _forward(config, windows=evaluation.windows_of(corpus), seq_len=evaluation.seq_len)
    if control.method == "static":
        flops += _fit_flops(dense, partition, seq_len=train.seq_len, layers=dense["num_hidden_layers"])
    return PrunedPlan(
        **vars(own) | {"flops": flops},
        parameters=counts.parameters(config)["total"],
        shape={field: config[field] for field in _SHAPE if config.get(field) != dense.get(field)},
        beside={title: trained(dense, params) for title, params in trainings.items()},
    )


def _forward(config: dict[str, Any], *, windows: int, seq_len: int) -> int:
    flops: int = counts.flops_per_token(config, seq_len=seq_len)["forward"]
    return windows * seq_len * flops


def _fit_flops(dense: dict[str, Any], partition: Partition, *, seq_len: int, layers: int) -> int:
    """FLOPs of the fit of that many layers: 3 products of each token with an FFN matrix forward, 4 backward."""
    matrix: int = 2 * dense["hidden_size"] * dense["intermediate_size"]
    return 7 * matrix * partition.calibration_windows * partition.fit_passes * seq_len * layers


def _other_flops(settings: Settings, pipeline: Pipeline, *, dense: dict[str, Any], sparse: dict[str, Any]) -> int:
    """What is beside training: references, calibration, fit, the distilling parent, validation, evaluation."""
    from tasks.partition.construct import needs_text

    corpus, train, evaluation = settings.corpus(pipeline.corpus), pipeline.pretrain, pipeline.evaluate
    domains, partition = len(corpus.trained), pipeline.partition
    references = pipeline.mixture.windows * domains if pipeline.mixture.method == "reference_loss" else 0
    validated = estimate.evaluated_windows(train, domains=domains)
    read = train.steps * train.batch if train.distill else 0
    flops = 0
    if needs_text(partition):
        read += partition.calibration_windows
        layers = len(partition.sparse_layers(dense["num_hidden_layers"]))
        flops += _fit_flops(dense, partition, seq_len=train.seq_len, layers=layers)
    return (
        flops
        + _forward(dense, windows=references + evaluation.windows_of(corpus), seq_len=evaluation.seq_len)
        + _forward(dense, windows=read, seq_len=train.seq_len)
        + _forward(sparse, windows=validated, seq_len=train.seq_len)
        + 2 * _forward(sparse, windows=evaluation.windows_of(corpus), seq_len=evaluation.seq_len)
    )


def _memory(
    sparse: dict[str, Any], train: Pretrain, *, bfloat16: bool, cuda: bool, parent: dict[str, Any]
) -> dict[int, tuple[Memory, Memory]]:
    stages = range(train.offload or train.expert_parallel > 1, 4)  # the settings refuse stage 0 with either
    needs = {}
    for stage in stages:
        at = train.model_copy(update={"zero_stage": stage})
        first, other = (
            estimate.memory(sparse, at, bfloat16=bfloat16, cuda=cuda, parent=parent, first=first)
            for first in (True, False)
        )
        needs[stage] = first, other
    return needs


def _disk(
    settings: Settings, name: str, *, sizes: dict[str, dict[str, int]], pruned: PrunedPlan | None
) -> dict[str, float]:
    pipeline = settings.pipeline(name)
    dtype = 2 if settings.model(pipeline.model).dtype == "bfloat16" else 4
    total = sizes["sparse"]["total"]
    parts: dict[str, float] = {
        _DENSE: sizes["dense"]["total"] * dtype,
        _CONVERTED: total * dtype,
        _TRAINED: total * dtype,
    }
    if pruned:
        parts[_PRUNED] = 2 * pruned.parameters * dtype
        for title, each in {"pruned baseline": pruned, **pruned.beside}.items():
            parts |= {f"{title}: {part}": size for part, size in each.scratch.items()}
    if (manifest := Path("data/corpora", pipeline.corpus, "manifest.json")).exists():
        parts["shards"] = sum(path.stat().st_size for path in manifest.parent.rglob("*.arrow"))
    if size := branch.kept_bytes(name):
        parts["kept of earlier training in .scratch; `python -m tasks.pretrain NAME --discard` frees it"] = size
    return parts


def converted_config(settings: Settings, name: str) -> dict[str, Any]:
    """config.json of a pipeline's converted model: the one that is there, or the one that will be."""
    path = Path("runs", name, "moe", "config.json")
    if path.exists():
        config: dict[str, Any] = json.loads(path.read_text())
        return config
    pipeline = settings.pipeline(name)
    return sparse_config(dense_config(settings, pipeline.model), pipeline.partition)


def short_windows(settings: Settings, name: str) -> list[str]:
    """Where the corpus has fewer windows than the settings ask for, if it is there. A stage takes those there are."""
    pipeline = settings.pipeline(name)
    path = Path("data/corpora", pipeline.corpus, "manifest.json")
    if not path.is_file():
        return []
    evaluation, train, mixture = pipeline.evaluate, pipeline.pretrain, pipeline.mixture
    corpus = json.loads(path.read_text())["domains"]
    unseen = [domain for domain, entry in corpus.items() if entry.get("unseen")]
    trained = [domain for domain in corpus if domain not in unseen]
    needs = [
        ("evaluate.windows", "test", evaluation.seq_len, evaluation.windows, trained),
        ("evaluate.unseen_windows", "test", evaluation.seq_len, evaluation.unseen_windows, unseen),
        ("pretrain.eval_windows", "validation", train.seq_len, train.eval_windows, trained),
    ]
    if mixture.method == "reference_loss":
        needs.append(("mixture.windows", "validation", evaluation.seq_len, mixture.windows, trained))
    return [
        f"{field} = {count}: the {split} part of {domain} has {there} of {seq_len} tokens"
        + ("" if there else "; raise its `heldout`, or lower seq_len: no run can be finished")
        for field, split, seq_len, count, domains in needs
        for domain in domains
        if (there := corpus[domain].get(split, {}).get("tokens", seq_len * count) // seq_len) < count
    ]


def disk_lacks(cost: Plan, model: str) -> list[str]:
    """The disks here that have less room than what is not there yet will take; two folders may lie on one disk."""
    run = Path("runs", cost.pipeline)
    outputs = {
        _DENSE: models.FETCHED / model,
        _CONVERTED: run / "moe",
        _TRAINED: run / "trained",
        _PRUNED: run / "control",
        "shards": Path("data"),
    }
    needed: dict[int, float] = {}
    folders: dict[int, dict[str, Path]] = {}
    for part, size in cost.disk.items():
        folder = outputs.get(part, scratch.ROOT)
        if part in outputs and folder.exists():
            continue
        there = next(path for path in (folder, *folder.parents, Path()) if path.exists())
        disk = there.stat().st_dev
        needed[disk] = needed.get(disk, 0.0) + size
        folders.setdefault(disk, {})[folder.parts[0]] = there
    short = []
    for disk, size in needed.items():
        free = shutil.disk_usage(next(iter(folders[disk].values()))).free
        if size > free:
            short.append(
                f"does not fit here: {', '.join(sorted(folders[disk]))} needs {size / 1e9:.2f} GB more, "
                f"{free / 1e9:.2f} GB are free"
            )
    return short
