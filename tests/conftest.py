"""Test set-up: CPU only, eight virtual devices, a persistent compilation cache, no silent rank promotion."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs run once or twice here, so that most of the time goes into compiling: LLVM need not optimise them, and XLA's
# older way of emitting fused loops takes half as long as its present one.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=2"
).strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".cache" / "jax-tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
