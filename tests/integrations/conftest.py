"""What tests of the plug-ins share: engines of vLLM, and the bundled model as it serves it."""

import contextlib

import pytest

from helpers.served import write_folder
from helpers.vllm_engines import RUNNERS, Engines


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A folder with the bundled model as vLLM reads it, and its recipes."""
    path = tmp_path_factory.mktemp("digits")
    write_folder(path)
    return path


@pytest.fixture(scope="session")
def engines():
    with contextlib.closing(Engines()) as engines:
        yield engines


@pytest.fixture(scope="session", params=RUNNERS)
def runner(request):
    """Each of vLLM's model runners. Of the session, so that pytest puts the tests of one together."""
    return request.param


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of two test processes, one takes a file's tests by the first runner, and one those by the second."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            second = hasattr(item, "callspec") and item.callspec.params.get("runner") == RUNNERS[1]
            item.add_marker(pytest.mark.xdist_group(item.path.stem + "-v2" * second))
