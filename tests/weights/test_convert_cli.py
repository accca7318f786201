"""`python -m vpae_jax.convert`: models between layouts, training runs to models, and LoRA files."""

import json
import shutil
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import original_wan
import pytest
import random_model
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from vpae_jax import cli
from vpae_jax.convert import main
from vpae_jax.train import checksums
from vpae_jax.weights import layout
from vpae_jax.weights.find import find_model
from vpae_jax.weights.loading import read_part
from vpae_jax.weights.lora_reading import read_lora
from vpae_jax.weights.settings import Scheduler, read_defaults, read_scheduler

PARTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model.pipeline(folder, image=False)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    original_wan.save_folder(folder, image=True)
    return folder


@pytest.fixture(scope="module")
def workdir(source, tmp_path_factory):
    """What a first phase that trained the generator, kept its average and trained adapters leaves behind."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, source, {"name": "vpae_phase1", "fake_rank": 4})
    _, params = read_part(source, "transformer")
    trained = {"bias": params["proj_out"]["bias"]}
    state = {"step": jnp.int32(3), "params": {}, "averages": {}}
    for number, (kind, name) in enumerate((("params", "generator"), ("averages", "generator_ema")), 1):
        state[kind][name] = {**params, "proj_out": {**params["proj_out"], "bias": trained["bias"] + number}}
    kernel = params["blocks"]["attn1"]["to_q"]["kernel"]
    a = jax.random.normal(jax.random.key(0), (*kernel.shape[:-1], 4))
    b = jax.random.normal(jax.random.key(1), (kernel.shape[0], 4, kernel.shape[-1]))
    state["params"]["fake_score"] = {"blocks": {"attn1": {"to_q": {"lora_a": a, "lora_b": b}}}}
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        manager.save(3, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    written = folder / "checkpoints" / "3"
    checksums.write(written, [checksums.of_process(written, 0)])
    found = {"t2v/kvd": 12.5, "t2v/sharpness": 0.9}
    scores = {"clips": 4, "compared": "kvd", "scores": {"3": found}}
    (folder / "guard.json").write_text(json.dumps(scores))
    return folder


def write_run(folder, source, method):
    run = {"name": "phase1", "model": {"path": str(source)}, "method": method, "sample_shift": 2.0}
    (folder / "config.json").write_text(json.dumps({**run, "generator_nfe": 1, "sample_guidance": 4.0}))


def fails(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(main, [str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def run(*arguments):
    main([str(argument) for argument in arguments])


def test_a_model_directory_is_written_anew(source, tmp_path, capsys):
    run(source, tmp_path / "out", "--format=diffusers", "--verify")
    assert "transformer: 69 tensors read back, bit for bit" in capsys.readouterr().out
    for part, stem in PARTS.items():
        theirs, ours = (load_file(folder / part / f"{stem}.safetensors") for folder in (source, tmp_path / "out"))
        assert theirs.keys() == ours.keys()
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| source | {source} |" in card and "DiffusionPipeline.from_pretrained" in card


def test_in_another_precision(source, tmp_path):
    run(source, tmp_path / "out", "--format=diffusers", "--dtype=bfloat16", "--verify")
    tensors = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype.name for value in tensors.values()} == {"bfloat16"}


def test_wan_to_diffusers_to_orbax_to_wan_ends_where_it_began(original, tmp_path):
    run(original, tmp_path / "a", "--format=diffusers", "--verify")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "a")
    assert isinstance(theirs, diffusers.WanImageToVideoPipeline)
    run(tmp_path / "a", tmp_path / "b", "--format=wan", "--verify")
    for name in (original_wan.VAE_FILE, original_wan.TEXT_FILE, original_wan.IMAGE_FILE):
        before, after = (torch.load(folder / name, weights_only=True) for folder in (original, tmp_path / "b"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    before = {}
    for path in sorted(original.glob("*.safetensors")):
        before |= load_file(path)
    after = load_file(tmp_path / "b" / "diffusion_pytorch_model.safetensors")
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}
    config = json.loads((original / "config.json").read_text())
    # Wan's code would otherwise take its own default for the text width.
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == {**config, "text_dim": 32}
    assert read_scheduler(tmp_path / "b", image=True) == Scheduler("unipc", 3.0, 40, 5.0)
    assert read_defaults(tmp_path / "b") == read_defaults(tmp_path / "a") == read_defaults(original, image=True)
    run(tmp_path / "b", tmp_path / "c", "--format=orbax", "--verify")
    (one, found), (two, expected) = read_part(tmp_path / "c", "vae"), read_part(original, "vae")
    assert one == two and jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), found, expected))


def test_a_single_file_takes_the_rest_from_a_base(source, tmp_path):
    tensors = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    run(source, tmp_path / "wan", "--format=wan")
    file = tmp_path / "some name"
    wan = load_file(tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    save_file({f"model.diffusion_model.{name}": value for name, value in wan.items()}, file)
    run(file, tmp_path / "out", "--format=diffusers", f"--base={source}")
    back = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {k: v.tobytes() for k, v in back.items()} == {k: v.tobytes() for k, v in tensors.items()}
    assert diffusers.WanPipeline.from_pretrained(tmp_path / "out").tokenizer is not None


def test_a_part_alone_is_converted_alone(source, tmp_path, capsys):
    run(source / "transformer", tmp_path / "out", "--format=wan", "--verify")
    out = capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Parts of a Wan 2.1 text-to-video model" in card and "## Use" not in card
    assert "note: no vae, text_encoder, tokenizer in the source; --base=MODEL makes" in out
    run(tmp_path / "out", tmp_path / "back", "--format=diffusers")
    model, info = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path / "back", subfolder="transformer", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(np.array_equal(model.state_dict()[name].numpy(), value) for name, value in expected.items())
    assert not (tmp_path / "back" / "model_index.json").exists()


@pytest.mark.parametrize("weights, added", [("generator", 1), ("ema", 2), (None, 2)])
def test_a_run_becomes_a_model_directory(source, workdir, tmp_path, weights, added):
    chosen = [] if weights is None else [f"--weights={weights}"]
    run(workdir, tmp_path / "out", "--format=diffusers", "--verify", *chosen)
    _, params = read_part(tmp_path / "out", "transformer")
    _, base = read_part(source, "transformer")
    np.testing.assert_array_equal(params["proj_out"]["bias"], base["proj_out"]["bias"] + added)
    np.testing.assert_array_equal(
        params["blocks"]["attn1"]["to_q"]["kernel"], base["blocks"]["attn1"]["to_q"]["kernel"]
    )
    assert read_scheduler(tmp_path / "out") == Scheduler("euler", 2.0, 1, 1.0)
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in (
        "| step | 3 |",
        "| held-out t2v/kvd, step 3 | 12.5 |",
        "euler, 1 step, guidance 1, shift 2",
    ):
        assert fact in card


def test_a_run_becomes_files_of_the_original_layout(workdir, tmp_path):
    run(workdir, tmp_path / "out", "--format=wan", "--verify")
    model = find_model(tmp_path / "out")
    assert {part.layout for part in model.parts.values()} == {"wan"}
    assert read_scheduler(tmp_path / "out") == Scheduler("euler", 2.0, 1, 1.0)


@pytest.mark.parametrize("form", ["diffusers", "wan"])
def test_a_difference_as_lora_gives_the_student_back(source, tmp_path, capsys, form):
    student = tmp_path / "student"
    run(source, student, "--format=diffusers")
    path = student / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    rng = np.random.default_rng(0)
    changed = {}
    for name, value in tensors.items():
        change = rng.standard_normal((*value.shape[:-1], 2)) @ rng.standard_normal((2, value.shape[-1]))
        linear = value.ndim == 2 and name.endswith("weight")
        changed[name] = value + (0.1 * change).astype(np.float32) if linear else value
    save_file(changed, path)
    file = tmp_path / "student.safetensors"
    run(student, file, f"--format={form}", "--as-lora", "--rank=2", f"--base={source}")
    out = capsys.readouterr().out
    assert "blocks/attn1/to_q" in out and str(file) in out
    run(source, tmp_path / "merged", "--format=diffusers", f"--lora={file}", "--verify")
    merged = load_file(tmp_path / "merged" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in changed.items():
        np.testing.assert_allclose(merged[name], value, atol=2e-5, err_msg=name)


def test_adapters_of_a_run_are_written_as_they_are(source, workdir, tmp_path):
    file = tmp_path / "fake.safetensors"
    run(workdir, file, "--format=diffusers", "--as-lora", "--weights=fake_score")
    config = find_model(source).part("transformer").config
    found = read_lora(file, config)
    keys = {name for name in load_file(file)}
    assert keys == {f"transformer.blocks.{i}.attn1.to_q.lora_{x}.weight" for i in range(2) for x in "AB"}
    assert found.change("blocks/attn1/to_q/kernel", 1) is not None


def test_adapters_of_a_run_tell_of_its_teachers_lora(source, workdir, tmp_path):
    run_ = shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((run_ / "config.json").read_text())
    config["model"]["lora"] = "{workdir}/style.safetensors:0.8,other.safetensors"
    (run_ / "config.json").write_text(json.dumps(config))
    run(run_, tmp_path / "fake.safetensors", "--format=diffusers", "--as-lora", "--weights=fake_score")
    with safe_open(tmp_path / "fake.safetensors", "np") as file:
        told = file.metadata()
    assert (told["base"], told["base_lora"]) == (str(source), f"{run_ / 'style.safetensors'}:0.8, other.safetensors:1")


def test_bad_input_is_one_line_and_writes_nothing(source, workdir, tmp_path, capsys):
    out = tmp_path / "out"
    lora = tmp_path / "lora.safetensors"
    assert "invalid choice: 'onnx'" in fails([source, out, "--format=onnx"], capsys)
    assert "--format" in fails([source, out], capsys)
    assert "--weights=best: expected one of generator, ema" in fails(
        [workdir, out, "--format=wan", "--weights=best"], capsys
    )
    assert "not a training run's workdir" in fails([source, out, "--format=diffusers", "--weights=ema"], capsys)
    assert "no such folder" in fails([tmp_path / "none", out, "--format=diffusers"], capsys)
    assert "already exists" in fails([source, source, "--format=diffusers"], capsys)
    assert "unrecognized arguments: --verfy" in fails([source, out, "--format=diffusers", "--verfy"], capsys)
    assert "--rank=4: only with --as-lora" in fails([source, out, "--format=wan", "--rank=4"], capsys)
    assert "give --rank=N" in fails([source, lora, "--format=wan", "--as-lora"], capsys)
    assert "ends in .safetensors" in fails([source, out, "--format=wan", "--as-lora", "--rank=4"], capsys)
    assert "for diffusers or wan" in fails([source, lora, "--format=orbax", "--as-lora", "--rank=4"], capsys)
    assert "with --base" in fails([source, lora, "--format=wan", "--as-lora", "--rank=4"], capsys)
    assert "trains adapters of fake_score only" in fails(
        [workdir, lora, "--format=wan", "--as-lora", "--weights=teacher"], capsys
    )
    assert "holds no part of a Wan model" in fails([source / "tokenizer", out, "--format=wan"], capsys)
    assert not list(tmp_path.iterdir())


def test_parts_that_do_not_fit_are_not_written(source, original, tmp_path, capsys):
    line = fails([original / "config.json", tmp_path / "out", "--format=wan"], capsys)
    assert "config.json" in line
    shutil.copytree(source, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "text_encoder")
    wide = transformers.UMT5EncoderModel(
        transformers.UMT5Config(vocab_size=384, d_model=40, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )
    wide.save_pretrained(tmp_path / "model" / "text_encoder")
    capsys.readouterr()
    for form in ("diffusers", "wan", "orbax"):
        line = fails([tmp_path / "model", tmp_path / "out", f"--format={form}"], capsys)
        assert "the transformer's text_dim is 32, but the text_encoder's d_model is 40" in line
    image = find_model(original).part("transformer").files[0]
    line = fails([image, tmp_path / "out", "--format=wan", f"--base={source}"], capsys)
    assert "image_dim is 32, but the image_encoder's hidden_size is None" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_base_does_not_change_how_a_model_is_sampled(source, tmp_path):
    run(source, tmp_path / "model", "--format=diffusers")
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(Scheduler("euler", 7.0, 1, 1.0).to_json())
    )
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    run(tmp_path / "model", tmp_path / "out", "--format=diffusers", f"--base={source}")
    assert read_scheduler(tmp_path / "out") == Scheduler("euler", 7.0, 1, 1.0)
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_a_destination_inside_the_source_is_refused(source, capsys):
    assert "lies in" in fails([source, source / "out", "--format=wan"], capsys)


def test_weights_that_are_not_finite_are_refused(source, tmp_path, capsys):
    run(source, tmp_path / "model", "--format=diffusers")
    path = tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_in.bias"][1] = np.nan
    save_file(tensors, path)
    for form in ("diffusers", "wan", "orbax"):
        line = fails([tmp_path / "model", tmp_path / "out", f"--format={form}"], capsys)
        assert "vae" in line and "'decoder.conv_in.bias' holds NaN or infinity" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_run_that_trained_no_generator(source, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", source, {"name": "autoencoder"})
    with ocp.CheckpointManager((tmp_path / "run" / "checkpoints").absolute()) as manager:
        state = {
            "step": jnp.int32(1),
            "params": {"vae": {"a": jnp.ones(2)}},
            "averages": {"vae_ema": {"a": jnp.ones(2)}},
        }
        manager.save(1, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
    written = tmp_path / "run" / "checkpoints" / "1"
    checksums.write(written, [checksums.of_process(written, 0)])
    message = fails([tmp_path / "run", tmp_path / "out", "--format=diffusers"], capsys)
    assert "its method autoencoder makes no generator to convert" in message and not (tmp_path / "out").exists()


def test_a_disk_that_garbles_is_noticed_before_anything_appears(source, tmp_path, capsys, monkeypatch):
    written = layout.write_part

    def garbled(folder, part, *arguments):
        written(folder, part, *arguments)
        (path,) = (folder / part).glob("*.safetensors")
        with path.open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))

    monkeypatch.setattr(layout, "write_part", garbled)
    target = tmp_path / "out"
    line = fails([source, target, "--format=diffusers", "--verify"], capsys)
    assert line.startswith(f"error: {target}: transformer's ") and line.endswith("Is the disk sound?\n")
    assert not list(tmp_path.iterdir())


def decided(workdir, source, tmp_path, **guard):
    """The same run, with a guard that has decided."""
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "guard": {"enabled": True}}))
    found = json.loads((folder / "guard.json").read_text())
    (folder / "guard.json").write_text(json.dumps({**found, **guard}))
    return folder


REASON = "held-out KVD rose from 3.0 to 9.0 (real clips: 0.1): the weights that it started from are kept"


@pytest.mark.parametrize(
    "more",
    [
        ("--format=diffusers",),
        ("--format=diffusers", "--weights=ema"),
        ("--format=diffusers", "--weights=generator"),
        ("--format=wan", "--as-lora", "--rank=2"),
    ],
)
def test_weights_that_the_guard_turned_down_are_written_only_when_asked_for_by_name(
    workdir, source, tmp_path, capsys, more
):
    folder, target = decided(workdir, source, tmp_path, kept=False, reason=REASON), tmp_path / "out.safetensors"
    message = fails([folder, target, *more], capsys)
    assert f"its guard turned the trained weights down ({REASON}); {folder / 'model'} holds the weights that" in message
    assert not target.exists()
    run(folder, target, "--refused", *more)
    assert target.exists()
    if target.is_dir():
        told = f"| guard | {REASON}; this model has the trained weights all the same (--refused) |"
        assert told in (target / "README.md").read_text()


@pytest.mark.parametrize("damage", [b"", b'{"kept": fal', b"\0" * 50, b"[]"])
def test_a_guards_file_that_cannot_be_read_stops_no_conversion(workdir, source, tmp_path, capsys, damage):
    """What it decided is not guessed; weights are converted when they are asked for all the same."""
    folder, target = decided(workdir, source, tmp_path, kept=False, reason=REASON), tmp_path / "out"
    (folder / "guard.json").write_bytes(damage)
    message = fails([folder, target, "--format=diffusers"], capsys)
    assert message.startswith(f"error: {folder / 'guard.json'}: cannot be read, so the guard's decision is unknown")
    assert "--refused converts the trained weights" in message and not target.exists()
    run(folder, target, "--format=diffusers", "--refused")
    assert "| guard |" not in (target / "README.md").read_text()


@pytest.mark.parametrize(
    "found", ["[]", '{"scores": 7}', '{"scores": {"1": []}, "compared": 3}', '{"scores": {"1": {"a/None": "x"}}}']
)
def test_scores_of_another_kind_are_not_on_the_card(workdir, tmp_path, found):
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    (folder / "guard.json").write_text(found)
    run(folder, tmp_path / "out", "--format=diffusers")
    assert "held-out" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "config.json.model: expected"),
        ({"model": {}}, "model.path is None, expected a model; give it with --base"),
        ({"method": 7}, "config.json.method: expected"),
        ({"method": {}}, "config.method.name: '' does not exist"),
        ({"sample_shift": "three"}, "config.json.sample_shift: expected float"),
        ({"guard": []}, "config.json.guard: expected"),
    ],
)
def test_a_config_that_no_run_has_written(workdir, source, tmp_path, capsys, change, message):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    config = json.loads((workdir / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    assert message in fails([folder, tmp_path / "out", "--format=diffusers"], capsys)


def test_a_folder_of_checkpoints_that_are_not_ours(source, tmp_path, capsys):
    """Other programs call theirs so, too, and keep a model's config.json beside them."""
    run(source, tmp_path / "wan", "--format=wan")
    (tmp_path / "wan" / "checkpoints" / "step_10").mkdir(parents=True)
    (tmp_path / "wan" / "checkpoints" / "step_10" / "optimizer.bin").write_bytes(b"state")
    run(tmp_path / "wan", tmp_path / "out", "--format=diffusers", "--verify")
    assert find_model(tmp_path / "out").parts.keys() == find_model(source).parts.keys()


def test_the_card_of_weights_that_the_guard_kept_says_so(workdir, source, tmp_path):
    run(decided(workdir, source, tmp_path, kept=True, reason="it fell"), tmp_path / "out", "--format=diffusers")
    assert "| guard | it fell |" in (tmp_path / "out" / "README.md").read_text()


def test_a_guard_that_was_switched_off_since_decides_nothing(workdir, source, tmp_path):
    folder = decided(workdir, source, tmp_path, kept=False, reason=REASON)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "guard": {"enabled": False}}))
    run(folder, tmp_path / "out", "--format=diffusers")
    assert "| guard |" not in (tmp_path / "out" / "README.md").read_text()


def test_refused_weights_are_those_of_a_run(source, tmp_path, capsys):
    message = fails([source, tmp_path / "out", "--format=diffusers", "--refused"], capsys)
    assert f"--refused: {source} is no training run" in message


def test_a_layout_that_needs_pytorch_says_so_before_anything_is_written(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(layout, "write_part", None)
    message = fails([source, tmp_path / "out", "--format=wan"], capsys)
    assert "a PyTorch checkpoint needs PyTorch: pip install torch" in message
    assert not list(tmp_path.iterdir())


def test_a_difference_is_told_in_a_screenful(workdir, source, tmp_path, capsys):
    run(workdir, tmp_path / "x.safetensors", "--format=wan", "--as-lora", "--rank=4")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24 and any("squared change" in line for line in lines)
