"""Verdicts on scanned rows, one byte each: kept, or dropped and why.

A row that a filter dropped is not judged again, nor does it make another one a duplicate. The others are
judged in this order: in an evaluation set, exact duplicate, looks like an image of an evaluation set, near
duplicate, semantic duplicate, listed in `dedupe.drop`. So the duplicates are those of a dataset that never
had the images of the evaluation sets. The list comes last, because the other program saw what an earlier plan
had kept: which of two equal rows stays must not depend on it.
"""

import numpy as np
import pyarrow as pa

from data_prep.config import MAX_EVALUATION_SETS, DatasetConfig
from data_prep.plan.against import set_name
from data_prep.plan.dedupe import EXACT, NEAR

LISTED_REASON = "dedupe: listed in dedupe.drop"
SEMANTIC_REASON = "dedupe: means the same"

KEPT, COPIED, SAME_FILE, LOOKS_SAME, FILTERED, LISTED, MEANS_SAME = range(7)
"""Verdicts on a row: kept, kept and with exact duplicates, or dropped."""
IN_SET = 16
"""Verdict on a row whose file is in evaluation set 0; those of the other sets follow."""
LIKE_SET = IN_SET + MAX_EVALUATION_SETS
"""Verdict on a row that looks like an image of evaluation set 0; those of the other sets follow."""


def reasons_of(config: DatasetConfig) -> dict[int, str]:
    """Return the reason of each verdict that drops a row, except a filter's."""
    reasons = {SAME_FILE: EXACT, LOOKS_SAME: NEAR, MEANS_SAME: SEMANTIC_REASON, LISTED: LISTED_REASON}
    for number, source in enumerate(config.dedupe.against or []):
        reasons[IN_SET + number] = f"{EXACT} as in {set_name(source)}"
        reasons[LIKE_SET + number] = f"{NEAR} as in {set_name(source)}"
    return reasons


def with_reasons(table: pa.Table, verdicts: np.ndarray, reasons: dict[int, str]) -> pa.Table:
    """Return rows of a scan table with the reasons of their verdicts filled in.

    Args:
        table: the rows.
        verdicts: uint8 [rows].
        reasons: reason of each verdict (`reasons_of`).
    """
    texts = np.array(table["reason"].to_pylist(), object)
    for code in np.unique(verdicts).tolist():
        if code in reasons:
            texts[verdicts == code] = reasons[code]
    column = table.schema.get_field_index("reason")
    return table.set_column(column, "reason", pa.array(texts.tolist(), pa.string()))
