"""binidx compared with Megatron, which defines the format: each reads the files of the other, for both id types."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fledge.data.binidx import BinIdx, open_binidx_writer

if importlib.util.find_spec("megatron") is None:
    pytest.skip("needs megatron-core", allow_module_level=True)
pytestmark = pytest.mark.peer

DOCUMENTS = [[1, 60000, 0], [0], [5, 6, 7, 8, 0]]

# Runs in a separate process, because importing Megatron emits warnings about optional packages.
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
dataset = IndexedDataset(ours, mmap=True)
print(json.dumps([[dataset[n].tolist() for n in range(len(dataset))], dataset.document_indices.tolist()]))
"""


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_each_reads_the_files_of_the_other(tmp_path: Path, dtype: str) -> None:
    with open_binidx_writer(tmp_path / "ours", np.dtype(dtype)) as writer:
        for ids in DOCUMENTS:
            writer.add(ids)
    arguments = json.dumps([str(tmp_path / "ours"), str(tmp_path / "theirs"), dtype, DOCUMENTS])
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=arguments, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [DOCUMENTS, [0, 1, 2, 3]]
    theirs = BinIdx(tmp_path / "theirs")
    assert theirs.dtype == dtype and [theirs[number].tolist() for number in range(3)] == DOCUMENTS
    assert (tmp_path / "theirs.bin").read_bytes() == (tmp_path / "ours.bin").read_bytes()
    assert (tmp_path / "theirs.idx").read_bytes() == (tmp_path / "ours.idx").read_bytes()
