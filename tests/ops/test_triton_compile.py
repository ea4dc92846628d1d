"""Every Triton kernel compiles for every architecture as it would be launched, without spills, on tensor cores."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
SCRIPT = Path(__file__).parents[2] / "tools" / "triton_resources.py"
ARCHITECTURES = (80, 89, 90, 100)
REGISTERS = 65536  # of a processor
SPILLS = {  # bytes of a thread, by Triton 3.8 or 3.9; no published size
    ("attention_blocked.key_gradient", "d=128", "float32"): 88,
    ("attention_blocked.query_gradient", "d=128", "float32"): 32,
    ("attention.backward", "branches", "sm_89"): 40,
    ("linear_nll.word_gradient", "D=512", "bfloat16"): 32,  # so that two blocks are resident, with 3.8 on sm_90
}
KERNELS = {
    *(f"attention.{name}" for name in ("forward", "backward")),
    *(
        f"attention_blocked.{name}"
        for name in ("forward", "weights", "query_gradient", "key_gradient", "moment_gradient")
    ),
    *(f"linear_nll.{name}" for name in ("forward", "combine", "hidden_gradient", "word_gradient", "sum")),
    "packed_tokens.list",
    *(f"dropout_add_layer_norm.{name}" for name in ("forward", "backward", "sum_parts")),
    "dropout.kernel",
    *(f"gaussian_mask.{name}" for name in ("forward", "backward")),
    *(f"intra_video_contrastive_loss.{name}" for name in ("forward", "backward")),
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def records(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("triton") / "records.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, str(SCRIPT), "--json", str(path), str(request.param)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return json.loads(path.read_text())


def test_every_kernel_is_there(records: list[dict[str, Any]]) -> None:
    assert {record["kernel"] for record in records} == KERNELS


def test_no_spills_and_within_the_limits(records: list[dict[str, Any]]) -> None:
    for record in records:
        words = {record["kernel"], f"sm_{record['sm']}", *record["case"].split()}
        allowed = max((spilled for case, spilled in SPILLS.items() if words.issuperset(case)), default=0)
        assert record["spilled"] <= allowed, record
        assert record["shared"] <= record["shared_limit"], record
        assert record["registers"] * 32 * record["warps"] <= REGISTERS, record


def test_products_run_on_tensor_cores(records: list[dict[str, Any]]) -> None:
    with_products = [record for record in records if record["dots"]]
    assert {record["kernel"] for record in with_products} >= {"attention.forward", "linear_nll.word_gradient"}
    for record in with_products:
        assert record["tensor_cores"], record
    newest = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(records[0]["sm"], "mma.sync")
    assert any(newest in record["tensor_cores"] for record in with_products)
