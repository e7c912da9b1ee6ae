import subprocess
import sys

import pytest
from PIL import Image

from flashdit.shared.charts import new_axes, save_figure


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(1, 3, (1, 1)), (3, 3, (1, 3)), (5, 3, (2, 3)), (2, 1, (2, 1))]
)
def test_every_title_has_its_panel_row_by_row(count, columns, shape):
    titles = [f"loss {place}" for place in range(count)]
    _, panels = new_axes(titles, "step", columns)
    assert [axes.get_title(loc="left") for axes in panels] == titles
    assert {axes.get_xlabel() for axes in panels} == {"step"}
    assert panels[-1].get_gridspec().get_geometry() == shape
    assert [axes.get_subplotspec().num1 for axes in panels] == list(range(count))


def test_a_figure_is_written_in_the_format_of_its_name(tmp_path):
    figure, (axes,) = new_axes(["loss"], "step", heading="run")
    axes.plot([0, 1], [2, 1])
    save_figure(figure, tmp_path / "new" / "loss.png")
    with Image.open(tmp_path / "new" / "loss.png") as picture:
        assert picture.format == "PNG"
    save_figure(figure, tmp_path / "loss.svg")
    assert "<svg" in (tmp_path / "loss.svg").read_text()


def test_a_figure_that_cannot_be_drawn_leaves_the_earlier_one(tmp_path):
    figure, _ = new_axes(["loss"], "step")
    (tmp_path / "loss.bad").write_text("old")
    with pytest.raises(ValueError, match="Format 'bad' is not supported"):
        save_figure(figure, tmp_path / "loss.bad")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("loss.bad", "old")]


def test_no_window_system_is_touched():
    code = "import sys, flashdit.shared.charts; print('matplotlib.pyplot' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )
