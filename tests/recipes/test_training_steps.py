"""Timing of training steps on a GPU, as far as a CPU can run it: batches, ways that are not captured, failures."""

import json
from typing import Any

import pytest
import torch
from transformers import BertConfig, LlamaConfig

import benchmark
from support import training_steps
from support.training_steps import BASELINE, WAYS, WORKLOADS, Section, Workload, make_batches, run, sections

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"vocab_size": 100}
CPU = torch.device("cpu")
CAPTURED = [name for name in WAYS if "captured" in name]


def short(count):
    return torch.randint(1, 13, (count,))


TINY = {
    "BERT": Workload(BertConfig(**SIZES), 3, 12, short),
    "Llama": Workload(LlamaConfig(**SIZES, num_key_value_heads=1, pad_token_id=0), 3, 12, short),
}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(training_steps, "WORKLOADS", TINY)
    monkeypatch.setattr(training_steps, "POOL", 20)


def measured(monkeypatch, *parts):
    monkeypatch.setattr(training_steps, "sections", lambda quick: [*parts])
    return run(False, 1, CPU, 2)


@pytest.mark.parametrize("workload", TINY)
def test_each_way(workload, tiny, monkeypatch, capsys):
    ways = [name for name in WAYS if name not in training_steps.SLOW]
    records, all_well = measured(monkeypatch, Section(workload, 0.1, ways))
    printed = capsys.readouterr().out
    assert all_well, printed
    assert [record["way"] for record in records] == ways
    for record in records:
        assert f"  {record['way']} " in printed
        if record["way"] in CAPTURED:
            assert record["error"] == "skipped: a step is captured on CUDA, not on 'cpu'"
        else:
            assert record["real_tokens_per_second"] > 0 < record["speedup"]


@pytest.mark.parametrize("workload", TINY)
def test_steps_of_a_trainer(workload, tiny, monkeypatch):
    ways = [BASELINE, "ours, fixed flat", "stock, our attention, flat"]
    records, all_well = measured(monkeypatch, Section(workload, 0.0, ways, in_trainer=True))
    assert all_well, [record.get("error") for record in records]
    assert records[0]["speedup"] == 1
    assert all(record["real_tokens_per_second"] > 0 < record["speedup"] for record in records)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers(tiny, monkeypatch):
    monkeypatch.setitem(WAYS, "eagerly", training_steps.Way("stock", "padded", {"backend": "eager"}))
    monkeypatch.setitem(WAYS, "whole", training_steps.Way("stock", "padded", {"backend": "eager"}, whole=True))
    records, all_well = measured(monkeypatch, Section("BERT", 0.0, ["eagerly", "whole"]))
    assert all_well, [record.get("error") for record in records]


def test_what_fails_is_said_and_the_others_are_measured(tiny, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(WAYS, "broken", training_steps.Way("stock", "nothing"))
    monkeypatch.setattr(training_steps, "sections", lambda quick: [Section("BERT", 0.0, ["broken", BASELINE])])
    monkeypatch.setattr(benchmark, "describe_environment", lambda device: {"device": str(device)})
    options = benchmark.BenchmarkArguments(repeats=1, output=str(tmp_path / "new" / "steps.json"))
    with pytest.raises(SystemExit, match="1"):
        benchmark.time_training_steps(options, CPU)
    printed = capsys.readouterr().out
    assert f"{'broken':43} FAILED: KeyError: 'nothing'" in printed
    records = json.loads((tmp_path / "new" / "steps.json").read_text())["steps"]
    assert [record["way"] for record in records] == ["broken", BASELINE]
    assert records[1]["real_tokens_per_second"] > 0


def test_a_quick_run_ends_in_time(tiny, monkeypatch):
    monkeypatch.setattr(training_steps, "STARTED", float("-inf"))
    monkeypatch.setattr(training_steps, "sections", lambda quick: [Section("BERT", 0.0, [BASELINE])])
    records, all_well = run(True, 1, CPU, 2)
    assert all_well
    assert records[0]["error"] == f"skipped: {training_steps.QUICK_SECONDS} seconds are over"


@pytest.mark.parametrize("quick", [True, False])
def test_sections_name_what_there_is(quick):
    for section in sections(quick):
        assert section.workload in WORKLOADS
        assert section.ways[0] == BASELINE
        assert set(section.ways) <= set(WAYS)
    measured = {name for section in sections(quick) for name in section.ways}
    assert quick or measured == set(WAYS)


def shapes(batch):
    return {name: getattr(value, "shape", value) for name, value in batch.items()}


def test_batches(tiny):
    batches = {kind: make() for kind, make in make_batches(TINY["BERT"], 2).items()}
    assert {way.batches for way in WAYS.values()} == set(batches)
    for kind in ("padded", "one width", "rows", "flat", "batch_rebalance"):
        assert sorted(batches[kind][1]) == sorted(batches["padded"][1]), kind  # the same texts
    for kind, (found, lengths) in batches.items():
        assert len(found) == 2
        targets = sum(int((batch["labels"] != -100).sum()) for batch in found)
        assert targets == sum(lengths) - (len(lengths) if kind == "flat" else 0), kind
    for kind in ("one width", "fixed flat"):
        one, other = batches[kind][0]
        assert shapes(one) == shapes(other)
    assert batches["one width"][0][0]["input_ids"].shape == (3, 12)
    for batch in batches["fixed flat"][0]:
        assert int(batch["lengths"].sum()) <= batch["input_ids"].shape[1]
        assert batch["lengths"].sum() == (batch["labels"] != -100).sum()


def test_groups_are_of_like_lengths(tiny):
    found, _ = make_batches(TINY["BERT"]._replace(draw=lambda n: torch.arange(n) % 12 + 1), 2)["group_by_length"]()
    for batch in found:
        lengths = batch["attention_mask"].sum(1)
        assert lengths.max() - lengths.min() <= 1


def test_first_tokens_of_a_causal_row_are_no_targets():
    examples = [{"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([5, 6, 7])}] * 2
    row = training_steps.flat_row(examples, TINY["Llama"].config)
    assert row["labels"].tolist() == [[-100, 6, 7, -100, 6, 7]]
