"""What is kept of the parent's logits, how it comes about, and that training sees the same by it as by the parent."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from tasks.corpus import manifest, shards
from tasks.corpus.sampling.loader import IGNORED
from tasks.pretrain import batches
from tasks.pretrain.job import Job, TrainingError
from tasks.pretrain.loss import teacher_cache
from tasks.pretrain.loss.distil import Distiller
from tasks.pretrain.loss.teacher import Teacher
from tasks.pretrain.loss.teacher_cache import TeacherCache
from tasks.settings import Pretrain
from tasks.settings.pretrain import Distill
from tests.corpus.handmade import corpus
from tests.warm_processes import spawn

V, LENGTH, STEPS, BATCH = 64, 16, 5, 4
CPU = torch.device("cpu")
ALL = slice(0, BATCH)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent, a split model's config, a corpus of two domains and a mixture."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "parent")
    (folder / "moe").mkdir()
    shutil.copy(folder / "parent/config.json", folder / "moe/config.json")
    rng = np.random.default_rng(0)
    documents = {d: [[rng.integers(1, V, n) for n in rng.integers(2, 30, 20)]] for d in ("code", "prose")}
    (folder / "corpus").mkdir()
    corpus(folder / "corpus", documents)
    (folder / "mixture.json").write_text(json.dumps({"weights": {"code": 0.25, "prose": 0.75}}))
    return folder


@pytest.fixture
def job(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher_cache, "_SHARD", 3 * LENGTH)  # windows a shard, times their length
    params = Pretrain(
        tokens=STEPS * BATCH * LENGTH, seq_len=LENGTH, batch=BATCH, learning_rate=1.0, distill=Distill(top_n=8)
    )
    return Job(
        pipeline="p",
        params=params,
        corpus=made / "corpus",
        model=made / "moe",
        parent=made / "parent",
        mixture=made / "mixture.json",
        workspace=tmp_path,
    )


def other(job: Job, *, distill: dict[str, Any] | None = None, **params: Any) -> Job:
    assert job.params.distill is not None
    result = job.params.model_copy(update={"distill": job.params.distill.model_copy(update=distill), **params})
    return replace(job, params=result)


def made_by(job: Job) -> TeacherCache:
    return TeacherCache(job, device=CPU, dtype=torch.float32)


def drawn(job: Job) -> Iterator[Any]:
    weights = json.loads(job.mixture.read_text())["weights"]
    sha256 = manifest.load(job.corpus).sha256
    _, loader = batches.draw(job, weights, corpus_sha256=sha256, rank=0, world_size=1)
    with loader:
        for _ in range(job.params.steps):
            yield loader.next()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*part-*"))}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The windows that a parent has read."""
    seen: list[Any] = []
    ask = TeacherCache._compute_row

    def noted(self: TeacherCache, slot: Any) -> Any:
        seen.append(slot)
        return ask(self, slot)

    monkeypatch.setattr(TeacherCache, "_compute_row", noted)
    return seen


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_training_sees_the_losses_and_gradients_of_a_parent_in_memory(job: Job, masked: bool, packing: str) -> None:
    job = other(job, distill={"temperature": 1.5, "top_n": V}, mask_documents=masked, packing=packing)
    cached = Distiller.load(job, device=CPU, dtype=torch.float32)
    resident = Distiller.load(other(job, distill={"top_n": None}), device=CPU, dtype=torch.float32)
    assert cached is not None
    assert resident is not None
    for batch in drawn(job):
        torch.manual_seed(batch.windows[0])
        logits = torch.randn(BATCH, LENGTH, V)
        target = F.pad(torch.from_numpy(batch.labels)[:, 1:], (0, 1), value=IGNORED)
        seen = []
        for distiller in (cached, resident):
            out = SimpleNamespace(logits=logits.clone().requires_grad_())
            result = distiller.losses(batch, rows=ALL, out=out, target_BL=target)
            (result["cross_entropy"] + result["kl"]).sum().backward()
            seen.append((result["cross_entropy"].detach(), result["kl"].detach(), out.logits.grad))
        torch.testing.assert_close(seen[0][0], seen[1][0], rtol=0, atol=0)
        torch.testing.assert_close(seen[0][1], seen[1][1], rtol=2e-3, atol=2e-3)  # float16 logs
        torch.testing.assert_close(seen[0][2], seen[1][2], rtol=2e-2, atol=1e-4)


def test_a_row_has_the_largest_logits_the_probability_of_the_rest_and_their_tokens(job: Job) -> None:
    cache = made_by(job)
    teacher = LlamaForCausalLM.from_pretrained(job.parent).eval()
    for batch in drawn(job):
        for row, (domain, window) in enumerate(zip(batch.domains, batch.windows, strict=True)):
            ids, logs, rest = cache._row((domain, window))
            with torch.no_grad():
                logits = teacher(input_ids=torch.from_numpy(batch.input_ids[row : row + 1])).logits[0].double()
            theirs = F.log_softmax(logits, 1)
            top = theirs.topk(8, dim=1)
            assert ids.dtype == np.uint16
            assert torch.equal(torch.from_numpy(ids.astype(np.int64)), top.indices)
            torch.testing.assert_close(torch.tensor(logs).double(), top.values, rtol=1e-3, atol=1e-4)
            others = theirs.exp().scatter(1, top.indices, 0.0).sum(1)
            torch.testing.assert_close(torch.tensor(rest).exp().double(), others, rtol=1e-4, atol=1e-6)


def test_every_window_of_the_run_is_read_by_the_parent_once_and_never_again(
    job: Job, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_by(job).folder
    windows = {slot for batch in drawn(job) for slot in zip(batch.domains, batch.windows, strict=True)}
    assert sorted(asked) == sorted(windows)
    monkeypatch.setattr(Teacher, "load", lambda *_, **__: pytest.fail("the parent isn't needed"))
    cache = made_by(job)
    assert cache.folder == folder
    for batch in drawn(job):
        cache.kept(batch, rows=ALL)
    assert len(asked) == len(windows)


def test_a_longer_run_adds_the_windows_that_it_draws_more(job: Job, asked: list[Any]) -> None:
    made_by(job)
    before, longer = set(asked), other(job, tokens=2 * job.params.tokens)
    made_by(longer)
    assert len(asked) == len(set(asked))
    windows = {slot for batch in drawn(longer) for slot in zip(batch.domains, batch.windows, strict=True)}
    assert set(asked) == windows
    assert before < windows


@pytest.mark.parametrize(
    "changed",
    [{"distill": {"temperature": 2.0}}, {"distill": {"top_n": 4}}, {"mask_documents": True}, {"packing": "best_fit"}],
)
def test_what_decides_a_row_decides_the_folder(job: Job, changed: dict[str, Any]) -> None:
    assert made_by(job).folder != made_by(other(job, **changed)).folder


@pytest.mark.parametrize("written", [0, 2])
def test_killed_at_any_shard_it_goes_on_after_the_last_whole_one_to_the_same_bytes(
    job: Job, asked: list[Any], written: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = contents(made_by(job).folder)
    shutil.rmtree(tmp_path / ".scratch")
    asked.clear()
    commit = shards.write_sidecar
    done = 0

    def killed(path: Path, sidecar: dict[str, Any]) -> None:
        nonlocal done
        if done == written:
            for name in (f".{path.name}.tmp-left", "part-of-another-grouping.arrow"):
                (path.parent / name).write_bytes(b"half")
            raise KeyboardInterrupt  # between a shard and its sidecar
        done += 1
        commit(path, sidecar)

    monkeypatch.setattr(shards, "write_sidecar", killed)
    with pytest.raises(KeyboardInterrupt):
        made_by(job)
    monkeypatch.setattr(shards, "write_sidecar", commit)
    lost = 3  # windows a shard
    folder = made_by(job).folder
    assert len(asked) == len(set(asked)) + lost
    assert not list(folder.glob(".*"))
    index = {name for name in contents(folder) if name.endswith(".json")}
    assert index <= contents(folder).keys()
    rows = {tuple(w) for name in index for w in json.loads((folder / name).read_text())["windows"]}
    assert rows == set(asked)
    assert contents(folder) == wanted


def _flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 4
    path.write_bytes(content)


DAMAGES: list[Callable[[Path, Path], object]] = [
    lambda shard, _: shard.write_bytes(shard.read_bytes()[:-8]),
    lambda shard, _: shard.write_bytes(bytes(shard.stat().st_size)),
    lambda shard, _: _flip(shard, 0.8),
    lambda shard, other: shutil.copy(other, shard),
    lambda shard, other: [shutil.copy(other.with_suffix(s), shard.with_suffix(s)) for s in (".arrow", ".json")],
    lambda shard, _: shard.with_suffix(".json").write_bytes(b"\xff"),
    lambda shard, _: shard.with_suffix(".json").write_text("[]"),
    lambda shard, _: _swap(shard.with_suffix(".json")),
]


def test_a_damaged_shard_is_named_and_made_again(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_by(job).folder
    wanted = contents(folder)
    shard, other = sorted(folder.glob("*.arrow"))[:2]
    for damage in DAMAGES:
        damage(shard, other)
        capsys.readouterr()
        made_by(job)
        assert f"teacher: {shard}: its" in capsys.readouterr().out
        assert contents(folder) == wanted


def _swap(sidecar: Path) -> None:
    """Say of two rows that they are each other's."""
    content = json.loads(sidecar.read_text())
    content["windows"][:2] = content["windows"][1::-1]
    sidecar.write_text(json.dumps(content))


def test_a_window_that_was_not_foreseen_is_read_by_the_parent_itself(job: Job) -> None:
    short = made_by(other(job, tokens=1))
    whole = made_by(other(job, tokens=job.params.tokens))
    for batch in drawn(job):
        result, wanted = (cache.kept(batch, rows=ALL) for cache in (short, whole))
        assert torch.equal(result._ids_TN, wanted._ids_TN)
        assert torch.equal(result._logs, wanted._logs)


def test_too_small_a_disk_is_told_before_the_parent_is_read(
    job: Job, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(TrainingError, match=r"0\.0 GB are needed for \d+ windows.*top_n = 8"):
        made_by(job)
    assert not asked


def test_a_disk_that_fills_up_leaves_the_shards_before(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    write = shards.write_batch
    done: list[Any] = []

    def full(file: Any, batch: Any) -> Any:
        if done:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(batch)
        return write(file, batch)

    monkeypatch.setattr(shards, "write_batch", full)
    with pytest.raises(TrainingError, match=r"part-.*Make room and run again: what is there is kept"):
        made_by(job)
    folder = next(Path(".scratch").glob("teacher-*"))
    assert [path.suffix for path in sorted(folder.glob("*part-*"))] == [".arrow", ".json"]
    assert shards.open_shard(next(folder.glob("*.arrow"))).num_rows == 3


def test_more_logits_than_tokens_are_refused(job: Job) -> None:
    with pytest.raises(TrainingError, match=r"top_n = 65 is more than the 64 tokens"):
        made_by(other(job, distill={"top_n": V + 1}))


def _rank(rank: int, job: Job) -> None:
    """A process of two. The disk of the second is full at first."""
    meet = f"file://{job.workspace / 'meet'}"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    teacher_cache._SHARD = 3 * LENGTH
    compute = TeacherCache._compute

    def full(self: TeacherCache, missing: list[Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        TeacherCache._compute = full  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="Make room"):
        made_by(job)
    TeacherCache._compute = compute  # type: ignore[method-assign]
    folder = made_by(job).folder
    torch.distributed.barrier()
    if rank == 0:
        for shard in folder.glob("*.arrow"):
            _flip(shard, 0.8)
    torch.distributed.barrier()
    made_by(job)
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_work_and_fail_together(job: Job) -> None:
    spawn(_rank, (job,))
    folder = next(Path(".scratch").glob("teacher-*"))
    together = {slot: (folder / name, row) for slot, (name, row) in made_by(job)._index.items()}
    result = {slot: shards.open_shard(path).slice(row, 1).to_pydict() for slot, (path, row) in together.items()}
    shutil.rmtree(folder)
    alone = made_by(job)
    assert result.keys() == alone._index.keys()
    for slot, (name, row) in alone._index.items():
        assert shards.open_shard(folder / name).slice(row, 1).to_pydict() == result[slot]
