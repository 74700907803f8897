"""Runs the files of ``interpreted/`` in processes of their own: on the GPU where there is one, otherwise in Triton's
interpreter, which ``TRITON_INTERPRET`` switches on for a whole process."""

import pytest
import torch
from children import run_python

pytest.importorskip("triton")


@pytest.mark.parametrize("files", [("layer",), ("loads", "memory", "routing")], ids="+".join)
def test_the_triton_kernels_pass(files: tuple[str, ...]) -> None:
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    paths = [f"interpreted/cases_{name}.py" for name in files]
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, **environment)
