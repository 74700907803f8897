"""A stock llama.cpp, out of the wheel xllamacpp, by its C interface: what it computes of a GGUF file, and how fast.

    python -m tasks.engines.llama_cpp < request.json

`ask` and `measure` run this command, because llama.cpp ends its process where it refuses.
"""

from __future__ import annotations

import ctypes as C
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from tasks.engines import turns

PACKAGE = "xllamacpp"
_ERROR = 4
"""GGML_LOG_LEVEL_ERROR in ggml.h."""


class _ModelParams(C.Structure):
    """llama.cpp's up to kv_overrides, and larger than that, whatever the version: all else is only handed back."""

    _fields_ = [
        ("lists", C.c_void_p * 2),
        ("numbers", C.c_int32 * 5),
        ("pointers", C.c_void_p * 3),
        ("kv_overrides", C.c_void_p),
        ("rest", C.c_byte * 1024),
    ]


class _Override(C.Structure):
    """A whole number in place of what the file says; a list of them ends with an empty key."""

    _fields_ = [("tag", C.c_int), ("key", C.c_char * 128), ("value", C.c_int64), ("rest", C.c_byte * 120)]


class _ContextParams(C.Structure):
    _fields_ = [(name, C.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max")] + [
        ("rest", C.c_byte * 1024)
    ]


class _Batch(C.Structure):
    _fields_ = [
        ("n_tokens", C.c_int32),
        ("token", C.POINTER(C.c_int32)),
        ("embd", C.c_void_p),
        ("pos", C.POINTER(C.c_int32)),
        ("n_seq_id", C.POINTER(C.c_int32)),
        ("seq_id", C.POINTER(C.POINTER(C.c_int32))),
        ("logits", C.POINTER(C.c_int8)),
    ]


_SIGNATURES = {
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (C.c_void_p, [C.c_char_p, _ModelParams]),
    "llama_init_from_model": (C.c_void_p, [C.c_void_p, _ContextParams]),
    "llama_set_n_threads": (None, [C.c_void_p, C.c_int32, C.c_int32]),
    "llama_model_get_vocab": (C.c_void_p, [C.c_void_p]),
    "llama_vocab_n_tokens": (C.c_int32, [C.c_void_p]),
    "llama_tokenize": (
        C.c_int32,
        [C.c_void_p, C.c_char_p, C.c_int32, C.POINTER(C.c_int32), C.c_int32, C.c_bool, C.c_bool],
    ),
    "llama_batch_init": (_Batch, [C.c_int32, C.c_int32, C.c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (C.c_int32, [C.c_void_p, _Batch]),
    "llama_get_logits": (C.POINTER(C.c_float), [C.c_void_p]),
    "llama_get_memory": (C.c_void_p, [C.c_void_p]),
    "llama_memory_clear": (None, [C.c_void_p, C.c_bool]),
}


class Model:
    """A GGUF file in memory, with a context of `length` tokens; `override`: llama.cpp's --override-kv."""

    def __init__(
        self, file: str, *, length: int = 256, threads: int = 1, override: tuple[str, int] | None = None
    ) -> None:
        import xllamacpp.xllamacpp

        self._c = C.CDLL(xllamacpp.xllamacpp.__file__)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments
        errors: list[str] = []
        self._log = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)(
            lambda level, text, _: errors.append(text.decode(errors="replace").strip()) if level == _ERROR else None
        )
        self._c.llama_log_set(self._log, None)
        model_params = self._c.llama_model_default_params()
        if override:
            key, value = override
            overrides = (_Override * 2)(_Override(key=key.encode(), value=value))
            model_params.kv_overrides = C.cast(overrides, C.c_void_p)
        self._model = self._c.llama_model_load_from_file(file.encode(), model_params)
        if not self._model:
            raise ValueError(f"llama.cpp does not load {file}: {'; '.join(errors)}")
        params = self._c.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = length
        self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context of {length} tokens for {file}: {'; '.join(errors)}")
        self._c.llama_set_n_threads(self._context, threads, threads)
        self._vocab = self._c.llama_model_get_vocab(self._model)
        self.size: int = self._c.llama_vocab_n_tokens(self._vocab)
        self._next = 0

    def restart(self) -> None:
        """Forget what was decoded."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        self._next = 0

    def decode(self, ids: Sequence[int]) -> np.ndarray:
        """Logits [L, V] after each of the next L tokens."""
        return self._logits(ids, of=range(len(ids))).copy()

    def read(self, ids: Sequence[int]) -> int:
        """The likeliest token after the next ones; logits are computed for the last of them alone."""
        return int(self._logits(ids, of=range(len(ids) - 1, len(ids)))[0].argmax())

    def _logits(self, ids: Sequence[int], *, of: range) -> np.ndarray:
        """Logits [positions, V], which the next call overwrites."""
        batch = self._c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self._next + i, 1, i in of
            batch.seq_id[i][0] = 0
        status = self._c.llama_decode(self._context, batch)
        self._c.llama_batch_free(batch)
        if status:
            raise ValueError(f"llama_decode returned {status}")
        self._next += len(ids)
        return np.ctypeslib.as_array(self._c.llama_get_logits(self._context), (len(of), self.size))

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text without special tokens in it, with those that the tokenizer adds."""
        content = text.encode()
        ids = (C.c_int32 * (len(content) + 8))()
        count = self._c.llama_tokenize(self._vocab, content, len(content), ids, len(ids), True, False)
        return list(ids[:count])


def installed() -> bool:
    """Whether the wheel is there; `pip install 'moeforge[llama-cpp]'` brings it."""
    return importlib.util.find_spec(PACKAGE) is not None


def override(file: Path, *, top_k: int) -> tuple[str, int]:
    """Key and value by which llama.cpp chooses so many experts of a GGUF file: --override-kv KEY=int:VALUE."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("general.architecture")
    assert field
    return f"{field.contents()}.expert_used_count", top_k


def ask(
    file: Path,
    *,
    ids: Sequence[Sequence[int]] = (),
    texts: Sequence[str] = (),
    generate: int = 0,
    top_k: int | None = None,
) -> dict[str, Any]:
    """What llama.cpp computes of a GGUF file with one thread.

    Args:
        file: its path. Logits are written beside it.
        ids: sequences of one length, [sequences, L].
        texts: to be tokenised.
        generate: number of tokens to continue ids[0] by, the likeliest each time.
        top_k: routed experts of a token; what the file says if absent.

    Returns:
        logits: a .npy file of [sequences, L, V]; tokens: ids of each text; generated: ids.

    Raises:
        RuntimeError: llama.cpp refused; the message has its last words.
    """
    request = {"file": str(file), "ids": [list(row) for row in ids], "texts": list(texts), "generate": generate}
    request["override"] = override(file, top_k=top_k) if top_k else None
    lines, error = _child(request)
    if error:
        raise RuntimeError(error)
    return dict(lines[-1])


def measure(
    files: Mapping[str, Path], text: turns.Text, *, threads: int, top_ks: Mapping[str, int] = MappingProxyType({})
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Speed of GGUF files that take turns in one process.

    Args:
        files: their paths; one may come under several names.
        text: what they read.
        threads: number of them.
        top_ks: routed experts of a token by name, where they are not what the file says.

    Returns:
        The rates of `turns.take` of each file that runs, and the last words of llama.cpp for each that does not.
    """
    files = dict(files)
    refused: dict[str, str] = {}
    while files:
        request: dict[str, Any] = {"files": {name: str(path) for name, path in files.items()}, "text": asdict(text)}
        kept = {name: override(files[name], top_k=top_k) for name, top_k in top_ks.items() if name in files}
        lines, error = _child(request | {"threads": threads, "overrides": kept})
        if not error:
            return dict(lines[-1]), refused
        blamed = str(lines[-1]) if lines else next(iter(files))
        refused[blamed] = error
        del files[blamed]
    return {}, refused


def _child(request: dict[str, Any]) -> tuple[list[Any], str]:
    """The lines of JSON that a process of its own prints, and if it fails the end of what it said."""
    command = [sys.executable, "-m", "tasks.engines.llama_cpp"]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, env=environment, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines, said[-1] if done.returncode else ""


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    model = Model(request["file"], override=request["override"])
    answer: dict[str, Any] = {"tokens": [model.tokenize(text) for text in request["texts"]]}
    if ids := request["ids"]:
        rows = []
        for sequence in ids:
            model.restart()
            rows.append(model.decode(sequence))
        answer["logits"] = request["file"] + ".npy"
        np.save(answer["logits"], np.array(rows))
    if count := request["generate"]:
        model.restart()
        token, answer["generated"] = model.read(ids[0]), []
        for _ in range(count):
            answer["generated"].append(token)
            token = model.read([token])
    return answer


def _rates(request: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Prints the name of each model before it runs, so that the one that ends the process is known."""
    text = turns.Text(**request["text"])

    def begins(name: str) -> None:
        print(json.dumps(name), flush=True)

    models = {}
    for name, file in request["files"].items():
        begins(name)
        changed = request["overrides"].get(name)
        models[name] = Model(file, length=text.length, threads=request["threads"], override=changed)
    return turns.take(models, text, begins=begins)


def _main() -> int:
    request = json.load(sys.stdin)
    try:
        print(json.dumps(_rates(request) if "files" in request else _answer(request)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
