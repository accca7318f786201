"""Programs look for no device that cannot be there, and say nothing of it."""

import os
import subprocess
import sys

import jax
import pytest

from vpae_jax.runtime.platforms import GOOGLE, skip_absent_tpus


@pytest.fixture
def unset():
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("vendors", "gpu", "found"),
    [([], False, "cpu"), (["0x8086\n"], False, "cpu"), (["0x8086\n", f"{GOOGLE}\n"], False, None), ([], True, None)],
    ids=["nothing", "another vendor", "a TPU", "a GPU"],
)
def test_only_where_there_is_neither_tpu_nor_gpu_the_processor_alone_is_used(unset, tmp_path, vendors, gpu, found):
    for number, vendor in enumerate(vendors):
        (tmp_path / f"0000:0{number}").mkdir()
        (tmp_path / f"0000:0{number}" / "vendor").write_text(vendor)
    if gpu:
        (tmp_path / "nvidia").touch()
    skip_absent_tpus(tmp_path, (tmp_path / "nvidia",))
    assert jax.config.jax_platforms == found


def test_what_the_user_has_set_stays(tmp_path):
    assert jax.config.jax_platforms == "cpu"
    jax.config.update("jax_platforms", "tpu,cpu")
    try:
        skip_absent_tpus(tmp_path, ())
        assert jax.config.jax_platforms == "tpu,cpu"
    finally:
        jax.config.update("jax_platforms", "cpu")


def test_a_program_begins_without_a_word_of_the_libraries(tmp_path):
    """libtpu and transformers are installed here, and a TPU is not."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = "import vpae_jax.sample as s, vpae_jax.cli as c, sys; c.run(s.main, sys.argv[1:])"
    flags = ["--prompt=a three moves up", "--num_frames=1", f"--output={tmp_path / 'a.png'}"]
    ended = subprocess.run(
        [sys.executable, "-c", command, *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert ended.stderr == ""


def test_help_imports_neither_transformers_nor_pytorch():
    programs = ["sample", "main", "encode", "evaluate", "convert"]
    imports = ", ".join(f"vpae_jax.{name}" for name in programs)
    code = f"import sys, {imports}; print({{'torch', 'transformers'}} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert ended.stdout == "set()\n"
