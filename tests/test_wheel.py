"""The wheel works outside a checkout: bundled configs, embedded model, licence."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from config_files import CONFIGS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the unpacked wheel, which is built from a copy of what it is made of."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("vpae_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*build, source], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(installed, where, *words):
    environment = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *words], cwd=where, env=environment, capture_output=True, text=True)


def test_configs_model_and_licence_are_in_it(installed):
    package = installed / "vpae_jax"
    assert {path.stem for path in (package / "configs").glob("*.py")} == {*CONFIGS, "common", "__init__"}
    assert not (package / "configs").is_symlink()
    assert (package / "assets/tiny/model_index.json").is_file()
    (metadata,) = installed.glob("*.dist-info")
    assert {"LICENSE", "NOTICE"} <= {path.name for path in (metadata / "licenses").iterdir()}


@pytest.mark.parametrize("config", ["phase1", "phase1:tiny", "configs/phase1.py:tiny"])
def test_training_finds_its_bundled_config(installed, tmp_path, config):
    ended = run(installed, tmp_path, "-m", "vpae_jax.main", f"--config={config}", "--workdir=x", "--help")
    assert ended.returncode == 0, ended.stderr
    assert "method.fake_updates = " in ended.stdout


def test_an_unknown_config_is_one_line(installed, tmp_path):
    ended = run(installed, tmp_path, "-m", "vpae_jax.main", "--config=phse1", "--workdir=x")
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == ["error: phse1: no such config file or bundled config; did you mean 'phase1'?"]


def test_the_embedded_model_makes_a_clip(installed, tmp_path):
    words = ["-m", "vpae_jax.sample", "--model=tiny", "--steps=1", "--prompt=a three moves right", "--output=out.mp4"]
    ended = run(installed, tmp_path, *words)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out.mp4").stat().st_size > 0
    found = run(installed, tmp_path, "-c", "import vpae_jax; print(vpae_jax.__file__)")
    assert found.stdout.strip() == str(installed / "vpae_jax" / "__init__.py")
