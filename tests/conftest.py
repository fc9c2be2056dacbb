"""Fixtures that several test files share; checkpoints are written once a session."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import tiny_checkpoint
from hypothesis import settings

settings.register_profile("shared machines", deadline=None)
settings.load_profile("shared machines")

# A shell's background jobs are born deaf to Ctrl-C, and so would be the tests that press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `tier` runs on every instruction set that this machine has."""
    if "tier" in metafunc.fixturenames:
        from engines import TIERS  # not above: tests without the engine need not load it

        metafunc.parametrize("tier", TIERS)


@pytest.fixture(scope="session", autouse=True)
def away_from_the_sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Child processes import the installed package, not the folder `swa` of the sources."""
    home = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("away"))
    yield
    os.chdir(home)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(family, **settings)`: folder of that `builders.tiny_checkpoint`, written once."""
    made: dict[str, Path] = {}

    def get(family: str = "llama", **settings: Any) -> Path:
        key = repr((family, sorted(settings.items())))
        if key not in made:
            made[key] = tiny_checkpoint(tmp_path_factory.mktemp(family), family, **settings)
        return made[key]

    return get
