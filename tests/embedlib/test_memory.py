import os
import sys

import pytest

from embedlib.memory import KEPT_KERNELS_A_THREAD, KERNEL_CACHES, keep_few_kernels, keep_freed_memory


def test_setting_it_again_and_elsewhere_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_freed_memory()
    keep_freed_memory()
    monkeypatch.setattr(sys, "platform", "darwin")
    keep_freed_memory()


def test_few_kernels_are_kept_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = KERNEL_CACHES
    monkeypatch.setattr(os, "environ", {first: "7"})
    keep_few_kernels(2)
    assert os.environ == {first: "7", second: str(KEPT_KERNELS_A_THREAD * 2)}
