"""What a checkpoint costs training: DeepSpeed's own save and an fsync against the one in the background.

    python -m bench.checkpoint FOLDER      # takes three checkpoints of 0.5 GB; made and removed

The same steps three times, interleaved: without saves, with one every `--every` steps on either side. Blocked is the
time in which no forward, backward or optimizer step runs; extra is what the steps with saves took more than those
without, a share of the processor that the thread took included. bfloat16, ZeRO-1, one process.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import common

ROUNDS = 3
OWN, OURS = "DeepSpeed's own", "in the background"


def build(params: Any, *, layers: int, hidden: int) -> Any:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from tasks.pretrain.engine import interface

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=hidden // 2, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    torch.nn.Module.to(model, torch.bfloat16)
    return interface.build(model, params)


def step(built: Any, params: Any) -> None:
    import torch

    for _ in range(params.batch // params.micro_batch):
        ids = torch.randint(4096, (params.micro_batch, params.seq_len))
        built.backward(built(input_ids=ids, labels=ids).loss)
        if not built.deepspeed.is_gradient_accumulation_boundary():
            built.next_micro_batch()
    built.finish_step()


def synchronous(built: Any, folder: Path) -> Callable[[int], float]:
    """DeepSpeed's own, and its files brought to the disk."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    def save(number: int) -> float:
        begun = time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        ours, built.deepspeed.checkpoint_engine = built.deepspeed.checkpoint_engine, TorchCheckpointEngine()
        built.deepspeed.save_checkpoint(str(folder), tag=str(number), save_latest=False)
        built.deepspeed.checkpoint_engine = ours
        for path in folder.rglob("*.pt"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return time.perf_counter() - begun

    return save


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--every", type=int, default=4, help="steps between saves")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args(argv)

    from tasks.pretrain.checkpoints.manager import CheckpointManager
    from tasks.pretrain.engine import distributed
    from tasks.settings import Pretrain

    arguments.folder.mkdir(parents=True)
    try:
        distributed.join(arguments.folder)
        params = Pretrain(
            tokens=1 << 20, seq_len=arguments.seq_len, batch=arguments.batch, micro_batch=1, learning_rate=1e-4, keep=1
        )
        built = build(params, layers=arguments.layers, hidden=arguments.hidden)
        step(built, params)
        checkpoints = CheckpointManager(arguments.folder / "background", params=params, rank=0, world_size=1)
        own = synchronous(built, arguments.folder / "own")
        seconds = dict.fromkeys(("none", OWN, OURS), 0.0)
        blocked = dict.fromkeys(seconds, 0.0)
        for number in range(ROUNDS):
            for side in seconds:
                begun = time.perf_counter()
                before = checkpoints.blocked
                if side == OWN:
                    blocked[side] += own(number)
                elif side == OURS:
                    checkpoints.save(built, state={"step": number + 1})
                for _ in range(arguments.every):
                    step(built, params)
                if side == OURS:
                    checkpoints.finish()  # in a run, the next save waits instead
                    blocked[side] += checkpoints.blocked - before
                seconds[side] += time.perf_counter() - begun
        size = sum(path.stat().st_size for path in (arguments.folder / "own").rglob("*.pt"))
        plain = seconds["none"] / ROUNDS
        print(f"{size / 1e9:.2f} GB, {arguments.every} steps of {plain / arguments.every:.2f} s between saves")
        for side, total in list(seconds.items())[1:]:
            wait, extra = blocked[side] / ROUNDS, total / ROUNDS - plain
            print(
                f"{side:18} blocked {wait:6.3f} s a save, {wait / plain:7.2%} of the time between saves, "
                f"{wait * arguments.every / plain:7.2%} of a step; extra {extra:6.3f} s"
            )
        print(f"blocked, ratio: {blocked[OURS] / blocked[OWN]:.3f}")
    finally:
        distributed.leave()
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
