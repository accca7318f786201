"""Programs look for no device that cannot be there, and say nothing of it."""

import os
import subprocess
import sys

import jax
import pytest

from vpae_jax.planning.chips import CHIPS
from vpae_jax.runtime.platforms import GOOGLE, GPU_FLAGS, TPU_FLAGS, found, keep_compiled, prepare, with_flags


@pytest.fixture
def unset():
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("vendors", "gpu", "expected"),
    [([], False, None), (["0x8086\n"], False, None), (["0x8086\n", f"{GOOGLE}\n"], False, "tpu"), ([], True, "gpu")],
    ids=["nothing", "another vendor", "a TPU", "a GPU"],
)
def test_only_where_there_is_neither_tpu_nor_gpu_the_processor_alone_is_used(unset, tmp_path, vendors, gpu, expected):
    for number, vendor in enumerate(vendors):
        (tmp_path / f"0000:0{number}").mkdir()
        (tmp_path / f"0000:0{number}" / "vendor").write_text(vendor)
    if gpu:
        (tmp_path / "nvidia").touch()
    accelerator = found(tmp_path, (tmp_path / "nvidia",))
    assert accelerator == expected
    prepare({}, accelerator)
    assert jax.config.jax_platforms == ("cpu" if expected is None else None)


def test_accelerators_are_told_to_overlap_and_to_take_the_memory_that_plan_counts():
    tpu, gpu = {}, {}
    prepare(tpu, "tpu")
    prepare(gpu, "gpu")
    assert tpu.keys() == {"LIBTPU_INIT_ARGS"} and gpu.keys() == {"XLA_FLAGS", "XLA_CLIENT_MEM_FRACTION"}
    assert tpu["LIBTPU_INIT_ARGS"].split() == [f"--{name}={value}" for name, value in TPU_FLAGS.items()]
    assert gpu["XLA_FLAGS"].split() == [f"--{name}={value}" for name, value in GPU_FLAGS.items()]
    chip = CHIPS["h100"]
    assert chip.capacity == int(float(gpu["XLA_CLIENT_MEM_FRACTION"]) * chip.memory)
    again = dict(gpu)
    prepare(again, "gpu")
    assert again == gpu, "nothing is said twice"


def test_flags_and_memory_that_the_user_has_set_stay():
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        given = {name: ".5", "XLA_FLAGS": "--xla_gpu_deterministic_ops=true"}
        prepare(given, "gpu")
        assert given.keys() == {name, "XLA_FLAGS"} and given[name] == ".5"
        assert given["XLA_FLAGS"].startswith("--xla_gpu_deterministic_ops=true --xla_gpu_")
    assert with_flags("--a=1  --b", {"a": "2", "b": "3", "c": "4"}) == "--a=1 --b --c=4"


@pytest.mark.parametrize(
    ("flags", "known"),
    [(with_flags("--xla_gpu_deterministic_ops=true", GPU_FLAGS), True), ("--xla_gpu_no_such_flag=true", False)],
    ids=["ours", "another"],
)
def test_xla_knows_the_flags_for_gpus(flags, known):
    """Its build for processors reads the same list, and ends a process for a flag that is not in it. TPU_FLAGS are
    compiled with, in tests/planning/test_overlap.py."""
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode == 0, "Unknown flag" in ended.stderr) == (known, not known), ended.stderr


def test_compiled_programs_are_kept_beside_a_run_on_accelerators_alone(tmp_path):
    name = "jax_compilation_cache_dir"
    before = getattr(jax.config, name)
    try:
        for environment, accelerator in (({}, None), ({"JAX_COMPILATION_CACHE_DIR": "gs://a"}, "tpu")):
            keep_compiled(environment, accelerator, tmp_path)
            assert getattr(jax.config, name) == before
        keep_compiled({}, "gpu", tmp_path / "compiled")
        assert getattr(jax.config, name) == str(tmp_path / "compiled")
    finally:
        jax.config.update(name, before)


def test_what_the_user_has_set_stays(tmp_path):
    assert jax.config.jax_platforms == "cpu"
    jax.config.update("jax_platforms", "tpu,cpu")
    try:
        prepare({}, found(tmp_path, ()))
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
