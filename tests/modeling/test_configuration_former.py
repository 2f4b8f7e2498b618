"""Checkpoints of version 0.1.0, whose configurations have former names, compute what they computed there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from hf_dynmask import DynMaskConfig, DynMaskSeq2SeqConfig
from hf_dynmask.modeling.configuration_former import FORMER_NAMES, FORMER_VALUES, with_current_names

CHECKPOINTS = Path(__file__).parent / "checkpoints_0.1.0"  # saved by that version, with a batch and its logits
AUTO = {"encoder": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
BASES = {"position_type": "rotary", "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}


@pytest.mark.parametrize("name", AUTO)
def test_checkpoints_of_0_1_0(name, tmp_path):
    batch = load_file(CHECKPOINTS / name / "batch.safetensors")
    expected = batch.pop("logits")
    model, report = AUTO[name].from_pretrained(CHECKPOINTS / name, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for part in (saved, saved.get("encoder", {}), saved.get("decoder", {})):
        assert part.get("config_version", 2) == 2
        assert not FORMER_NAMES.keys() & part.keys()
    with torch.no_grad():
        torch.testing.assert_close(AUTO[name].from_pretrained(tmp_path)(**batch).logits, expected)


def test_each_way_to_read_a_configuration():
    folder = CHECKPOINTS / "encoder"
    entries = json.loads((folder / "config.json").read_text())
    config: Any = DynMaskConfig.from_pretrained(folder)
    assert (config.norm_placement, config.use_qk_norm, config.mlp_bias) == ("pre", True, False)
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert [parameters["rope_theta"] for parameters in config.rope_by_layer()] == [160000.0, 100.0, 100.0]
    for other in (
        AutoConfig.from_pretrained(folder),
        DynMaskConfig.from_json_file(folder / "config.json"),
        DynMaskConfig.from_dict(entries),
    ):
        assert other.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert entries == json.loads((folder / "config.json").read_text())
    sides: Any = DynMaskSeq2SeqConfig.from_json_file(CHECKPOINTS / "seq2seq" / "config.json")
    assert (sides.encoder.norm_placement, sides.decoder.norm_placement) == ("post", "pre")
    assert AutoModel.from_config(sides).decoder.final_norm.weight.shape == (8,)


@pytest.mark.parametrize(
    "former, current",
    [
        ({}, {}),
        ({"norm_placement": "after"}, {"norm_placement": "post"}),
        ({"norm_placement": "before"}, {"norm_placement": "pre"}),
        ({"norm_placement": "pre"}, {"norm_placement": "pre"}),
        ({"query_key_norm": True, "feed_forward_bias": None}, {"use_qk_norm": True, "mlp_bias": None}),
        ({"layer_rope_theta": None, "mask": "causal"}, {"mask": "causal"}),
        (
            {"layer_rope_theta": [1e4, 1e4], **BASES},
            {
                "position_type": "rotary",
                "layer_types": ["full_attention"] * 2,
                "rope_parameters": {"full_attention": BASES["rope_parameters"]},
            },
        ),
        (
            {"layer_rope_theta": [3.0, 1.0, 2.0, 1.0]},
            {
                "layer_types": ["full_attention", "sliding_attention", "chunked_attention", "sliding_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_theta": 3.0},
                    "sliding_attention": {"rope_theta": 1.0},
                    "chunked_attention": {"rope_theta": 2.0},
                },
            },
        ),
    ],
)
def test_current_names(former, current):
    before = json.dumps(former)
    assert with_current_names(former) == current
    assert json.dumps(former) == before


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"query_key_norm": True, "use_qk_norm": True},
            "`query_key_norm` is a former name of `use_qk_norm`, .* got both",
        ),
        ({"layer_rope_theta": 1e4}, "`layer_rope_theta` must be a list of numbers; got 10000.0"),
        ({"layer_rope_theta": [1e4, "1e5"]}, r"`layer_rope_theta` must be a list of numbers; got \[10000.0, '1e5'\]"),
        (
            {"layer_rope_theta": [1, 2, 3, 4]},
            r"`layer_rope_theta` must have at most 3 different bases; got \[1, 2, 3, 4\]",
        ),
        ({"layer_rope_theta": [1.0], "rope_parameters": [1]}, r"`rope_parameters` must be a dictionary; got \[1\]"),
    ],
)
def test_what_has_no_current_name(settings: dict[str, Any], message):
    with pytest.raises(ValueError, match=message):
        DynMaskConfig.from_dict(settings)


def test_values_are_those_that_the_field_has():
    for name, values in FORMER_VALUES.items():
        for value in values.values():
            settings: dict[str, Any] = {name: value}
            DynMaskConfig(**settings)
