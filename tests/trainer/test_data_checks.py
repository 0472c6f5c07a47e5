from itertools import pairwise

import numpy as np
import pytest
from datasets import Dataset, Features, LargeList, List, Value

from p2d_peft import HeadSet
from p2d_peft.trainer.data_checks import _tokens

from .test_p2d_trainer import trainer


IDS = [[7 + (row * column) % 60 for column in range(12)] for row in range(32)]
KINDS = [List(Value("int64")), List(Value("int32"), length=12), LargeList(Value("int64"))]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rows", [range(32), range(3, 9), [5, 1, 30]], ids=str)
def test_lists_of_any_kind_are_read_row_by_row(kind, rows):
    pool = Dataset.from_dict({"input_ids": IDS}, features=Features({"input_ids": kind})).select(rows)
    ((values, offsets),) = _tokens(pool)
    found = [values[start:end].tolist() for start, end in pairwise(offsets)]
    assert found == [IDS[row] for row in rows] and values.dtype == np.int64


def test_rows_of_a_fixed_length_are_trained_on(tmp_path):
    pool = Dataset.from_dict({"input_ids": IDS}, features=Features({"input_ids": KINDS[1]}))
    run = trainer(tmp_path, pool=pool, target=pool.select(range(4)), changes={"max_steps": 1}, heads=HeadSet([(0, 1)]))
    run.train()
    assert run.report.selected_tokens == 16 * 12
