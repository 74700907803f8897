from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from tasks import scratch
from tasks.corpus import manifest, shards
from tasks.corpus.tokenizer import encoder
from tasks.tools import repair_corpus
from tasks.tools import verify_corpus as verify
from tests.corpus.conftest import copied, with_bos, write_project
from tests.corpus.texts import Project, run, sentences


@pytest.fixture(scope="module")
def cut_project(tmp_path_factory: pytest.TempPathFactory, byte_level: Path) -> Path:
    """A corpus of several tasks with several parts each, whose sources also hold blank, bad and doubled records."""
    root = tmp_path_factory.mktemp("cut")
    lines = [json.dumps({"text": text}) for text in sentences(300, seed=1)]
    for place in (17, 18, 150, 222):
        lines.insert(place, "")
    lines[40:40] = ["{torn", *lines[:5]]
    (root / "prose.jsonl").write_text("\n".join(lines) + "\n")
    for i, text in enumerate(sentences(80, seed=2)):
        (root / "files" / f"{i % 7}").mkdir(parents=True, exist_ok=True)
        (root / "files" / f"{i % 7}" / f"{i}.txt").write_text(text)
    two = {"prose": {"source": "dir:prose.jsonl"}, "notes": {"source": "dir:files/**/*.txt", "format": "text"}}
    write_project(root, byte_level, two, shard_tokens=900, task_bytes=8000, max_bad=0.01)
    with contextlib.chdir(root):
        run()
    return root


@pytest.fixture
def cut(cut_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; the test runs in its project."""
    return copied(cut_project, tmp_path, monkeypatch)


def repaired(corpus: Path) -> tuple[list[str], list[str]]:
    """What was done, and what is wrong still."""
    said: list[str] = []
    return said, repair_corpus.repair(corpus, report=said.append)


def test_the_fixture_has_tasks_and_parts_to_tell_apart(cut: Path) -> None:
    prose = manifest.load(cut).domains["prose"]
    numbers = {verify.number_of(shard) for shard in prose.train.shards}
    assert {task for task, _ in numbers} >= {0, 1, 2}
    assert {index for _, index in numbers} >= {0, 1}
    assert prose.rules["bad"] == 1
    assert prose.rules["duplicate"] == 5


def test_a_corpus_that_is_whole_is_left_alone(cut: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in cut.rglob("*")}
    assert repaired(cut) == ([], [])
    assert {path: path.stat().st_mtime_ns for path in cut.rglob("*")} == before
    assert not list(Path(".scratch/corpus-tiny").glob("*/"))


def test_every_shard_is_made_again_byte_for_byte_and_nothing_else_is_written(cut: Path) -> None:
    clean = scratch.digest(cut)
    paths = sorted(cut.rglob("*.arrow"))
    for i, path in enumerate(path for path in paths if "verdicts" not in path.parts):
        content = path.read_bytes()
        others = {other: other.stat().st_mtime_ns for other in cut.rglob("*") if other.is_file() and other != path}
        if i % 3 == 0:
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if i % 3 == 1 else content[:-9] + b"?" + content[-8:])
        assert repaired(cut) == ([f"{path}: made again"], [])
        assert {other: other.stat().st_mtime_ns for other in others} == others
        assert path.read_bytes() == content
    assert scratch.digest(cut) == clean


def test_several_broken_files_are_repaired_at_once(cut: Path) -> None:
    clean = scratch.digest(cut)
    broken = [shard for shard in sorted(cut.glob("*/*/*.arrow"))[::2] if "verdicts" not in shard.parts]
    for path in broken:
        path.write_bytes(b"")
        shards.sidecar_of(path).unlink()
    left_over = cut / "prose/train/.part-00009-000.arrow.tmp-0123"
    left_over.write_text("half")
    said, left = repaired(cut)
    assert left == []
    assert sorted(said) == sorted(
        [f"{path}: made again" for path in broken]
        + [f"{shards.sidecar_of(path)}: written again from the manifest" for path in broken]
        + [f"{left_over}: deleted; a writer that was killed left it"]
    )
    assert scratch.digest(cut) == clean


def test_only_the_documents_of_the_broken_part_are_tokenised(cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = manifest.load(cut).domains["prose"].train.shards[1]
    (cut / shard.path).unlink()
    encoded: list[str] = []
    encode = encoder.Encoder.encode
    monkeypatch.setattr(encoder.Encoder, "encode", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    assert repaired(cut)[1] == []
    assert len(encoded) == shard.documents


def test_a_link_into_a_cache_is_replaced_and_the_cache_is_not_written(cut: Path, tmp_path: Path) -> None:
    clean = scratch.digest(cut)
    cache = tmp_path / "cache"
    cache.mkdir()
    for path, link in ((cut / "prose/train/part-00000-000.arrow", os.link), (cut / "notes/train", None)):
        target = path if link else min(path.glob("*.arrow"))
        flawed = target.read_bytes()[:-1] + b"!"
        held = cache / target.name.replace("part", path.parts[-3])
        held.write_bytes(flawed)
        held.chmod(0o444)
        target.unlink()
        (link or os.symlink)(held, target)
        said, left = repaired(cut)
        assert (said, left) == ([f"{target}: made again{repair_corpus.LINKED}"], [])
        assert not target.is_symlink()
        assert held.read_bytes() == flawed
    assert scratch.digest(cut) == clean


def test_a_changed_source_leaves_the_shard_as_it_was_and_says_to_run_the_stage(cut: Path, tmp_path: Path) -> None:
    path = max(cut.glob("prose/train/part-00001-*.arrow"))
    path.write_bytes(b"broken")
    source = tmp_path / "prose.jsonl"
    content = source.read_text()
    for changed, problem in (
        (content.replace("lazy", "busy"), "source, settings or code changed"),
        (content[:12000], "the source has other records than the "),
        (content[:4000], "the source gives 1 tasks, there is no task 1 any more"),
        (content.replace('"text": "1-8', '"text": 51-8'), "but it was a document; it changed"),
        (content.replace('"text"', '"body"'), "but it was a document; it changed"),
    ):
        source.write_text(changed)
        said, (left,) = repaired(cut)
        assert said == []
        assert left.startswith(f"{path}: cannot be made again (")
        assert left.endswith("run the stage again: `python -m tasks.corpus tiny`")
        assert problem in left
        assert path.read_bytes() == b"broken"
        assert not list(cut.rglob("*.tmp-*"))
    source.unlink()
    _, (left,) = repaired(cut)
    assert "matches no file" in left
    source.write_text(content)
    assert repaired(cut) == ([f"{path}: made again"], [])


def test_another_tokenizer_and_a_corpus_without_settings_are_named(cut: Path, sentencepiece: Path) -> None:
    path = cut / "prose/train/part-00001-000.arrow"
    path.unlink()
    model = Path("data/models/small")
    own = model.readlink()
    model.unlink()
    model.symlink_to(sentencepiece)
    _, (left,) = repaired(cut)
    assert f"{path}: cannot be made again (data/models/small: its tokenizer is" in left
    model.unlink()
    model.symlink_to(own)
    raw = json.loads(Path("pipelines.yaml").read_text())
    raw["corpora"]["other"] = raw["corpora"].pop("tiny")
    Path("pipelines.yaml").write_text(json.dumps(raw))
    _, (left,) = repaired(cut)
    assert "tiny" in left
    assert "cannot be made again" in left


def test_verdicts_and_unlisted_files_are_named_but_not_repaired(cut: Path) -> None:
    verdicts, foreign = cut / "verdicts/prose/task-00001.arrow", cut / "prose/notes.txt"
    verdicts.write_bytes(b"?")
    foreign.write_text("mine")
    of_task_1, of_task_0 = cut / "prose/train/part-00001-000.arrow", cut / "prose/train/part-00000-000.arrow"
    of_task_1.unlink()
    of_task_0.unlink()
    said, left = repaired(cut)
    assert said == [f"{of_task_0}: made again"]
    stage = "`python -m tasks.corpus tiny`"
    assert left[0].startswith(f"{verdicts}: sha256 is ")
    assert left[0].endswith(f"only the stage can fix it: {stage}")
    assert left[1] == f"{foreign}: unlisted file, the manifest doesn't list it; delete it if nobody needs it"
    needs = f"it needs {verdicts}, which is broken too"
    assert left[2] == f"{of_task_1}: cannot be made again ({needs}); run the stage again: {stage}"
    assert len(left) == 3
    assert foreign.exists()


def test_with_a_damaged_manifest_nothing_is_changed(cut: Path) -> None:
    path = cut / manifest.FILE
    path.write_text(path.read_text().replace("CC0-1.0", "CC0-9.9", 1))
    (cut / "prose/train/part-00000-000.arrow").unlink()
    before = scratch.digest(cut)
    said, (left,) = repaired(cut)
    assert said == []
    assert "one of them is damaged or of another run; nothing was changed. `dvc checkout --force" in left
    assert scratch.digest(cut) == before


def test_a_corpus_that_is_being_made_is_not_repaired(cut: Path) -> None:
    (cut / "prose/train/part-00000-000.json").unlink()
    with (
        scratch.workspace("corpus", "tiny"),
        pytest.raises(scratch.BusyError, match="corpus tiny is already being run"),
    ):
        repaired(cut)


def test_a_shard_with_other_separators_is_made_again_too(project: Project, byte_level: Path) -> None:
    corpus = project({"prose": sentences(150, seed=1)}, separators="bos_eos", shard_tokens=1500)
    with_bos(byte_level)
    run()
    clean = scratch.digest(corpus)
    path = min(corpus.glob("*/train/part-00000-001.arrow"))
    path.unlink()
    assert repaired(corpus) == ([f"{path}: made again"], [])
    assert scratch.digest(corpus) == clean


def test_the_command_says_what_was_done_and_exits_with_the_verdict(cut: Path) -> None:
    path = cut / "prose/train/part-00000-000.arrow"
    path.unlink()
    (cut / "notes.txt").touch()
    done = CliRunner().invoke(app, ["repair", str(cut)])
    assert done.exit_code == 1
    assert f"{path}: made again\n" in done.output
    assert f"{cut}/notes.txt: unlisted file" in done.output
    (cut / "notes.txt").unlink()
    path.write_bytes(b"")
    done = CliRunner().invoke(app, ["repair", str(cut)])
    assert (done.exit_code, done.output) == (0, f"{path}: made again\n{cut}: sound\n")
    done = CliRunner().invoke(app, ["repair", str(path)])
    assert done.exit_code == 1
    assert f"{path}: a shard cannot be repaired, only a corpus" in done.output


def test_a_task_of_more_than_a_thousand_parts_is_whole_and_its_last_parts_can_be_made_again(project: Project) -> None:
    corpus = project({"a": sentences(1150, seed=1)}, shard_tokens=1, heldout=0.05)
    run()
    parts = manifest.load(corpus).domains["a"].train.shards
    assert len(parts) > 1050
    assert verify.number_of(parts[-1]) == (0, len(parts) - 1)
    assert len({part.task_key for part in parts}) == len(parts)
    assert verify.verify_shard(corpus / parts[-1].path) == []
    clean = scratch.digest(corpus)
    broken = [corpus / part.path for part in (parts[999], parts[1000], parts[-1])]
    for path in broken:
        path.write_bytes(b"")
    assert repaired(corpus) == ([f"{path}: made again" for path in broken], [])
    assert scratch.digest(corpus) == clean
