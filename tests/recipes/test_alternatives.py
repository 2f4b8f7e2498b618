"""The comparison of ways to deal with padding: a tiny run, what each method computes, and on which examples."""

import json
import math
from importlib.metadata import version

import pytest
import torch

import alternatives
from alternatives import make_contenders, pack, padding_share, typical_lengths
from support import workloads

SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
LENGTHS = [9, 7, 7, 5, 3, 1]
OF_ALL = ["padded", "length-grouped", "batch-rebalanced", "flattened"]
OF_BERT = ["flattened, mask by hand", "nested tensors"]
OURS = ["packed, FlexAttention", "hf_dynmask", "hf_dynmask, one argument", "hf_dynmask, flattened"]
OURS += ["hf_dynmask, token budget"]
METHODS = {"minilm": OF_ALL + OF_BERT + OURS, "llama": OF_ALL + OURS}
FORWARD_ALONE = ["nested tensors", "packed, FlexAttention"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning",
    "ignore:flex_attention called without torch.compile:UserWarning",
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning",  # in torch's own code
    "ignore:_compile flag on create_block_mask:DeprecationWarning",  # in that of transformers
)


@pytest.fixture
def tiny(monkeypatch):
    """Small models; FlexAttention is not compiled, which takes long and a C++ compiler."""
    for name in METHODS:
        shape = workloads.SHAPES[name]
        monkeypatch.setitem(workloads.SHAPES, name, shape._replace(sizes=SIZES | {"vocab_size": 100}))
    with torch.compiler.set_stance("force_eager"):
        yield


def test_run(tiny, tmp_path, capsys):
    output = tmp_path / "new" / "alternatives.json"
    options = ["--shapes", *METHODS, "--lengths", "heavy-tailed", "--batch_size", "2", "--batches", "3"]
    alternatives.main([*options, "--repeats", "1", "--output", str(output)])
    results = json.loads(output.read_text())
    printed = capsys.readouterr().out

    for record, (shape, methods) in zip(results["comparisons"], METHODS.items(), strict=True):
        assert (record["shape"], record["lengths"], record["examples"]) == (shape, "heavy-tailed", 6)
        assert list(record["largest_difference"]) == list(record["padding_share"]) == methods
        assert list(record["seconds"]["forward"]) == methods
        assert list(record["seconds"]["forward+backward"]) == [each for each in methods if each not in FORWARD_ALONE]
        for pass_name, rates in record["real_tokens_per_second"].items():
            for method, rate in rates.items():
                assert math.isfinite(rate)
                assert rate == record["tokens"] / record["seconds"][pass_name][method]
                assert f"{rate:,.0f}" in printed
    assert printed.strip() == alternatives.report(results)
    assert f"torch {version('torch')}" in printed


@pytest.mark.parametrize("shape", METHODS)
def test_which_methods_are_exact(tiny, shape):
    """All but a BERT that is given positions alone: it takes no notice of where they restart, and sequences mix."""
    torch.manual_seed(0)
    contenders = make_contenders(shape, LENGTHS, batch_size=2)
    expected = alternatives.logits_by_example(contenders["padded"], LENGTHS)
    assert [len(logits) for logits in expected] == LENGTHS
    for method, contender in contenders.items():
        found = alternatives.logits_by_example(contender, LENGTHS)
        difference = alternatives.largest_difference(found, expected)
        if (shape, method) == ("minilm", "flattened"):
            assert difference > 1e-4
        else:
            assert difference < 1e-6


@pytest.mark.parametrize("shape", METHODS)
def test_all_methods_have_the_same_examples(tiny, shape):
    contenders = make_contenders(shape, LENGTHS, batch_size=2)
    tokens = contenders["padded"].batches
    of_first = sorted(torch.cat([batch["input_ids"].flatten() for batch in tokens]).tolist())
    real = [token for token in of_first if token > 0]
    most = max(sum(LENGTHS[k] for k in group) for group in contenders["padded"].groups)
    for method, contender in contenders.items():
        assert sorted(k for group in contender.groups for k in group) == list(range(len(LENGTHS)))
        if method == "packed, FlexAttention":
            assert {batch["input_ids"].shape for batch in contender.batches} == {(1, most)}
        else:
            found = torch.cat([batch["input_ids"].flatten() for batch in contender.batches])
            assert sorted(found[found > 0].tolist()) == real
    shares = {method: padding_share(contender.batches, sum(LENGTHS)) for method, contender in contenders.items()}
    assert shares["length-grouped"] == 1 - 32 / (2 * (9 + 7 + 3))
    assert shares["flattened"] == shares["hf_dynmask, flattened"] == 0
    assert shares["hf_dynmask"] == shares["padded"] >= shares["length-grouped"]
    assert shares["padded"] >= shares["batch-rebalanced"]


def test_torch_drops_padding(tiny):
    """What the nested tensors leave out comes back as zeros, and what the classifier makes of these is its bias."""
    contender = make_contenders("minilm", LENGTHS, batch_size=6)["nested tensors"]
    (batch,) = contender.batches
    logits = workloads.run_model(contender.model, batch, training=False).logits
    padding = logits[batch["attention_mask"] == 0]
    assert padding.shape == (6 * 9 - sum(LENGTHS), 2)
    assert torch.equal(padding, contender.model.classifier.bias.expand_as(padding))


def test_typical_lengths(monkeypatch):
    """Batches from all over an epoch: as much padding as it has, grouped and not."""
    monkeypatch.setitem(workloads.LENGTHS, "reviews", lambda count: [(1 + k % 100,) for k in range(count)])
    lengths = typical_lengths("reviews", batch_size=4, batches=10)
    batches = workloads.make_groups(lengths, 4)
    assert [max(batch) for batch in batches] == sorted((max(batch) for batch in batches), reverse=True)
    assert 1 - sum(lengths) / sum(4 * max(batch) for batch in batches) < 0.02
    assert sum(lengths) / len(lengths) == pytest.approx(50.5, abs=5)
    assert max(lengths) > 90 and min(lengths) < 10


def test_rows_of_one_size():
    examples = [{"input_ids": torch.full((n,), n), "labels": torch.zeros(n, dtype=torch.long)} for n in (2, 3)]
    batch = pack(examples, size=7)
    assert batch["input_ids"].tolist() == [[2, 2, 3, 3, 3, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 0, -100, 0, 0, -100, -100]]
    assert pack(examples, size=5)["input_ids"].tolist() == [[2, 2, 3, 3, 3]]


@pytest.mark.parametrize("batches", ["0", "51"])
def test_batches_are_part_of_those_sorted_at_once(batches):
    with pytest.raises(ValueError, match=f"`batches` must be from 1 to 50; got {batches}"):
        alternatives.main(["--batches", batches])
