"""Every benchmark is a command of its own; those that are cheap run here on little."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from bench import common
from tests.corpus.handmade import corpus

COMMANDS = [
    ".".join(path.relative_to(common.ROOT).with_suffix("").parts)
    for path in sorted(Path(common.ROOT, "bench").rglob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text()
]


def test_the_commands_are_found():
    assert {"bench.speed", "bench.kernels.gpu_layer", "bench.tune.__main__"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_how_it_is_run(name, capsys):
    module = importlib.import_module(name)
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    assert f"python -m {name.removesuffix('.__main__')}" in capsys.readouterr().out


def test_the_loader_is_measured_beside_its_peers(tmp_path, capsys):
    from bench import loader

    rng = np.random.default_rng(0)
    documents = [[rng.integers(1, 99, n).tolist() for n in rng.integers(5, 90, 60)] for _ in range(2)]
    folder = corpus(tmp_path / "corpus", {"prose": documents, "code": documents})
    loader.main([str(folder), "--batch", "8", "--seq-len", "32", "--world-size", "2", "--seconds", "0.001"])
    printed = capsys.readouterr().out
    assert "x datasets" in printed
    assert "x np.memmap" in printed
    assert "first batch at step 0" in printed
