"""The columns of published data sets, and the parser of `--columns`. Columns that are kept are stored under `row`.

openvid: OpenVID-1M (Nan et al. 2025), the tables OpenVid-1M.csv and OpenVidHD.csv.
  Read: `video` (a file name), `caption`; kept: `aesthetic score`, `motion score`, `temporal consistency score`,
  `camera motion`, `frame`, `fps`, `seconds`. The folder of videos is the one into which all archives were unpacked
  (`unzip -j ... -d video_folder`).
  Sources: the data set's page (huggingface.co/datasets/nkp37/OpenVid-1M) and its authors' reader
  (github.com/NJU-PCALab/OpenVid-1M, openvid/datasets/datasets.py), which takes the first column as the file and the
  second as the caption.

koala: Koala-36M (Wang et al. 2025), the ten tables Koala_36M_1.csv to Koala_36M_10.csv, one at a time.
  Read: `videoID` (id of the row: a YouTube id, an underscore, the number of the clip in that video), `timestamp` (start
  and end, as "['0:00:10.000', '0:00:20.000']"), `caption`; kept: `url`, `clarity_score`, `aesthetic_score`,
  `motion_score`, `video_training_suitability_score`. The videos themselves are not published. Download whole videos
  under their YouTube ids: the row `pv97fCP13SE_68` is the part `timestamp` of pv97fCP13SE.mp4, or .mkv, .webm, ... A
  video used by many rows is stored once. If you cut the clips when downloading and named them by `videoID`, give
  `--columns=path=videoID,caption=caption` instead, which uses whole files.
  Source of the table names: the data set's page (huggingface.co/datasets/Koala-36M/Koala-36M-v1). NOT VERIFIED against
  the tables or a publication of the authors: the column names and value formats, on which several public programs that
  read these tables agree.

intern4k: what the paper calls Intern4K, citing Lin et al. 2025b (CascadeV), is Inter4K (Stergiou and Poppe 2021), to
  which CascadeV's repository (github.com/bytedance/CascadeV) links: 1,000 clips of 5 s at 3840x2160 and 60 frames per
  second, unpacked into `60fps/UHD/` (github.com/alexandrosstergiou/Inter4K). That the two are the same is our reading
  of that link. It comes WITHOUT a table and WITHOUT captions, and the paper does not say how the clips were captioned.
  Write a table with the columns `video` (a file name) and `caption`, or put caption files next to the videos, which
  needs no table.
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
    """Parses `--columns`: a data set's name, or pairs such as `path=video,caption=text,start=from`.

    Raises:
      UserError: an unknown name, something that is not a pair, or the same use twice.
    """
    if text.strip().lower() in DATASETS:
        return DATASETS[text.strip().lower()]
    found: dict[str, str] = {}
    for pair in text.split(","):
        use, equals, column = pair.partition("=")
        use, column = use.strip(), column.strip()
        if not equals or not column:
            raise UserError(f"--columns={text!r}: {pair!r} is neither USE=COLUMN nor one of {', '.join(DATASETS)}")
        if use not in USES:
            near = difflib.get_close_matches(use, USES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(USES)}"
            raise UserError(f"--columns={text!r}: unknown use {use!r}; {hint}")
        if use in found:
            raise UserError(f"--columns={text!r}: {use!r} is given twice")
        found[use] = column
    return Columns(**found)
