"""`python -m opd.bench` on the tiny size: counts are compared with counting by hand, the two structures with
each other, and the instruments with closed forms."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import train
from opd import compiled, memory
from opd.bench import clock as bench_clock
from opd.bench import loop as bench
from opd.bench.clock import Stopwatch, alive, flop_counter, matmul_rate
from opd.bench.model import SIZES, shifted_levels
from opd.families import sd3
from opd.memory import LiveTensors

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
FLAGS = ["--size", "tiny", "--dtype", "float32", "--device", "cpu"]
# The tiny size: 6 prompts of 3 tasks, 2 trajectories each, 3 states.
TRAJECTORIES, STATES, TEACHERS = 12, 3, 3


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(standard output, JSON) of the real command with both structures."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "opd.bench", *FLAGS, "--structure", "both", "--updates", "2"]
    command += ["--json", str(folder / "b.json"), "--picture", str(folder / "b.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "b.png").read_bytes()[1:4] == b"PNG"
    return done.stdout, json.loads((folder / "b.json").read_text())


def measured(tmp_path, *flags):
    """What one structure measured, in this process, without the tensors that earlier tests left in it."""
    strangers = alive()
    keys = {tensor.untyped_storage()._cdata for tensor in strangers}

    def own() -> list[torch.Tensor]:
        return [tensor for tensor in alive() if tensor.untyped_storage()._cdata not in keys]

    with patch.object(bench_clock, "alive", own):
        assert bench.main([*FLAGS, "--updates", "2", "--json", str(tmp_path / "b.json"), *flags]) == 0
    return json.loads((tmp_path / "b.json").read_text())


def rows(numbers, name):
    return numbers["passes"][name]["rows"]


# ---- both structures ---------------------------------------------------------------------------------------


def test_the_table_names_both_structures_and_calls_one_an_emulation(both):
    text, result = both
    assert "== ours" in text and "== released" in text
    assert "EMULATION" in text
    speed = result["ratio"]["trajectories_per_second"]
    assert f"ours / released: {speed:.3f} x trajectories/s" in text
    assert f"ours / released: {result['ratio']['peak_memory']:.3f} x peak memory" in text


def test_both_structures_find_the_same_loss_and_gradient(both):
    """Same samples, same noise: only the order of the work differs."""
    ours, released = both[1]["structures"].values()
    assert ours["loss"] > 0 and ours["grad_norm"] > 0
    assert released["loss"] == pytest.approx(ours["loss"], rel=1e-4)
    assert released["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)
    assert both[1]["ratio"]["loss_difference"] < 1e-4


def test_ratios_are_those_of_the_numbers(both):
    ours, released = both[1]["structures"].values()
    speed = released["seconds_per_update"] / ours["seconds_per_update"]
    assert both[1]["ratio"]["trajectories_per_second"] == pytest.approx(speed)
    peak = ours["memory"]["peak"] / released["memory"]["peak"]
    assert both[1]["ratio"]["peak_memory"] == pytest.approx(peak)
    assert ours["trajectories_per_second"] == pytest.approx(TRAJECTORIES / ours["seconds_per_update"])


def test_passes_of_our_structure(both):
    """A queried state costs a sample one student forward and backward, its teacher and the anchor a
    forward."""
    ours = both[1]["structures"]["ours"]
    visited = TRAJECTORIES * STATES
    expected = {"student, forward": visited, "student, backward": visited, "further": visited}
    for k in range(TEACHERS):
        expected[f"task{k}"] = visited // TEACHERS
    assert {name: passes["rows"] for name, passes in ours["passes"].items()} == expected


def test_the_emulation_adds_a_forward_pass_of_the_student(both):
    """Three tasks of 4 samples fill the micro-batches of both structures alike."""
    ours, released = both[1]["structures"].values()
    expected = ours["passes"] | {"student, no gradient": {"calls": 9, "rows": TRAJECTORIES * STATES}}
    assert released["passes"] == expected


def test_memory_by_part(both):
    """float32: the emulation holds the transformer once more per teacher and for the anchor."""
    ours, released = both[1]["structures"].values()
    assert ours["memory"]["copies"] == 0
    assert released["memory"]["copies"] == 4 * released["memory"]["base"]
    assert ours["memory"]["base"] == released["memory"]["base"]
    assert both[1]["ratio"]["peak_memory"] < 1
    for numbers in (ours, released):
        memory = numbers["memory"]
        parts = ("base", "copies", "adapters", "optimizer", "gradients", "activations")
        assert sum(memory[part] for part in parts) == memory["peak"]
        assert 0 < memory["activations"] < 3 * 2**20
    assert_predicted(ours)
    assert both[0].count("   predicted ") == 6  # the peak and five parts, of ours alone


def assert_predicted(numbers):
    """Within a tenth of the peak, found before the model was built; what is counted to the byte or nearly."""
    measured, predicted = numbers["memory"], numbers["predicted"]
    assert predicted["peak"] == pytest.approx(measured["peak"], rel=0.1)
    for part in ("base", "adapters", "gradients", "optimizer"):
        assert predicted[part] == pytest.approx(measured[part], rel=0.01), part


def test_phases_are_of_one_update(both):
    for numbers in both[1]["structures"].values():
        assert all(seconds > 0 for seconds in numbers["phases"].values())
        assert list(numbers["phases"])[0] == "student forward"


# ---- other work --------------------------------------------------------------------------------------------


def test_queries_guidance_and_a_teacher_that_anchors(tmp_path):
    """2 of 4 states are trained on; a guided sample of the student is two rows; the teacher that anchors
    answers for every sample once."""
    flags = ("--states", "4", "--queries", "2", "--guidance", "3", "--anchor", "teacher", "--teachers", "2")
    numbers = measured(tmp_path, *flags)["structures"]["ours"]
    assert rows(numbers, "student, forward") == 2 * 2 * TRAJECTORIES
    assert rows(numbers, "student, backward") == 2 * 2 * TRAJECTORIES
    assert rows(numbers, "task0") == 2 * TRAJECTORIES
    assert rows(numbers, "task1") == 2 * TRAJECTORIES // 2
    assert "further" not in numbers["passes"]
    assert_predicted(numbers)


@pytest.mark.parametrize("anchor", ["teacher", "base", "none"])
def test_every_anchor_in_the_emulation(tmp_path, anchor):
    flags = ("--structure", "both", "--anchor", anchor, "--states", "2")
    result = measured(tmp_path, *flags)
    assert result["ratio"]["loss_difference"] < 1e-4
    memory = result["structures"]["released"]["memory"]
    copies = {"teacher": TEACHERS + 1, "base": TEACHERS, "none": TEACHERS}
    assert memory["copies"] == copies[anchor] * memory["base"]


def test_bfloat16_and_checkpointing(tmp_path):
    """In bfloat16 the base is half as large and a float32 copy twice that; the losses still agree to that
    precision."""
    flags = "--structure both --dtype bfloat16 --checkpointing --states 2 --prompts-per-step 3".split()
    result = measured(tmp_path, *flags)
    memory = result["structures"]["released"]["memory"]
    assert memory["copies"] == 4 * 2 * memory["base"]
    assert result["ratio"]["loss_difference"] < 0.05
    assert_predicted(result["structures"]["ours"])


def test_stage_grpo_says_what_it_leaves_out(tmp_path, capsys):
    """Beta > 0: the base answers for every trained state."""
    numbers = measured(tmp_path, "--stage", "grpo", "--states", "2")["structures"]["ours"]
    assert "without a VAE" in capsys.readouterr().out
    for name in ("student, no gradient", "student, forward", "student, backward", "base"):
        assert rows(numbers, name) == 2 * TRAJECTORIES
    assert_predicted(numbers)


def test_work_doubles_with_the_group(tmp_path, both):
    twice = measured(tmp_path, "--group", "4")["structures"]["ours"]["flops_per_update"]
    assert twice == 2 * both[1]["structures"]["ours"]["flops_per_update"]


def test_compiled_blocks_are_counted_and_counted_through(tmp_path, monkeypatch):
    """Passes, operations and memory are those of the eager blocks, which the counters can see."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    flags = ("--states", "2", "--teachers", "1", "--anchor", "none", "--prompts-per-step", "2")
    plain = measured(tmp_path, *flags)["structures"]["ours"]
    fast = measured(tmp_path, *flags, "--compile")["structures"]["ours"]
    assert plain["graphs"] == 0 < fast["graphs"] <= 5 and fast["graphs_later"] == 0
    assert fast["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    for name in ("passes", "flops_per_update"):
        assert fast[name] == plain[name]
    assert fast["memory"]["peak"] == pytest.approx(plain["memory"]["peak"], rel=0.05)


# The rank is the shipped teachers'.
WHOLE_RUNS = {
    "mini": "--prompts-per-step 6 --micro-batch 6 --rank 16",
    "mini-compose": "--prompts-per-step 2 --micro-batch 16 --window 0 --no-shared-start --steps 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("preset, flags", WHOLE_RUNS.items())
def test_the_real_command_holds_what_is_predicted(tmp_path, monkeypatch, preset, flags):
    """train.py on the shipped miniature, VAE and moving average included: what is counted nearly to the byte;
    activations, which are followed, below their prediction."""
    strangers, loop, found = alive(), train.train, {}

    def counted(cfg, stage, trained, *others):
        known = {tensor.untyped_storage()._cdata for tensor in strangers}
        live = LiveTensors()
        live.add([tensor for tensor in alive() if tensor.untyped_storage()._cdata not in known])
        with live:
            finished = loop(cfg, stage, trained, *others)
        measured = bench_clock.parts(stage, live.peak)
        measured["vae"] = sum(weight.nbytes for weight in stage.model.vae.parameters())
        measured["average"] = sum(average.nbytes for average in trained.average.values())
        measured["activations"] -= measured["vae"] + measured["average"]
        teachers = memory.assumed_teachers(cfg, stage.model)
        found.update(measured=measured, predicted=memory.predict_run(cfg, stage.model, teachers))
        return finished

    monkeypatch.setattr(train, "train", counted)
    places = ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    short = "--iterations 1 --no-evaluate --sample-every 0 --watch-every 0 --dtype float32"
    monkeypatch.setattr(sys, "argv", ["train.py", preset, *flags.split(), *short.split(), *places])
    train.main()
    measured, predicted = found["measured"], found["predicted"]
    predicted["adapters"] += predicted["teachers"]
    for part in ("base", "adapters", "gradients", "optimizer", "average", "vae"):
        assert measured[part] == pytest.approx(predicted[part], rel=0.01), part
    activations = max(predicted["activations"], predicted["decoding"]) + predicted["trajectories"]
    assert 0.5 * activations < measured["activations"] <= 1.05 * activations


# ---- instruments -------------------------------------------------------------------------------------------


def test_attention_is_counted():
    """4 L^2 D per head forward; backward makes five products of that size where forward makes two."""
    heads, length, width = 2, 8, 16
    query, key, value = torch.randn(3, 1, heads, length, width, requires_grad=True)
    with flop_counter() as counter:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        forward = counter.get_total_flops()
        output.sum().backward()
    assert forward == 4 * heads * length**2 * width
    assert counter.get_total_flops() == forward * 7 / 2


def test_live_tensors_sees_what_the_graph_keeps():
    """exp keeps its result for backward though nothing in Python holds it."""
    live = LiveTensors()
    x = torch.zeros(1000, requires_grad=True)
    with live:
        y = x.exp().exp()
        assert live.bytes == 8000
        del y
        assert live.bytes == 0
        torch.zeros(500).add_(1.0).view(5, 100)
    assert (live.bytes, live.peak) == (0, 8000)


def test_the_stopwatch_gives_nested_time_to_the_outer_call():
    watch = Stopwatch(CPU)
    inner = watch.around(lambda: "kernels", lambda: sum(range(100_000)))
    outer = watch.around(lambda: "teachers", lambda: inner())
    outer()
    assert watch.seconds["kernels"] == 0 < watch.seconds["teachers"]
    inner()
    assert watch.seconds["kernels"] > 0


def test_matmul_rate_is_one_of_a_computer():
    assert 1e8 < matmul_rate(torch.float32, CPU) < 1e15


def test_sizes_are_those_of_the_models():
    """The miniature as shipped; SD3.5-Medium has 2.24 billion parameters."""
    shipped = sd3.transformer_config(ROOT / "opd/mini/weights/base")
    for name, value in SIZES["mini"].transformer.items():
        assert shipped[name] == value, name
    medium = SIZES["sd35-medium"].transformer
    with torch.device("meta"):
        transformer = sd3.SD3Transformer2DModel(patch_size=2, **medium)
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(2.24e9, rel=0.005)


def test_levels_fall_to_zero():
    levels = shifted_levels(4, 3.0)
    assert levels[0] == 1 and levels[-1] == 0
    assert levels[2] == pytest.approx(0.75)  # at s = 1/2 the odds are the shift


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--size huge", "--size 'huge' is unknown; choose from tiny, mini, sd35-medium"),
        ("--structure theirs", "--structure 'theirs' is unknown; choose from ours, released, both"),
        ("--stage sft", "--stage 'sft' is unknown"),
        ("--device tpu", "--device 'tpu' is unknown"),
        ("--anchor heavy", "--anchor 'heavy' is unknown"),
        ("--dtype int8", "--dtype 'int8' is unknown"),
        ("--micro-batch 0", "--micro-batch is 0; it must be at least 1"),
        ("--teachers 0", "--teachers is 0"),
        ("--states 2 --queries 3", "--queries 3 exceeds the 2 states"),
        ("--pixels 60", "--pixels 60 does not fit --size tiny; use a multiple of 16 up to 256"),
        ("--pixels 512", "--pixels 512 does not fit --size tiny"),
        ("--updates 1", "--updates is 1"),
        ("--stage grpo --structure both", "--structure both emulates distillation"),
        ("--stage grpo --queries 1", "--queries 1 is for --stage opd"),
        ("--stage grpo --group 1", "--group 1: an advantage compares"),
        ("--query-range 2 9", "--query-range 2 9 does not lie within the 3 states"),
        ("--stage grpo --query-range 0 1", "--query-range (0, 1) is for --stage opd"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, flags, words):
    assert bench.main(flags.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(capsys):
    assert bench.main(["--device", "cuda"]) == 2
    assert "there is none: nothing was measured" in capsys.readouterr().err
