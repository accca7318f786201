"""What suites ask for: prompts, seeds, names and pictures, from the files of a checkout."""

import json
import shutil

import pytest
from suite_checkouts import AUGMENTED, LONG, T2V

from vpae_jax.suites.prompts import SUITES, check_pictures, crop_of, read_prompts
from vpae_jax.types import UserError

VBENCH, VBENCH_I2V, VBENCH2 = (SUITES[name] for name in ("vbench", "vbench_i2v", "vbench2"))


@pytest.fixture
def own(checkout, tmp_path):
    """A checkout to be damaged."""
    return shutil.copytree(checkout, tmp_path / "own")


def test_vbench_makes_augmented_prompts_and_names_original_ones(checkout):
    prompts = read_prompts(VBENCH, checkout)
    # The second "a three" has the same files as the first.
    assert [(p.number, p.text, p.augmented, p.samples) for p in prompts] == [
        (0, "a one", "a one moves up", 25),
        (1, "a two, up", "a two moves up", 5),
        (2, "a three", "a three moves left", 5),
        (3, "a four", "a four moves down", 5),
    ]
    assert prompts[2].dimensions == tuple(T2V[2]["dimension"] + T2V[4]["dimension"])
    clips = [clip for prompt in prompts for clip in prompt.clips]
    assert len(clips) == 40 == len({clip.file for clip in clips}) == len({clip.seed for clip in clips})
    assert [(clip.file, clip.seed) for clip in prompts[1].clips] == [
        (f"a two, up-{j}.mp4", 100_000 + j) for j in range(5)
    ]


def test_vbench_i2v_has_no_augmented_prompts_and_a_picture_each(checkout):
    prompts = read_prompts(VBENCH_I2V, checkout)
    assert {p.augmented for p in prompts} == {None} and {p.samples for p in prompts} == {5}
    assert [(p.stem, p.image) for p in prompts] == [
        ("a five", "a five.jpg"),
        ("a five, camera pans left", "a five.jpg"),
        ("a five, camera static", "a five.jpg"),
        ("a six", "a six.jpg"),
        ("a seven", "a seven.jpg"),
    ]
    assert check_pictures(VBENCH_I2V, checkout, "7-4", prompts) == checkout / "vbench2_beta_i2v/data/crop/7-4"


def test_vbench2_has_twenty_samples_for_diversity_and_names_of_180_characters(checkout):
    prompts = read_prompts(VBENCH2, checkout)
    assert [(p.number, p.text[:7], p.augmented, p.samples) for p in prompts] == [
        (0, "a two", "a two moves up", 20),
        (1, "a one", "a one moves up", 3),
        (2, "a nine ", "a nine moves down", 3),
        (3, "a three", "a three moves up", 3),
        (4, "a four", "a four moves left", 3),
    ]
    assert prompts[0].dimensions == ("Diversity", "Human_Anatomy")
    assert prompts[2].clips[1].file == f"{LONG[:180]}-1.mp4" and len(prompts[2].stem) == 180


def test_only_what_is_asked_for(checkout):
    def found(suite, *more, **options):
        return {p.text: p.samples for p in read_prompts(suite, checkout, *more, **options)}

    assert found(VBENCH, dimensions=["color", "imaging_quality"]) == {"a three": 5, "a four": 5}
    assert found(VBENCH, dimensions=["temporal_flickering"], samples=5) == {"a one": 5}
    # Of a prompt that is also one of diversity's, anatomy needs three.
    assert found(VBENCH2, dimensions=["Human_Anatomy"]) == {"a two": 3, "a four": 3}
    # A prompt keeps its seeds, whichever others are asked for.
    (prompt,) = read_prompts(VBENCH, checkout, dimensions=["color"], samples=1)
    assert prompt.clips[0].seed == 300_000


def test_other_augmented_prompts_or_none(checkout, tmp_path):
    (file := tmp_path / "mine.txt").write_text("\n".join(reversed(AUGMENTED)) + "\n\n")
    assert read_prompts(VBENCH, checkout, str(file))[1].augmented == AUGMENTED[3]
    assert {p.augmented for p in read_prompts(VBENCH, checkout, "none")} == {None}
    assert read_prompts(VBENCH_I2V, checkout, str(file))[0].augmented == AUGMENTED[4]


@pytest.mark.parametrize(
    ("size", "crop"),
    [((480, 832), "7-4"), ((720, 1280), "16-9"), ((480, 480), "1-1"), ((512, 832), "8-5"), ((704, 1280), "16-9")],
)
def test_the_crop_is_that_next_to_the_videos_shape(size, crop):
    assert crop_of(*size) == crop


@pytest.mark.parametrize("size", [(832, 480), (544, 736), (400, 1000)])
def test_a_shape_without_pictures_is_refused(size):
    with pytest.raises(UserError, match="give a --height and --width close to one of these ratios"):
        crop_of(*size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": ["colour"]}, "--dimensions: VBench has no dimension 'colour'; it has subject_consistency, "),
        ({"samples": 0}, "--samples=0: expected 1 to 1000 videos per prompt"),
        ({"samples": 1001}, "--samples=1001: expected 1 to 1000"),
        ({"augmented": "nowhere.txt"}, "nowhere.txt: no such file; give another"),
    ],
)
def test_what_cannot_be_asked_for(checkout, options, message):
    with pytest.raises(UserError, match=message):
        read_prompts(VBENCH, checkout, **options)


def test_no_checkout(tmp_path):
    with pytest.raises(UserError, match=r"VBench_full_info.json: no such file; --checkout=.* must be a clone of https"):
        read_prompts(VBENCH, tmp_path)


@pytest.mark.parametrize(
    ("suite", "file", "text", "message"),
    [
        (VBENCH, VBENCH.info, "{", "VBench_full_info.json: not valid JSON"),
        (VBENCH, VBENCH.info, "{}", "expected a list of prompts; take it from https://github.com/Vchitect/VBench"),
        (VBENCH, VBENCH.info, '[{"prompt_en": "a"}]', "entry 0 has no valid 'prompt_en' and 'dimension'"),
        (VBENCH, VBENCH.augmented, "one\ntwo", "has 2 lines, expected 5: line i is for prompt i of vbench/VBench_full"),
        (VBENCH, VBENCH.augmented, "one\n\n3\n4\n5", "line 2 is empty; write a prompt there"),
        (VBENCH, VBENCH.augmented, b"\xff\xfe", "cannot be read: .*utf-8"),
        (VBENCH2, VBENCH2.order, "a two\na one", "list different prompts, such as"),
        (VBENCH, VBENCH.info, json.dumps([{**e, "prompt_en": "a/b"} for e in T2V]), "'a/b' has a slash"),
    ],
)
def test_damaged_files_are_one_line(own, suite, file, text, message):
    (own / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as error:
        read_prompts(suite, own)
    assert "\n" not in str(error.value)


def test_a_picture_that_is_missing(own):
    prompts = read_prompts(VBENCH_I2V, own)
    (own / "vbench2_beta_i2v/data/crop/7-4/a six.jpg").unlink()
    with pytest.raises(UserError, match=r"a six.jpg: no such image; run `sh vbench2_beta_i2v/download_data.sh` in "):
        check_pictures(VBENCH_I2V, own, "7-4", prompts)
    check_pictures(VBENCH_I2V, own, "1-1", prompts)
