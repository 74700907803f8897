"""Released LLaMA-MoE checkpoints become stock ones with the same logits; what would change them is refused."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tasks.moe import gate
from tasks.plugins.llama_moe import conversion
from tests.plugins.llama_moe.released_models import HIDDEN, LAYERS, SIZE, V1, V2, logits, save, v1_tensors, v2_tensors

IDS = np.random.default_rng(0).integers(0, 64, (3, 24))
SCALES = [4.0, 2.5, 1.0, 7.0]


def load(folder):
    model, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes.values())
    return model.eval()


def difference(folder, config, tensors):
    """Largest difference of logits, over the largest logit."""
    model = load(folder)
    gate.swap_in(model, gate.read(folder))
    expected = logits(config, tensors, torch.from_numpy(IDS))
    with torch.no_grad():
        given = model(input_ids=torch.from_numpy(IDS), use_cache=False).logits.double()
    return ((given - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("scale", [4.0, SCALES], ids=["one scale", "a scale a layer"])
def test_a_v1_checkpoint_with_its_gates_has_the_logits_of_its_own_code(tmp_path, scale):
    config, tensors = V1 | {"score_scale_factor": scale}, v1_tensors()
    source = save(tmp_path / "source", config, tensors)
    report = conversion.convert(source, tmp_path / "new")
    assert difference(tmp_path / "new", config, tensors) < 1e-5
    assert report["model_type"] == "mixtral"
    assert report["scales"] == (scale if isinstance(scale, list) else [scale] * LAYERS)
    assert json.loads((tmp_path / "new/import.json").read_text()) == report
    gates = gate.read(tmp_path / "new")
    for i in range(LAYERS):
        assert torch.equal(gates[i].inner_ED, tensors[f"model.layers.{i}.mlp.gate.gate_network.0.weight"])
        assert torch.equal(gates[i].noise_ED, tensors[f"model.layers.{i}.mlp.gate.weight_noise.weight"])
    assert (tmp_path / "new/tokenizer_config.json").read_text() == '{"model_max_length": 64}'


def test_the_linear_routers_come_near_the_gates_and_nearer_on_text(tmp_path):
    source = save(tmp_path / "source", V1, v1_tensors())
    text = np.random.default_rng(1).integers(0, 64, (64, 32))
    blind = conversion.convert(source, tmp_path / "blind")["fit"]
    fitted = conversion.convert(source, tmp_path / "fitted", ids_BL=text)["fit"]
    assert (blind["inputs"], fitted["inputs"], fitted["tokens"]) == ("gaussian", "text", text.size)
    assert fitted["layers"].keys() == {str(i) for i in range(LAYERS)}
    assert 0.75 < fitted["mean"]["agreement"] < 1
    exact, near, far = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("fitted", "fitted", "blind")
    )
    gate.swap_in(exact, gate.read(tmp_path / "fitted"))
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        expected = exact(input_ids=ids).logits
        distances = [(model(input_ids=ids).logits - expected).square().mean().item() for model in (near, far)]
    assert distances[0] < distances[1] < expected.square().mean().item()


def test_the_same_source_gives_the_same_bytes(tmp_path):
    source = save(tmp_path / "source", V1, v1_tensors())
    for name in ("a", "b"):
        conversion.convert(source, tmp_path / name, ids_BL=IDS)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_v1_checkpoint_in_bfloat16_keeps_its_dtype_and_the_bits_of_every_weight_but_down(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in v1_tensors().items()}
    conversion.convert(save(tmp_path / "source", V1 | {"torch_dtype": "bfloat16"}, tensors), tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.dtype == torch.bfloat16
    experts = model.model.layers[1].mlp.experts
    name = "model.layers.1.mlp.calculator.experts.weight"
    assert torch.equal(experts.gate_up_proj[2], torch.cat([tensors[f"{name}_gate.2"], tensors[f"{name}_up.2"]]))
    assert torch.equal(experts.down_proj[3], tensors[f"{name}_down.3"] * 4)


def test_a_linear_v1_gate_is_the_router_itself(tmp_path):
    tensors = v1_tensors()
    for i in range(LAYERS):
        network = f"model.layers.{i}.mlp.gate.gate_network"
        tensors[f"{network}.weight"] = tensors.pop(f"{network}.0.weight")
        del tensors[f"{network}.2.weight"]
    report = conversion.convert(save(tmp_path / "source", V1 | {"gate_network": "linear"}, tensors), tmp_path / "new")
    assert report["fit"] is None
    assert not (tmp_path / "new" / gate.FILE).exists()
    router = gate.router(load(tmp_path / "new").model.layers[0])
    assert torch.equal(router.weight, tensors["model.layers.0.mlp.gate.gate_network.weight"])


@pytest.mark.parametrize(
    ("residual", "contract", "dense", "target"),
    [
        (0, 0, "block_sparse_moe", "mixtral"),
        (SIZE, 0, "block_sparse_moe", "granitemoeshared"),
        (SIZE + 3, 0, "block_sparse_moe", "granitemoeshared"),
        (SIZE, 1, "block_sparse_moe", "qwen2_moe"),
        (0, 1, "mlp", "qwen2_moe"),
    ],
)
def test_a_v2_checkpoint_has_the_logits_of_its_own_code(tmp_path, residual, contract, dense, target):
    config = V2 | {"intermediate_size_residual": residual or None, "num_moe_contract_layers": contract}
    tensors = v2_tensors(residual=residual, contract=contract, dense=dense)
    report = conversion.convert(save(tmp_path / "source", config, tensors), tmp_path / "new")
    assert report["model_type"] == target
    assert report["sparse_layers"] == list(range(contract, LAYERS - contract))
    assert report["fit"] is None
    assert difference(tmp_path / "new", config, tensors) < 1e-5


def test_a_v2_sliding_window_that_the_text_outgrows_is_kept(tmp_path):
    config, tensors = V2 | {"sliding_window": 5, "intermediate_size_residual": SIZE}, v2_tensors(residual=SIZE)
    report = conversion.convert(save(tmp_path / "source", config, tensors), tmp_path / "new")
    assert report["model_type"] == "qwen2_moe"  # GraniteMoeShared has no window
    assert difference(tmp_path / "new", config, tensors) < 1e-5


@pytest.mark.parametrize(
    ("base", "field", "value", "reason"),
    [
        (V1, "add_weight_norm", True, "its learnt scale"),
        (V1, "gate_type", "SwitchBalancedGate", "choose otherwise"),
        (V1, "gate_network", "conv", "other tensors"),
        (V1, "gate_use_softmax", False, "raw logits"),
        (V1, "calculator_type", "SwitchDropTokenCalculator", "drop tokens"),
        (V1, "multiply_gate_scores", False, "weighs its experts"),
        (V1, "hidden_act", "gelu", "SwiGLU"),
        (V1, "num_selects", 0, "whole number"),
        (V1, "size_experts", [[8, 16, 12, 12]] * LAYERS, "one size"),
        (V1, "score_scale_factor", [1.0, 2.0], "2 entries for 4 layers"),
        *((V1, "score_scale_factor", value, "finite number") for value in (0, -1.0, math.nan, math.inf, "4", True)),
        (V1, "score_scale_factor", [4.0, 4.0, math.nan, 4.0], "finite number"),
        (V1, "num_experts", 10**9, "the files hold"),
        (V1, "size_experts", 3, "a list of sizes"),
        (V1, "num_attention_heads", 5, "no multiple of num_attention_heads"),
        (V1, "num_hidden_layers", 10**8, "the files hold 4 layers"),
        (V2, "scale_factor", math.nan, "finite number"),
        (V2, "scale_factor", 0.0, "a number above 0|finite number above 0"),
        (V2, "num_moe_contract_layers", 2, "leaves none"),
        (V2, "num_moe_contract_layers", -1, "whole number"),
        (V2, "intermediate_size_residual", 1.5, "whole number"),
        (V2, "num_local_experts", True, "whole number"),
        (V1, "something_new", 3, "not known here"),
        (V1, "quantization_config", {"quant_method": "hqq"}, "not known here"),
        (V1, "model_type", "llama", "needs no import"),
        (V2, "use_attn_moe", True, "attention heads"),
        (V2, "add_rescale_bias", True, "biases"),
        (V2, "moe_type", "megablocks", "other tensors"),
        (V2, "rope_scaling", {"type": "linear", "factor": 2.0}, "ignores it"),
    ],
)
def test_what_would_change_the_result_is_refused_by_field_value_and_reason(tmp_path, base, field, value, reason):
    tensors = v1_tensors() if base is V1 else v2_tensors()
    source = save(tmp_path / "source", base | {field: value}, tensors)
    with pytest.raises(ValueError, match=reason) as refused:
        conversion.convert(source, tmp_path / "new")
    assert field in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_stock_mixtral_is_told_that_it_needs_no_import(tmp_path):
    config = {name: value for name, value in V2.items() if name not in {"scale_factor", "moe_type", "use_attn_moe"}}
    config = {name: value for name, value in config.items() if "contract" not in name and "residual" not in name}
    with pytest.raises(ValueError, match="A stock checkpoint needs no import"):
        conversion.read(save(tmp_path / "source", config, v2_tensors()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("model.layers.2.mlp.calculator.experts.weight_up.1"), r"1 missing \(model.layers.2.mlp.calc"),
        (lambda t: t.pop("model.layers.0.mlp.gate.gate_network.2.weight"), "gate_network.2.weight"),
        (lambda t: t.update({"model.layers.0.mlp.bias": torch.zeros(3)}), r"1 unknown \(model.layers.0.mlp.bias\)"),
        (
            lambda t: t.update({"model.layers.0.mlp.calculator.experts.weight_gate.0": torch.zeros(SIZE, HIDDEN + 1)}),
            r"weight_gate.0 is \[12, 33\], by config.json \[12, 32\]",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.int8)}),
            "lm_head.weight is stored as I8, which is no plain number",
        ),
        (
            lambda t: t["model.layers.1.mlp.calculator.experts.weight_up.2"][3].fill_(math.nan),
            r"weight_up.2 holds nan at \[3, 0\], and 32 of its 384 numbers are not finite; fetch it again",
        ),
        (lambda t: t["model.layers.0.mlp.gate.gate_network.0.weight"][0].fill_(math.inf), "0.weight holds inf"),
    ],
)
def test_missing_unknown_misshapen_and_quantised_tensors_are_named(tmp_path, spoil, message):
    tensors = v1_tensors()
    spoil(tensors)
    source = save(tmp_path / "source", V1, tensors)
    with pytest.raises(ValueError, match=message):
        conversion.convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_shard_that_is_cut_short_or_absent_is_named(tmp_path):
    source = save(tmp_path / "source", V1, v1_tensors())
    shard = source / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is damaged or cut short"):
        conversion.convert(source, tmp_path / "new")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors named by .* is missing"):
        conversion.convert(source, tmp_path / "new")


def test_a_tensor_that_stands_in_two_files_is_named_with_both(tmp_path):
    tensors = v1_tensors()
    source = save(tmp_path / "source", V1, tensors)
    again = {"model.norm.weight": tensors["model.norm.weight"] + 1}
    (source / "model.safetensors.index.json").unlink()
    save_file(again, source / "zz.safetensors")
    with pytest.raises(ValueError, match=r"norm\.weight twice, in model-0000\d-of-00002.safetensors and zz\.safe"):
        conversion.convert(source, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 99_999, "\xff", "3"])
def test_a_config_that_is_no_object_is_one_line(tmp_path, text):
    source = save(tmp_path / "source", V1, v1_tensors())
    (source / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json (is not valid JSON|holds a JSON)") as refused:
        conversion.convert(source, tmp_path / "new")
    assert "\n" not in str(refused.value)


def test_pickles_are_refused_with_a_script_that_makes_them_safetensors(tmp_path, monkeypatch):
    tensors = v1_tensors()
    source = save(tmp_path / "source", V1, tensors)
    for path in source.glob("model*"):
        path.unlink()
    names = sorted(tensors)
    for n in (1, 2):
        torch.save({name: tensors[name] for name in names[n - 1 :: 2]}, source / f"pytorch_model-0000{n}-of-00002.bin")
    with pytest.raises(ValueError, match="only as pickles") as refused:
        conversion.read(source)
    assert "refs/pr/2" in str(refused.value)
    script = "\n".join(line[4:] for line in str(refused.value).splitlines() if line.startswith("    "))
    monkeypatch.chdir(source)
    exec(script, {})
    assert set(conversion.read(source).format.tensors) == {name for name in tensors if "inv_freq" not in name}


def test_a_target_that_exists_is_left_alone_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    source = save(tmp_path / "source", V1, v1_tensors())
    (tmp_path / "new").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        conversion.convert(source, tmp_path / "new")
    (tmp_path / "new").rmdir()
    monkeypatch.setattr(gate, "write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        conversion.convert(source, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
