from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from expertflow import LLM
from tests.server.running import WAIT_SECONDS, Running, chat_checkpoint, running


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def llm(chat_folder: Path) -> Iterator[LLM]:
    """Two units of four places: eight answers at once."""
    with LLM(chat_folder, cache_size=4, context=128, batch=2, sequences=8) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Running]:
    with running(llm, queue=16, served_model_name="tiny", write_seconds=2 * WAIT_SECONDS) as server:
        yield server
