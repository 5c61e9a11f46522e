import sys

import pytest

from embedlib.memory import keep_freed_memory


def test_setting_it_again_and_elsewhere_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_freed_memory()
    keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    keep_freed_memory()
