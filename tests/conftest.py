"""Fixtures that every room shares: a tiny real LLaMA and a project around it; one thread, set before torch loads."""

from __future__ import annotations

import ctypes
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

import pytest
from filelock import FileLock
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent

SETTINGS = """\
models:
  tiny:
    source: dir:{model}
    license: PSF-2.0

corpora:
  tiny:
    model: tiny
    heldout: 0.2
    domains:
      prose: {{source: "dir:{data}/prose.jsonl.gz", format: jsonl, license: PSF-2.0}}
      code: {{source: "dir:{data}/code.jsonl", format: jsonl, license: PSF-2.0}}

pipelines:
  tiny:
    model: tiny
    corpus: tiny
    mixture: {{method: reference_loss, windows: 4}}
    partition: {{method: activation, experts: 12, shared_experts: 4, top_k: 4, calibration_windows: 16}}
    pretrain:
      tokens: 1536
      seq_len: 64
      batch: 4
      micro_batch: 2
      learning_rate: 1e-3
      warmup_tokens: 256
      dynamic: {{rule: paper}}
      eval_tokens: 512
      eval_windows: 2
      save_every: 2
      precision: float32
    evaluate: {{seq_len: 64, windows: 4, batch: 4}}

deployments:
  - name: tiny
    entrypoint: flows/upcycle.py:upcycle
    parameters: {{pipeline: tiny}}
    work_pool: {{name: local}}
  - name: tiny
    entrypoint: flows/retrain.py:retrain
    parameters: {{pipeline: tiny}}
    work_pool: {{name: local}}
    schedules: [{{cron: "0 3 * * 1", timezone: UTC, active: true}}]
"""


def documents(domain: str) -> list[str]:
    """Real text that every Python has: the language reference's topics as prose, the standard library as code."""
    if domain == "prose":
        from pydoc_data.topics import topics

        texts = [part for topic in topics.values() for part in topic.split("\n\n\n")]
    else:
        files = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:60]
        texts = [part for file in files for part in file.read_text(errors="replace").split("\n\n\n")]
    return [text for text in dict.fromkeys(texts) if len(text) > 200][:500]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prose.jsonl.gz and code.jsonl of about 500 documents each."""
    folder = tmp_path_factory.mktemp("data")
    for domain, opener in {"prose.jsonl.gz": gzip.open, "code.jsonl": open}.items():
        with opener(folder / domain, "wt") as file:
            for text in documents(domain.split(".")[0]):
                file.write(json.dumps({"text": text}) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: LlamaForCausalLM of 2 layers, trained for a few seconds, with its own byte-level BPE."""
    base = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent  # shared by the workers
    folder = base / "tiny-model"
    with FileLock(f"{folder}.lock"):
        if not (folder / "model.safetensors").exists():
            _train_tiny(folder)
    return folder


def _train_tiny(folder: Path) -> None:
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = documents("prose") + documents("code")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=512, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor([i for encoded in bpe.encode_batch(texts) for i in [*encoded.ids, 0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        starts = torch.randint(len(ids) - 64, (16,))
        batch = torch.stack([ids[s : s + 64] for s in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def tiny_project(tmp_path: Path, tiny_model: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project root with its own copy of the code and the pipeline `tiny`; the test runs inside it."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("tasks", "flows", "kernels"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, project / name)
    data = project / "texts"
    shutil.copytree(tiny_data, data)
    (project / "pipelines.yaml").write_text(SETTINGS.format(model=tiny_model, data=data))
    monkeypatch.chdir(project)
    monkeypatch.setenv("PYTHONPATH", f"{project}{os.pathsep}{project / 'kernels'}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return project


@pytest.fixture
def tiny_repo(tiny_project: Path) -> Path:
    """The tiny project as a git and DVC repository with one commit."""
    make_repository(tiny_project)
    return tiny_project


def make_repository(folder: Path) -> None:
    """Turn a folder into a git and DVC repository with one commit of all that is in it."""
    for command in (
        ["git", "init", "--quiet"],
        ["git", "config", "user.name", "Test"],
        ["git", "config", "user.email", "test@example.org"],
        [sys.executable, "-m", "dvc", "init", "--quiet"],
        ["cp", str(ROOT / ".dvc/config"), ".dvc/config"],
        ["git", "add", "--all"],
        ["git", "commit", "--quiet", "--message", "Start"],
    ):
        subprocess.run(command, check=True, cwd=folder)


def obey_file_modes() -> None:
    """For subprocess's `preexec_fn`: let root meet read-only files and folders as everybody else does."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: what is executed next lacks it


def assert_kept_once(project: Path) -> None:
    """Fail unless DVC's cache is sound, and each file that it keeps of this project is the very file in its place."""
    cached = {}
    for file in (project / ".dvc/cache/files/md5").glob("*/*"):
        assert hashlib.md5(file.read_bytes()).hexdigest() == (file.parent.name + file.name).removesuffix(".dir"), file
        cached[file.stat().st_ino] = file
    command = ["git", "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--", "data", "runs"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=project).stdout
    lock = YAML(typ="safe", pure=True).load((project / "dvc.lock").read_text())
    kept = tuple(f"{out['path']}/" for stage in lock["stages"].values() for out in stage.get("outs", []))
    names = [name for name in listed.split("\0")[:-1] if f"{name}/".startswith(kept)]
    outs = [file for name in names if (file := project / name).stat().st_size]
    assert outs
    assert [file for file in outs if file.stat().st_ino not in cached] == []


@pytest.fixture
def hub_listing(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    """An imitation of the hub's API: {repository at a commit: its files}; others are not found."""
    listed: dict[str, list[str]] = {}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("?")[0].removeprefix("/api/datasets/").replace("/revision/", "@")
            files = listed.get(name)
            self.send_response(404 if files is None else 200)
            if files is None:
                self.send_header("X-Error-Code", "RevisionNotFound")
            self.end_headers()
            siblings = [{"rfilename": path} for path in files or []]
            self.wfile.write(json.dumps({"id": name, "siblings": siblings}).encode())

        def log_message(self, format: str, *_: object) -> None:
            """Nothing is logged."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{http.server_port}")
        yield listed
        http.shutdown()
