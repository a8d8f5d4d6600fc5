"""What every test shares: one thread, no network, a fixed seed; and a device to be given to those that ask for one."""

import multiprocessing
import os
import re

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
# From Python 3.14 on, a DataLoader's workers come from a server; without this, each of them would import torch anew.
multiprocessing.set_forkserver_preload(["torch", "pgt_hf.images.dataset"])


# Tests of the root that take more than a few seconds; the other files mark their own.
SLOW = re.compile(r"test_attach.*(inductor|soft_targets)|tritons_interpreter|test_readme")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
