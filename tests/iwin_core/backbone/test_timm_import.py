import subprocess
import sys

from iwin_core.backbone.timm_import import MODELS, TimmFinder, register_with_timm

SCRIPT = """
import importlib.util, sys
import iwin_core
assert importlib.util.find_spec("timm"), "as diffusers asks whether there is timm, without importing it"
assert "timm" not in sys.modules
import timm
print(timm.is_model("iwin_tiny_patch4_window7_224"))
"""


def test_entry_points_come_with_timm_which_nobody_else_loads():
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "True"


def test_without_timm_nothing_is_found(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [TimmFinder(), TimmFinder()])
    assert TimmFinder().find_spec("timm", None) is None
    assert TimmFinder().find_spec("torch", None) is None


def test_timm_that_came_first_gets_them_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", sys)
    monkeypatch.delitem(sys.modules, MODELS, raising=False)
    asked = []
    monkeypatch.setattr("importlib.import_module", asked.append)
    finders = list(sys.meta_path)
    register_with_timm()
    assert asked == [MODELS]
    assert sys.meta_path == finders
