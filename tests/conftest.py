"""One thread, in processes that tests start too: tensors are tiny, and threads that wait for each other cost minutes.

Of the files that are dealt to two processes (`make test`) the long ones come first, so that neither is left alone with one."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

LONG = ("shards", "processes", "hf", "docs", "report", "integrations", "drop_in", "plan", "resume", "finetune")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=place)
