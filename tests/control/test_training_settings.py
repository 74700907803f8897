"""What the settings of a pipeline make of its pruned baseline."""

from __future__ import annotations

from tasks.control import training
from tasks.settings import Pretrain
from tasks.settings.pretrain import Balance, Phase

BASE = Pretrain(tokens=4096, seq_len=64, batch=4, micro_batch=2, processes=2, learning_rate=1e-3)


def test_plain_settings_are_left_as_they_are_but_for_the_balance() -> None:
    assert training.dense(BASE) == BASE.model_copy(update={"balance": Balance(loss="none")})


def test_routers_phases_and_experts_are_left_out_and_the_ffn_learns_as_the_experts_do() -> None:
    sparse = BASE.model_copy(
        update={
            "learning_rates": {"router": 4e-7, "experts": 2e-3, "shared": 3e-3, "norms": 5e-4},
            "train": [Phase(what="router", tokens=512), Phase(what="all")],
            "noise": True,
            "expert_parallel": 2,
        }
    )
    dense = training.dense(sparse)
    assert dense.learning_rates == {"norms": 5e-4, "ffn": 2e-3}
    assert (dense.train, dense.noise, dense.expert_parallel, dense.balance.loss) == ("all", False, 1, "none")
    Pretrain.model_validate(dense.model_dump())
