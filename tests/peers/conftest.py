"""Fixtures of the tests of this folder."""

from collections.abc import Iterator
from typing import Any

import pytest
import small_ppo
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, above all where other processes want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> small_ppo.Folders:
    """Saved models whose answers sometimes end."""
    return small_ppo.save(tmp_path_factory.mktemp("plain"), small_ppo.language_model(eos_bias=2.0))


@pytest.fixture(scope="session")
def shared_trainer(plain: small_ppo.Folders) -> Any:
    """A trainer that no test trains."""
    return small_ppo.ppo(plain, small_ppo.SHORT)
