"""The columns of published data sets, and of `--columns`. What is kept stands under `row` in a record.

openvid: OpenVID-1M (Nan et al. 2025), the tables OpenVid-1M.csv and OpenVidHD.csv.
  Read: `video` (a file's name), `caption`; kept: `aesthetic score`, `motion score`, `temporal consistency score`,
  `camera motion`, `frame`, `fps`, `seconds`. The folder of the videos is the one that all archives were unpacked into
  (`unzip -j ... -d video_folder`).
  Known from the data set's page (huggingface.co/datasets/nkp37/OpenVid-1M) and its authors' reader
  (github.com/NJU-PCALab/OpenVid-1M, openvid/datasets/datasets.py), which takes the first column for the file and the
  second for the caption.

koala: Koala-36M (Wang et al. 2025), the ten tables Koala_36M_1.csv to Koala_36M_10.csv, one at a time.
  Read: `videoID` (id of the row: a YouTube id, an underscore, the number of the clip in that video), `timestamp` (start
  and end, as "['0:00:10.000', '0:00:20.000']"), `caption`; kept: `url`, `clarity_score`, `aesthetic_score`,
  `motion_score`, `video_training_suitability_score`. No videos are published. Download whole videos under their YouTube
  ids: the row `pv97fCP13SE_68` is the part `timestamp` of pv97fCP13SE.mp4, or .mkv, .webm, ... A video that serves many
  rows is there once. If you cut the clips when you downloaded them, and named them by `videoID`, give
  `--columns=path=videoID,caption=caption` instead: then the whole file is meant.
  The tables' names are known from the data set's page (huggingface.co/datasets/Koala-36M/Koala-36M-v1). NOT VERIFIED
  against the tables or a text of the authors: column names and forms of values, which several public programs that read
  these tables agree on.

intern4k: what the paper calls Intern4K, after Lin et al. 2025b (CascadeV), is Inter4K (Stergiou and Poppe 2021), to
  which CascadeV's repository (github.com/bytedance/CascadeV) links: 1,000 clips of 5 s at 3840x2160 and 60 frames a
  second, unpacked into `60fps/UHD/` (github.com/alexandrosstergiou/Inter4K). That the two are one is our reading of
  that link. It comes WITHOUT a table and WITHOUT captions, and the paper does not say how it captioned the clips. Write
  a table with the columns `video` (a file's name) and `caption`, or captions beside the videos, which need no table.
"""

from __future__ import annotations

import difflib
from dataclasses import fields

from vpae_jax.encoding.manifest import Columns
from vpae_jax.types import UserError

OPENVID = Columns(path="video", caption="caption")
KOALA = Columns(path="videoID", caption="caption", id="videoID", span="timestamp", stem=r"(.+)_[0-9]+")
INTERN4K = Columns(path="video", caption="caption")
DATASETS = {"openvid": OPENVID, "koala": KOALA, "intern4k": INTERN4K}
USES = tuple(f.name for f in fields(Columns) if f.name != "stem")


def parse_columns(text: str) -> Columns:
    """Columns as flags give them: a data set's name, or pairs such as `path=video,caption=text,start=from`.

    Raises:
      UserError: an unknown name, something that is no pair, or the same use twice.
    """
    if text.strip().lower() in DATASETS:
        return DATASETS[text.strip().lower()]
    found: dict[str, str] = {}
    for pair in text.split(","):
        use, equals, column = pair.partition("=")
        use, column = use.strip(), column.strip()
        if not equals or not column:
            raise UserError(f"--columns={text!r}: {pair!r} is no USE=COLUMN, nor is it one of {', '.join(DATASETS)}")
        if use not in USES:
            near = difflib.get_close_matches(use, USES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(USES)}"
            raise UserError(f"--columns={text!r}: unknown use {use!r}; {hint}")
        if use in found:
            raise UserError(f"--columns={text!r}: {use!r} is given twice")
        found[use] = column
    return Columns(**found)
