"""Tiny dense models of many kinds, and single FFNs."""

import numpy as np
import torch

from tasks.moe.streamed import Streamed
from tasks.partition import exporters
from tasks.partition.convert import moe_writer
from tasks.partition.layer import Layer
from tests import models


def dense_model(layers=2):
    """A random LLaMA with weights large enough that its FFNs matter."""
    return models.build("llama", varied=False, num_hidden_layers=layers)


def sample(shape=(6, 40), seed=0):
    return np.random.default_rng(seed).integers(0, 64, shape)


def stored(folder, dense, **options):
    """The same as a checkpoint folder, to be read a layer at a time."""
    dense.save_pretrained(folder, **options)
    return Streamed(folder)


def export(parent, folder, options, *, layer, exporter=None, **more):
    """Convert a checkpoint whose sparse layers `layer` gives by their numbers; returns the exporter."""
    exporter = exporter or exporters.choose(parent.config, options)
    with moe_writer(parent, folder, exporter=exporter, partition=options, **more) as write:
        for i in options.sparse_layers(parent.layers):
            write(i, layer(i))
    return exporter


def ffn(*, tokens=600, hidden=16, width=48):
    """A random FFN and what it reads on some tokens."""
    torch.manual_seed(0)
    return Layer(
        number=0,
        gate_ND=torch.randn(width, hidden),
        up_ND=torch.randn(width, hidden),
        down_DN=torch.randn(hidden, width),
        x_TD=torch.randn(tokens, hidden),
    )
