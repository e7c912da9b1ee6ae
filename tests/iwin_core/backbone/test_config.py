from iwin_core import IwinConfig
from iwin_core.backbone.config import stage_grids, stage_kernels, stage_windows


def test_windows_follow_the_shorter_side_and_only_one_over_the_whole_map_leaves_the_kernel_out():
    long = IwinConfig(img_size=(56, 224))
    assert stage_grids(long) == [(14, 56), (7, 28), (4, 14), (2, 7)]
    assert stage_windows(long) == [7, 7, 4, 2]
    assert stage_kernels(long) == [3, 3, 3, 3]
    square = IwinConfig(img_size=112, kernel_sizes=(3, 5, 7, 9))
    assert stage_windows(square) == [7, 7, 7, 4]
    assert stage_kernels(square) == [3, 5, 0, 0]
    assert stage_kernels(IwinConfig(img_size=112, attention="none")) == [3, 3, 3, 3]
