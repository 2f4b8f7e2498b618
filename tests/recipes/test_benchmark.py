"""The benchmark: a tiny run, what it counts and how it measures. No test depends on how long something takes."""

import json
import math
import sys
from importlib.metadata import version

import pytest
import torch
from transformers import BartConfig, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import benchmark
from support import timing, workloads

SHAPE = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
SIDES = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
SMALLER = {"bart": {"d_model": 16} | {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in SIDES.items()}}
PAIRS = [(3, 2), (9, 4), (1, 6), (7, 1)]
CPU = torch.device("cpu")
LENGTHS = ["uniform", "heavy-tailed", "equal"]
METHODS = ["padded", "sorted", "dynmask", "floor", "unpadded", "flat"]


@pytest.fixture
def tiny(monkeypatch):
    for name, shape in workloads.SHAPES.items():
        sizes = SMALLER.get(name, SHAPE) | {"vocab_size": 100}
        monkeypatch.setitem(workloads.SHAPES, name, shape._replace(sizes=sizes))
    monkeypatch.setattr(benchmark, "MASK_TOKENS", 600)
    monkeypatch.setattr(benchmark, "MASK_MEMORY_TOKENS", (300, 600))


def numbers(value):
    if isinstance(value, dict | list):
        return [number for part in (value.values() if isinstance(value, dict) else value) for number in numbers(part)]
    return [value] if isinstance(value, int | float) else []


def test_run(tiny, tmp_path, capsys):
    output = tmp_path / "new" / "benchmark.json"
    options = ["--lengths", *LENGTHS, "--batch_size", "2", "--batches", "2", "--repeats", "1"]
    benchmark.main([*options, "--output", str(output)])
    results = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    cells = [tuple(record[key] for key in ("dtype", "lengths", "pass")) for record in results["models"]]
    passes = ["forward", "forward+backward"]
    assert cells == [(d, n, p) for d in ("float32", "bfloat16") for n in LENGTHS for p in passes]
    assert [(record["dtype"], record["pass"]) for record in results["mask"]] == [
        (d, p) for d in ("float32", "bfloat16") for p in passes
    ]
    assert all(math.isfinite(number) for number in numbers(results))
    for record in results["models"]:
        seconds = record["seconds"]
        assert list(seconds) == METHODS
        assert record["speedup"] == seconds["padded"] / seconds["dynmask"]
        assert record["share_of_ideal"] == record["speedup"] / record["ideal_speedup"]
        assert record["speedup_over_sorted"] == seconds["sorted"] / seconds["dynmask"]
        assert record["unpadded_over_dynmask"] == seconds["dynmask"] / seconds["unpadded"]
        assert record["flat_over_dynmask"] == seconds["dynmask"] / seconds["flat"]
        assert f"{record['share_of_floor_rate']:.3f}" in printed
        if record["lengths"] == "equal":
            assert (record["padding_share"], record["ideal_speedup"]) == (0, 1)
        else:
            assert record["ideal_speedup"] > 1 / (1 - record["padding_share"]) > 1
    assert [record["dtype"] for record in results["budget"]] == ["float32", "bfloat16"]
    for record in results["budget"]:
        assert record["speedup"] == record["seconds"]["fixed"] / record["seconds"]["budget"]
        assert record["steps"]["fixed"] == benchmark.BUDGET_BATCHES >= record["steps"]["budget"]
    assert printed.strip() == benchmark.report(results)
    assert f"torch {version('torch')}" in printed
    assert f"threads {torch.get_num_threads()}" in printed


def test_lengths_have_to_fit_the_shape():
    with pytest.raises(ValueError, match=r"`lengths` of 'bart' must be of pairs; got reviews, equal"):
        benchmark.main(["--shapes", "minilm", "bart", "--lengths", "reviews", "equal"])


def test_flops_by_hand():
    """Two layers of width 4 and 8: 2 * (4 * 4 * 4 + 2 * 4 * 8) = 256 weights; 8 tokens; 9 + 25 = 34 pairs."""
    config = BertConfig(num_hidden_layers=2, hidden_size=4, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    forward = 2 * 256 * 8 + 4 * 2 * 4 * 34
    assert benchmark.flops(config, [(3,), (5,)], training=False) == forward == 5184
    assert benchmark.flops(config, [(3,), (5,)], training=True) == 3 * 5184
    matrices = [weight for weight in BertModel(config).encoder.parameters() if weight.dim() == 2]
    assert sum(weight.numel() for weight in matrices) == 256


def test_flops_of_a_causal_model():
    """A layer's matrices and the output's are 160 + 36 weights; 6 + 15 = 21 pairs."""
    config = LlamaConfig(num_hidden_layers=1, hidden_size=4, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    assert benchmark.flops(config, [(3,), (5,)], training=False) == 2 * (160 + 36) * 8 + 4 * 4 * 21
    matrices = [weight for name, weight in LlamaForCausalLM(config).named_parameters() if "embed" not in name]
    assert sum(weight.numel() for weight in matrices if weight.dim() == 2) == 160 + 36


def test_flops_of_an_encoder_decoder():
    """An encoder layer has 128 weights; of a decoder layer 96 + 64 act on its tokens, 32 on those of the source."""
    config = BartConfig(
        encoder_layers=1, decoder_layers=1, d_model=4, encoder_ffn_dim=8, decoder_ffn_dim=8, vocab_size=9
    )
    expected = 2 * ((128 + 32) * 3 + (96 + 64 + 36) * 2) + 4 * 4 * (9 + 3 + 6)
    assert benchmark.flops(config, [(3, 2)], training=False) == expected


def test_batches():
    lengths = [(3,), (9,), (1,), (7,), (2,), (4,)]
    batches = benchmark.make_batches(lengths, 3, BertConfig(vocab_size=50), CPU)
    assert list(batches) == METHODS
    assert {len(batches[method]) for method in METHODS} == {2}
    for padded, ours in zip(batches["padded"], batches["dynmask"], strict=True):
        assert torch.equal(padded["input_ids"], ours["input_ids"])
        assert torch.equal(padded["attention_mask"], (ours["input_ids"] > 0).long())
    computed = {method: benchmark.computed_lengths(batches[method], BertConfig()) for method in METHODS}
    assert computed == {
        "padded": [(9,)] * 3 + [(7,)] * 3,
        "sorted": [(3,)] * 3 + [(9,)] * 3,
        "dynmask": lengths,
        "floor": [(4,)] * 6,
        "unpadded": [(9,)] * 3 + [(7,)] * 3,  # as they come in
        "flat": lengths,
    }
    tokens = [torch.cat([b["input_ids"].flatten() for b in batches[m]]) for m in ("padded", "sorted")]
    first, second = (ids[ids > 0].sort().values for ids in tokens)
    assert torch.equal(first, second)


def test_batches_of_pairs():
    config = BartConfig(vocab_size=50)
    batches = benchmark.make_batches(PAIRS, 2, config, CPU)
    computed = {method: benchmark.computed_lengths(batches[method], config) for method in batches}
    assert computed == {
        "padded": [(9, 4)] * 2 + [(7, 6)] * 2,
        "sorted": [(3, 6)] * 2 + [(9, 4)] * 2,
        "dynmask": PAIRS,
        "floor": [(6, 3)] * 2 + [(4, 4)] * 2,
        "unpadded": [(9, 4)] * 2 + [(7, 6)] * 2,
    }


def loss_or_norms(model, batch, training):
    """The loss, or the norms of all gradients while training."""
    computed = workloads.run_model(model, batch, training)
    return sorted(gradient.norm() for gradient in computed) if training else computed.loss


@pytest.mark.parametrize("shape", ["minilm", "llama", "bart"])
def test_methods_compute_the_same(tiny, shape):
    stock, ours = workloads.make_models(shape, "float32", CPU)
    assert stock.config._attn_implementation == "sdpa"
    lengths = PAIRS if shape == "bart" else [(source,) for source, _ in PAIRS]
    batches = benchmark.make_batches(lengths, 4, stock.config, CPU)
    for training in (False, True):
        expected = loss_or_norms(stock, batches["padded"][0], training)
        found = loss_or_norms(ours, batches["dynmask"][0], training)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", ["minilm", "llama", "bart"])
def test_the_stock_model_with_our_attention_computes_the_same(tiny, shape):
    stock, _ = workloads.make_models(shape, "float32", CPU)
    lengths = PAIRS if shape == "bart" else [(source,) for source, _ in PAIRS]
    (batch,) = benchmark.make_batches(lengths, 4, stock.config, CPU)["unpadded"]
    expected = [loss_or_norms(stock, batch, training) for training in (False, True)]
    stock.set_attn_implementation("dynmask")
    for training in (False, True):
        found = loss_or_norms(stock, batch, training)
        torch.testing.assert_close(found, expected[training], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", ["minilm", "llama"])
def test_the_stock_model_on_flat_batches_computes_the_same(tiny, shape):
    """Apart from the labels of first tokens, which the flat batch has not, as no causal model predicts them."""
    stock, _ = workloads.make_models(shape, "float32", CPU)
    batches = benchmark.make_batches([(source,) for source, _ in PAIRS], 4, stock.config, CPU)
    padded = batches["padded"][0]
    padded["labels"][:, 0] = -100
    expected = [loss_or_norms(stock, padded, training) for training in (False, True)]
    stock.set_attn_implementation("dynmask")
    for training in (False, True):
        found = loss_or_norms(stock, batches["flat"][0], training)
        torch.testing.assert_close(found, expected[training], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name, low, high", [("uniform", 8, 256), ("heavy-tailed", 16, 512), ("equal", 64, 64)])
def test_lengths(name, low, high):
    lengths = [length for (length,) in workloads.LENGTHS[name](20000)]
    assert len(lengths) == 20000
    assert (min(lengths), max(lengths)) == (low, high)


def test_methods_take_turns():
    calls = []
    jobs = {method: [lambda m=method, i=i: calls.append((m, i)) for i in range(2)] for method in "ab"}
    seconds = timing.time_in_turns(jobs, repeats=2, device=CPU)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1)] * 3
    assert list(seconds) == ["a", "b"]


def test_time_is_the_sum_of_medians_after_a_warm_up(monkeypatch):
    times = iter([100, 50, 7, 1, 3, 4, 5, 2])
    monkeypatch.setattr(timing, "_seconds", lambda job, device: next(times))
    assert timing.time_in_turns({"a": [print, print]}, repeats=3, device=CPU) == {"a": 5 + 2}


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells the peak of a process on Linux only")
def test_peak_memory():
    """A block of 64 MiB, twice, each freed before the next."""
    megabytes = timing.peak_memory([lambda: torch.ones(16 * 2**20)] * 2, CPU)
    assert megabytes == pytest.approx(64, abs=8)


def test_figure():
    """A panel for each pass, in it as many bars for each kind of lengths as there are methods to show."""
    rates = {"padded": 10.0, "sorted": 20.0, "dynmask": 30.0, "floor": 40.0}
    records = [
        {"shape": "bart", "dtype": "float32", "lengths": name, "pass": of, "real_tokens_per_second": rates}
        for name in ("pairs", "equal", "uniform")
        for of in ("forward", "forward+backward")
    ]
    figure = benchmark.draw(records)
    assert [axes.get_title() for axes in figure.axes] == ["bart, float32, forward", "bart, float32, forward+backward"]
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["pairs", "equal", "uniform"]
        heights = [float(height) for bars in axes.containers for height in bars.datavalues]  # pyright: ignore
        assert heights == [10.0] * 3 + [30.0] * 3 + [40.0] * 3
