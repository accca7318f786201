"""The documentation site builds without a warning: every link between pages, anchor, image and docstring is sound."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "doctrees"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [*command, ROOT / "docs", tmp_path / "site"], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "tutorials/newcomer.html", "methods/vpae.html", "api/methods.html"} <= pages
    assert "vpae_jax.methods.vpae.PhaseTwo" in (tmp_path / "site" / "api" / "methods.html").read_text()
