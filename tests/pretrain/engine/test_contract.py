"""DeepSpeed's internals that tasks/pretrain/engine relies on, one test each: what to change when a release breaks one.

A plug-in's are beside it. The last test looks whether another file of tasks/ imports DeepSpeed.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import operator
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tasks.pretrain.engine import distributed, optimizer, universal
from tasks.pretrain.engine.checkpoint_writer import _KNOWN, CheckpointCollector
from tasks.pretrain.engine.interface import Engine
from tasks.pretrain.launch import launcher
from tests.pretrain.engines import build, settings, train

ROOT = Path(__file__).parents[3]
ROOM = "tasks/pretrain/engine/"


def broken(what: str, *, used: str, fix: str) -> str:
    return f"DeepSpeed {version('deepspeed')}: {what}. {ROOM}{used} relies on it. {fix}"


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    """One of each kind: the ZeRO stage in fp32, and stage 0 in bfloat16."""
    distributed.join(tmp_path_factory.mktemp("group"))
    made = {str(stage): build(settings(zero_stage=stage)) for stage in range(4)}
    yield made | {"0 bf16": build(settings(zero_stage=0), dtype=torch.bfloat16)}
    distributed.leave()


class Internal(NamedTuple):
    kinds: str
    """Of engine, as in the fixture, separated by commas."""
    path: str
    """Of the attribute, from DeepSpeed's engine."""
    used: str
    fix: str


INTERNALS = [
    Internal("0,1,2,3,0 bf16", "basic_optimizer.register_step_pre_hook", "optimizer.py prepare",
             "Find torch's AdamW under its new name: every stage must step through it."),
    Internal("0,1,2,3,0 bf16", "optimizer.param_groups", "optimizer.py set_rates",
             "Set the rates on the groups of basic_optimizer."),
    Internal("0,1,2,3,0 bf16", "micro_steps", "optimizer.py discard",
             "Find the count that decides about is_gradient_accumulation_boundary(), and set it back."),
    Internal("1,2,3", "optimizer.micro_step_id", "optimizer.py discard",
             "Find what decides whether the next gradient is copied or added, and make it copy."),
    Internal("1,2,3", "optimizer.averaged_gradients", "optimizer.py discard",
             "Find where ZeRO keeps the sums of a step's gradients, and clear it."),
    Internal("1,2,3", "optimizer.reset_cpu_buffers", "optimizer.py discard",
             "Find what clears the gradients that offload keeps on the CPU."),
    Internal("0 bf16", "optimizer.fp32_groups", "optimizer.py undo_first_step, masters.py full_weights",
             "Find the fp32 weights beside bfloat16 ones; safe_get_full_fp32_param may know them by then."),
    Internal("0 bf16", "optimizer.fp16_groups", "optimizer.py undo_first_step, masters.py full_weights",
             "Find the parameters that belong to fp32_groups, in the same order."),
    Internal("3", "optimizer.grad_position", "masters.py full",
             "Find out otherwise whether a parameter has fp32 weights, i.e. whether some group trains it."),
    Internal("3", "optimizer.fp32_partitioned_groups_flat", "universal.py _count_steps",
             "Find the flat tensors that the optimizer steps, or drop _count_steps if test_universal.py passes."),
    Internal("3", "optimizer.sub_group_to_group_id", "universal.py _count_steps",
             "Find the optimizer group of each flat tensor."),
    Internal("0,1,2,3,0 bf16", "_config.load_universal_checkpoint", "universal.py load",
             "Find the switch that makes load_checkpoint read the universal form."),
    Internal("0,1,2,3,0 bf16", "checkpoint_engine.name", "checkpoint_writer.py CheckpointCollector.install",
             "Find how an engine is given a checkpoint engine; a public setting would be better."),
]  # fmt: skip


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda internal: internal.path)
def test_an_attribute_of_the_engine_is_where_this_folder_reads_it(
    internal: Internal, engines: dict[str, Engine]
) -> None:
    for kind in internal.kinds.split(","):
        try:
            operator.attrgetter(internal.path)(engines[kind].deepspeed)
        except AttributeError as error:
            raise AssertionError(
                broken(f"engine.{internal.path} is missing with ZeRO {kind}", used=internal.used, fix=internal.fix)
            ) from error


def test_every_stage_steps_through_torchs_adamw_with_the_groups_that_it_was_given(engines: dict[str, Engine]) -> None:
    for kind, engine in engines.items():
        adam = engine.deepspeed.basic_optimizer
        assert isinstance(adam, torch.optim.AdamW), broken(
            f"ZeRO {kind} steps through {type(adam).__name__}", used="optimizer.py prepare",
            fix="It holds back groups by step hooks and needs AdamW's state; see `torch_adam` in configuration.py.",
        )  # fmt: skip
        for groups in (adam.param_groups, engine.deepspeed.optimizer.param_groups):
            assert all({"part", "active", "name"} <= group.keys() for group in groups), broken(
                f"ZeRO {kind} drops keys of the optimizer's groups", used="optimizer.py set_rates",
                fix="Keep the part of each group beside the engine, by the group's place.",
            )  # fmt: skip


def test_the_count_of_micro_batches_begins_where_a_discarded_step_sets_it_back_to(engines: dict[str, Engine]) -> None:
    for stage, first in optimizer._FIRST_MICRO_STEP.items():
        count = engines[str(stage)].deepspeed.optimizer.micro_step_id
        assert count == first, broken(
            f"ZeRO {stage} begins to count micro-batches at {count}, not at {first}",
            used="optimizer.py _FIRST_MICRO_STEP",
            fix="Put the new number there, and run test_engine.py.",
        )  # fmt: skip


@pytest.mark.usefixtures("engines")  # the process group
def test_bfloat16_without_zero_takes_a_step_of_its_own_when_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.pretrain.engine import optimizer

    states: list[int] = []
    undo = optimizer.undo_first_step
    monkeypatch.setattr(
        optimizer, "undo_first_step", lambda engine: (states.append(len(engine.basic_optimizer.state)), undo(engine))
    )
    build(settings(zero_stage=0), dtype=torch.bfloat16)
    assert states[0] > 0, broken(
        "stage 0 in bfloat16 no longer takes a step with zero gradients", used="optimizer.py undo_first_step",
        fix="Delete that function; test_engine.py says whether the weights still begin where they should.",
    )  # fmt: skip


def test_a_parameter_of_stage_3_knows_its_optimizer(engines: dict[str, Engine]) -> None:
    for parameter in engines["3"].module.parameters():
        assert getattr(parameter, "_z3_optimizer", None) is engines["3"].deepspeed.optimizer, broken(
            "parameters of ZeRO-3 have no `_z3_optimizer`", used="masters.py full",
            fix="Find the optimizer of a parameter otherwise: it says whether the parameter has fp32 weights.",
        )  # fmt: skip


def test_a_checkpoint_engine_has_the_methods_that_the_collector_writes() -> None:
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    for name in CheckpointEngine.__abstractmethods__ | {"create", "save", "load", "commit"}:
        assert name in vars(CheckpointCollector), broken(
            f"CheckpointEngine has a new abstract method `{name}`", used="checkpoint_writer.py CheckpointCollector",
            fix="Write it there: it must not write to the disk, which Write does.",
        )  # fmt: skip
        ours, theirs = (
            list(inspect.signature(vars(kind)[name]).parameters) for kind in (CheckpointCollector, CheckpointEngine)
        )
        assert ours == theirs, broken(
            f"CheckpointEngine.{name} takes {theirs}, not {ours}", used="checkpoint_writer.py CheckpointCollector",
            fix="Take the same arguments there.",
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["0", "1", "2", "3", "0 bf16"])
def test_the_files_of_a_checkpoint_hold_what_is_read_from_them_without_an_engine(
    kind: str, engines: dict[str, Engine], tmp_path: Path
) -> None:
    train(engines[kind], range(1))
    collected = engines[kind]._collector
    folder = tmp_path / "step"
    written: list[Any] = []
    engines[kind].save(folder, texts={}, then=written.append).done.wait()
    assert written, "nothing was written"
    names, load = sorted(written[0]), collected.load
    used, fix = (
        "masters.py read",
        "Read the new layout there; test_export_step.py compares with the engine.",
    )
    state = load(str(folder / next(name for name in names if name.endswith("model_states.pt"))))
    if kind != "3":
        assert "mp_rank_00_model_states.pt" in names, broken(f"the weights are in {names}", used=used, fix=fix)
        assert "module" in state, broken("the weights' file has no `module`", used=used, fix=fix)
    if kind == "0 bf16":
        assert "fp32_groups" in state["optimizer"], broken("no `fp32_groups`", used=used, fix=fix)
    if kind in ("1", "2"):
        shard = next(name for name in names if "pp_rank_0" in name and name.endswith("_optim_states.pt"))
        optimizer = load(str(folder / shard))["optimizer_state_dict"]
        flat, slices = optimizer["single_partition_of_fp32_groups"], optimizer["param_slice_mappings"]
        assert len(flat) == len(slices), broken("groups and their slices are not in step", used=used, fix=fix)
        assert all(hasattr(piece, "start") and hasattr(piece, "numel") for piece in slices[0].values()), broken(
            "a parameter's slice has no `start` and `numel`", used=used, fix=fix
        )


def test_only_three_classes_of_deepspeed_are_unpickled_from_a_checkpoint() -> None:
    assert {kind.__name__ for kind in _KNOWN} == {"LossScaler", "ZeroStageEnum", "fragment_address"}, broken(
        "its files hold other classes", used="checkpoint_writer.py _KNOWN",
        fix="Name a class there only after looking at what its unpickling runs.",
    )  # fmt: skip


def test_the_converter_reads_the_options_that_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    monkeypatch.setattr("sys.argv", ["convert", "--input_folder", "a", "--output_folder", "b"])
    theirs = set(vars(ds_to_universal.parse_arguments()))
    given: list[argparse.Namespace] = []

    def main(arguments: argparse.Namespace) -> None:
        given.append(arguments)
        Path(arguments.output_folder).mkdir()

    monkeypatch.setattr(ds_to_universal, "main", main)
    universal.convert(tmp_path / "from", tmp_path / "to")
    assert theirs == set(vars(given[0])), broken(
        f"ds_to_universal takes {sorted(theirs)}", used="universal.py convert",
        fix="Give main() the new options with their defaults, but one worker each.",
    )  # fmt: skip


def test_zero_to_fp32_takes_a_folder_and_a_tag() -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    parameters = list(inspect.signature(get_fp32_state_dict_from_zero_checkpoint).parameters)
    assert parameters[:2] == ["checkpoint_dir", "tag"], broken(
        f"get_fp32_state_dict_from_zero_checkpoint takes {parameters}", used="masters.py _zero_3",
        fix="Give it the folder and the tag by their new names.",
    )  # fmt: skip


@pytest.mark.parametrize("local", [True, False])
def test_the_launcher_knows_the_options_that_it_is_given(local: bool) -> None:
    from deepspeed.launcher import runner

    line = launcher.deepspeed_command(Path("hosts"), port=1234, local=local)
    assert line[1:3] == ["-m", runner.__name__]
    try:
        arguments = runner.parse_args([*line[3:], "some.module", "argument"])
    except SystemExit as error:
        raise AssertionError(
            broken(f"its launcher refuses {line[3:]}", used="launcher.py deepspeed_command",
                   fix="`python -m deepspeed.launcher.runner --help` has the new names.")
        ) from error  # fmt: skip
    assert (arguments.module, arguments.no_local_rank, arguments.user_script) == (True, True, "some.module")


def test_the_shared_memory_collectives_can_be_switched_off() -> None:
    import deepspeed.ops

    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__, broken(
        "deepspeed.ops.__compatible_ops__ has no deepspeed_shm_comm", used="distributed.py join",
        fix="Find what makes it compile shared-memory collectives at the first one on a CPU, and switch that off.",
    )  # fmt: skip


def outside(folder: Path) -> Iterator[tuple[str, ast.AST]]:
    """The nodes of every file of tasks/ but those of the engine's folder, with the file's name."""
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(ROOM) and path.name != "engine.py":  # a plug-in's
            yield from ((name, node) for node in ast.walk(ast.parse(path.read_text())))


def test_no_other_file_of_tasks_imports_deepspeed_or_reaches_into_its_engine() -> None:
    internals = ("deepspeed", "basic_optimizer", "micro_step_id")
    result = []
    for name, node in outside(ROOT / "tasks"):
        modules = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(module.split(".")[0] == "deepspeed" for module in modules):
            result.append(name)
        if isinstance(node, ast.Attribute) and node.attr in internals:
            result.append(name)
    assert not result, f"{', '.join(result)}: give {ROOM}interface.py a method for it, and call that"
