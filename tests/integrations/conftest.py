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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of several test processes, one takes a file's tests by the second runner, and one its others."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFileAndRunner(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            return file + f"[{RUNNERS[1]}" * (f"[{RUNNERS[1]}" in test)

    return ByFileAndRunner(config, log)
