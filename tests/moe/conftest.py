"""A checkpoint folder that a test may spoil."""

import shutil

import pytest


@pytest.fixture
def copy_of(tiny_model, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(tiny_model, folder)
    return folder
