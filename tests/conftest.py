import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from trueward.testing import tiny_tokenizer


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_small() -> None:
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@pytest.fixture(scope="session")
def trained_tokenizer() -> PreTrainedTokenizerFast:
    """Trained once; tests that change a tokenizer take `tokenizer`."""
    return tiny_tokenizer()


@pytest.fixture
def tokenizer(trained_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    import copy

    return copy.deepcopy(trained_tokenizer)
