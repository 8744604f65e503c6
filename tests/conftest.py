"""One thread: the tensors are tiny, and threads that wait for each other on a busy machine cost minutes.

Of the files that are dealt to two processes (`make test`) the long ones come first, so that neither is left alone with one."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)

LONG = ("shards", "processes", "hf", "docs", "report", "integrations", "drop_in", "plan", "resume", "finetune")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=place)
