"""Make a corpus: run the units of the three phases, then publish the result.

`make` is the stage. `prepare` does everything but publish, so that any number of machines can share the work before
the stage runs. Units may be killed, run twice or run at once: their results depend on the plan alone, and appear by a
rename.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
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
from tasks.corpus.prepare import planning, publishing, resolve, scan, tokenise
from tasks.corpus.prepare.planning import PHASES, Phase, Plan, Unit
from tasks.corpus.readers import streams
from tasks.corpus.records import CorpusError
from tasks.corpus.tokenizer import encoder
from tasks.display import Progress
from tasks.workers import WORKER_KILLED, cores, default_environment, end_with_parent

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
"""Errors that a user can fix. Any other is a bug, and shows its traceback."""

FILTER_PACKAGES = ("datatrove", "py3langid", "rensa", "wordfreq")
"""Packages whose version may change which documents are dropped."""

POLL = 2.0
"""Seconds between looks for finished units."""

FAST = "tokenised"
"""The folder of shards by the fast tokenizer, unless a document shows that it is wrong."""

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
    with _workspace(name) as plan:
        out = _run_phases(plan, run=run or processes())
        metrics = publishing.publish(plan, out=out, counts=resolve.counts_of(plan), encode=_encoder(plan.corpus))
        work = plan.path.parent
        # Renamed first: a later run would resume work that a kill left half deleted.
        shutil.rmtree(work.rename(work.with_name(f"done-{work.name}")))
    return metrics


def prepare(name: str, *, run: Runner) -> None:
    """Do everything but publish. Raises FAILURES."""
    with _workspace(name) as plan:
        _run_phases(plan, run=run)


def run_share(name: str, *, phase: Phase, index: int, count: int) -> int:
    """Run the units index, index + count, … of a phase, beside others that run theirs; returns how many there were.

    Raises:
        FAILURES: also if the phase before is not finished.
    """
    with _workspace(name, shared=phase != "resolve") as plan:
        for earlier in PHASES[: PHASES.index(phase)]:
            if missing := _pending(plan, earlier):
                raise CorpusError(
                    f"phase {phase} of corpus {name} needs phase {earlier}, of which {len(missing)} units are not "
                    f"done; run --phase {earlier} first"
                )
        mine = [unit for i, unit in enumerate(plan.units(phase)) if i % count == index]
        for unit in mine:
            run_unit(str(plan.path), unit)
    return len(mine)


def run_unit(path: str, unit: Unit) -> None:
    """Run one unit, unless it is done; a function of the plan in `path`."""
    plan = planning.load(Path(path))
    if _is_done(plan, unit):
        return
    if unit.phase == "scan":
        # Only documents that come as ids need a tokenizer here, to be decoded.
        scan.scan(plan, domain=unit.domain, task=unit.task, load_encoder=functools.partial(_encoder, plan.corpus))
    elif unit.phase == "resolve":
        source_versions.require_unchanged(plan.corpus, planning.SOURCES, versions=plan.sources)
        resolve.resolve(plan)
    else:
        _tokenise(plan, unit=unit)


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


@contextlib.contextmanager
def _workspace(name: str, *, shared: bool = False) -> Iterator[Plan]:
    """The plan of a corpus in its work folder, which stays locked until the block ends."""
    corpus = settings.load().corpus(name)
    fingerprints = fingerprint.check(name, corpus)
    encode = _encoder(corpus)
    keys = planning.keys_of(corpus, fingerprints=fingerprints, tokenizer=encode.fingerprint)
    # Work of other code is not resumed. The shards do not name the code, which need not change them.
    inputs = {"code": code.fingerprint("tasks.corpus"), **{name: _version(name) for name in FILTER_PACKAGES}}
    with scratch.workspace("corpus", name, inputs=inputs, shared=shared, priority=scratch.last_used) as work:
        if not shared:
            scratch.report_kept(work)
            files.sweep(work)
        path = planning.plan_file(work, corpus, keys=keys)
        if path.exists():
            yield planning.load(path)
            return
        planning.make(path, name, corpus=corpus, keys=keys, fingerprints=fingerprints)
        yield planning.load(path)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _run_phases(plan: Plan, *, run: Runner) -> Path:
    """Run the units that are not done; returns the folder of the result."""
    for phase in PHASES:
        while units := _pending(plan, phase):  # twice if the fast tokenizer proves wrong
            with _shown(plan, phase, units=units):
                run(functools.partial(run_unit, str(plan.path)), units)
    return _output_folder(plan)


@contextlib.contextmanager
def _shown(plan: Plan, phase: Phase, *, units: list[Unit]) -> Iterator[None]:
    """Show how many units of a phase are done, whichever machine does them."""
    stop, total = threading.Event(), len(plan.units(phase))
    with Progress(total, label=f"corpus {phase}", unit="unit", done=total - len(units)) as progress:

        def look(units: list[Unit]) -> list[Unit]:
            left = [unit for unit in units if not _is_done(plan, unit)]
            if len(left) < len(units):
                progress.advance(by=len(units) - len(left))
            return left

        def watch() -> None:
            left = units
            while not stop.wait(POLL):
                left = look(left)
            look(left)

        thread = threading.Thread(target=watch, name="corpus display", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _pending(plan: Plan, phase: Phase) -> list[Unit]:
    return [unit for unit in plan.units(phase) if not _is_done(plan, unit)]


def _is_done(plan: Plan, unit: Unit) -> bool:
    if unit.phase == "scan":
        return scan.is_done(plan, unit.domain, task=unit.task)
    if unit.phase == "resolve":
        return resolve.result_file(plan).exists()
    return tokenise.finished(_output_folder(plan), unit.domain, task=unit.task) is not None


def _tokenise(plan: Plan, *, unit: Unit) -> None:
    def attempt(out: Path) -> None:
        # The folder decides the backend: another worker may find a mismatch meanwhile.
        encode = _encoder(plan.corpus, backend="auto" if out.parent.name == FAST else "reference")
        tokenise.tokenise(plan, out=out, domain=unit.domain, task=unit.task, encode=encode)

    try:
        attempt(_output_folder(plan))
    except encoder.BackendMismatch as error:
        warnings.warn(f"{error}; everything is tokenised by the reference instead", stacklevel=2)
        scratch.write_json(_mismatch_file(plan), {"domain": unit.domain, "task": unit.task, "error": str(error)})
        attempt(_output_folder(plan))


def _mismatch_file(plan: Plan) -> Path:
    """The file that says that the fast tokenizer differed from the reference."""
    return plan.path.with_name("mismatch.json")


def _output_folder(plan: Plan) -> Path:
    """The folder of the shards; another one once the fast tokenizer proves wrong, so that none of its shards stays."""
    return plan.path.with_name("tokenised-by-reference" if _mismatch_file(plan).exists() else FAST) / plan.keys.shards


_encoders = planning.PerThread(encoder.load_encoder, most=2)


def _encoder(corpus: settings.Corpus, *, backend: str = "reference") -> encoder.Encoder:
    return _encoders.get((MODELS / corpus.model).resolve(), separators=corpus.separators, backend=backend)
