"""Test set-up: CPU only, eight virtual devices, a persistent compilation cache, no silent rank promotion."""

import dataclasses
import gc
import json
import os
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs run once or twice here, so that most of the time goes into compiling: LLVM need not optimise them, and XLA's
# older way of emitting fused loops takes half as long as its present one (jaxlib 0.12 has it no more). Said once, since
# the flags are part of the name under which a program is kept, and processes that tests start inherit them.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=2"
if metadata.version("jaxlib") < "0.11":
    QUICK += " --xla_cpu_use_fusion_emitters=false"
if QUICK not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".cache" / "jax-tests")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # tests compile much alike, and a second run the same
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

MEMORY = 3 * 2**30  # bytes that a worker holds before it lets go of what it has compiled

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_modifyitems(items):
    """The file whose programs most others need comes first: those that ran beside it would compile them once more."""
    items.sort(key=lambda item: item.path.name != "test_experiment.py")


def pytest_collection_finish():
    """What was imported stays, and need not be looked through for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Compiled programs stay in memory, of which the tests of all rooms together would need more than there is."""
    yield
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > MEMORY:
        jax.clear_caches()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A text-to-video and an image-to-video model of random weights and two steps; clips are 5 frames of 32x32."""
    import random_model  # with PyTorch, which few tests need

    from vpae_jax.weights.settings import Defaults, Scheduler

    found = {}
    for name in ("t2v", "i2v"):
        folder = found[name] = tmp_path_factory.mktemp(name)
        random_model.pipeline(folder, image=name == "i2v")
        (folder / "vpae_jax.json").write_text(json.dumps(dataclasses.asdict(Defaults(5, 32, 32, 8.0))))
        file = folder / "tokenizer" / "tokenizer_config.json"  # which spells most words
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": 32}))
        scheduler = Scheduler("euler", 3.0, steps=2, guidance=1.0)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler.to_json()))
    return found


@pytest.fixture
def program(capsys):
    """Runs a program's `main` in this process; returns its exit status, output and standard error."""
    from vpae_jax import cli  # only now: what the checks of shapes have to see is imported after this file

    def call(main, *more, **options):
        arguments, code = [*(f"--{name}={value}" for name, value in options.items()), *more], 0
        try:
            cli.run(main, arguments)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call
