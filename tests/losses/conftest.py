from collections.abc import Iterator

import jaxtyping
import pytest


@pytest.fixture
def without_annotation_checks() -> Iterator[None]:
    """As users run it: our own errors speak, not the annotation check that tests add."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
