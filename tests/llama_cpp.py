"""A stock llama.cpp, out of the wheel xllamacpp, by its C interface: what exported GGUF files are held to.

It runs in a process of its own, because it aborts where it refuses.

    python tests/llama_cpp.py < request.json > answer.json

A request is {"file", "threads"?, "ids"?: [[id]], "texts"?: [text], "generate"?: n}. The answer has logits of each
position [sequences, L, V] in the file "logits" (.npy), "tokens" of each text, and n "generated" ids after ids[0].
"""

from __future__ import annotations

import ctypes as C
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np


class _ModelParams(C.Structure):
    """Larger than llama.cpp's, whatever the version: only ever handed back."""

    _fields_ = [("content", C.c_byte * 1024)]


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
    """A GGUF file in memory, with a context of `length` tokens."""

    def __init__(self, file: str, *, length: int = 256, threads: int = 1) -> None:
        import xllamacpp.xllamacpp

        self._c = C.CDLL(xllamacpp.xllamacpp.__file__)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments
        self._quiet = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)(lambda *_: None)
        self._c.llama_log_set(self._quiet, None)
        self._model = self._c.llama_model_load_from_file(file.encode(), self._c.llama_model_default_params())
        if not self._model:
            raise ValueError(f"llama.cpp does not load {file}")
        params = self._c.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = length
        self._context = self._c.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"llama.cpp makes no context of {length} tokens for {file}")
        self._c.llama_set_n_threads(self._context, threads, threads)
        self._vocab = self._c.llama_model_get_vocab(self._model)
        self.size: int = self._c.llama_vocab_n_tokens(self._vocab)
        self._next = 0

    def restart(self) -> None:
        """Forget what was decoded."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        self._next = 0

    def decode(self, ids: list[int]) -> np.ndarray:
        """Logits [L, V] after each of the next L tokens."""
        batch = self._c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self._next + i, 1, 1
            batch.seq_id[i][0] = 0
        status = self._c.llama_decode(self._context, batch)
        self._c.llama_batch_free(batch)
        if status:
            raise ValueError(f"llama_decode returned {status}")
        self._next += len(ids)
        return np.ctypeslib.as_array(self._c.llama_get_logits(self._context), (len(ids), self.size)).copy()

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text without special tokens in it, with those that the tokenizer adds."""
        content = text.encode()
        ids = (C.c_int32 * (len(content) + 8))()
        count = self._c.llama_tokenize(self._vocab, content, len(content), ids, len(ids), True, False)
        return list(ids[:count])


def ask(file: Path, **request: Any) -> dict[str, Any]:
    """The answer of a process of its own. Raises RuntimeError with the end of its output if it aborts."""
    command = [sys.executable, __file__]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1", "OMP_NUM_THREADS": "1"}
    content = json.dumps({"file": str(file), **request})
    result = subprocess.run(command, input=content, capture_output=True, text=True, env=environment, timeout=120)
    if result.returncode:
        raise RuntimeError(result.stderr[-500:])
    return dict(json.loads(result.stdout))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    model = Model(request["file"], threads=request.get("threads", 1))
    answer: dict[str, Any] = {"tokens": [model.tokenize(text) for text in request.get("texts", [])]}
    if ids := request.get("ids"):
        rows = []
        for sequence in ids:
            model.restart()
            rows.append(model.decode(sequence))
        np.save(request["file"] + ".npy", np.array(rows))
        answer["logits"] = request["file"] + ".npy"
    if count := request.get("generate"):
        model.restart()
        token, generated = int(model.decode(ids[0])[-1].argmax()), []
        for _ in range(count):
            generated.append(token)
            token = int(model.decode([token])[-1].argmax())
        answer["generated"] = generated
    return answer


if __name__ == "__main__":
    print(json.dumps(_answer(json.load(sys.stdin))))
