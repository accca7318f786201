"""Columns of published data sets, on rows in their form, and the flag that names columns."""

import pytest

from vpae_jax.encoding.datasets import DATASETS, parse_columns
from vpae_jax.encoding.manifest import Columns, Manifest
from vpae_jax.types import UserError

OPENVID = """video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds
---_iRTHryQ_13_0to241.mp4,"In the video, a man is seen, ""standing"".",5.426345,1.570724,0.996875,static,241,29.97,8.04
pexels_landscape_4762371_002.mp4,Two adventurers.,5.426848,17.168211,0.993587,pan_right,64,24.0,2.666667
"""

KOALA = """videoID,url,timestamp,caption,clarity_score,aesthetic_score,motion_score,video_training_suitability_score
pv97fCP13SE_68,https://www.youtube.com/watch?v=pv97fCP13SE,"['0:03:10.500', '0:03:16.000']",A car.,0.97,4.4,12.5,4.1
pv97fCP13SE_70,https://www.youtube.com/watch?v=pv97fCP13SE,"['0:03:20.000', '0:03:31.266']","A bus, red.",0.9,4,2.5,3.1
-a_b_1,https://www.youtube.com/watch?v=-a_b,"['1:00:00.000', '1:00:05.000']",A cat.,0.9,4.0,2.5,3.1
missing0001_5,https://www.youtube.com/watch?v=missing0001,"['0:00:00.000', '0:00:05.000']",A dog.,0.9,4.0,2.5,3.1
noNumber,https://www.youtube.com/watch?v=noNumber,"['0:00:00.000', '0:00:05.000']",A fox.,0.9,4.0,2.5,3.1
pv97fCP13SE_71,https://www.youtube.com/watch?v=pv97fCP13SE,"['0:03:20.000']",A ship.,0.9,4.0,2.5,3.1
pv97fCP13SE_72,https://www.youtube.com/watch?v=pv97fCP13SE,"['0:03:20.000', '0:03:10.000']",A ship.,0.9,4.0,2.5,3.1
"""


def entries(tmp_path, text, columns, videos):
    root = tmp_path / "videos"
    root.mkdir()
    for name in videos:
        (root / name).touch()
    (tmp_path / "table.csv").write_text(text)
    return root, list(Manifest(root, tmp_path / "table.csv", parse_columns(columns)).read(0))


def test_openvid(tmp_path):
    names = ["---_iRTHryQ_13_0to241.mp4", "pexels_landscape_4762371_002.mp4"]
    root, (first, second) = entries(tmp_path, OPENVID, "openvid", names)
    assert (first.id, first.path, first.start, first.end) == (names[0], root / names[0], None, None)
    assert first.caption == 'In the video, a man is seen, "standing".'
    assert second.about["camera motion"] == "pan_right" and second.about["fps"] == "24.0"


def test_koala_rows_are_parts_of_whole_videos(tmp_path):
    root, found = entries(tmp_path, KOALA, "koala", ["pv97fCP13SE.mp4", "-a_b.webm"])
    car, bus, cat, missing, form, half, back = found
    assert (car.id, car.path, car.start, car.end) == ("pv97fCP13SE_68", root / "pv97fCP13SE.mp4", 190.5, 196.0)
    assert (bus.id, bus.path, bus.start, bus.end) == ("pv97fCP13SE_70", root / "pv97fCP13SE.mp4", 200.0, 211.266)
    assert bus.caption == "A bus, red." and bus.about["video_training_suitability_score"] == "3.1"
    assert (cat.path, cat.start) == (root / "-a_b.webm", 3600.0)
    assert [one.kind for one in (missing, form, half, back)] == ["missing", "path", "time", "time"]
    assert "'missing0001'" in missing.reason and "'noNumber'" in form.reason


def test_koala_clips_that_were_cut_when_downloaded(tmp_path):
    root, found = entries(tmp_path, KOALA, "path=videoID,caption=caption", ["pv97fCP13SE_70.mkv"])
    assert (found[1].path, found[1].start, found[1].end) == (root / "pv97fCP13SE_70.mkv", None, None)


def test_intern4k_with_a_table_of_ones_own(tmp_path):
    root, (first,) = entries(tmp_path, "video,caption\n1.mp4,A street at night.\n", "intern4k", ["1.mp4"])
    assert (first.path, first.caption) == (root / "1.mp4", "A street at night.")


def test_flags_name_data_sets_and_columns():
    assert parse_columns(" Koala ") == DATASETS["koala"]
    assert parse_columns("caption=text") == Columns(caption="text")
    text = "path=video, caption=a column=of text ,id=n,start=from,end=to,cuts=shots"
    assert parse_columns(text) == Columns("video", "a column=of text", "n", "from", "to", "shots")
    assert parse_columns("span=timestamp").span == "timestamp"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "openvid, koala, intern4k"),
        ("openvids", "openvid, koala, intern4k"),
        ("path=", "USE=COLUMN"),
        ("path=a,,caption=b", "USE=COLUMN"),
        ("captions=text", "did you mean 'caption'?"),
        ("zzz=text", "expected one of path, caption, id, start, end, cuts, span"),
        ("stem=x", "unknown use 'stem'"),
        ("path=a,path=b", "twice"),
        ("span=a,start=b", "leave out"),
    ],
)
def test_flags_that_name_nothing(text, hint):
    with pytest.raises(UserError, match="--columns") as caught:
        parse_columns(text)
    assert hint in str(caught.value) and "\n" not in str(caught.value)
