"""The writer of tables and sizes."""

from mlx_rotor import tables


def test_text_columns_stand_under_their_titles():
    assert tables.text(["name", "MB"], [["a", "10.5"], ["longer", "7"]]) == "name      MB\na       10.5\nlonger     7"
    assert tables.text(["a", "b"], [["x", "yy"]], left=(0, 1)) == "a  b\nx  yy"


def test_markdown_is_a_table_padded_or_not():
    rows = [["a", "1"], ["bb", "22"]]
    assert tables.markdown(["name", "n"], rows) == "| name | n  |\n|------|---:|\n| a    | 1  |\n| bb   | 22 |"
    assert tables.markdown(["name", "n"], rows, padded=False) == "| name | n |\n|----|---:|\n| a | 1 |\n| bb | 22 |"


def test_sizes_have_their_unit():
    assert tables.size(92_871_229_440) == "92.871 GB" and tables.size(4_307_000) == "4.307 MB"
