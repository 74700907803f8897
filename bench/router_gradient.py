"""What the router's temperature does to its gradient in training, and to the split itself.

    python -m bench.router_gradient runs/demo [--stds 0.02 0.1 0.5 2]

Scales every router of a split checkpoint so that its logits have the given standard deviation over experts, and
prints, for each: loss on validation windows, the router's gradient norm beside that of all other weights, and how many
of a token's choices one plain gradient step of the optimizer's size moves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import common
from tasks import settings
from tasks.corpus.sampling import windows
from tasks.moe import checkpoint, routing


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("run", type=Path, help="runs/PIPELINE, with moe/ in it")
    parser.add_argument("--stds", type=float, nargs="+", default=[0.02, 0.1, 0.5, 2.0])
    parser.add_argument("--windows", type=int, default=1, help="validation windows per domain")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of the step (Adam's first: its sign)")
    args = parser.parse_args(argv)
    pipeline = settings.load().pipeline(args.run.name)
    held = windows.validation(Path("data/corpora") / pipeline.corpus, seq_len=512, count=args.windows)
    ids = torch.cat([torch.from_numpy(window) for window in held.values()])
    model: Any = checkpoint.load(args.run / "moe", dtype=torch.float32)
    routers: list[Any] = routing.routers(model)
    stored = [router.weight.data.clone() for router in routers]
    seen: list[torch.Tensor] = [torch.empty(0)] * len(routers)
    chosen: list[torch.Tensor] = [torch.empty(0)] * len(routers)
    for i, router in enumerate(routers):

        def note(_module: Any, inputs: Any, output: Any, i: int = i) -> None:
            seen[i], chosen[i] = inputs[0].detach().flatten(0, -2), output[2].detach()

        router.register_forward_hook(note)
    print("| logits' std | loss, nats | router gradient | all other gradients | share | choices moved by a step |")
    print("|---:|---:|---:|---:|---:|---:|")
    for std in args.stds:
        with torch.no_grad():
            model(input_ids=ids[:1])
            for router, weight, x in zip(routers, stored, seen, strict=True):
                router.weight.copy_(weight * (std / (x @ weight.T).std()))
        model.zero_grad()
        loss = sum(model(input_ids=row[None], labels=row[None]).loss / len(ids) for row in ids)
        loss.backward()
        own = torch.stack([router.weight.grad.norm() for router in routers]).norm().item()
        everything = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
        moved = []
        for router, x, before in zip(routers, seen, chosen, strict=True):
            after = (x @ (router.weight - args.rate * router.weight.grad.sign()).T).topk(router.top_k, dim=1)[1]
            same = (before[:, :, None] == after[:, None]).any(2).float().mean()
            moved.append(1 - same.item())
        others = (everything**2 - own**2) ** 0.5
        print(
            f"| {std} | {loss:.4f} | {own:.3g} | {others:.3g} | {own / others:.2%} | {sum(moved) / len(moved):.1%} |"
        )
    print(json.dumps({"windows": len(ids), "rate": args.rate}))


if __name__ == "__main__":
    main()
