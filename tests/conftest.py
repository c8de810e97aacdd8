"""What every test run starts from: nothing of the user's own settings, caches or accounts, and no network."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import pytest

# Read by libraries when they are imported, so it has to be set before any test module is; subprocesses inherit it.
_scratch = tempfile.mkdtemp(prefix="hf_bigload-tests-")
for _name in [name for name in os.environ if name.startswith(("HF_", "ACCELERATE_", "TRANSFORMERS_"))]:
    del os.environ[_name]
os.environ |= {
    "HF_BIGLOAD_CACHE": os.path.join(_scratch, "cache"),
    "HF_BIGLOAD_POISON": "1",  # weights are NaN once their slot was given back: a late use cannot pass
    "HF_ENDPOINT": "http://127.0.0.1:1",  # nothing listens there; tests of the Hub name the one they embed
    "HF_HOME": os.path.join(_scratch, "huggingface"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only wait for each other


def pytest_collection_finish(session: pytest.Session) -> None:
    """Load the simulated accelerator before anything runs backward: autograd counts devices once, at its first use."""
    if any("simdev" in vars(getattr(item, "module", None) or object) for item in session.items):
        from tests import simdev

        with contextlib.suppress(RuntimeError):  # no compiler: the tests that need it say so themselves
            simdev.load()
            torch = sys.modules["torch"]
            torch.ones(1, device="sim:0", requires_grad=True).sum().backward()


def pytest_unconfigure() -> None:
    shutil.rmtree(_scratch, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> None:
    """Many tests collect garbage: spare them all that libraries made when they were imported, by the module before."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def no_simulated_devices_of_other_modules() -> None:
    """A backend cannot be unregistered, so once a module has loaded the simulated accelerator, the next ones would plan
    for it. Those that want it say so, with `simdev.devices`."""
    sim = getattr(sys.modules.get("torch"), "sim", None)
    if sim is not None:
        sim.set_visible_count(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    with _skipped_without_compiler():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    with _skipped_without_compiler():
        return (yield)


@contextmanager
def _skipped_without_compiler() -> Iterator[None]:
    """Tests on the simulated accelerator need a C++ compiler, and it alone may be missing."""
    try:
        yield
    except RuntimeError as error:
        if "there is no C++ compiler" not in str(error):
            raise
        pytest.skip(str(error))
