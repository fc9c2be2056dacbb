"""Fixtures that several test files share; checkpoints are written once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import tiny_checkpoint


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
