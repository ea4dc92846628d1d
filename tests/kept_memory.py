"""How much memory a call leaves allocated: what a graph keeps for its backward, whoever keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def kept_bytes(call: Callable[[], Any], folder: Path) -> int:
    """Bytes of CPU memory that ``call`` allocates and its result, which is alive till then, holds at the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    trace = folder / "trace.json"
    recorded.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    return sum(event["args"]["Bytes"] for event in events if event["name"] == "[memory]")
