"""From a corpus entry to its shards: the three phases, by whatever runs their units, and what is published.

`make` is the stage. `prepare` does all of it but the publishing, so that any number of machines may do the work and
the stage, run afterwards, finds it done. Units may be killed at any point, run twice or run at once: their results
are functions of the plan, and appear by a rename.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import Any

from tasks import code, scratch, settings, sources
from tasks.corpus import files, fingerprint, source_versions
from tasks.corpus.build import corpus_display, counters, planning, publishing, resolve, scan, tokenise
from tasks.corpus.build.planning import Phase, Plan, Unit
from tasks.corpus.readers import streams
from tasks.corpus.records import CorpusError
from tasks.corpus.tokenizer import encoder

MODELS = Path("data/models")
FAILURES = (
    settings.SettingsError,
    sources.SourceError,
    encoder.TokenizerError,
    CorpusError,
    streams.ReadError,
    scratch.BusyError,
    OSError,
)
"""What a person can mend; anything else is a fault of this program and shows its traceback."""

WORKER_KILLED = (
    "a worker process was killed, perhaps for want of memory; run again with fewer --workers. Finished parts are kept"
)

JUDGES = ("datatrove", "py3langid", "rensa", "wordfreq")
"""Packages whose version may change what is dropped."""

FAST = "tokenised"
"""The folder of what a tokenizer made that no document has shown to be wrong."""

Runner = Callable[[Callable[[Unit], None], list[Unit]], None]
"""Calls a picklable function with every unit, in any order, anywhere, and raises if a call does."""


def make(name: str, *, run: Runner | None = None) -> dict[str, Any]:
    """Make corpus `name` of pipelines.yaml; returns its metrics.

    Args:
        name: its key in the settings.
        run: what runs the units; processes on this machine if None.

    Raises:
        FAILURES: what was finished is kept for the next run.
    """
    with _workspace(name) as todo:
        out = _phases(todo, run=run or processes())
        metrics = publishing.publish(todo, out=out, resolved=resolve.resolved(todo), encode=_encoder(todo.corpus))
        work = todo.path.parent
        # Not in place: half of it, after a kill, would be taken for work to go on with.
        shutil.rmtree(work.rename(work.with_name(f"done-{work.name}")))
    return metrics


def prepare(name: str, *, run: Runner) -> None:
    """Everything but the publishing. Raises FAILURES."""
    with _workspace(name) as todo:
        _phases(todo, run=run)


def run_share(name: str, *, phase: Phase, index: int, count: int) -> int:
    """Run the units index, index + count, … of a phase, beside others that run theirs; returns how many there were.

    Raises:
        FAILURES: also if the phase before is not finished.
    """
    with _workspace(name, shared=phase != "resolve") as todo:
        before = planning.PHASES[: planning.PHASES.index(phase)]
        for earlier in before:
            if missing := _pending(todo, earlier):
                raise CorpusError(
                    f"phase {phase} of corpus {name} needs phase {earlier}, of which {len(missing)} units are not "
                    f"done; run --phase {earlier} first"
                )
        mine = [unit for i, unit in enumerate(todo.units(phase)) if i % count == index]
        for unit in mine:
            run_unit(str(todo.path), unit)
    return len(mine)


def run_unit(path: str, unit: Unit) -> None:
    """Run one unit, unless it is done; a function of the plan in `path`."""
    todo = planning.load(Path(path))
    if _is_done(todo, unit):
        return
    with counters.Meter(_progress(todo), phase=unit.phase, domain=unit.domain, task=unit.task) as meter:
        if unit.phase == "scan":
            # Only documents that come as ids need a tokenizer here, to be decoded.
            load = functools.partial(_encoder, todo.corpus)
            scan.scan(todo, domain=unit.domain, task=unit.task, meter=meter, load_encoder=load)
        elif unit.phase == "resolve":
            source_versions.require_unchanged(todo.corpus, planning.SOURCES, versions=todo.sources)
            resolve.resolve(todo)
        else:
            _tokenise(todo, unit=unit, meter=meter)


def processes(workers: int | None = None) -> Runner:
    """Units in up to `workers` processes of this machine, one for each core by default."""
    limit = workers or cores()

    def run(function: Callable[[Unit], None], units: list[Unit]) -> None:
        count = min(limit, len(units))
        if count <= 1:
            for unit in units:
                function(unit)
            return
        threads = {"RAYON_NUM_THREADS": str(max(1, cores() // count))}  # read by tokenizers when a process starts
        with default_environment(threads):
            _run_in_pool(function, units, workers=count)

    return run


def cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_in_pool(function: Callable[[Unit], None], units: list[Unit], *, workers: int) -> None:
    spawn = multiprocessing.get_context("spawn")  # a tokenizer's threads don't survive a fork
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=end_with_parent) as pool:
        futures = [pool.submit(function, unit) for unit in units]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BrokenProcessPool:
            raise CorpusError(WORKER_KILLED) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def end_with_parent() -> None:
    """A worker whose parent was killed must not wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def default_environment(changed: dict[str, str]) -> Iterator[None]:
    """Set variables that are not set while the block runs, for the processes that it starts."""
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update({name: value for name, value in changed.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextlib.contextmanager
def _workspace(name: str, *, shared: bool = False) -> Iterator[Plan]:
    """The plan of a corpus in its work folder, which is held until the block ends."""
    corpus = settings.load().corpus(name)
    found = fingerprint.check(name, corpus)
    encode = _encoder(corpus)
    keys = planning.keys_of(corpus, found=found, tokenizer=encode.fingerprint)
    # Work begun by other code isn't continued; yet the code is no part of the shards, which it need not change.
    inputs = {"code": code.fingerprint("tasks.corpus"), **{name: _version(name) for name in JUDGES}}
    with scratch.workspace("corpus", name, inputs=inputs, shared=shared, priority=scratch.last_used) as work:
        if not shared:
            scratch.report_kept(work)
            files.sweep(work)
        path = planning.file(work, corpus, keys=keys)
        if path.exists():
            yield planning.load(path)
            return
        planning.make(path, name, corpus=corpus, keys=keys, found=found)
        todo = planning.load(path)
        for phase in planning.PHASES:
            for unit in _pending(todo, phase):  # counters of work begun with other settings
                counters.forget(_progress(todo), phase=unit.phase, domain=unit.domain, task=unit.task)
        yield todo


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _progress(todo: Plan) -> Path:
    return todo.path.with_name("progress")


def _phases(todo: Plan, *, run: Runner) -> Path:
    """Run what isn't done; returns the folder that holds the result."""
    with corpus_display.CorpusDisplay(_progress(todo), domains=list(todo.tasks)) as display:
        for phase in planning.PHASES:
            while units := _pending(todo, phase):  # twice, if a fast tokenizer turned out to be wrong
                total = len(todo.units(phase))
                display.phase(phase, total, before=total - len(units))
                run(functools.partial(run_unit, str(todo.path)), units)
    return _out(todo)


def _pending(todo: Plan, phase: Phase) -> list[Unit]:
    return [unit for unit in todo.units(phase) if not _is_done(todo, unit)]


def _is_done(todo: Plan, unit: Unit) -> bool:
    if unit.phase == "scan":
        return scan.is_done(todo, unit.domain, task=unit.task)
    if unit.phase == "resolve":
        return resolve.result(todo).exists()
    return tokenise.finished(_out(todo), unit.domain, task=unit.task) is not None


def _tokenise(todo: Plan, *, unit: Unit, meter: counters.Meter) -> None:
    def attempt(
        out: Path,
    ) -> None:  # folder and backend by one look, since another worker may find a mismatch meanwhile
        encode = _encoder(todo.corpus, backend="auto" if out.parent.name == FAST else "reference")
        tokenise.tokenise(todo, out=out, domain=unit.domain, task=unit.task, encode=encode, meter=meter)

    try:
        attempt(_out(todo))
    except encoder.BackendMismatch as error:
        warnings.warn(f"{error}; everything is tokenised by the reference instead", stacklevel=2)
        scratch.write_json(_distrust(todo), {"domain": unit.domain, "task": unit.task, "error": str(error)})
        attempt(_out(todo))


def _distrust(todo: Plan) -> Path:
    """Where it is written that the fast tokenizer was found to be wrong."""
    return todo.path.with_name("distrust.json")


def _out(todo: Plan) -> Path:
    """Shards of a fast tokenizer that proved wrong are left where they are, and nothing is taken from there."""
    return todo.path.with_name("tokenised-by-reference" if _distrust(todo).exists() else FAST) / todo.keys.shards


class _Loaded(threading.local):
    """The encoders of a thread: only one may use an encoder at a time, and a cluster's worker may have several."""

    def __init__(self) -> None:
        self.load = functools.lru_cache(maxsize=2)(encoder.load_encoder)


_loaded = _Loaded()


def _encoder(corpus: settings.Corpus, *, backend: str = "reference") -> encoder.Encoder:
    return _loaded.load((MODELS / corpus.model).resolve(), separators=corpus.separators, backend=backend)
