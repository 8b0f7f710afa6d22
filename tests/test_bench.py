"""opd.bench on the tiny size: the two structures are compared with each other, and the instruments with
closed forms."""

import gc
import json
import sys
from dataclasses import replace

import pytest
import torch

import train
from opd import compiled
from opd.bench import clock, gpu, kernels
from opd.bench.model import SIZES, WORKS, make_stage
from opd.report import memory
from opd.report.memory import LiveTensors

CPU = torch.device("cpu")
TRAJECTORIES = 12  # of the tiny size


def everything() -> list[torch.Tensor]:
    """Every tensor that Python holds and that has storage."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    return [tensor for tensor in tensors if tensor.device.type != "meta"]


@pytest.fixture(scope="module")
def alive():
    """() -> the tensors that live, but for those that earlier tests left in this process."""
    others = everything()
    known = {tensor.untyped_storage()._cdata for tensor in others}
    return lambda: [tensor for tensor in everything() if tensor.untyped_storage()._cdata not in known]


@pytest.fixture(scope="module")
def both(alive):
    """Ours and the released structure; the peak of memory is that of live tensors in one update more."""
    found = []
    for name in ("ours", "released"):
        work = replace(WORKS["tiny"], dtype="float32", steps=2)
        numbers = clock.measure(name, work, CPU, 2, 1e9)
        stage = make_stage(name, work, CPU)
        stage.step(0)
        with (live := LiveTensors(alive())):
            stage.step(1)
        found.append(numbers | {"memory": clock.parts(stage, live.peak)})
    return found


def test_both_structures_find_the_same_loss_and_gradient(both):
    """Same samples, same noise: only the order of the work differs."""
    ours, released = both
    assert ours["loss"] > 0 and ours["grad_norm"] > 0
    for number in ("loss", "grad_norm"):
        assert released[number] == pytest.approx(ours[number], rel=1e-4)
    for numbers in both:
        assert numbers["trajectories_per_second"] == TRAJECTORIES / numbers["seconds_per_update"]


def test_flops_and_memory(both):
    """The emulation runs the student once more, five passes for four (student, its backward, teacher,
    anchor), and holds a transformer more per teacher and anchor."""
    ours, released = both
    assert released["flops_per_update"] == pytest.approx(5 / 4 * ours["flops_per_update"], rel=0.02)
    assert ours["memory"]["copies"] == 0 and ours["memory"]["base"] == released["memory"]["base"]
    assert released["memory"]["copies"] == 4 * released["memory"]["base"]
    for numbers in (ours, released):
        peak, *parts = numbers["memory"].values()
        assert sum(parts) == peak and 0 < numbers["memory"]["activations"] < 3 * 2**20
    # Found before the model was built: within a tenth of the peak; what is counted to the byte or nearly.
    measured, predicted = ours["memory"], ours["predicted"]
    assert predicted["peak"] == pytest.approx(measured["peak"], rel=0.1)
    for part in ("base", "adapters", "gradients", "optimizer"):
        assert predicted[part] == pytest.approx(measured[part], rel=0.01), part


# The rank is the shipped teachers'.
WHOLE_RUNS = {
    "mini": "--prompts-per-step 6 --micro-batch 6 --rank 16",
    "mini-text": "--prompts-per-step 2 --micro-batch 8 --window 0 --no-shared-start --steps 2 --updates 2",
    "mini-nft-compose": "--prompts-per-step 2 --micro-batch 8 --steps 2 --levels 2 --updates 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("preset, flags", WHOLE_RUNS.items())
def test_the_real_command_holds_what_is_predicted(tmp_path, monkeypatch, alive, preset, flags):
    """train.py on the shipped miniature, VAE and moving average included: what is counted nearly to the byte;
    activations, which are followed, below their prediction."""
    loop, found = train.train, []

    def counted(cfg, stage, trained, *others):
        with (live := LiveTensors(alive())):
            finished = loop(cfg, stage, trained, *others)
        measured = clock.parts(stage, live.peak)
        measured["vae"] = sum(weight.nbytes for weight in stage.model.vae.parameters())
        measured["average"] = sum(average.nbytes for average in trained.average.values())
        measured["to undo"] = sum(tensor.nbytes for tensor in trained.before[1].values())
        measured["activations"] -= measured["vae"] + measured["average"] + measured["to undo"]
        found.extend([measured, memory.predict_run(cfg, stage.model)])
        return finished

    monkeypatch.setattr(train, "train", counted)
    short = "--iterations 1 --no-evaluate --sample-every 0 --watch-every 0 --dtype float32"
    out = ["--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", preset, *flags.split(), *short.split(), *out])
    train.main()
    measured, predicted = found
    predicted["adapters"] += predicted["teachers"]
    for part in ("base", "adapters", "gradients", "optimizer", "average", "to undo", "vae"):
        assert measured[part] == pytest.approx(predicted[part], rel=0.01), part
    activations = max(predicted["activations"], predicted["decoding"]) + predicted["trajectories"]
    assert 0.5 * activations < measured["activations"] <= 1.05 * activations


def test_without_a_gpu_nothing_is_measured(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("error: no GPU: nothing was measured; --rehearse")


@pytest.mark.slow
def test_the_gpu_command_runs_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", compiled.BACKEND)
    torch._dynamo.reset()
    assert gpu.main(["--rehearse", "--out", str(tmp_path / "gpu.json")]) == 0
    torch._dynamo.reset()
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert all(0 < result["agreement"][op] <= 1 and result[op]["times_eager"] > 0 for op in kernels.OPS)
    loops = {name: numbers for name, numbers in result.items() if "teachers" in name}
    assert len(loops) == 6 and result["ours, twice as wide"]["flops_per_update"] > 0
    assert 0 < result["first command"]["a step"] < result["first command"]["first step"]
    plain, fast = (loops[f"ours, compile {compile}, teachers 4"] for compile in (False, True))
    assert plain["graphs"] == 0 < fast["graphs"] <= 5
    assert fast["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert fast["flops_per_update"] == plain["flops_per_update"]


def test_the_size_is_that_of_the_model():
    """SD3.5-Medium has 2.24 billion parameters."""
    with torch.device("meta"):
        medium = SIZES["sd35-medium"].transformer()
    assert sum(p.numel() for p in medium.parameters()) == pytest.approx(2.24e9, rel=0.005)
