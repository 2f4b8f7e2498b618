"""`from_transformers` and `to_transformers`: one implementation for all families, which are described by [`Family`]."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from ..modeling.configuration_base import DynMaskBaseConfig
from ..modeling.configuration_dynmask import DynMaskConfig
from ..modeling.configuration_dynmask_seq2seq import OF_BOTH_SIDES, DynMaskSeq2SeqConfig
from ..modeling.masks import parse
from ..modeling.modeling_dynmask import (
    DynMaskForCausalLM,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
    DynMaskPreTrainedModel,
)
from ..modeling.modeling_dynmask_seq2seq import (
    DynMaskForConditionalGeneration,
    DynMaskSeq2SeqForSequenceClassification,
    DynMaskSeq2SeqModel,
)
from ..stock.batches import CONFIG_ENTRY, NAME
from .family import POOLED, TOKEN_HEADS, Family, OurConfig, Settings, all_families, classifier_dropout
from .weights import to_ours, to_theirs
from .zero3 import whole_weights


class Task(NamedTuple):
    """The classes of a task: the stock classes by config class, and ours, one for each of our config classes."""

    stock: Mapping[type[PreTrainedConfig], Any]
    ours: tuple[Any, ...]

    def our_class(self, family: Family) -> Any:
        """Our class for models of `family`."""
        return next(cls for cls in self.ours if cls.config_class is family.config_class)


TASKS = {
    "base": Task(MODEL_MAPPING, (DynMaskModel, DynMaskSeq2SeqModel)),
    "causal-lm": Task(MODEL_FOR_CAUSAL_LM_MAPPING, (DynMaskForCausalLM,)),
    "masked-lm": Task(MODEL_FOR_MASKED_LM_MAPPING, (DynMaskForMaskedLM,)),
    "seq2seq-lm": Task(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, (DynMaskForConditionalGeneration,)),
    "sequence-classification": Task(
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        (DynMaskForSequenceClassification, DynMaskSeq2SeqForSequenceClassification),
    ),
    "token-classification": Task(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, (DynMaskForTokenClassification,)),
    "question-answering": Task(MODEL_FOR_QUESTION_ANSWERING_MAPPING, (DynMaskForQuestionAnswering,)),
    "multiple-choice": Task(MODEL_FOR_MULTIPLE_CHOICE_MAPPING, (DynMaskForMultipleChoice,)),
}

FAMILIES = all_families()

# Values that stock settings must have, since other values change the outputs or have no counterpart here. Some are
# settings of older releases.
REQUIRED = {
    "is_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "position_embedding_type": "absolute",
}

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
COMPILED = "_orig_mod."  # part of the names of weights if a module is compiled
ADAPTED = (".base_layer", ".original_module")  # PEFT's names for a layer that it wraps

COMMON_FIELDS = {field.name for field in fields(DynMaskBaseConfig)}
OUR_FIELDS = [field.name for field in fields(DynMaskConfig) if field.name not in COMMON_FIELDS]
OF_CLASSIFIERS = {"classifier_pooling", "classifier_transform", "classifier_bias"}
SIDES = tuple(DynMaskSeq2SeqConfig.sub_configs)


def from_transformers(
    source: str | os.PathLike | nn.Module, task: str | None = None, **overrides: Any
) -> DynMaskPreTrainedModel:
    r"""
    Converts a stock checkpoint to a DynMask model with bit-equal weights and the same outputs on real tokens.

    Args:
        source (`str`, `os.PathLike` or [`PreTrainedModel`]):
            A folder, a Hub id, or a loaded stock model: an encoder of type `bert`, `camembert`, `distilbert`,
            `electra`, `eurobert`, `modernbert`, `roberta` or `xlm-roberta`; a decoder of type `gemma3_text`,
            `gpt2`, `llama`, `mistral`, `qwen2` or `qwen3`; or an encoder-decoder of type `bart` or `marian`. Sliding
            windows become mask expressions. A loaded model may be compiled or wrapped for parallel training. PEFT
            adapters must be merged first.
        task (`str`, *optional*):
            `"base"`, `"sequence-classification"`, `"token-classification"` or `"question-answering"`; for encoders also
            `"masked-lm"` or `"multiple-choice"`; for decoders also `"causal-lm"`. As in transformers, EuroBERT has no
            `"question-answering"` and `"multiple-choice"`, and Gemma 3 has no `"question-answering"` and
            `"token-classification"`. Encoder-decoders have `"base"`, `"seq2seq-lm"` and (BART)
            `"sequence-classification"`. `None`: the task of the class in the checkpoint's `architectures`, or of the
            loaded model; `"base"` if the checkpoint names no class of a known task.
        overrides (*optional*):
            Config fields. Fields of the stock config (`num_labels`, `hidden_dropout_prob`, …) and loading options
            (`dtype`, `revision`, …) are passed to the stock model's `from_pretrained`. Fields that only
            [`DynMaskConfig`] has (`mask`, `layer_masks`, `attn_implementation`, …) are set on the converted config. For
            a loaded model, only fields of [`DynMaskConfig`] can be given. For an encoder-decoder, they are fields of
            [`DynMaskSeq2SeqConfig`], where `encoder={...}` and `decoder={...}` override fields of the two sides.

    Returns:
        [`DynMaskPreTrainedModel`]: The model for the task, with the dtype, device and mode (train or eval) of the stock
        model. From a path or Hub id, the model is in eval mode, as in transformers. All parameters are trainable. A
        loaded model is not changed, and its weights are copied. Weights from a checkpoint are used without a copy.

    Raises:
        ValueError: The model type or task is unknown; the stock model has adapters or uses an unsupported feature; an
            override cannot be applied; the weights do not have the expected names and shapes.

    Example:

    ```python
    >>> from hf_dynmask import from_transformers

    >>> model = from_transformers("google-bert/bert-base-uncased", "sequence-classification", num_labels=3)
    >>> causal = from_transformers("google-bert/bert-base-uncased", "masked-lm", mask="causal")
    ```
    """
    if isinstance(source, nn.Module):
        stock = _plain(source)
        stock_config = copy.deepcopy(stock.config)
        family = _family(stock_config.model_type)
        task = _task_of_model(stock, task)
        our_overrides, stock_overrides = _split(overrides, stock_config)
        _set(stock_config, stock_overrides, family)
        _check_supported(stock_config, task)
    else:
        stock_config = AutoConfig.from_pretrained(source, **overrides)
        family = _family(stock_config.model_type)
        task = _task_of_checkpoint(stock_config, task)
        our_overrides, stock_overrides = _split(overrides, stock_config)
        _check_supported(stock_config, task)
        with whole_weights():
            stock = TASKS[task].stock[type(stock_config)].from_pretrained(source, **stock_overrides)
        stock = _plain(stock)  # raises if the checkpoint has an adapter
        stock_config = stock.config
    with no_init_weights():
        model = TASKS[task].our_class(family)(_our_config(stock_config, task, **our_overrides))
    links = family.links(task, model.base_model_prefix, stock.base_model_prefix, _num_layers(model.config))
    with whole_weights(stock):
        _check_tables(stock, family)
        weights = _weights(stock, family)
        if isinstance(source, nn.Module):
            weights = _cloned(weights)
    _fill(model, to_ours(weights, links), family)
    _copy_state(stock, model)
    return model


def to_transformers(model: DynMaskPreTrainedModel, model_type: str | None = None) -> PreTrainedModel:
    r"""
    Converts a DynMask model to a stock model with bit-equal weights: the inverse of [`from_transformers`].

    Args:
        model ([`DynMaskPreTrainedModel`]): A model of this package, compiled or not, without PEFT adapters. It is not
            changed, and its weights are copied.
        model_type (`str`, *optional*):
            A type that [`from_transformers`] takes. `None`: the type that the model was converted from.

    Returns:
        [`PreTrainedModel`]: The stock model for the same task, with the same dtype, device and mode. Config fields that
        [`DynMaskConfig`] lacks (`sep_token_id`, …) have their default values.

    Raises:
        ValueError: No model type is given or known; the type cannot represent the model (rotary positions, a mask other
            than `"full"`, …); `model` is not a DynMask model or has adapters.

    Example:

    ```python
    >>> to_transformers(model).save_pretrained("for-everyone")
    ```
    """
    model = _plain(model)
    task = next((task for task, (_, ours) in TASKS.items() if isinstance(model, ours)), None)
    if task is None:
        known = ", ".join(ours.__name__ for _, classes in TASKS.values() for ours in classes)
        raise ValueError(f"`model` must be one of {known}; got {type(model).__name__}")
    config = model.config
    model_type = model_type or config.source_model_type
    if model_type is None:
        able = [name for name in FAMILIES if not _unrepresentable(config, name, task)]
        raise ValueError(
            "`model_type` must be given for a model that was not converted from a stock one; "
            f"types that can represent it: {', '.join(map(repr, able)) or 'none'}"
        )
    family = _family(model_type)
    if problems := _unrepresentable(config, model_type, task):
        raise ValueError(f"{model_type!r} cannot represent the model: {'; '.join(problems)}")
    stock_config = _stock_config(config, model_type, task)
    with no_init_weights():
        stock = TASKS[task].stock[type(stock_config)](stock_config)
    links = family.links(task, model.base_model_prefix, stock.base_model_prefix, _num_layers(config))
    with whole_weights(model):
        weights = _cloned(_weights(model, family))
    _fill(stock, to_theirs(weights, links, _weights(stock, family)), family)
    for table in _tables(stock, family).values():
        stock._init_weights(table.to(model.dtype))
    _copy_state(model, stock)
    return stock


def _plain(model: nn.Module) -> Any:
    """Removes the wrappers of `torch.compile` and parallel training from a model.

    Raises:
        ValueError: The model has adapters, which cannot be converted.
    """
    while isinstance(model, PARALLEL) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, PARALLEL) else model.get_submodule("_orig_mod")
    if hasattr(model, "get_base_model") or any(name.endswith(ADAPTED) for name, _ in model.named_modules()):
        raise ValueError(
            f"a model must be converted without adapters, which would be lost; got a {type(model).__name__} with some. "
            "Merge them, by the `merge_and_unload()` of PEFT, or convert its `get_base_model()` before they are added"
        )
    return model


def _family(model_type: str) -> Family:
    if model_type not in FAMILIES:
        known = ", ".join(map(repr, FAMILIES))
        raise ValueError(f"`model_type` must be one of {known}; got {model_type!r}{_without_conversion(model_type)}")
    return FAMILIES[model_type]


def _without_conversion(model_type: str) -> str:
    """A hint for an error: whether a stock model that cannot be converted runs without conversion."""
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_MAPPING:
        return ""
    model_class: Any = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
    can_run = isinstance(model_class, type) and model_class._can_set_attn_implementation()
    return f". It needs no conversion to run with attn_implementation='{NAME}'" if can_run else ""


def _find_task(config: PreTrainedConfig, class_names: list[str]) -> str | None:
    """The task whose stock class for `config` is one of these names."""
    return next((task for task, stock in _stock_classes(config).items() if stock.__name__ in class_names), None)


def _stock_classes(config: PreTrainedConfig) -> dict[str, type[PreTrainedModel]]:
    """The stock class of `config` for each task of the family."""
    return {task: TASKS[task].stock[type(config)] for task in FAMILIES[config.model_type].heads}


def _task_of_checkpoint(config: PreTrainedConfig, task: str | None) -> str:
    task = task or _find_task(config, config.architectures or []) or "base"
    known = FAMILIES[config.model_type].heads
    if task not in known:
        raise ValueError(
            f"`task` of a {config.model_type!r} model must be one of {', '.join(map(repr, known))}; got {task!r}"
        )
    return task


def _task_of_model(model: PreTrainedModel, task: str | None) -> str:
    found = _find_task(model.config, [cls.__name__ for cls in type(model).__mro__])
    if found is None:
        known = ", ".join(stock.__name__ for stock in _stock_classes(model.config).values())
        raise ValueError(f"`source` must be one of {known}; got {type(model).__name__}")
    if task not in (None, found):
        raise ValueError(f"`task` must be {found!r} for a loaded {type(model).__name__}; got {task!r}")
    return found


def _our_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """The names of fields that the constructor takes. For an encoder-decoder, they include the fields of its sides."""
    names = {field.name for field in fields(config_class)}
    return names | OF_BOTH_SIDES if config_class is DynMaskSeq2SeqConfig else names


def _split(overrides: Settings, stock_config: PreTrainedConfig) -> tuple[Settings, Settings]:
    """Splits overrides into those for the converted config, and those for the stock config or loading."""
    our_fields = _our_fields(FAMILIES[stock_config.model_type].config_class)
    only_ours = {name for name in our_fields if not hasattr(stock_config, name)} | {"attn_implementation"}
    ours = {name: value for name, value in overrides.items() if name in only_ours}
    return ours, {name: value for name, value in overrides.items() if name not in only_ours}


def _set(stock_config: PreTrainedConfig, overrides: Settings, family: Family) -> None:
    for name, value in overrides.items():
        if name not in _our_fields(family.config_class) - COMMON_FIELDS:
            raise ValueError(
                f"`{name}` must be a field of {family.config_class.__name__} with a loaded model; got {name}={value!r}"
            )
        setattr(stock_config, name, value)


def _shared_fields(family: Family, stock_class: type[PreTrainedConfig]) -> set[str]:
    theirs = {field.name for field in fields(stock_class)}
    return _our_fields(family.config_class) & theirs - {"transformers_version", "architectures", "layer_types"}


def _our_config(stock_config: PreTrainedConfig, task: str, **overrides: Any) -> OurConfig:
    family = FAMILIES[stock_config.model_type]
    settings = {name: getattr(stock_config, name) for name in _shared_fields(family, type(stock_config))}
    settings |= {ours: getattr(stock_config, theirs) for ours, theirs in family.renamed.items()}
    settings |= family.implied(stock_config, task)
    settings |= {"source_model_type": stock_config.model_type, "name_or_path": stock_config.name_or_path}
    mask = getattr(stock_config, CONFIG_ENTRY, None)
    if mask is not None and not overrides.keys() & {"mask", "layer_masks"}:
        overrides["mask"] = mask
    if "mask" in overrides:
        settings["layer_masks"] = None  # it would take precedence
    overrides |= {side: settings.get(side, {}) | overrides[side] for side in SIDES if side in overrides}
    try:
        return family.config_class(**settings | overrides)
    except StrictDataclassError as error:
        raise ValueError(f"cannot convert a {stock_config.model_type!r} model: {error.__cause__ or error}") from error


def _stock_config(config: OurConfig, model_type: str, task: str) -> PreTrainedConfig:
    family = FAMILIES[model_type]
    shared = _shared_fields(family, type(AutoConfig.for_model(model_type)))
    settings = {name: copy.deepcopy(_value(config, name)) for name in shared}
    settings |= {theirs: _value(config, ours) for ours, theirs in family.renamed.items()}
    if "rope_parameters" in settings:  # those of all layers, unless `restored` gives them by layer type
        settings["rope_parameters"] = copy.deepcopy(config.rope_by_layer()[0])
    settings |= family.restored(config, task)
    return AutoConfig.for_model(model_type, **settings, name_or_path=config.name_or_path)


def _value(config: OurConfig, name: str) -> Any:
    """A field of the configuration. If an encoder-decoder has no such field, that of its decoder."""
    return getattr(config if hasattr(config, name) else config.decoder, name)


def _num_layers(config: OurConfig) -> int:
    sides = [getattr(config, side) for side in SIDES] if isinstance(config, DynMaskSeq2SeqConfig) else [config]
    return max(side.num_hidden_layers for side in sides)


def _unsupported(stock_config: PreTrainedConfig, task: str) -> list[str]:
    """Reasons why a stock model cannot be converted, one phrase each."""
    required = REQUIRED | FAMILIES[stock_config.model_type].required(stock_config, task)
    return _differences(required, {name: getattr(stock_config, name, value) for name, value in required.items()})


def _check_supported(stock_config: PreTrainedConfig, task: str) -> None:
    if problems := _unsupported(stock_config, task):
        raise ValueError(f"cannot convert a {stock_config.model_type!r} model: {'; '.join(problems)}")


def _unrepresentable(config: OurConfig, model_type: str, task: str) -> list[str]:
    """Reasons why a DynMask model cannot become a stock one: the settings that a round trip would change."""
    family = FAMILIES[model_type]
    if not isinstance(config, family.config_class):
        return [f"its configuration is a {family.config_class.__name__}, and the model's a {type(config).__name__}"]
    if task not in family.heads:
        return [f"it has no model for {task!r}"]
    stock_config = _stock_config(config, model_type, task)
    expected, found = (_effective(each, task) for each in (_our_config(stock_config, task), config))
    return _differences(expected, found) + _unsupported(stock_config, task)


def _effective(config: OurConfig, task: str) -> Settings:
    """The settings that determine what a model computes."""
    if isinstance(config, DynMaskSeq2SeqConfig):
        by_side = {side: _effective(getattr(config, side), task) for side in SIDES}
        settings = {f"{side}.{name}": value for side in SIDES for name, value in by_side[side].items()}
        return settings | {name: getattr(config, name) for name in ("share_embeddings", "tie_word_embeddings")}
    unread = {"source_model_type", "layer_masks", "layer_types", "bos_token_id", "eos_token_id", "use_cache"}
    unread |= OF_CLASSIFIERS
    if task != "base":
        unread |= {"use_pooler"}
    if not config.add_cross_attention:
        unread |= {"cross_mask"}
    settings = {name: getattr(config, name) for name in OUR_FIELDS if name not in unread}
    settings["mask"] = _once_if_equal([str(mask) for mask in config.masks()])
    settings["rope_parameters"] = _once_if_equal(config.rope_by_layer())
    if config.add_cross_attention:
        settings["cross_mask"] = str(parse(config.cross_mask))
    return settings | {"classifier_dropout": classifier_dropout(config)} | _classifier(config, task)


def _classifier(config: DynMaskConfig, task: str) -> Settings:
    """The settings of classifiers that the head reads. A token classifier does not use a pooler."""
    if task in POOLED or task == "base" and config.use_pooler:
        return {name: getattr(config, name) for name in OF_CLASSIFIERS}
    transform = config.classifier_transform
    return {"classifier_transform": "none" if transform == "pooler" else transform} if task in TOKEN_HEADS else {}


def _once_if_equal(values: list[Any]) -> Any:
    """The common value of all layers, or the list of values if they differ."""
    return values[0] if all(value == values[0] for value in values) else values


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return [f"`{n}` must be {expected.get(n, 'absent')!r}; got {found.get(n, 'nothing')!r}" for n in names]


def _weights(model: PreTrainedModel, family: Family) -> dict[str, Tensor]:
    """The weights of a model, without tables. Of tied weights, only the one that the others are tied to."""
    skipped = {*model.all_tied_weights_keys, *(f"{name}.weight" for name in _tables(model, family))}
    weights = {name.replace(COMPILED, ""): weight for name, weight in model.state_dict().items()}
    return {name: weight for name, weight in weights.items() if name not in skipped}


def _tables(model: PreTrainedModel, family: Family) -> dict[str, nn.Module]:
    """The modules of a stock model whose weights are computed, not learned, such as sinusoidal positions."""
    modules = ((name.replace(COMPILED, ""), module) for name, module in model.named_modules())
    return {name: module for name, module in modules if name.rpartition(".")[2] in family.tables}


def _check_tables(stock: PreTrainedModel, family: Family) -> None:
    for name, table in _tables(stock, family).items():
        computed = copy.deepcopy(table)
        stock._init_weights(computed)
        given, expected = (module.get_parameter("weight") for module in (table, computed))
        if not torch.allclose(given, expected, atol=1e-2):
            raise ValueError(f"`{name}` must hold what a {stock.config.model_type!r} model computes; got other values")


def _cloned(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}


def _fill(model: PreTrainedModel, weights: dict[str, Tensor], family: Family) -> None:
    """Assigns weights to a model, without a copy."""
    shapes, expected = (
        {name: tuple(weight.shape) for name, weight in each.items()} for each in (weights, _weights(model, family))
    )
    if problems := _differences(expected, shapes):
        raise ValueError(f"the weights do not fit: {'; '.join(problems)}")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()


def _copy_state(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Gives a model the device, mode and generation settings of another."""
    target.to(source.device)  # pyright: ignore[reportArgumentType]: transformers wraps `to` without its type
    target.train(source.training)
    if source.can_generate() and target.can_generate():
        target.generation_config = copy.deepcopy(source.generation_config)
