"""Tiny families and runs of every network, made once a file."""

import json

import pytest
import tiny_networks as tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("backbones")


@pytest.fixture(scope="module")
def towers(root):
    return tiny.save_towers(root / "towers")


@pytest.fixture(scope="module")
def make(squares, root, towers):
    """`make("dit", own=True, drop_text=0.5)` is a family; the same one for the same arguments."""
    vae, made = tiny.save_autoencoder(squares, root / "ae"), {}

    def build(network, own=False, init=None, **settings):
        name = json.dumps([network, own, init, settings])
        if name not in made:
            section = tiny.settings_of(network, None if own else towers, **({"autoencoder": vae} | settings))
            made[name] = tiny.family_of(squares, root / f"assets-{len(made)}", section, init=init)
        return made[name]

    return build


@pytest.fixture(scope="module")
def run_of(make, root):
    """`run_of("dit")` is a run folder with a product that draws in two steps."""

    def saved(network, own=False):
        run = root / f"run-{network}-{own}"
        if not run.exists():
            tiny.save_product(make(network, own, sampling={"steps": 2, "guidance": 2.0}), run)
        return run

    return saved
