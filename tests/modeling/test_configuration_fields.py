"""Configurations of strangers: each loads at once or is refused by name."""

import json
import random
import re
import resource
from dataclasses import fields
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from hf_dynmask import DynMaskConfig, DynMaskRecurrentConfig, DynMaskSeq2SeqConfig

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 16,
}
BY_TYPE = {"full_attention": {"rope_theta": 1e5}, "sliding_attention": {"rope_theta": 1e4}}
ROTARY: dict[str, Any] = {"position_type": "rotary", "rope_parameters": BY_TYPE, "layer_types": list(BY_TYPE)}
CONFIGS = [
    DynMaskConfig(**SIZES),
    DynMaskConfig(**SIZES | ROTARY, use_qk_norm=True, norm_placement="pre"),
    DynMaskConfig.from_dict(
        SIZES
        | {
            "position_type": "rotary",
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            "layer_masks": ["causal & window(3, 0)", "heads(full, causal)"],
            "num_features": 3,
            "conv_kernel": [3, 3],
            "conv_stride": [1, 2],
            "num_labels": 3,
            "dtype": "float32",
        }
    ),
    DynMaskSeq2SeqConfig(**SIZES, encoder={"mask": "window(4)"}, decoder_start_token_id=2),
    DynMaskRecurrentConfig(vocab_size=60, hidden_size=16),
]
VALUES = [
    *[None, True, False, 0, -1, 1, 2, 3, 7, 10**7, 10**20, -(10**20), 10**400],
    *[0.0, -0.0, 0.5, -0.5, 1.0, 2.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")],
    *["", " ", "x", "0", "full", "causal &", "# full", "heads(full, causal)", "heads(full, full, causal)", "~" * 9000],
    *[
        "gelu",
        "tanh",
        "rotary",
        "gru",
        "weights",
        "float16",
        "half",
        "nn",
        "default",
        "yarn",
        "\x00",
        "\ud800",
        "ｆull",
    ],
    *[[], [0], [1, 2], [0.5, "x"], ["full", "causal"], ["full", None], [[]], [3] * 1000, ["full"] * 1000],
    *[{}, {"0": "x"}, {"x": 0}, {"rope_type": "yarn"}, {"rope_type": []}, {"rope_theta": "x"}, {"hidden_size": 0}],
]
KEYS = [
    *["masks", "maks", "hiden_size", "validate", "to_dict", "attribute_map", "sub_configs", "__class__", "__dict__"],
    *["query_key_norm", "feed_forward_bias", "layer_rope_theta"],
    *["num_labels", "torch_dtype", "rope_scaling", "rope_theta", "partial_rotary_factor", "per_layer_config"],
    *[
        "layer_types",
        "output_attentions",
        "attn_implementation",
        "use_return_dict",
        "id2label",
        "label2id",
        "use_cache",
    ],
    *["_name_or_path", "name_or_path", "return_dict", "problem_type", "is_encoder_decoder", "quite_unknown", ""],
]
REFUSED = (ValueError, StrictDataclassError)
COMMON = {field.name for field in fields(PreTrainedConfig)}


def own_fields(config) -> list[str]:
    return [field.name for field in fields(config) if field.name not in COMMON]


# --- mutations -------------------------------------------------------------------------------------------------------


def mutated(seed: int) -> dict:
    """A saved configuration, of which one to three settings are others."""
    draw = random.Random(seed)
    settings = json.loads(json.dumps(draw.choice(CONFIGS).to_dict()))
    for _ in range(draw.randint(1, 3)):
        place = settings
        while True:
            key = draw.choice([key for key in [*place, *KEYS] if key != "model_type"])
            if not isinstance(place.get(key), dict) or draw.random() < 0.2 or not place[key]:
                break
            place = place[key]
        match draw.randrange(8):
            case 0:
                place.pop(key, None)
            case 1 if key:
                slip = draw.randrange(len(key))
                place[key[:slip] + key[slip + 1 :]] = place.pop(key, draw.choice(VALUES))
            case _:
                place[key] = draw.choice(VALUES)
    return settings


def load(settings: dict, folder):
    (folder / "config.json").write_text(json.dumps(settings))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("part", range(4))
def test_mutations_load_or_are_refused_by_name(part, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = 0
    for seed in range(250 * part, 250 * (part + 1)):
        settings = mutated(seed)
        try:
            config = load(settings, tmp_path)
        except REFUSED as error:
            assert re.search(r"`[\w\[\]'.()]+`|[Ff]ield '\w+", str(error)), f"{settings} is refused with {error!r}"
        else:
            loaded += 1
            config.save_pretrained(tmp_path)
            again = AutoConfig.from_pretrained(tmp_path)
            assert {name: getattr(again, name) for name in own_fields(config)} == {
                name: getattr(config, name) for name in own_fields(config)
            }
    assert 20 <= loaded <= 230
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10


# --- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [DynMaskConfig, DynMaskRecurrentConfig])
def test_each_field_has_a_range_or_needs_none(config_class):
    free = {"source_model_type", "config_version", "pad_token_id", "bos_token_id", "eos_token_id"}
    for field in fields(config_class):
        if field.name in free | COMMON or field.type in (bool, bool | None):
            continue
        assert field.metadata["validator"], field.name


WRONG = [
    ({"vocab_size": 0}, r"`vocab_size` must be at least 1; got 0"),
    ({"hidden_size": -1}, r"`hidden_size` must be at least 1; got -1"),
    ({"hidden_size": 10**20}, r"`hidden_size` must be at most 2147483647; got 1000"),
    (
        {"hidden_size": True},
        r"'hidden_size' expected int, got bool \(value: True\)|`hidden_size` must be an integer; got True",
    ),
    ({"hidden_size": "16"}, r"'hidden_size' expected int, got str \(value: '16'\)"),
    ({"hidden_size": 16.0}, r"'hidden_size' expected int, got float"),
    ({"embedding_size": 0}, r"`embedding_size` must be at least 1; got 0"),
    ({"num_features": -3}, r"`num_features` must be at least 1; got -3"),
    ({"conv_kernel": [3, 0]}, r"`conv_kernel\[1\]` must be at least 1; got 0"),
    ({"conv_kernel": ["3"]}, r"'conv_kernel' with value \['3'\] doesn't match any type"),
    ({"conv_stride": [-1]}, r"`conv_stride\[0\]` must be at least 1; got -1"),
    ({"num_hidden_layers": 0}, r"`num_hidden_layers` must be at least 1; got 0"),
    ({"num_attention_heads": 0}, r"`num_attention_heads` must be at least 1; got 0"),
    ({"num_key_value_heads": 0}, r"`num_key_value_heads` must be at least 1; got 0"),
    ({"num_key_value_heads": -2}, r"`num_key_value_heads` must be at least 1; got -2"),
    ({"head_dim": 0}, r"`head_dim` must be at least 1; got 0"),
    (
        {"num_attention_heads": 32},
        r"`hidden_size` must be a multiple of num_attention_heads=32, .* given; got 16",
    ),
    (
        {"num_attention_heads": 3},
        r"`hidden_size` must be a multiple of num_attention_heads=3, .* given; got 16",
    ),
    ({"value_head_dim": -4}, r"`value_head_dim` must be at least 1; got -4"),
    ({"intermediate_size": 0}, r"`intermediate_size` must be at least 1; got 0"),
    ({"hidden_act": "nothing"}, r"`hidden_act` must be the name of an activation .* gelu, .*; got 'nothing'"),
    ({"hidden_act": ""}, r"`hidden_act` must be the name of an activation"),
    ({"pooler_act": "nothing"}, r"`pooler_act` must be the name of an activation"),
    ({"lm_head_act": "gelu "}, r"`lm_head_act` must be the name of an activation .*; got 'gelu '"),
    ({"classifier_pooling": "cls"}, r"`classifier_pooling` must be one of 'first', 'last', 'mean', 'late'; got 'cls'"),
    ({"classifier_transform": None}, r"classifier_transform"),
    (
        {"classifier_transform": "dense"},
        r"`classifier_transform` must be one of 'pooler', 'lm_head', 'none'; got 'dense'",
    ),
    (
        {"lm_head_transform": False, "embedding_size": 3},
        r"`embedding_size` must be hidden_size=\d+ with lm_head_transform=False; got 3",
    ),
    (
        {"norm_type": "batch_norm"},
        r"`norm_type` must be one of 'layer_norm', 'rms_norm', 'zero_.*_norm'; got 'batch_norm'",
    ),
    ({"norm_placement": "between"}, r"`norm_placement` must be one of 'pre', 'post', 'both'; got 'between'"),
    ({"query_pre_attn_scalar": 0}, r"`query_pre_attn_scalar` must be a finite number above 0; got 0"),
    ({"norm_eps": 0.0}, r"`norm_eps` must be a finite number above 0; got 0.0"),
    ({"norm_eps": float("nan")}, r"`norm_eps` must be a finite number above 0; got nan"),
    ({"embedding_scale": float("inf")}, r"`embedding_scale` must be a finite number above 0; got inf"),
    ({"embedding_scale": 10**400}, r"`embedding_scale` must be .*; got an integer of 1329 bits"),
    ({"position_type": "absolute"}, r"`position_type` must be one of 'learned', .*; got 'absolute'"),
    ({"position_offset": -1}, r"`position_offset` must be at least 0; got -1"),
    ({"max_position_embeddings": -1}, r"`max_position_embeddings` must be at least 1; got -1"),
    ({"rope_parameters": [1]}, r"'rope_parameters' with value \[1\] doesn't match any type"),
    ({"rope_parameters": {"rope_type": "spiral"}}, r"`rope_parameters\['rope_type'\]` must be one of .*'spiral'"),
    ({"rope_parameters": {"rope_type": None}}, r"`rope_parameters\['rope_type'\]` must be one of .* got None"),
    ({"rope_parameters": {"rope_theta": None}}, r"`rope_parameters\['rope_theta'\]` must be a finite number above 0"),
    ({"rope_parameters": {"rope_theta": "1e4"}}, r"`rope_parameters\['rope_theta'\]` must be .*; got '1e4'"),
    ({"rope_parameters": {"factor": -2.0}}, r"`rope_parameters\['factor'\]` must be a finite number above 0; got -2.0"),
    ({"rope_parameters": {"short_factor": 1.0}}, r"`rope_parameters\['short_factor'\]` must be a list; got 1.0"),
    ({"rope_parameters": {"long_factor": [1.0, "x"]}}, r"`rope_parameters\['long_factor'\]\[1\]` must be .* got 'x'"),
    (
        {"rope_parameters": {"original_max_position_embeddings": 0}},
        r"`rope_parameters\['original_max_position_embeddings'\]` must be at least 1; got 0",
    ),
    (
        {"position_type": "rotary", "rope_parameters": {"rope_type": "linear"}},
        r"`rope_parameters` must have what its `rope_type` needs; got .*factor",
    ),
    ({"rope_theta": -1.0}, r"`rope_theta` must be a finite number above 0; got -1.0"),
    ({"rope_scaling": "linear"}, r"`rope_scaling` must be a dictionary; got 'linear'"),
    ({"rope_scaling": BY_TYPE, "position_type": "rotary"}, r"`layer_types` must name types in .*; got None"),
    (
        {"rope_parameters": {**BY_TYPE, "rope_theta": 1e4}},
        r"`rope_parameters.keys\(\)` must be one of .*; got 'rope_theta'",
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 0.0}}},
        r"`rope_parameters\['full_attention'\]\['rope_theta'\]` must be a finite number above 0; got 0.0",
    ),
    (
        {"rope_parameters": {**BY_TYPE, "sliding_attention": None}},
        r"`rope_parameters\['sliding_attention'\]` must be a dictionary; got None",
    ),
    (
        {"layer_types": ["full_attention", "conv"]},
        r"`layer_types\[1\]` must be one of 'full_attention', .*; got 'conv'",
    ),
    (
        {**ROTARY, "layer_types": ["full_attention"]},
        r"`layer_types` must have one entry a layer, num_hidden_layers=2; got 1",
    ),
    (
        {**ROTARY, "layer_types": ["full_attention", "chunked_attention"]},
        r"`layer_types` must name types in `rope_parameters`, \['full_attention', .*\]; got 'chunked_attention'",
    ),
    (
        {**ROTARY, "rope_theta": 1e4},
        r"`rope_theta` must be in the entries of `rope_parameters`, by layer type; got 10000.0",
    ),
    (
        {**ROTARY, "rope_parameters": {kind: {"partial_rotary_factor": 0.5} for kind in BY_TYPE}},
        r"`partial_rotary_factor` must be 1.0: heads are rotated whole; got 0.5",
    ),
    (
        {**ROTARY, "rope_parameters": None},
        r"`layer_types` must be None unless `rope_parameters` is by layer type .* with position_type='rotary'",
    ),
    ({**ROTARY, "position_type": "none"}, r"`layer_types` must be None unless .* with position_type='none'"),
    ({"sliding_window": 4}, r"`sliding_window` must not be given"),
    ({"query_key_norm": True}, r"`query_key_norm` is a former name of `use_qk_norm`; got True"),
    ({"feed_forward_bias": False}, r"`feed_forward_bias` is a former name of `mlp_bias`; got False"),
    ({"layer_rope_theta": [1e4, 1e5]}, r"`layer_rope_theta` is a former name of `rope_parameters`; got \[10000.0, "),
    ({"norm_placement": "before"}, r"`norm_placement` must be one of 'pre', 'post', 'both'; got 'before'"),
    ({"type_vocab_size": -1}, r"`type_vocab_size` must be at least 0; got -1"),
    ({"hidden_dropout_prob": -0.5}, r"`hidden_dropout_prob` must be a number from 0 to 1; got -0.5"),
    ({"attention_probs_dropout_prob": 2.0}, r"`attention_probs_dropout_prob` must be a number from 0 to 1; got 2.0"),
    ({"classifier_dropout": float("nan")}, r"`classifier_dropout` must be a number from 0 to 1; got nan"),
    (
        {"pooler_dropout": True},
        r"'pooler_dropout' with value True|`pooler_dropout` must be a number from 0 to 1; got True",
    ),
    ({"initializer_range": -0.02}, r"`initializer_range` must be a finite number of at least 0; got -0.02"),
    ({"mask": ""}, r"`mask`: mask does not parse at column 1: expected a mask, not the end; got ''"),
    ({"mask": "causal # & full"}, r"`mask`: mask does not parse at column 8"),
    ({"mask": ["causal"]}, r"'mask' with value \['causal'\] doesn't match any type"),
    ({"mask": "heads(full, full, causal)"}, r"`heads` must be given a number of masks that divides the 4 heads; got 3"),
    ({"cross_mask": " "}, r"`cross_mask`: mask does not parse at column 2"),
    ({"layer_masks": ["full", ""]}, r"`layer_masks\[1\]`: mask does not parse at column 1"),
    ({"layer_masks": ["full", 1]}, r"'layer_masks' with value \['full', 1\] doesn't match any type"),
    ({"layer_masks": []}, r"`layer_masks` must have one entry a layer, num_hidden_layers=2; got 0"),
    ({"apply_mask_to": "keys"}, r"`apply_mask_to` must be one of 'scores', 'weights'; got 'keys'"),
    ({"ctc_loss_reduction": "none"}, r"`ctc_loss_reduction` must be one of 'mean', 'sum'; got 'none'"),
    ({"pad_token_id": 60}, r"`pad_token_id` must be None or a token id below vocab_size=60; got 60"),
    ({"pad_token_id": "0"}, r"'pad_token_id' with value '0' doesn't match any type"),
    ({"source_model_type": 3}, r"'source_model_type' with value 3 doesn't match any type"),
    ({"use_cache": "yes"}, r"'use_cache' expected bool, got str"),
]
OF_TRANSFORMERS = [
    ({"num_labels": 10**9}, r"`num_labels` must be at most 100000; got 1000000000"),
    ({"num_labels": 0}, r"`num_labels` must be at least 1; got 0"),
    ({"num_labels": None}, r"`num_labels` must be an integer; got None"),
    ({"id2label": {"first": "a"}}, r"`id2label.keys\(\)` must be an integer; got 'first'"),
    ({"id2label": {}}, r"`id2label` must have at least one entry; got \{\}"),
    ({"id2label": ["a"]}, r"`id2label` must be a dictionary; got \['a'\]|'id2label' with value"),
    ({"label2id": {"a": "first"}}, r"`label2id\['a'\]` must be an integer; got 'first'"),
    ({"dtype": "float17"}, r"`dtype` must be a floating dtype of torch, or its name; got 'float17'"),
    ({"dtype": "nn"}, r"`dtype` must be a floating dtype of torch"),
    ({"torch_dtype": "int8"}, r"`torch_dtype` must be a floating dtype of torch, .*; got 'int8'"),
    ({"problem_type": "clustering"}, r"`problem_type` must be one of|'problem_type' "),
    ({"architectures": "DynMaskModel"}, r"`architectures` must be a list; got 'DynMaskModel'|'architectures' "),
    ({"attn_implementation": 5}, r"`attn_implementation` must be text, or a dictionary; got 5"),
    ({"auto_map": ["AutoModel"]}, r"`auto_map` must be a dictionary; got \['AutoModel'\]"),
    ({"auto_map": {"AutoModel": 3}}, r"`auto_map\['AutoModel'\]` must be text, or a list; got 3"),
    ({"layer_types": 5}, r"`layer_types` must be a list; got 5|'layer_types' with value 5"),
    (
        {"per_layer_config": {"0": {"hidden_size": 2}}},
        r"`per_layer_config` must be None: a DynMask\w+ has equal layers",
    ),
    ({"validate": 1}, r"`validate` must not be given: it is no field of DynMask\w+, but part of its code; got 1"),
    ({"check_shareable": None}, r"`check_shareable` must not be given"),
    ({"use_return_dict": True}, r"`use_return_dict` must not be given"),
    ({"attribute_map": {"mask": "cross_mask"}}, r"`attribute_map` must not be given"),
    ({"__class__": "DynMaskConfig"}, r"`__class__` must not be given"),
]


@pytest.mark.parametrize("settings, message", WRONG + OF_TRANSFORMERS)
def test_what_a_field_cannot_be(settings, message):
    with pytest.raises(REFUSED, match=message):
        DynMaskConfig(**SIZES | settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cell": "rnn"}, r"`cell` must be one of 'lstm', 'gru'; got 'rnn'"),
        ({"num_hidden_layers": 0}, r"`num_hidden_layers` must be at least 1; got 0"),
        ({"classifier_dropout": 1.5}, r"`classifier_dropout` must be a number from 0 to 1; got 1.5"),
        ({"pad_token_id": 10**20}, r"`pad_token_id` must be None or a token id below vocab_size=10000"),
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            r"`rope_scaling` must be None: a \w+ has no rotary positions of its own",
        ),
        *OF_TRANSFORMERS,
    ],
)
def test_what_a_field_of_a_recurrent_model_cannot_be(settings, message):
    with pytest.raises(REFUSED, match=message):
        DynMaskRecurrentConfig(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"encoder": [1]}, r"'encoder' with value \[1\] doesn't match any type"),
        ({"decoder": "causal"}, r"'decoder' with value 'causal' doesn't match any type"),
        ({"encoder": {"mask": ""}}, r"(?s)field 'encoder':.*`mask`: mask does not parse at column 1"),
        ({"decoder": {"cross_mask": 5}}, r"(?s)field 'decoder':.*'cross_mask' expected str, got int"),
        ({"encoder": {"num_labels": "2"}}, r"(?s)field 'encoder':.*`num_labels` must be an integer; got '2'"),
        ({"decoder": {"masks": 1}}, r"(?s)field 'decoder':.*`masks` must not be given"),
        ({"mask": "causal &"}, r"(?s)field 'encoder':.*`mask`: mask does not parse at column 9"),
        ({"num_attention_heads": 0}, r"(?s)field 'encoder':.*`num_attention_heads` must be at least 1; got 0"),
        ({"share_embeddings": "yes"}, r"'share_embeddings' with value 'yes' doesn't match any type"),
        ({"decoder_start_token_id": [1]}, r"'decoder_start_token_id' with value \[1\] doesn't match any type"),
        *OF_TRANSFORMERS,
    ],
)
def test_what_a_field_of_an_encoder_decoder_cannot_be(settings, message):
    with pytest.raises(REFUSED, match=message):
        DynMaskSeq2SeqConfig(**SIZES | settings)


@pytest.mark.parametrize("name, value", [("mask", ""), ("hidden_act", "nothing"), ("num_attention_heads", 0)])
def test_fields_are_checked_whenever_they_are_set(name, value, tmp_path):
    config = DynMaskConfig(**SIZES)
    before = config.to_dict()
    with pytest.raises(StrictDataclassError, match=f"`{name}`"):
        setattr(config, name, value)
    assert config.to_dict() == before
    config.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=f"`{name}`"):
        AutoConfig.from_pretrained(tmp_path, **{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**9},
        {
            "num_attention_heads": 10**9,
            "num_key_value_heads": 10**9,
            "head_dim": 8,
            "mask": "heads(full, causal)",
            "layer_masks": ["heads(full, full, causal, full)", "window(1000000000000)"],
        },
        {"vocab_size": 2**31 - 1, "max_position_embeddings": 2**31 - 1, "intermediate_size": 2**31 - 1},
    ],
)
def test_large_numbers_cost_nothing(settings, tmp_path):
    config = load(DynMaskConfig(**SIZES).to_dict() | settings, tmp_path)
    assert all(getattr(config, name) == value for name, value in settings.items())
    config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, known",
    [
        ("msak", "mask"),
        ("hidden_sizes", "hidden_size"),
        ("layer_mask", "layer_masks"),
        ("num_hiddem_layers", "num_hidden_layers"),
    ],
)
def test_a_slip_in_a_name_is_warned_of(name, known, caplog):
    settings: dict[str, Any] = {name: None}
    DynMaskConfig(**settings)
    assert f"`{name}` is no field of DynMaskConfig; is it meant to be `{known}`?" in caplog.text
    DynMaskSeq2SeqConfig(**settings)
    assert f"`{name}` is no field of DynMaskSeq2SeqConfig; is it meant to be `{known}`?" in caplog.text


def test_what_transformers_writes_is_no_slip(caplog, tmp_path):
    known = [
        "torch_dtype",
        "tie_encoder_decoder",
        "torchscript",
        "use_bfloat16",
        "pruned_heads",
        "is_decoder",
        "prefix",
    ]
    known += ["finetuning_task", "task_specific_params", "tokenizer_class", "cross_attention_hidden_size", "num_beams"]
    for config in CONFIGS:
        load(dict.fromkeys(known) | config.to_dict(), tmp_path)
    assert "is no field of" not in caplog.text


def test_a_setting_that_nobody_knows_is_kept(tmp_path):
    config = load(DynMaskConfig(**SIZES).to_dict() | {"data_version": 3}, tmp_path)
    assert config.data_version == 3
