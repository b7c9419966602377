"""Files are replaced in one step."""

import pytest

from rrhf_fast.stages.files import replacing, write_rows, write_text


def test_a_failed_write_keeps_the_earlier_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    write_text(file, "earlier")
    with pytest.raises(OSError), replacing(file) as staging:
        staging.write_text("half")
        raise OSError
    assert file.read_text() == "earlier"
    with pytest.raises(TypeError):
        write_rows(file, [{"a": 1}, {"a": object()}])
    assert file.read_text() == "earlier"
    write_rows(file, [{"a": "é"}])
    assert file.read_text() == '{"a": "\\u00e9"}\n' and list(tmp_path.iterdir()) == [file]
