"""binidx against Megatron, whose format it is: each reads what the other has written, in both types of ids."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fledge.data.binidx import BinIdx, writing

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)
pytestmark = pytest.mark.peer

DOCUMENTS = [[1, 60000, 0], [0], [5, 6, 7, 8, 0]]

# In a process of its own: importing Megatron warns of what it would like to have.
SCRIPT = """
import json, sys
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
ours, theirs, dtype, documents = json.loads(sys.stdin.read())
builder = IndexedDatasetBuilder(theirs + ".bin", dtype=getattr(numpy, dtype))
for ids in documents:
    builder.add_item(torch.tensor(ids))
    builder.end_document()
builder.finalize(theirs + ".idx")
found = IndexedDataset(ours, mmap=True)
print(json.dumps([[found[at].tolist() for at in range(len(found))], found.document_indices.tolist()]))
"""


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_both_ways(tmp_path: Path, dtype: str) -> None:
    with writing(tmp_path / "ours", np.dtype(dtype)) as writer:
        for ids in DOCUMENTS:
            writer.add(ids)
    asked = json.dumps([str(tmp_path / "ours"), str(tmp_path / "theirs"), dtype, DOCUMENTS])
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [DOCUMENTS, [0, 1, 2, 3]]
    theirs = BinIdx(tmp_path / "theirs")
    assert theirs.dtype == dtype and [theirs[at].tolist() for at in range(3)] == DOCUMENTS
    assert (tmp_path / "theirs.bin").read_bytes() == (tmp_path / "ours.bin").read_bytes()
    assert (tmp_path / "theirs.idx").read_bytes() == (tmp_path / "ours.idx").read_bytes()
