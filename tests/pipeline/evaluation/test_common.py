"""Files of a benchmark, as people write them."""

import pytest

from pipeline.evaluation.common import read_json, read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, encoding):
    path = tmp_path / "prompts.json"
    path.write_text('["Äpfel"]', encoding=encoding)
    assert read_text(path) == '["Äpfel"]'
    assert read_json(path) == ["Äpfel"]
