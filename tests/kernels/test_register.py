import ast
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moe_kernels
import pytest
import torch
import transformers
from moe_kernels.register import experts_forward, unsupported
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(transformers.__file__).parent / "models"
# The classes that compute something else than silu(gate) * up over [gate; up] rows; all others must be served.
REFUSED = {
    "AriaExperts": "stored transposed",
    "BeamExperts": "overrides _apply_gate",
    "DeepseekV4Experts": "overrides _apply_gate",
    "DiffusionGemmaTextExperts": "activation is GELU",
    "Gemma4TextExperts": "activation is GELU",
    "Glm5NextTextExperts": "overrides _apply_gate",
    "GptOssExperts": "interleaved",
    "HYV4Experts": "overrides _apply_gate",
    "HYV4VLExperts": "overrides _apply_gate",
    "Inkling2Experts": "overrides _apply_gate",
    "Inkling2LoopExperts": "overrides _apply_gate",
    "MiniMaxM3VLExperts": "overrides _apply_gate",
    "MuseSparkExperts": "normalises the output",
    "NemotronHExperts": "no gate projection",
    "OpenAIPrivacyFilterExperts": "stored transposed",
}
SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": SIZE | {"num_local_experts": 6},
    "qwen2_moe": SIZE | EXPERTS | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    "qwen3_moe": SIZE | EXPERTS | {"head_dim": 8, "norm_topk_prob": True},
    "granitemoeshared": SIZE | {"num_local_experts": 6, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    moe_kernels.register()


def decorated_classes() -> Iterator[tuple[str, str]]:
    """(module, class) of every experts class of the installed transformers."""
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        if "@use_experts_implementation" in (text := path.read_text()):
            for node in ast.parse(text).body:
                decorators = " ".join(map(ast.unparse, getattr(node, "decorator_list", ())))
                if isinstance(node, ast.ClassDef) and "use_experts_implementation" in decorators:
                    yield f"transformers.models.{path.parent.name}.{path.stem}", node.name


class Tiny:
    """A config of a model with its own defaults, but small widths and few experts."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        sizes = {"expert": 5, "intermediate": 12, "hidden_size": 16}
        size = next((size for word, size in sizes.items() if word in name), None)
        return size if size and isinstance(value, int | list | None) else value


def build(module: str, name: str) -> nn.Module:
    """The experts class from the default config of its own model, with random weights in fp64."""
    scope = importlib.import_module(module)
    kind = getattr(scope, name)
    annotation = list(inspect.signature(kind.__init__).parameters.values())[1].annotation
    types = [value for value in vars(scope).values() if isinstance(value, type) and value is not PreTrainedConfig]
    configs = [value for value in types if issubclass(value, PreTrainedConfig)]
    configs.sort(key=lambda config: (config is not annotation, "Text" not in config.__name__))
    failures = []
    for config in configs:
        try:
            experts = kind(Tiny(config()))
        except AttributeError as error:  # a config of the model's vision or audio tower
            failures.append(str(error))
            continue
        generator = torch.Generator().manual_seed(0)
        for parameter in experts.double().parameters():
            nn.init.normal_(parameter, generator=generator)
        return experts
    raise AssertionError(f"no config of {module} builds {name}: {failures}")


def routed(experts: int, *, hidden: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens large enough for a clamp at 10 to bite, their experts, and weights that do not sum to one."""
    generator = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(20, hidden, generator=generator, dtype=dtype)
    index = torch.rand(20, experts, generator=generator).topk(2).indices
    return x, index, 0.2 + torch.rand(20, 2, generator=generator, dtype=dtype)


def run(experts: nn.Module, forward: Any, *, x: Tensor, index: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The output and every gradient, by name."""
    experts.zero_grad()
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = forward(x, index.clone(), weights)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype))
    gradients = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **gradients}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float, atol: float) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("module", "name"), list(decorated_classes()), ids=lambda value: value.rsplit(".", 1)[-1])
def test_an_experts_class_of_transformers_agrees_with_its_eager_forward_or_is_refused(module: str, name: str) -> None:
    experts = build(module, name)
    x, index, weights = routed(5, hidden=16)
    expected = run(experts, experts, x=x, index=index, weights=weights)
    experts.config._experts_implementation = "moe_kernels"
    if name in REFUSED:
        with pytest.raises(
            NotImplementedError, match=rf"cannot run {name}: .*{REFUSED[name]}.*'grouped_mm' or 'eager'"
        ):
            experts(x, index, weights)
    else:
        assert_same(run(experts, experts, x=x, index=index, weights=weights), expected, rtol=1e-9, atol=1e-9)


def mixtral_experts(**attributes: Any) -> nn.Module:
    config = transformers.MixtralConfig(hidden_size=16, intermediate_size=8, num_local_experts=5)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    for name, value in attributes.items():
        setattr(experts, name, value)
    return experts


class SiLU(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"is_transposed": True}, r"is_transposed=True"),
        ({"has_bias": True}, r"has_bias=True"),
        ({"has_gate": False}, r"has_gate=False"),
        ({"is_concatenated": False}, r"is_concatenated=False"),
        ({"has_post_expert_norm": True}, r"has_post_expert_norm=True"),
        ({"act_fn": nn.GELU()}, "activation is GELU, and only SiLU"),
        ({"act_fn": SiLU()}, "activation is SiLU, and only SiLU"),
        ({"act_fn": nn.Sequential(nn.SiLU())}, "activation is Sequential"),
        ({"_apply_gate": lambda gate_up: gate_up}, "overrides _apply_gate"),
        ({"per_expert_scale": nn.Parameter(torch.ones(5))}, "its per_expert_scale would not be computed"),
        ({"output_norm": nn.Identity()}, "its output_norm would not be computed"),
        ({"num_experts": 4}, "num_experts is 4, and gate_up_proj holds 5 experts"),
        ({"gate_up_proj": nn.Parameter(torch.zeros(5, 16, 16).byte(), requires_grad=False)}, "not both tensors of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,  # the same in every process
)
def test_a_module_with_a_feature_of_its_own_is_refused_with_the_reason_and_the_fix(
    attributes: dict[str, Any], reason: str
) -> None:
    x, index, weights = routed(5, hidden=16, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=f"MixtralExperts: .*{reason}.*experts_implementation='grouped_mm'"):
        experts_forward(mixtral_experts(**attributes), x, index, weights)


@pytest.mark.parametrize("act_fn", [nn.SiLU(), nn.functional.silu], ids=["module", "function"])
def test_silu_is_recognised_in_both_of_its_forms(act_fn: Any) -> None:
    experts = mixtral_experts()
    del experts.act_fn
    experts.act_fn = act_fn
    assert unsupported(experts) is None


@pytest.mark.parametrize("peer", ["eager", "grouped_mm"])
def test_the_experts_of_other_ranks_add_nothing_as_in_transformers(peer: str) -> None:
    experts = mixtral_experts(_is_expert_parallel=True)
    experts.config._experts_implementation = "eager"
    x, index, weights = routed(5, hidden=16, dtype=torch.float32)
    absent = torch.rand(index.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    absent[0] = True  # a token that is wholly another rank's
    index, weights = index.masked_fill(absent, 5), weights.masked_fill(absent, 0)
    forward = experts if peer == "eager" else lambda *args: grouped_mm_experts_forward(experts, *args)
    expected = run(experts, forward, x=x, index=index, weights=weights)
    got = run(experts, lambda *args: experts_forward(experts, *args), x=x, index=index, weights=weights)
    assert_same(got, expected, rtol=1e-4, atol=1e-5)
    assert not got["out"][0].any()


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family] | changes)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # routers are zero in some families: every token would tie
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def step(model: PreTrainedModel) -> dict[str, Tensor]:
    """The logits and every gradient of one batch."""
    ids = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **gradients}


def generate(model: PreTrainedModel) -> Tensor:
    return model.eval().generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_trains_generates_and_saves_as_with_the_eager_implementation(
    family: str, tmp_path: Path
) -> None:
    tiny(family).save_pretrained(tmp_path / "model")
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "model", experts_implementation="eager")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "model", experts_implementation="moe_kernels")
    assert ours.config._experts_implementation == "moe_kernels"
    assert_same(step(ours), step(eager), rtol=1e-4, atol=1e-6)
    assert torch.equal(generate(ours), generate(eager))
    ours.save_pretrained(tmp_path / "again")
    assert "moe_kernels" not in (tmp_path / "again" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name


def test_a_model_can_be_switched_to_the_kernels_after_loading() -> None:
    model = tiny("mixtral")
    model.set_experts_implementation("eager")
    expected = step(model)
    model.set_experts_implementation("moe_kernels")
    assert_same(step(model), expected, rtol=1e-4, atol=1e-6)


def test_a_model_compiles_to_one_graph_with_the_same_result() -> None:
    model = tiny("mixtral", num_hidden_layers=1)
    model.set_experts_implementation("moe_kernels")
    expected = step(model)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert_same(step(model), expected, rtol=1e-5, atol=1e-6)


def test_registering_twice_is_registering_once() -> None:
    known = set(ALL_EXPERTS_FUNCTIONS.keys())
    moe_kernels.register()
    assert set(ALL_EXPERTS_FUNCTIONS.keys()) == known
    assert ALL_EXPERTS_FUNCTIONS["moe_kernels"] is experts_forward


def test_transformers_finds_no_hub_kernels_in_the_folder_of_that_name() -> None:
    """The project's root is on the path, and its folder ``kernels`` is named as a package of Hugging Face."""
    assert str(ROOT) in sys.path
    assert not (ROOT / "kernels" / "__init__.py").exists()
    importlib.import_module("transformers.integrations.hub_kernels")
