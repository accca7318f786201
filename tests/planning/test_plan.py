"""The program from end to end, on real compilers; and its pages and its search on plans with known numbers."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from vpae_jax import config
from vpae_jax.configs import phase2
from vpae_jax.planning import compiling, memory, report, roofline, search
from vpae_jax.planning.chips import CHIPS, GIB
from vpae_jax.planning.clips import size_of
from vpae_jax.planning.flops import Work
from vpae_jax.planning.hlo import Collective, Communication
from vpae_jax.planning.memory import Footprint
from vpae_jax.planning.programs import Setting
from vpae_jax.planning.result import Plan, ProgramPlan
from vpae_jax.planning.roofline import Time
from vpae_jax.planning.topology import installed, parse

ROOT = Path(__file__).parents[2]
ASKED = Setting(1, 8, 2, 1, 1, "full")
CLIP = size_of("i2v-14b-720p")


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)


def program(name="generator", temporaries=20 * GIB, refused=None, calls=1.0) -> ProgramPlan:
    sent = Communication((Collective("all-gather", ("fsdp",), (0, 2, 4, 6), 40, 3.5 * GIB),), 0)
    return ProgramPlan(
        name,
        calls,
        Work(8e17, 2e17, 1e17, 1e17, activation_bytes=1e15, weight_bytes=1e12),
        1e14,
        None if refused is not None else Footprint(30 * GIB, temporaries, GIB, 30 * GIB + temporaries - GIB),
        refused,
        None if refused is not None else sent,
        None if refused is not None else Time(10.0, 2.0, 3.0),
        12.0,
    )


def plan(*programs: ProgramPlan) -> Plan:
    sizes = dict(zip(memory.KINDS, (4 * GIB, 8 * GIB, 4 * GIB, GIB, GIB, GIB), strict=False))
    return Plan(
        "phase2",
        "v5p:2x2x4",
        CHIPS["v5p"],
        16,
        ASKED,
        CLIP,
        32,
        500,
        compiling.sizes(sizes, programs),
        {"checkpoint": 64 * GIB, "offloaded": 0},
        programs,
    )


def test_a_step_is_the_state_once_and_the_hungriest_program():
    made = plan(program("heads", 10 * GIB, calls=2.0), program("generator", 20 * GIB))
    assert made.memory["temporaries"] == 20 * GIB and made.memory["code"] == 2 * GIB
    assert made.total == (4 + 8 + 4 + 2 + 1 + 20 + 2) * GIB and made.fits
    assert (made.step(serial=False), made.step(serial=True)) == (30.0, 39.0)
    assert made.flops == 3 * 8e17 and made.model_flops == 3 * 6e17
    assert made.mfu(serial=False) == pytest.approx(3 * 6e17 / (30 * 16 * 459e12))
    assert made.device_hours(serial=False) == pytest.approx(16 * 500 * 30 / 3600)
    assert "500 steps, at least 4.17 hours, 67 device hours" in report.page(made)


def test_what_does_not_fit_says_by_how_much():
    assert not plan(program(temporaries=90 * GIB)).fits
    page = report.page(plan(program(temporaries=90 * GIB)))
    assert "DOES NOT FIT by 14.26 GiB" in page  # 19 of state, 90, 1 of code; 95.74 there
    refused = plan(program(refused=150 * GIB))
    assert refused.total == 150 * GIB and not refused.fits and refused.step(serial=True) is None
    assert "the compiler rejected generator" in report.page(refused)
    silent = dataclasses.replace(refused, memory={**refused.memory, "temporaries": None})
    assert silent.total is None and "unknown" in report.page(silent)


def test_the_page_reads_in_columns():
    page = report.page(plan(program("heads", 10 * GIB), program("generator", 20 * GIB)))
    lines = page.splitlines()
    assert max(map(len, lines)) <= 100
    kinds = [line for line in lines if line.startswith("  ") and line.split()[0] in (*memory.KINDS, "total")]
    assert len(kinds) == 10 and len({line.index("%") for line in kinds}) == 1
    assert "mesh data 1 x fsdp 8 x context 2 x tensor 1, batch in 1 part, remat full" in page
    assert "FITS, 54.74 GiB to spare" in page
    assert "20 s if communication is hidden, 26 s if it is not" in page
    assert "  at its peak     40.00 GiB    41.8%  by XLA's own count" in lines  # a GiB below the sum
    assert "memory of one host: checkpoint 64.00 GiB, of 448.00 GiB" in lines
    assert any(line.split() == ["heads", "all-gather", "fsdp", "40", "3.50", "GiB"] for line in lines)


def test_json_holds_the_documented_keys():
    made = plan(program()).as_json()
    assert json.loads(json.dumps(made)) == json.loads(json.dumps(made))
    assert set(made) == {
        *("schema", "phase", "topology", "chip", "devices", "setting", "flags", "clip", "batch_size", "memory"),
        *("total", "peak", "host", "fits", "programs", "step", "run"),
    }
    assert made["flags"].startswith("--config.mesh.data=1 --config.mesh.fsdp=8 --config.mesh.context=2")
    assert made["programs"][0]["communication"][0]["axes"] == ("fsdp",)


def test_what_the_host_does_not_hold_does_not_fit():
    made = dataclasses.replace(plan(program()), host={"checkpoint": 64 * GIB, "offloaded": 400 * GIB})
    assert made.total is not None and made.total < made.chip.capacity and not made.fits
    page = report.page(made)
    assert "DOES NOT FIT into the memory of the hosts" in page and "of 448.00 GiB; DOES NOT FIT by 16.00 GiB" in page


def test_a_plan_warns_of_what_will_crawl():
    calm = report.page(plan(program()))
    assert "warning" not in calm
    again = dataclasses.replace(program(), communication=Communication((), 0, 196))
    assert "XLA rematerialises 196 instructions" in report.page(plan(again))
    tiles = dataclasses.replace(program(), work=Work(8e17, tiled=1e17))
    assert plan(tiles).tiled and "plain tiles" in report.page(plan(tiles))
    slow, fast = (roofline.arithmetic(CHIPS["h100"], 8, p.work) for p in (tiles, program()))
    assert slow > 4 * fast


def test_workspaces_are_those_of_gpus():
    setting = Setting(1, 1, 8, 1, 32, "full")
    assert memory.workspace(CHIPS["h100"], CLIP, 5120, 32, setting) == 4 * 75_600 * 5120 // 8
    assert memory.workspace(CHIPS["v5p"], CLIP, 5120, 32, setting) == 0


def test_refusals_of_the_compiler_are_read():
    hbm = "RESOURCE_EXHAUSTED: compile error. Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm."
    assert memory.needed(hbm) == int(21.5 * GIB)
    early = "the total memory required for HLO temporaries (1.25T) exceeds available HBM (30.75G)."
    assert memory.needed(early) == int(1280 * GIB)
    assert memory.needed("RESOURCE_EXHAUSTED: no") is None


def test_rates_of_links():
    slow, fast = CHIPS["h100"].network, CHIPS["h100"].link
    hosts = [i // 8 for i in range(32)]

    def rate(kind, group, chip="h100"):
        return roofline.rate(CHIPS[chip], Collective(kind, (), tuple(group), 1, 1.0), hosts)

    assert rate("all-gather", range(8)) == fast  # within a host
    assert rate("all-gather", range(0, 32, 8)) == slow  # one member in each host: one adapter
    assert rate("all-gather", range(0, 32, 2)) == 4 * slow
    assert rate("all-reduce", range(32)) == 8 * slow < fast
    assert rate("all-to-all", range(32)) == slow
    assert rate("all-gather", range(32), "v5p") == CHIPS["v5p"].link
    assert rate("all-to-all", range(8), "v5p") == CHIPS["v5p"].link / 2


@pytest.mark.parametrize(("chip", "reached"), [("v5p", 136e12), ("v6e", 260e12), ("tpu7x", 384e12), ("h200", 610e12)])
def test_rates_agree_with_what_others_reach(chip, reached):
    """Of Wan 14B's forward pass at 720p: MaxDiffusion's rates on TPUs, and cuDNN's and FastVideo's on an H200."""
    products, attention = 1.81e15, 4.73e15
    seconds = roofline.arithmetic(CHIPS[chip], 1, Work(products + attention, attention=attention))
    assert (products + attention) / seconds == pytest.approx(reached, rel=0.03)


def test_time_is_the_longest_part():
    rates = CHIPS["v5p"].rates
    shares = (rates.products, 0.5 * rates.attention, 0.5 * rates.attention_backward)  # one second, and half of one each
    one, forward, backward = (16 * 459e12 * share for share in shares)
    work = Work(2 * one + forward + backward, 0.0, forward, backward)
    sent = Collective("all-gather", ("fsdp",), tuple(range(16)), 1, 200e9 * 0.8 * 5)
    time = roofline.estimate(CHIPS["v5p"], 16, work, 2.765e12 * 0.8, [sent], [0] * 16)
    assert (time.compute, time.memory, time.communication) == pytest.approx((3, 1, 5))
    assert (time.overlapped, time.serial, time.bound) == (pytest.approx(5), pytest.approx(8), "communication")
    assert roofline.traffic(Work(1.0, activation_bytes=160.0, weight_bytes=7.0), 16, 5) == 10 + 7 + 10


def test_settings_give_every_device_whole_clips():
    found = list(search.settings(ASKED, 16, 32))
    assert len(found) == len(set(found)) and ASKED in found
    for s in found:
        assert s.data * s.fsdp * s.context * s.tensor == 16 and 32 % (s.data * s.fsdp * s.accumulation) == 0
    assert {(s.fsdp, s.context) for s in found} == {(16, 1), (8, 2), (4, 4), (2, 8), (1, 16)}
    assert {s.fsdp for s in search.settings(ASKED, 64, 32)} == {1, 2, 4, 8, 16, 32}


def test_estimates_follow_what_drives_them():
    transformer = search.transformer_of(config.parse(phase2.get_config("i2v-14b-720p")))

    def held(**changes):
        return search.activations(transformer, CLIP, 32, dataclasses.replace(ASKED, **changes))

    one_block = held(remat="none") / 41  # of 40 blocks, and one at work
    assert held() == pytest.approx(one_block + 40 * 4 * 75_600 / 2 * 5120 * 2)
    assert held(accumulation=2) == pytest.approx(held() / 2) == pytest.approx(held(context=4))
    assert held(remat="full") < held(remat="dots") < held(remat="none")
    asked = plan(program())

    def seconds(**changes):
        return search.seconds(transformer, CLIP, CHIPS["v5p"], asked, dataclasses.replace(ASKED, **changes))

    assert seconds(remat="none") < seconds(remat="dots") < seconds(remat="full") < seconds(accumulation=4)
    # Weights are gathered over fsdp x context, whatever their shares.
    gathers = seconds(accumulation=4) - seconds()
    assert seconds(fsdp=2, context=8, accumulation=4) - seconds(fsdp=2, context=8) == pytest.approx(gathers, rel=1e-6)
    # Of 40 heads, 16 devices exchange eight ways and pass keys and values around rings of two.
    assert seconds(fsdp=1, context=16) > seconds(fsdp=2, context=8)


def test_a_search_proposes_the_fastest_as_compiled(monkeypatch):
    """Programs whose times contradict the estimates: the order of the estimates does not decide, what cannot be faster
    any more is not compiled, and what has no kernel for its attention is not proposed."""
    experiment = config.parse(phase2.get_config("i2v-14b-720p"))
    settings = [dataclasses.replace(ASKED, accumulation=n) for n in (1, 2, 4, 8)]
    expected = zip(settings, (8.0, 9.0, 12.0, 13.5), strict=True)
    estimates = [search.Estimate(s, 0.0, 1.0 * GIB, seconds) for s, seconds in expected]
    compiled = {1: 26.0, 2: 1.0, 4: 13.0, 8: 13.5}

    def made(changed, *_, **__):
        ratio = compiled[changed.accumulation] / 13.0
        work = Work(8e17, tiled=1e17 if changed.accumulation == 2 else 0.0)
        one = dataclasses.replace(program(), time=Time(10 * ratio, 2 * ratio, 3 * ratio), work=work)
        return dataclasses.replace(plan(one), setting=dataclasses.replace(ASKED, accumulation=changed.accumulation))

    asked = dataclasses.replace(made(dataclasses.replace(experiment, accumulation=8)), setting=settings[3])
    monkeypatch.setattr(search, "_estimates", lambda *_: (list(estimates), []))
    monkeypatch.setattr(search, "make_plan", made)
    found = search.search(experiment, CLIP, parse("v5p:2x2x4"), range(16), asked, print, tries=9)
    assert found.plan is not None and found.plan.setting.accumulation == 4
    assert [tried.setting.accumulation for tried in found.tried] == [1, 2, 4]
    assert [tried.outcome for tried in found.tried] == ["fits", "plain tiles", "fits"]
    assert [tried.seconds for tried in found.tried] == pytest.approx([26.0, 1.0, 13.0])


@pytest.mark.long
def test_the_search_proposes_what_it_compiled():
    """On eight devices of this CPU in the place of a chip's: a device with a little less memory than the config asks
    for, so that something must be recomputed, and one with next to none."""
    ended = run("tests.planning.search_on_cpu")
    assert ended.returncode == 0, ended.stderr
    made = json.loads(ended.stdout)
    asked, found, none = made["asked"], made["found"], made["none"]
    assert asked["fits"] and asked["memory"]["parameters"] == asked["memory"]["averages"]
    assert {"all-gather"} <= {c["kind"] for c in asked["programs"][0]["communication"]}
    assert asked["programs"][0]["flops"] == asked["programs"][0]["model_flops"]
    assert found["plan"]["fits"] and found["plan"]["total"] < asked["total"]
    fitting = [tried for tried in found["tried"] if tried["outcome"] == "fits"]
    assert found["flags"] == min(fitting, key=lambda tried: tried["seconds"])["flags"]
    assert f"fastest of those that fit: {found['flags']}" in made["page"]
    assert none["plan"] is None and none["flags"] is None
    assert all(tried["outcome"] != "fits" for tried in none["tried"])


def end_to_end(name: str) -> dict:
    """The smallest phase there is, on a real compiler, in a process of its own."""
    small = ["--config.batch_size=4", "--config.model.remat=full"]
    ended = run("vpae_jax.plan", "--config=configs/teacher.py", f"--topology={name}", "--json", *small)
    assert ended.returncode == 0, ended.stderr
    # No noise of the compiler's; of a slow machine more lines of the same.
    said = tuple(f"compiling {program} for {name}" for program in ("generator", "preview"))
    assert all(line.startswith(said) for line in ended.stderr.splitlines()), ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        "v5e:2x2",
        pytest.param("h100:4", marks=pytest.mark.skipif(not installed("jax_plugins.xla_cuda12"), reason="needs CUDA")),
    ],
)
def test_a_phase_is_planned_on_a_machine_without_it(name):
    made = end_to_end(name)
    assert made["fits"] and made["devices"] == 4 and made["chip"]["name"] == parse(name).chip.name
    weights = sum(4 * size for size in (3_801_344,)) / 4
    assert weights < made["memory"]["parameters"] < 1.2 * weights  # all but small ones are sharded
    assert made["memory"]["averages"] == made["memory"]["parameters"]
    update = made["programs"][0]
    assert update["footprint"]["temporaries"] > 0 and update["unknown_loops"] == 0
    assert {c["kind"] for c in update["communication"]} >= {"all-gather"}
    assert update["flops"] > update["model_flops"] > 0
    assert made["step"]["seconds_overlapped"] < made["step"]["seconds_serial"]


@pytest.mark.skipif(installed("jax_plugins.xla_cuda12"), reason="the plugin is there")
def test_without_the_plugin_gpus_are_one_line():
    ended = run("vpae_jax.plan", "--config=configs/phase1.py", "--topology=h100:8")
    assert ended.returncode == 2 and not ended.stdout
    assert ended.stderr.splitlines() == [
        "error: planning for h100:8 needs JAX's CUDA plugin (5.5 GB, no GPU); "
        f"pip install 'jax[cuda12]=={jax.__version__}'"
    ]
