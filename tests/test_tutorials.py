"""The tutorials' commands run, in their order, in an empty folder: shorter than they are written, on the tiny model."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from moving_patterns import patterns

pytestmark = pytest.mark.long  # minutes of trainings; tests/test_commands.py reads every command
TUTORIALS = Path(__file__).parent.parent / "docs" / "tutorials"
# What makes them short: real models and sizes become the tiny one, numbers of steps and clips small ones.
SHORTER = (
    (r"configs/(\w+)\.py:t2v-1\.3b-480p", r"configs/\1.py"),
    (r"a cat jumps over a fence", "a three moves up"),
    (r"Wan-AI/Wan2\.1-T2V-1\.3B-Diffusers", "tiny"),
    (r"--buckets=\S+|--dtype=bfloat16", ""),
    (r"--config\.steps=\d+", "--config.steps=4"),
    (r"--config\.method\.disc_warmup=20", "--config.method.disc_warmup=1"),
    (r"--config\.data\.clips=\d+", "--config.data.clips=32"),
    (r"--config\.score_every=\d+", ""),
    (r"--count=\d+", "--count=16"),
    (r"--rank=\d+", "--rank=4"),
    (r"--topology=h100:8", "--topology=v5e:2x2"),
    (r"for seed in 0 1 2", "for seed in 0"),
)
TRAINING = (
    "--config.steps=4 --config.batch_size=4 --config.score_clips=2 --config.sample_steps=2 --config.guard.enabled=False"
)


def commands(page):
    """The commands of a page's bash blocks."""
    return re.findall(r"```bash\n(.*?)```", (TUTORIALS / f"{page}.md").read_text(), re.DOTALL)


def shorter(command):
    for pattern, replacement in SHORTER:
        command = re.sub(pattern, replacement, command)
    if "vpae_jax.main" in command and "--help" not in command:
        extra = " ".join(word for word in TRAINING.split() if word.split("=")[0] not in command)
        command = re.sub(r"(--workdir=[^\s;]+)", rf"\1 {extra}", command)
    if "vpae_jax.main" in command and "phase2" in command and "disc_warmup" not in command and "--help" not in command:
        command = re.sub(r"(--workdir=[^\s;]+)", r"\1 --config.method.disc_warmup=1", command)
    return command


def run(command, folder):
    place = Path(sys.executable).parent
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PATH": f"{place}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(TUTORIALS.parents[1])
    ended = subprocess.run(["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def write_video(path, clip):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "yuv420p"
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def test_first_steps(tmp_path):
    for command in commands("newcomer"):
        run(shorter(command), tmp_path)
    assert (tmp_path / "runs/first/report.html").stat().st_size > 0
    assert all((tmp_path / name).stat().st_size > 0 for name in ("teacher.mp4", "blur.mp4", "student.mp4"))
    assert list((tmp_path / "runs/first/phase1/previews").iterdir())


def test_from_a_fine_tune_to_comfyui(tmp_path):
    """Her model is the tiny one in one file, her videos moving patterns; nothing goes to a hub."""
    run("python -m vpae_jax.convert tiny wan --format=wan", tmp_path)
    shutil.move(tmp_path / "wan/diffusion_pytorch_model.safetensors", tmp_path / "my_finetune.safetensors")
    (tmp_path / "videos").mkdir()
    for i, clip in enumerate(patterns(48, frames=40, height=64, width=64)):
        write_video(tmp_path / f"videos/{i}.mp4", clip)
        (tmp_path / f"videos/{i}.txt").write_text("a three moves right")
    (tmp_path / "captions.txt").write_text("a three moves right\na seven moves up and to the left\n" * 6)
    for command in commands("distiller"):
        if "--push" not in command:
            run(shorter(command), tmp_path)
    assert (tmp_path / "runs/mine/scores/report.html").is_file()
    assert (tmp_path / "comfyui/student_lora.safetensors").is_file() and (tmp_path / "comfyui/student").is_dir()
    assert (tmp_path / "records/mine/summary.html").is_file()
    with av.open(str(tmp_path / "cat.mp4")) as made:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in made.decode(video=0)])
    assert frames.shape == (9, 48, 48, 3)


def test_comparing_methods(tmp_path):
    shown = [run(shorter(command), tmp_path) for command in commands("researcher")]
    assert any("method.csds.weight = " in text for text in shown)
    assert (tmp_path / "runs/compare/metrics.json").is_file()
