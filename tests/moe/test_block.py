"""A block by registry, and token ids and positions in a router: in training, checkpointed, packed and cached."""

import types

import pytest
import torch

from tasks import plugin
from tasks.moe import block, routing
from tasks.moe.internals.layers import recompute_activations
from tests import models

KINDS = ("mixtral", "granitemoe", "qwen2_moe", "qwen3_moe")
TEXT = torch.tensor([[3, 5, 7, 9, 11, 2], [4, 4, 8, 1, 0, 6]])


class ByToken:
    """Mixed into a stock router: expert (token id + position) mod E comes first, the next is the second."""

    needs = frozenset({"input_ids", "position_ids"})

    def forward(self, hidden_states):
        logits_TE, weights_TK, _ = super().forward(hidden_states)
        first_T = (self.inputs["input_ids"] + self.inputs["position_ids"]) % logits_TE.shape[1]
        self.seen.append(first_T)
        chosen_TK = torch.stack([first_T, (first_T + 1) % logits_TE.shape[1]], dim=1)
        return logits_TE, weights_TK, chosen_TK


def read(folder):
    return {"salt": 0} if (folder / "hash.json").exists() else {}


def swap_in(model, parts):
    for router in routing.routers(model) if parts else ():
        router.__class__ = type("HashTopKRouter", (ByToken, type(router)), {})
        router.seen = []


def take_out(weights, *, biases=None):
    return {}


def to_stock(folder, parts, windows):
    raise ValueError("no stock class routes by token id")


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """Makes a model of a kind with the throw-away block."""
    kind = types.SimpleNamespace(read=read, swap_in=swap_in, take_out=take_out, write=None, to_stock=to_stock)
    monkeypatch.setattr(plugin, "modules", lambda seam: {"hash": kind} if seam == "block" else {})
    (tmp_path / "hash.json").touch()

    def build(name):
        fields = models.QWEN if name.startswith("qwen") else {}
        model = models.build(name, **models.EXPERTS | fields | {"num_experts_per_tok": 2, "num_hidden_layers": 2})
        block.swap_in(model, tmp_path)
        return model

    return build


def experts(model, ids, positions):
    return (ids + positions).flatten() % routing.counts.experts(model.config)["experts"]


@pytest.mark.parametrize("name", KINDS)
def test_a_router_reads_ids_and_positions_when_a_layer_is_computed_again(hashed, name):
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = hashed(name).train()
        if checkpointed:
            recompute_activations(model)
        # Two passes before the first backward pass: each layer must see its own pass's tokens again.
        losses = [model(input_ids=ids, labels=ids, use_cache=False).loss for ids in (TEXT, TEXT.flip(0))]
        for loss in losses:
            loss.backward()
        passes = [router.seen for router in routing.routers(model)]
        wanted = [experts(model, ids, torch.arange(6).expand(2, 6)) for ids in (TEXT, TEXT.flip(0))]
        for seen in passes:
            assert len(seen) == (4 if checkpointed else 2)
            assert all(torch.equal(one, other) for one, other in zip(seen, wanted * 2, strict=False))
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_packed_windows_give_their_own_positions(hashed, name):
    model = hashed(name).eval()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    model(input_ids=TEXT[:1], position_ids=positions, use_cache=False)
    assert torch.equal(routing.routers(model)[1].seen[0], experts(model, TEXT[:1], positions))


@pytest.mark.parametrize("name", KINDS)
def test_cached_generation_routes_as_the_whole_text_does(hashed, name):
    model = hashed(name).eval()
    text = model.generate(TEXT[:1, :3], attention_mask=torch.ones(1, 3), max_new_tokens=4, do_sample=False)
    router = routing.routers(model)[0]
    stepwise = torch.cat(router.seen)
    router.seen.clear()
    model(input_ids=text[:, :-1], use_cache=False)
    assert torch.equal(stepwise, router.seen[0])


def test_a_block_without_a_stock_class_says_so(hashed, tmp_path):
    (kind,) = [each for each in block.kinds() if each is not block.GATE]
    kind.write = lambda folder, parts: None
    with pytest.raises(ValueError, match="no stock class routes by token id"):
        block.to_stock(tmp_path, [(kind, {"salt": 0})], lambda: None)


def test_a_checkpoint_without_files_of_blocks_stays_stock(hashed, tmp_path):
    (tmp_path / "hash.json").unlink()
    model = hashed("mixtral")
    assert type(routing.routers(model)[0]).__name__ == "MixtralTopKRouter"
