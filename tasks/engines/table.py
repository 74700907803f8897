"""The inference engines that are known here, a row each: what they compute of each class, and what they run well.

Every entry says what it was read from. docs/model.md shows the table; a test compares them. limits.py answers by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tasks import architectures
from tasks.architectures import Biases, Windows
from tasks.settings.partition import Engine

ROPES = ("default", "linear", "yarn", "llama3", "dynamic", "longrope")
_STATIC = ROPES[:4]
"""vLLM and SGLang scale `dynamic` for the longest text whatever the length, and fix longrope's factors at start."""


@dataclass(frozen=True, kw_only=True)
class Support:
    """What an engine computes of a class as transformers 5 does."""

    read: str
    """The file that it was read from."""
    biases: Biases = "qkvo"
    """Of the attention; others are dropped without a word."""
    wants_biases: bool = False
    """Biases of q, k and v that a checkpoint lacks are left uninitialised."""
    head_dim: bool = True
    """One that is not hidden / heads."""
    tied: bool = True
    """Tied embeddings."""
    dense_layers: bool = True
    """Dense layers among sparse ones."""
    unnormalised: bool = True
    """norm_topk_prob: false."""
    whole_shared: bool = False
    """Those with at least one shared expert, all as wide as the routed ones, and the usual head_dim."""
    trained_gate: bool = True
    """A gate before the shared experts that is not zero any more, as training leaves it where weights sum to 1."""
    ropes: tuple[str, ...] = ROPES
    window: Windows = "per layer"
    """The sliding windows that it has; where a model's are others, its results are equal up to the window's length."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """An engine."""

    title: str
    version: str
    classes: Mapping[str, Support]
    """By model_type. Of a class that is missing, nothing is known to fail."""
    experts: int | None = None
    """The most that it loads."""
    top_k: bool = False
    """The number of chosen experts is limited (limits.llama_cpp_top_k)."""
    yarn_fixed: Mapping[str, float | None] = field(default_factory=dict)
    """Fields of `rope_parameters` of the kind yarn that it does not read, with the values that it takes."""
    row_bytes: int = 1
    """The width of an expert times the size of a number must be a multiple of this."""
    narrow: int = 0
    """Experts of fewer neurons are slow."""
    narrow_why: str = ""
    blocks: int = 1
    """Experts whose neurons are no multiple of this waste time or memory."""
    blocks_why: str = ""
    chosen: int | None = None
    """More chosen experts are slow."""
    chosen_why: str = ""
    fast_experts: str = "any number"
    """Numbers of experts among which it chooses in one kernel."""


_MIXTRAL, _SHARED, _GRANITE, _QWEN2, _QWEN3 = (
    row.model_type
    for row in (
        architectures.MIXTRAL,
        architectures.GRANITE_MOE_SHARED,
        architectures.GRANITE_MOE,
        architectures.QWEN2_MOE,
        architectures.QWEN3_MOE,
    )
)
assert set(architectures.SPARSE) == {_MIXTRAL, _SHARED, _GRANITE, _QWEN2, _QWEN3}


def _llama_cpp(read: str, *, llama3: bool = True, biases: Biases = "qkvo", **more: bool) -> Support:
    ropes = ("default", "linear", "yarn", *["llama3"] * llama3)
    fields = {"unnormalised": False, **more}
    return Support(read=read, biases=biases, dense_layers=False, ropes=ropes, window="none", **fields)


LLAMA_CPP = Row(
    title="llama.cpp, Ollama",
    version="b11549",
    classes={
        architectures.LLAMA.model_type: _llama_cpp("src/models/llama.cpp"),
        architectures.MISTRAL.model_type: _llama_cpp("src/models/llama.cpp"),
        architectures.QWEN2.model_type: _llama_cpp("src/models/qwen2.cpp", llama3=False),
        architectures.QWEN3.model_type: _llama_cpp("src/models/qwen3.cpp", llama3=False, biases="qkv"),
        architectures.GRANITE.model_type: _llama_cpp("src/models/granite.cpp"),
        _MIXTRAL: _llama_cpp("src/models/llama.cpp"),
        _SHARED: _llama_cpp("src/models/granite-moe.cpp"),
        _GRANITE: _llama_cpp("src/models/granite-moe.cpp"),
        _QWEN2: _llama_cpp(
            "src/models/granite-moe.cpp, qwen2moe.cpp and deepseek.cpp",
            trained_gate=False,
            unnormalised=True,
            whole_shared=True,
        ),
        _QWEN3: _llama_cpp("src/models/qwen3moe.cpp", llama3=False, biases="qkv"),
    },
    experts=1024,  # LLAMA_MAX_EXPERTS in llama-hparams.h
    top_k=True,
    yarn_fixed={"beta_fast": 32, "beta_slow": 1, "truncate": True},  # llama-hparams.h, ggml_rope_yarn_corr_dims
    narrow=64,
    narrow_why="with half of a 135M's FFN active, Q8_0 reads a prompt at 0.34 x the dense parent's speed with experts "
    "of 16 neurons, at 0.73 x with 32, at 1.06 x with 96",
    blocks=32,
    blocks_why="in Q8_0 and Q4_0 their down-projections stay F16",
    chosen=16,
    chosen_why="each adds two operations to every layer; 24 of 16 neurons decode at 0.87 x the dense parent's speed, "
    "2 of 192 at 1.20 x",
)
_VLLM = "vllm/model_executor/models/"
_GPU_TILES = "GPU kernels work in tiles of 64, Marlin in blocks of 64, FP8 in blocks of 128"
VLLM = Row(
    title="vLLM",
    version="0.32.0",
    classes={
        _MIXTRAL: Support(read=f"{_VLLM}mixtral.py", biases="", ropes=_STATIC, window="uniform"),
        _SHARED: Support(read=f"{_VLLM}granitemoeshared.py", biases="", head_dim=False, ropes=_STATIC, window="none"),
        _GRANITE: Support(read=f"{_VLLM}granitemoe.py", biases="", head_dim=False, ropes=_STATIC, window="none"),
        _QWEN2: Support(
            read=f"{_VLLM}qwen2_moe.py", biases="qkv", wants_biases=True, head_dim=False, ropes=_STATIC,
            window="uniform",
        ),
        _QWEN3: Support(read=f"{_VLLM}qwen3_moe.py", biases="qkv", ropes=_STATIC, window="uniform"),
    },
    blocks=64,
    blocks_why=f"{_GPU_TILES}; on a CPU they are padded to 32",
    fast_experts="powers of two up to 512, and 192, 320, 384, 448, 576",
)  # fmt: skip
_SGLANG = "sglang/srt/models/"
_THETA = ("default",)
SGLANG = Row(
    title="SGLang",
    version="0.5.23",
    classes={
        _MIXTRAL: Support(
            read=f"{_SGLANG}mixtral.py", biases="", head_dim=False, tied=False, ropes=_THETA, window="none"
        ),
        _SHARED: Support(read=f"{_SGLANG}granitemoe.py", biases="", head_dim=False, ropes=_THETA, window="none"),
        _GRANITE: Support(read=f"{_SGLANG}granitemoe.py", biases="", head_dim=False, ropes=_THETA, window="none"),
        _QWEN2: Support(
            read=f"{_SGLANG}qwen2_moe.py", biases="qkv", head_dim=False, tied=False, dense_layers=False,
            ropes=_STATIC, window="none",
        ),
        _QWEN3: Support(
            read=f"{_SGLANG}qwen3_moe.py", tied=False, dense_layers=False, ropes=_STATIC, window="none"
        ),
    },
    yarn_fixed={"attention_factor": None},  # sglang/srt/layers/rotary_embedding
    blocks=64,
    blocks_why=_GPU_TILES,
    fast_experts="powers of two up to 512",
)  # fmt: skip
_MODELING = "models/{0}/modeling_{0}.py"
TRANSFORMERS = Row(
    title="transformers 5",
    version="5.24.0",
    classes={kind: Support(read=_MODELING.format(kind)) for kind in architectures.SPARSE},
    row_bytes=16,  # torch's grouped_mm; integrations/moe.py
    narrow=64,
    narrow_why="with half of a 135M's FFN active, two threads and float32, grouped_mm reads a prompt at 0.19 x the "
    "dense parent's speed with experts of 8 neurons, at 0.70 x with 64",
)
TRANSFORMERS_4 = Row(
    title="transformers 4",
    version="4.57.6",
    classes={
        _MIXTRAL: Support(read=_MODELING.format(_MIXTRAL)),
        _SHARED: Support(read=_MODELING.format(_SHARED), head_dim=False),
        _GRANITE: Support(read=_MODELING.format(_GRANITE), head_dim=False),
        _QWEN2: Support(read=_MODELING.format(_QWEN2), head_dim=False, window="uniform"),
        _QWEN3: Support(read=_MODELING.format(_QWEN3)),
    },
)
ENGINES: Mapping[Engine, Row] = {
    "llama.cpp": LLAMA_CPP,
    "vllm": VLLM,
    "sglang": SGLANG,
    "transformers": TRANSFORMERS,
    "transformers4": TRANSFORMERS_4,
}


def describe(engine: Engine, model_type: str) -> str:
    """What an engine needs of a sparse class, beside what its row says, as in docs/model.md; "all" if nothing."""
    support, known = ENGINES[engine].classes[model_type], architectures.SPARSE[model_type]
    rank: dict[Windows, int] = {"none": 0, "uniform": 1, "per layer": 2}
    needs = {
        "no attention biases": known.biases and not support.biases,
        "no bias on o": known.biases == "qkvo" and support.biases == "qkv",
        "biases of q, k, v in the file": support.wants_biases,
        "head_dim = hidden / heads": not support.head_dim,
        "untied embeddings": not support.tied,
        "all layers sparse": known.dense_layers and not support.dense_layers,
        "norm_topk_prob": known.unnormalised and not support.unnormalised,
        "norm_topk_prob or shared experts": known.unnormalised and support.whole_shared,
        "shared experts' gate at zero": known.shared_gate and not support.trained_gate,
        "rope " + ", ".join(support.ropes): support.ropes != ROPES,
        "text within the sliding window": rank[support.window] < rank[known.window],
    }
    return "; ".join(need for need, asked in needs.items() if asked) or "all"
