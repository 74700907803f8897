"""The hidden states that calibration moves up through a model, against the model's own forward pass."""

import pytest
import torch
from dense_models import sample, stored

from tasks.partition import calibration
from tests import models


@pytest.mark.parametrize(("kind", "fields"), [("llama", {}), ("granite", models.GRANITE)])
def test_states_are_those_of_the_model_over_its_residual_multiplier(kind, fields, tmp_path):
    model = stored(tmp_path, models.build(kind, **fields))
    states = calibration.States(model, sample())
    for i in range(model.layers):
        block = model.block(i)
        with torch.no_grad():
            states.residual_TD.add_(block.mlp(states.attend(block, i)))
    states_BLD = states.hidden_BLD * fields.get("residual_multiplier", 1.0)
    torch.testing.assert_close(states_BLD, model.forward(torch.from_numpy(sample())), rtol=1e-5, atol=1e-5)
