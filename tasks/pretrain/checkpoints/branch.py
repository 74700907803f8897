"""Where a pipeline's next run can begin: at a kept checkpoint of another pipeline's run, or of its own."""

from __future__ import annotations

from tasks import scratch
from tasks.pretrain import job
from tasks.pretrain.checkpoints import finished, resume, store
from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain


def branch(pipeline: str, other: str, *, step: int | None, params: Pretrain, inputs: dict[str, str]) -> str:
    """Begin a pipeline's run where a kept checkpoint of another's is, or of its own; returns what to tell the user.

    Args:
        step: of the checkpoint; the newest that fits if None.

    Raises:
        TrainingError: there is no such checkpoint, or it is not one of a run from these inputs with these settings.
        scratch.BusyError: the pipeline is being trained.
    """
    sources = [*resume.unfinished(other), *filter(None, [finished.folder(other)])]
    if not sources:
        raise TrainingError(
            f"{other} has no checkpoint of an unfinished run, nor of a finished one with pretrain.keep_finished: true"
        )
    name = scratch.fingerprint(inputs)
    fitting = [source for source in sources if source.name == name]
    if not fitting:
        before = resume.read_inputs(sources[-1])
        named = ", ".join(text for key, text in resume.NAMES.items() if before.get(key) != inputs[key])
        raise TrainingError(f"{pipeline} cannot begin from {other}: {named} of the two are not the same")
    candidates = sorted(
        ((at, source) for source in fitting for at in store.steps(source / "checkpoints")), reverse=True
    )
    some = [each for each in candidates if step in (None, each[0])]
    if not some:
        present = ", ".join(str(at) for at, _ in reversed(candidates))
        raise TrainingError(f"{other} has no checkpoint of step {step}; kept: {present}")
    with scratch.workspace(resume.STAGE, pipeline, inputs=inputs, priority=resume.last_step) as folder:
        mine = store.steps(folder / "checkpoints")
        if mine and pipeline != other:
            raise TrainingError(
                f"{pipeline} has unfinished training up to step {mine[-1]}; finish it, or give it up: "
                f"`python -m tasks.pretrain {pipeline} --discard`"
            )
        problem = ""
        for at, source in some:
            path = source / "checkpoints" / store.tag(at)
            fault = store.damage(path, content=source == folder)
            if fault is None:
                _, fault = resume.compare(store.state(path), params)
            if not fault:
                for later in mine:
                    if source != folder or later > at:
                        store.delete(folder / "checkpoints" / store.tag(later))
                fault = finished.take(source, folder, step=at) if source != folder else None
            if not fault:
                scratch.write_json(
                    folder / resume.INPUTS, {**inputs, "code": resume.read_inputs(source).get("code", "")}
                )
                return f"{pipeline} begins from step {at} of {other}; run it: `dvc repro pretrain@{pipeline}`"
            problem = problem or f"step {at}: {fault}"
        raise TrainingError(f"{pipeline} cannot begin from {other}, {problem}")


def outlook(pipeline: str, params: Pretrain) -> int:
    """The step that a run would go on from if what it reads is what it was; 0 without such a checkpoint."""
    last_run = finished.folder(pipeline)
    if last_run and resume.read_inputs(last_run).get("code") != job.code_digest():
        last_run = None
    for folder in [*resume.unfinished(pipeline), *filter(None, [last_run])]:
        for step in reversed(store.steps(folder / "checkpoints")):
            path = folder / "checkpoints" / store.tag(step)
            if not store.damage(path, content=False) and not (resume.compare(store.state(path), params)[1]):
                return step
            if folder != last_run:  # of an unfinished run, the newest alone is gone on with
                break
    return 0


def kept_bytes(pipeline: str) -> int:
    """What training has left in .scratch for later runs of a pipeline; linked files count once."""
    folders = [*resume.unfinished(pipeline), *filter(None, [finished.folder(pipeline)])]
    files = [path.stat() for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in files}.values())
