"""Runs the files of ``interpreted/``, each in a process of its own: on the GPU where there is one, otherwise in
Triton's interpreter, which ``TRITON_INTERPRET`` switches on for a whole process."""

from pathlib import Path

import pytest
import torch
from children import HERE, run_python

pytest.importorskip("triton")


@pytest.mark.parametrize("file", sorted(HERE.glob("interpreted/cases_*.py")), ids=lambda path: path.stem)
def test_the_triton_kernels_pass(file: Path) -> None:
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), **environment)
