import ctypes
import platform
import subprocess
import sys

import pytest

from flashdit.shared.process import keep_freed_memory

FAULTS = """
import resource, torch
from flashdit.shared.process import keep_freed_memory

def faults():
    tensors = [torch.ones(3_000, 4_000) for _ in range(2)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

{call}
for _ in range(8):  # the heap finds its shape
    faults()
print(faults() - faults())
"""


def page_faults(call):
    """Returns the page faults of making large tensors again, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", FAULTS.format(call=call)], capture_output=True, check=True)
    return -int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_large_tensors_reuse_the_pages_of_those_before():
    assert page_faults("assert keep_freed_memory()") * 10 < page_faults("")


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
