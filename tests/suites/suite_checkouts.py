"""Stand-ins for checkouts of VBench: few prompts, in the files and formats of the repository itself."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

WAN = "prompts/augmented_prompts/Wan2.1-T2V-1.3B/all_dimension_aug_wanx_seed42.txt"
# A prompt may be there twice, as two of VBench's are.
T2V = [
    {"prompt_en": "a one", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a two, up", "dimension": ["subject_consistency", "dynamic_degree", "motion_smoothness"]},
    {
        "prompt_en": "a three",
        "dimension": ["appearance_style"],
        "auxiliary_info": {"appearance_style": {"appearance_style": "oil painting"}},
    },
    {"prompt_en": "a four", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a three", "dimension": ["overall_consistency", "aesthetic_quality", "imaging_quality"]},
]
AUGMENTED = ["a one moves up", "a two moves up", "a three moves left", "a four moves down", "a three moves right"]
QUALITY = ["aesthetic_quality", "imaging_quality", "temporal_flickering"]
SUBJECT = ["i2v_subject", "subject_consistency", "motion_smoothness", "dynamic_degree", *QUALITY]
I2V = [
    {
        "prompt_en": "a five",
        "dimension": ["i2v_background", "background_consistency", *QUALITY],
        "image_type": "indoor",
        "image_name": "a five.jpg",
    },
    *(
        {
            "prompt_en": f"a five, camera {motion}",
            "dimension": ["camera_motion"],
            "image_type": "indoor",
            "image_name": "a five.jpg",
        }
        for motion in ("pans left", "static")
    ),
    *(
        {"prompt_en": text, "dimension": SUBJECT, "image_type": "animal", "image_name": f"{text}.jpg"}
        for text in ("a six", "a seven")
    ),
]
LONG = "a nine moves up, as it\u2019s said, " * 8
# Each dimension of a prompt has an entry of its own.
VBENCH2 = [
    {"prompt_en": "a one", "dimension": ["Camera_Motion"], "auxiliary_info": "zoom_in"},
    {"prompt_en": LONG.strip(), "dimension": ["Complex_Plot"]},
    {"prompt_en": "a two", "dimension": ["Diversity"]},
    {"prompt_en": "a two", "dimension": ["Human_Anatomy"]},
    {"prompt_en": "a three", "dimension": ["Material"], "auxiliary_info": ["Is it? (yes or no)"]},
    {"prompt_en": "a four", "dimension": ["Human_Anatomy"]},
]
TEXT = ["a two", "a one", LONG.strip(), "a three", "a four"]  # diversity comes first
WANX = ["a two moves up", "a one moves up", "a nine moves down", "a three moves up", "a four moves left"]


def write(folder: Path) -> Path:
    """A checkout with all three suites."""
    files = {
        "vbench/VBench_full_info.json": json.dumps(T2V),
        WAN: "".join(line + "\r\n" for line in AUGMENTED),  # some of the files have such ends of lines
        "vbench2_beta_i2v/vbench2_i2v_full_info.json": json.dumps(I2V),
        "VBench-2.0/vbench2/VBench2_full_info.json": json.dumps(VBENCH2),
        "VBench-2.0/prompts/VBench2_full_text.txt": "\n".join(TEXT),
        "VBench-2.0/prompts/prompt_aug/Wanx_full_text_aug.txt": "".join(line + "\n" for line in WANX),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    rng = np.random.default_rng(0)
    for ratio, (width, height) in {"1-1": (40, 40), "7-4": (56, 32)}.items():
        crops = folder / "vbench2_beta_i2v" / "data" / "crop" / ratio
        crops.mkdir(parents=True)
        for name in sorted({entry["image_name"] for entry in I2V}):
            Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(crops / name)
    return folder
