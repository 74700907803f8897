"""DeepSpeed's configuration, from the settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks import plugin
from tasks.pretrain.job import TrainingError
from tasks.settings import Pretrain

if TYPE_CHECKING:
    import torch

BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once at most: its default, of which it allocates all, however small the model."""


def of(params: Pretrain, *, dtype: torch.dtype, model_type: str = "") -> dict[str, Any]:
    """The effective DeepSpeed configuration, as JSON.

    Args:
        dtype: of the weights in the forward pass.
        model_type: of the model's config, for plug-ins.

    Raises:
        TrainingError: settings that DeepSpeed cannot follow together.
    """
    import torch

    bfloat16, cuda = dtype == torch.bfloat16, torch.cuda.is_available()
    accumulation = params.batch // (params.micro_batch * params.processes)
    zero: dict[str, Any] = {"stage": params.zero_stage, "overlap_comm": cuda}
    if params.offload:
        if params.zero_stage == 0:
            raise TrainingError(
                "pretrain.offload: true needs zero_stage 1, 2 or 3: without ZeRO, DeepSpeed keeps the optimizer where "
                "the weights are"
            )
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        if params.zero_stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    config: dict[str, Any] = {
        "train_batch_size": params.batch,
        "train_micro_batch_size_per_gpu": params.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": params.clip,
        "bf16": {"enabled": bfloat16},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "torch_adam": True,  # DeepSpeed's own are compiled at the first start
                "fused": True,
                "lr": params.learning_rate,
                "betas": list(params.betas),
                "weight_decay": params.weight_decay,
            },
        },
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }
    if bfloat16 and accumulation > 1 and params.zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}  # bfloat16 sums of many micro-batches lose the small ones
    for module in plugin.modules("engine").values():
        config |= module.configuration(params, model_type=model_type)
    return config
