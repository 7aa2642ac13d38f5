from __future__ import annotations

import pytest
from characters import character_llama, character_tokenizer


@pytest.fixture
def tokenizer():
    return character_tokenizer()


@pytest.fixture
def model():
    return character_llama()
