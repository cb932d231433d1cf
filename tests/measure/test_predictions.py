"""Predictions and what is known without a GPU: computed from the estimate, as written down."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import Run
from support.results import ROOT, STATIC

from fused_resnet.measure import (
    documents,
    predict,
    predict_training,
    resources,
)
from fused_resnet.tuning.architecture import ARCHITECTURES
from fused_resnet.tuning.choice import CHAIN_KERNELS, Choice


def test_predictions_are_those_of_the_estimate() -> None:
    """`fused-resnet bench static --json` would write the file that is there."""
    assert (STATIC / "predicted.json").read_text() == predict.text(predict.document())


def test_predictions_count_what_networks_move() -> None:
    """Megabytes of a half-precision ResNet-50 and image, the weights spread over the batch."""
    content = documents.load(STATIC / "predicted.json")
    (network,) = (
        network
        for network in content["networks"]
        if (network["gpu"], network["model"], network["batch"]) == ("H100", "resnet50", 256)
    )
    moved = network["megabytes_per_image"]
    assert 150 < moved["eager"] < 170
    assert 50 < moved["fused"] < 55
    assert moved["chained"] <= 31
    assert moved["chained"] < moved["chain"] < moved["fused"]
    assert sum(layer["count"] for layer in network["layers"]) == 53
    for layer in network["layers"]:
        assert 0 < layer["share_of_copy_bandwidth"] < 1
        assert 0 < layer["share_of_matrix_rate"] < 1
        assert layer["microseconds"] < layer["eager_microseconds"]
    assert sum(block["count"] for block in network["chains"]) == 16
    assert {block["choice"].split(" ")[0] for block in network["chains"]} == {
        "chain",
        "pair",
        "convolutions",
    }
    for block in network["chains"]:
        assert block["microseconds"] <= block["fused_microseconds"]
    times = network["microseconds"]
    assert times["chain"] < times["fused"] < times["compiled"] < times["eager"]


def test_a_chain_moves_ten_units_for_sixteen() -> None:
    """A unit is the bottleneck width's activations; of a block with another after it."""
    blocks = predict.chains_of("resnet50", 256, "float16")
    assert sum(blocks.values()) == 16
    (block,) = (
        one for one in blocks if (one.width, one.projection, one.next_width) == (64, None, 64)
    )
    unit = 2 * 256 * 64 * 56 * 56
    small = sum(16 * part.K + part.weight_bytes for part in block.parts)
    moved = {
        kernel: predict.bytes_chosen(block, Choice(kernel, None, "")) for kernel in CHAIN_KERNELS
    }
    assert moved == {
        "chain": 10 * unit + small,
        "chain without next": 9 * unit + 5 * unit + small,
        "pair": 2 * unit + 10 * unit + small,
        "convolutions": 16 * unit + small,
    }
    assert not predict.chains_of("resnet18", 1, "float16")
    assert not predict.chains_of("resnext50_32x4d", 1, "float16")


def test_what_is_written_of_small_batches_is_computed() -> None:
    """docs/small_batches.md: its table; and what is asked of batch 1 and 256, as predicted."""
    text = (ROOT / "docs" / "small_batches.md").read_text()
    gpu = ARCHITECTURES["H100"]
    assert predict.small_batch_table(gpu) in text
    one = predict.predicted_network("resnet50", 1, gpu)["microseconds"]
    # Both add up shared sums without a launch of their own.
    assert one["chain"] < 0.75 * one["fused"]
    many = predict.predicted_network("resnet50", 256, gpu)["microseconds"]
    # The chains' weights come through L2, and its bandwidth bounds what they gain.
    assert many["fused"] / many["chain"] >= 1.15


def test_what_is_written_of_basic_blocks_is_computed() -> None:
    """docs/basic_block_chain.md: its table, and what it says that follows from it."""
    blocks = predict.basic_blocks(ARCHITECTURES["H100"])
    text = (ROOT / "docs" / "basic_block_chain.md").read_text()
    assert predict.basic_block_table(blocks) in text
    assert predict.first_stage_table(list(ARCHITECTURES)) in text
    for one in blocks:
        pays = one.width == 64 or (one.width == 128 and one.batch > 1)
        assert (one.chained < one.apart) == pays, one
        if one.rows:
            assert one.recomputed == (one.rows + 2) * 16 / (one.rows * 14)
            assert one.fewer_bytes == 0.6 * 5 * one.map_bytes
        assert (one.rows == 0) == (one.width == 512)
    for name, gpu in ARCHITECTURES.items():
        ratios = [one.chained / one.apart for one in predict.basic_blocks(gpu, (256,))]
        # What the text says of Hopper, of the A100 and of desktops, with many images.
        assert (ratios[0] < 0.6) == (gpu.capability == (9, 0)), name
        assert (ratios[0] > 1) == (gpu.capability in ((8, 0), (8, 9), (12, 0))), name


def test_what_a_training_step_moves() -> None:
    """The norms, and a Bottleneck by hand: at 56 x 56, 64 (128) channels twice, then 256."""
    content = documents.load(STATIC / "predicted.json")
    for step in content["training"]:
        times, terms = step["microseconds"], step["terms"]
        assert times["with_ends"] < times["fused"] < times["eager"]
        assert times["compile"] < times["eager"]
        for how, parts in terms.items():
            assert sum(parts.values()) == pytest.approx(times[how], abs=0.5)
            assert parts["convolutions"] == terms["eager"]["convolutions"] > 0
            assert parts["parameters"] == terms["eager"]["parameters"] > 0
        assert sum(norm["count"] for norm in step["norms"]) == 53
        assert len(step["blocks"]) == 17
        block = next(block for block in step["blocks"] if block["block"] == "layer1.1")
        unit = 2 * step["batch"] * 64 * 56 * 56 / 1e6
        inner = 2 if step["model"] == "resnet50" else 4  # of the two convolutions, in units
        assert block["eager_megabytes"] == pytest.approx((inner * 13 + 4 * 16) * unit, abs=0.1)
        assert block["fused_megabytes"] == pytest.approx((inner * 10 + 4 * 10.125) * unit, abs=0.1)
        for norm in step["norms"]:
            assert 0 < norm["forward_share_of_copy_bandwidth"] < 1
            assert 0 < norm["backward_share_of_copy_bandwidth"] < 1


def test_what_is_written_of_training_steps_is_computed() -> None:
    """docs/training.md: its tables."""
    text = (ROOT / "docs" / "training.md").read_text()
    for batch in predict_training.BATCHES:
        assert predict_training.terms_table(batch, ARCHITECTURES["H100"]) in text
    gpu = ARCHITECTURES["H100"]
    assert predict_training.if_free_table(predict_training.BATCHES, gpu) in text
    assert predict_training.one_launch_table(64, gpu) in text
    norms = predict_training.norms_of("resnet50", 64)
    least = [
        min(predict_training.share_of_a_copy(norm, backward, gpu) for norm in norms)
        for backward in (False, True)
    ]
    assert "is {:.0%} forward and {:.0%} backward".format(*least).replace("%", " %") in text
    smallest = predict_training.Norm("", "inner", (64, 512, 7, 7))
    share = predict_training.share_of_copy_bandwidth(smallest, False, gpu)
    assert f"no more than {100 * share:.0f} % of copy bandwidth forward" in text
    seconds = predict_training.copy_seconds(smallest, False, gpu)
    alone = 3 * smallest.bytes_once / gpu.copy_bandwidth / seconds
    assert f"one launch would get {100 * alone:.0f} %" in text
    for batch in predict_training.BATCHES:
        step = predict_training.terms("resnet50", batch, gpu)["with_ends"]
        saved = predict_training.if_free("resnet50", batch, gpu)
        everything = saved.pop("all but the convolutions")
        assert sum(step.values()) - everything == pytest.approx(step["convolutions"])
        assert all(0 <= seconds < everything for seconds in saved.values())


def test_static_says_that_it_predicts(run: Run, tmp_path: Path) -> None:
    written = tmp_path / "p.json"
    code, out, err = run(
        "bench", "static", "--model", "resnet50", "--batch", 32, "--gpu", "H100", "--json", written
    )
    assert code == 0, err
    assert out.count("PREDICTED") == 3
    for gpu in predict.GPUS:
        assert gpu in out
    assert "conv_kernel" in out  # what the compiler said, from the repository
    assert documents.load(written)["kind"] == "prediction"
    for arguments, part in (
        (("--gpu", "H9000"), "H9000"),
        (("--resources", written), "--resources"),
        (("--model", "vgg16"), "vgg16"),
    ):
        code, _, err = run("bench", "static", "--batch", 1, *arguments)
        assert code == 2
        assert part in err


def test_resource_files_are_found() -> None:
    for path in resources.resource_files():
        assert resources.load_resources(path)["entries"]
