"""The mutants of the CUDA kernels fit the sources; `make mutants` would stop where one does not."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cusim"))
import faults

MUTANTS = [mutant for mutant, _ in faults.load()]


def test_there_are_mutants_of_every_kernel():
    files = {mutant.path.name for mutant in MUTANTS}
    assert {path.name for path in faults.CSRC.glob("cuda/*.cu")} <= files
    assert len(set(map(str, MUTANTS))) == len(MUTANTS) > 150


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mutant_changes_one_place(mutant):
    text = (faults.CSRC / mutant.path).read_text()
    assert mutant.applied(text) != text
