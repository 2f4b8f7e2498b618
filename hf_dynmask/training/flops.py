"""The floating-point operations that a model needs for real tokens, computed from the sizes of its weights.

Shape legend: H heads, D the head size of queries and keys, Dv that of values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..modeling.layout import SequenceLayout
from ..modeling.masks import Causal, Full, Mask, Window, head_runs, parse
from ..modeling.plan import MaskPlan
from ..stock.masks import CONFIG_ENTRY
from .pairs import count_pairs

SOURCE, TARGET = 0, 1
CROSS_ATTENTION = re.compile(r"cross_?attention|encoder_attn|EncDecAttention", re.IGNORECASE)
KEYS_AND_VALUES = re.compile(r"\.(k|v|key|value)(_proj)?\.weight$")
CAUSAL_LM = ("ForCausalLM", "LMHeadModel")
Sizes = tuple[int, ...]  # tokens of an example; for an encoder-decoder also those of its target


@dataclass(frozen=True)
class AttentionFlops:
    """Attention in all layers and heads with the same mask.

    Attributes:
        mask (`Mask`): The mask. For `topk`, all candidate keys count, since it needs their scores.
        queries, keys (`int`): The side of the queries and of the keys: `SOURCE` or `TARGET`.
    """

    mask: Mask
    queries: int = SOURCE
    keys: int = SOURCE

    def most_pairs(self, examples: Mapping[Sizes, int]) -> int:
        """The number of allowed pairs in examples `{sizes: number of examples}`. All pairs count if the mask reads
        fields."""
        mask = Full() if self.mask.fields else self.mask
        sizes = torch.tensor([(each[self.queries], each[self.keys]) for each in examples]).view(-1, 2)
        return count_pairs(mask, sizes, counts=torch.tensor(list(examples.values())))


@dataclass(frozen=True)
class ModelFlops:
    """
    The work of a model per token and per pair of tokens, as [`model_flops`] returns it.

    Attributes:
        weights (`tuple[int, ...]`):
            The number of weights in the matrices that multiply one token. For an encoder-decoder, one number for tokens
            of the source and one for tokens of the target; the key and value matrices of cross-attention count for the
            source.
        output_weights (`int`): The number of weights of a language model's output embedding.
        attention (`dict[AttentionFlops, int]`):
            For each mask, the sum of `(D + Dv) / 2` over the heads and layers that have it.
    """

    weights: tuple[int, ...]
    output_weights: int
    attention: Mapping[AttentionFlops, int]

    def forward_flops(
        self,
        examples: Iterable[Sizes],
        targets: int | None = None,
        pairs: Mapping[AttentionFlops, int] | None = None,
    ) -> int:
        """
        Floating-point operations of a forward pass: `2 * weights * tokens + 4 * H * D * pairs`, summed over layers.
        Training takes three times as many, since the backward pass takes two (arXiv:2001.08361, section 2.1). Norms,
        embeddings and everything else that is not a matrix multiplication inside the layers are left out.

        Args:
            examples (`Iterable[tuple[int, ...]]`):
                The number of tokens of each example; for an encoder-decoder, of its source and of its target.
            targets (`int`, *optional*):
                The number of tokens for which a language model computes logits. `None`: all tokens of the last side.
            pairs (`dict[AttentionFlops, int]`, *optional*):
                The number of allowed pairs in all examples, where it is known from the batches. For all other attention
                it is computed from the sizes, and masks that read fields count as if they allowed all pairs.
        """
        counts = Counter(examples)
        tokens = [sum(sizes[side] * count for sizes, count in counts.items()) for side in range(len(self.weights))]
        linear = sum(weights * number for weights, number in zip(self.weights, tokens, strict=True))
        linear += self.output_weights * (tokens[-1] if targets is None else targets)
        known = pairs or {}
        attention = sum(
            width * (known[work] if work in known else work.most_pairs(counts))
            for work, width in self.attention.items()
        )
        return 2 * linear + 4 * attention


def model_flops(model: PreTrainedModel) -> ModelFlops:
    """
    Reads the sizes of a model from its modules. Its weights may be sharded, or on the meta device.

    Args:
        model ([`~transformers.PreTrainedModel`]): A DynMask model, or a stock model of dense layers.

    Returns:
        [`ModelFlops`]
    """
    model = _meta_copy(model)
    sides = _sides(model)
    weights = [0] * len(sides)
    for side, part in enumerate(sides):
        for name, parameter in part.named_parameters():
            if parameter.dim() == 2 and _is_in_a_layer(name):
                weights[_side_of_inputs(name, side)] += parameter.numel()
    attention: Counter[AttentionFlops] = Counter()
    for side, part in enumerate(sides):
        attention.update(_attention(part, side))
    output = model.get_output_embeddings()
    return ModelFlops(tuple(weights), 0 if output is None else output.weight.numel(), dict(attention))


def config_work(config: PreTrainedConfig) -> ModelFlops:
    """[`model_flops`] of the model that a configuration describes, without allocating it. Logits count for causal
    language models and encoder-decoders."""
    is_causal = any(name.endswith(CAUSAL_LM) for name in config.architectures or ())
    auto_class = AutoModelForCausalLM if is_causal else AutoModel
    with torch.device("meta"):
        return model_flops((AutoModelForSeq2SeqLM if config.is_encoder_decoder else auto_class).from_config(config))


def _meta_copy(model: Any) -> PreTrainedModel:
    """The same model on the meta device, without adapters and without wrappers around its parts."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.device("meta"):
        return type(base)(base.config)


def _sides(model: PreTrainedModel) -> list[Any]:
    return [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model]


def _is_in_a_layer(name: str) -> bool:
    """Whether a parameter belongs to a layer. Layers are in lists, so the names of their parameters have a number."""
    return any(part.isdigit() for part in name.split("."))


def _side_of_inputs(name: str, side: int) -> int:
    """The side whose tokens a matrix multiplies."""
    return SOURCE if CROSS_ATTENTION.search(name) and KEYS_AND_VALUES.search(name) else side


def _attention(part: Any, side: int) -> Counter[AttentionFlops]:
    """[`ModelFlops.attention`] for the layers of one side."""
    config = part.config
    widths: Counter[AttentionFlops] = Counter()
    if hasattr(config, "masks"):
        layers = [AttentionFlops(mask, side, side) for mask in config.masks()]
        if config.add_cross_attention:
            layers += [AttentionFlops(parse(config.cross_mask), side, SOURCE)] * len(layers)
        for layer in layers:
            for run, mask in head_runs(layer.mask, config.num_attention_heads):
                work = AttentionFlops(mask.without_choice(), layer.queries, layer.keys)
                widths[work] += (run.stop - run.start) * (config.head_dim + config.value_head_dim) // 2
        return widths
    for work in _stock_attention(part, side):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        widths[work] += config.num_attention_heads * head_dim
    return widths


def _stock_attention(part: nn.Module, side: int) -> Iterator[AttentionFlops]:
    """The attention layers of a stock model. In transformers, they have an attribute `is_causal`."""
    expression = getattr(part.config, CONFIG_ENTRY, None)
    for name, module in part.named_modules():
        if not hasattr(module, "is_causal") or isinstance(module, PreTrainedModel):
            continue
        if CROSS_ATTENTION.search(name):
            yield AttentionFlops(Full(), side, SOURCE)
        elif expression is not None:
            yield AttentionFlops(parse(expression), side, side)
        else:
            mask = Causal() if module.is_causal else Full()
            window = getattr(module, "sliding_window", getattr(part.config, "sliding_window", None))
            yield AttentionFlops(mask & Window(window - 1, window - 1) if window else mask, side, side)


# --- Pairs -----------------------------------------------------------------------------------------------------------


def allowed_pairs(mask: Mask, queries: int, keys: int) -> int:
    """The number of pairs that a mask without fields allows in one sequence; see [`count_pairs`]."""
    return count_pairs(mask, torch.tensor([(queries, keys)]))


def plan_pairs(*plans: MaskPlan) -> int:
    """The total number of pairs that plans with the same mask allow; see [`count_pairs`]. Counts on the CPU."""
    layouts = [[side.trimmed().to("cpu") for side in (plan.layout, plan.key_layout)] for plan in plans]
    fields = {name: _joined([plan.fields.tables[name].cpu() for plan in plans]) for name in plans[0].fields.tables}
    sizes = [_joined([side.lengths for side in sides]) for sides in zip(*layouts, strict=True)]
    positions = None
    if any(side.has_gaps for sides in layouts for side in sides):
        positions = [_joined(list(map(_positions, sides))) for sides in zip(*layouts, strict=True)]
    return count_pairs(plans[0].mask, torch.stack(sizes, 1), fields, positions)


def _positions(layout: SequenceLayout) -> Tensor:
    """Positions `(S, P)` of the tokens of each sequence, padded to the longest."""
    return pad_sequence(list(layout.positions.split(layout.sizes)), batch_first=True)


def _joined(tables: list[Tensor]) -> Tensor:
    """Concatenates tables `(S, ...)` of several batches, padded with zeros to the largest sizes. Dimensions of size 1,
    such as heads, are expanded instead."""
    sizes = [max(dimension) for dimension in zip(*(table.shape[1:] for table in tables), strict=True)]
    padded = []
    for table in tables:
        table = table.expand(-1, *(size if own == 1 else own for own, size in zip(table.shape[1:], sizes, strict=True)))
        missing = [size - own for own, size in zip(table.shape[1:], sizes, strict=True)]
        padded.append(nn.functional.pad(table, [number for size in reversed(missing) for number in (0, size)]))
    return torch.cat(padded)
