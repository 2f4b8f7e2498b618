"""`from_transformers` and `to_transformers`: one way through every family of [`Family`] data."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from ..configuration_dynmask import DynMaskConfig
from ..modeling_dynmask import (
    DynMaskForCausalLM,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForQuestionAnswering,
    DynMaskForSequenceClassification,
    DynMaskForTokenClassification,
    DynMaskModel,
    DynMaskPreTrainedModel,
)
from .bert import BERT
from .distilbert import DISTILBERT
from .electra import ELECTRA
from .family import Family, Settings, classifier_dropout
from .gpt2 import GPT2
from .llama import LLAMA
from .mistral import MISTRAL
from .qwen import QWEN2, QWEN3
from .roberta import ROBERTA
from .weights import to_ours, to_theirs


class Task(NamedTuple):
    """The classes of a task: the stock ones by config class, and ours."""

    stock: Mapping[type[PreTrainedConfig], Any]
    ours: type[DynMaskPreTrainedModel]


TASKS = {
    "base": Task(MODEL_MAPPING, DynMaskModel),
    "causal-lm": Task(MODEL_FOR_CAUSAL_LM_MAPPING, DynMaskForCausalLM),
    "masked-lm": Task(MODEL_FOR_MASKED_LM_MAPPING, DynMaskForMaskedLM),
    "sequence-classification": Task(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, DynMaskForSequenceClassification),
    "token-classification": Task(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, DynMaskForTokenClassification),
    "question-answering": Task(MODEL_FOR_QUESTION_ANSWERING_MAPPING, DynMaskForQuestionAnswering),
    "multiple-choice": Task(MODEL_FOR_MULTIPLE_CHOICE_MAPPING, DynMaskForMultipleChoice),
}

FAMILIES = {
    "bert": BERT,
    "distilbert": DISTILBERT,
    "electra": ELECTRA,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
}

# Stock settings, some from older releases, that change the function or have no counterpart here.
REQUIRED = {
    "is_decoder": False,
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "position_embedding_type": "absolute",
}

COMMON_FIELDS = {field.name for field in fields(PreTrainedConfig)}
OUR_FIELDS = [field.name for field in fields(DynMaskConfig) if field.name not in COMMON_FIELDS]


def from_transformers(
    source: str | os.PathLike | PreTrainedModel, task: str | None = None, **overrides: Any
) -> DynMaskPreTrainedModel:
    r"""
    Makes a DynMask model of a stock checkpoint: the same weights bit for bit, the same outputs on real tokens.

    Args:
        source (`str`, `os.PathLike` or [`PreTrainedModel`]):
            A folder, a Hub id, or a loaded stock model: an encoder of type `bert`, `distilbert`, `electra`, `roberta`
            or `xlm-roberta`, or a decoder of type `gpt2`, `llama`, `mistral`, `qwen2` or `qwen3`, whose masks, sliding
            windows included, become expressions.
        task (`str`, *optional*):
            `"base"`, `"token-classification"` or `"question-answering"`; of an encoder `"masked-lm"`,
            `"sequence-classification"` or `"multiple-choice"`, of a decoder `"causal-lm"`. `None`: the one of the
            checkpoint's `architectures`, or of the loaded model's class; `"base"` where a checkpoint names no such
            class.
        overrides (*optional*):
            Config fields. One that the stock config has (`num_labels`, `hidden_dropout_prob`, …) goes to the stock
            model's `from_pretrained`, and so does each option of loading (`dtype`, `revision`, …). One that only
            [`DynMaskConfig`] has (`mask`, `layer_masks`, `attn_implementation`, …) is set on the converted config. With
            a loaded model only the fields of [`DynMaskConfig`] can be given.

    Returns:
        [`DynMaskPreTrainedModel`]: The model of the task, in the dtype, on the device and in the mode (train or eval)
        of the stock model; from a path or Hub id that is eval, as everywhere in transformers. All its parameters are
        trainable. A loaded model is left as it is, and its weights are copied; weights read from a checkpoint are taken
        over without a copy.

    Raises:
        ValueError: The model type or the task is unknown; the stock model uses a feature without a counterpart; an
            override cannot be applied; the weights do not fit.

    Example:

    ```python
    >>> from hf_dynmask import from_transformers

    >>> model = from_transformers("google-bert/bert-base-uncased", "sequence-classification", num_labels=3)
    >>> causal = from_transformers("google-bert/bert-base-uncased", "masked-lm", mask="causal")
    ```
    """
    if isinstance(source, PreTrainedModel):
        stock_config = copy.deepcopy(source.config)
        family = _family(stock_config.model_type)
        task = _task_of_model(source, task)
        set_on_ours, set_on_theirs = _split(overrides, stock_config)
        _set(stock_config, set_on_theirs)
        _check_supported(stock_config, task)
        stock = source
    else:
        stock_config = AutoConfig.from_pretrained(source, **overrides)
        family = _family(stock_config.model_type)
        task = _task_of_checkpoint(stock_config, task)
        set_on_ours, set_on_theirs = _split(overrides, stock_config)
        _check_supported(stock_config, task)
        stock = TASKS[task].stock[type(stock_config)].from_pretrained(source, **set_on_theirs)
        stock_config = stock.config
    with no_init_weights():
        model = TASKS[task].ours(_our_config(stock_config, task, **set_on_ours))
    links = family.links(task, model.base_model_prefix, stock.base_model_prefix, stock_config.num_hidden_layers)
    weights = _weights(stock) if stock is not source else _cloned(_weights(stock))
    _fill(model, to_ours(weights, links))
    _hand_on(stock, model)
    return model


def to_transformers(model: DynMaskPreTrainedModel, model_type: str | None = None) -> PreTrainedModel:
    r"""
    Makes a stock model of a DynMask model; undoes [`from_transformers`], every weight bit-equal.

    Args:
        model ([`DynMaskPreTrainedModel`]): A model of this package. It is left as it is, and its weights are copied.
        model_type (`str`, *optional*):
            A type that [`from_transformers`] takes. `None`: the one that the model was converted from.

    Returns:
        [`PreTrainedModel`]: The stock model of the same task, in the same dtype, on the same device and in the same
        mode. What [`DynMaskConfig`] has no field for (`sep_token_id`, …) has the stock config's default.

    Raises:
        ValueError: No model type is given or known; the type cannot represent the model (rotary positions, a mask other
            than `"full"`, …); `model` is not a DynMask model.

    Example:

    ```python
    >>> to_transformers(model).save_pretrained("for-everyone")
    ```
    """
    task = next((task for task, (_, ours) in TASKS.items() if isinstance(model, ours)), None)
    if task is None:
        known = ", ".join(ours.__name__ for _, ours in TASKS.values())
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
    links = family.links(task, model.base_model_prefix, stock.base_model_prefix, config.num_hidden_layers)
    _fill(stock, to_theirs(_cloned(_weights(model)), links, _weights(stock)))
    _hand_on(model, stock)
    return stock


def _family(model_type: str) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(f"`model_type` must be one of {', '.join(map(repr, FAMILIES))}; got {model_type!r}")
    return FAMILIES[model_type]


def _find_task(config: PreTrainedConfig, class_names: list[str]) -> str | None:
    """The task for which one of the names is the stock class of `config`."""
    return next((task for task, stock in _stock_classes(config).items() if stock.__name__ in class_names), None)


def _stock_classes(config: PreTrainedConfig) -> dict[str, type[PreTrainedModel]]:
    """For each task of the family, the stock class of `config`."""
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


def _split(overrides: Settings, stock_config: PreTrainedConfig) -> tuple[Settings, Settings]:
    """What is set on the converted config, and what on the stock one or its loading."""
    alone = {name for name in OUR_FIELDS if not hasattr(stock_config, name)} | {"attn_implementation"}
    ours = {name: value for name, value in overrides.items() if name in alone}
    return ours, {name: value for name, value in overrides.items() if name not in alone}


def _set(stock_config: PreTrainedConfig, overrides: Settings) -> None:
    for name, value in overrides.items():
        if name not in OUR_FIELDS:
            raise ValueError(f"`{name}` must be a field of DynMaskConfig with a loaded model; got {name}={value!r}")
        setattr(stock_config, name, value)


def _shared_fields(stock_class: type[PreTrainedConfig]) -> set[str]:
    ours, theirs = ({field.name for field in fields(config_class)} for config_class in (DynMaskConfig, stock_class))
    return ours & theirs - {"transformers_version", "architectures"}


def _our_config(stock_config: PreTrainedConfig, task: str, **overrides: Any) -> DynMaskConfig:
    family = FAMILIES[stock_config.model_type]
    settings = {name: getattr(stock_config, name) for name in _shared_fields(type(stock_config))}
    settings |= {ours: getattr(stock_config, theirs) for ours, theirs in family.renamed.items()}
    settings |= family.implied(stock_config, task)
    settings |= {"source_model_type": stock_config.model_type, "name_or_path": stock_config.name_or_path}
    if "mask" in overrides:
        settings["layer_masks"] = None  # which would win over it
    try:
        return DynMaskConfig(**settings | overrides)
    except StrictDataclassError as error:
        raise ValueError(f"cannot convert a {stock_config.model_type!r} model: {error.__cause__ or error}") from error


def _stock_config(config: DynMaskConfig, model_type: str, task: str) -> PreTrainedConfig:
    family = FAMILIES[model_type]
    shared = _shared_fields(type(AutoConfig.for_model(model_type)))
    settings = {name: copy.deepcopy(getattr(config, name)) for name in shared}
    settings |= {theirs: getattr(config, ours) for ours, theirs in family.renamed.items()}
    settings |= family.restored(config, task)
    return AutoConfig.for_model(model_type, **settings, name_or_path=config.name_or_path)


def _unsupported(stock_config: PreTrainedConfig, task: str) -> list[str]:
    """What keeps a stock model from being a DynMask one, a phrase each."""
    required = REQUIRED | FAMILIES[stock_config.model_type].required(stock_config, task)
    return _differences(required, {name: getattr(stock_config, name, value) for name, value in required.items()})


def _check_supported(stock_config: PreTrainedConfig, task: str) -> None:
    if problems := _unsupported(stock_config, task):
        raise ValueError(f"cannot convert a {stock_config.model_type!r} model: {'; '.join(problems)}")


def _unrepresentable(config: DynMaskConfig, model_type: str, task: str) -> list[str]:
    """What keeps a DynMask model from being a stock one, a phrase each: what is lost on the way there and back."""
    if task not in FAMILIES[model_type].heads:
        return [f"it has no model for {task!r}"]
    stock_config = _stock_config(config, model_type, task)
    expected, found = (_function(side, task) for side in (_our_config(stock_config, task), config))
    return _differences(expected, found) + _unsupported(stock_config, task)


def _function(config: DynMaskConfig, task: str) -> Settings:
    """The fields that say what a model computes."""
    unread = {"source_model_type", "layer_masks"} | ({"use_pooler"} if task != "base" else set())
    settings = {name: getattr(config, name) for name in OUR_FIELDS if name not in unread}
    masks = [str(mask) for mask in config.masks()]
    one_for_all = masks[0] if len(set(masks)) == 1 else masks
    return settings | {"mask": one_for_all, "classifier_dropout": classifier_dropout(config)}


def _differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return [f"`{n}` must be {expected.get(n, 'absent')!r}; got {found.get(n, 'nothing')!r}" for n in names]


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters of `model`, of tied ones only that to which the others are tied."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: weight.detach() for name, weight in parameters if name not in model.all_tied_weights_keys}


def _cloned(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in weights.items()}


def _fill(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Makes the tensors, without a copy, the parameters of `model`."""
    shapes, expected = (
        {name: tuple(weight.shape) for name, weight in side.items()} for side in (weights, _weights(model))
    )
    if problems := _differences(expected, shapes):
        raise ValueError(f"the weights do not fit: {'; '.join(problems)}")
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()


def _hand_on(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """What else makes a model behave as the one that it was made of: device, mode, settings of generation."""
    target.to(source.device)  # pyright: ignore[reportArgumentType]: transformers wraps `to` without its type
    target.train(source.training)
    if source.can_generate() and target.can_generate():
        target.generation_config = copy.deepcopy(source.generation_config)
