"""The work that a model does for real tokens, in floating-point operations, worked out from its sizes.

Shape legend: H heads, D and Dv sizes of a head's queries and keys, and of its values.
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
Sizes = tuple[int, ...]  # of an example: its tokens, and of an encoder-decoder those of its target


@dataclass(frozen=True)
class AttentionFlops:
    """Attention in all layers and heads that follow one mask.

    Attributes:
        mask (`Mask`): The mask; a `topk` counts all the keys that it chooses from, since it needs their scores.
        queries, keys (`int`): Whose tokens these are: `SOURCE` or `TARGET`.
    """

    mask: Mask
    queries: int = SOURCE
    keys: int = SOURCE

    def most_pairs(self, examples: Mapping[Sizes, int]) -> int:
        """Pairs that are allowed in examples of some sizes, so many of each; all pairs, where the mask reads fields."""
        mask = Full() if self.mask.fields else self.mask
        sizes = torch.tensor([(each[self.queries], each[self.keys]) for each in examples]).view(-1, 2)
        return count_pairs(mask, sizes, counts=torch.tensor(list(examples.values())))


@dataclass(frozen=True)
class ModelFlops:
    """
    What a model computes for each token and for each pair of tokens. Make it with [`model_flops`].

    Attributes:
        weights (`tuple[int, ...]`):
            Weights in the matrices of the layers that a token goes through, and of an encoder-decoder those of a token
            of the target. The encoder's tokens go through the keys and values of cross-attention, too.
        output_weights (`int`): Weights of a language model's output embedding.
        attention (`dict[AttentionFlops, int]`):
            Of each mask the sum of `(D + Dv) / 2` over the heads and layers that follow it.
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
        Training takes three times as many (backward twice; arXiv:2001.08361, section 2.1). Norms, embeddings and
        everything else that is not a matrix multiplication inside the layers is left out.

        Args:
            examples (`Iterable[tuple[int, ...]]`): Tokens of each, and of an encoder-decoder those of its target.
            targets (`int`, *optional*): Tokens that logits of a language model are for. `None`: all of the last side.
            pairs (`dict[AttentionFlops, int]`, *optional*):
                Allowed pairs of all examples, where they are known from the batches. Others are worked out from the
                sizes, with masks that read fields counted as if they allowed all pairs.
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
    Reads a model's sizes off its modules. Its weights may be sharded, or on the meta device.

    Args:
        model ([`~transformers.PreTrainedModel`]): A DynMask model, or a stock model of dense layers.

    Returns:
        [`ModelFlops`]
    """
    model = _outline(model)
    sides = _sides(model)
    weights = [0] * len(sides)
    for side, part in enumerate(sides):
        for name, parameter in part.named_parameters():
            if parameter.dim() == 2 and _is_in_a_layer(name):
                weights[_tokens_through(name, side)] += parameter.numel()
    attention: Counter[AttentionFlops] = Counter()
    for side, part in enumerate(sides):
        attention.update(_attention(part, side))
    output = model.get_output_embeddings()
    return ModelFlops(tuple(weights), 0 if output is None else output.weight.numel(), dict(attention))


def config_work(config: PreTrainedConfig) -> ModelFlops:
    """[`model_flops`] of the model that a configuration describes, which is not made: a language model's logits count
    where it is causal or has an encoder and a decoder."""
    is_causal = any(name.endswith(CAUSAL_LM) for name in config.architectures or ())
    auto_class = AutoModelForCausalLM if is_causal else AutoModel
    with torch.device("meta"):
        return model_flops((AutoModelForSeq2SeqLM if config.is_encoder_decoder else auto_class).from_config(config))


def _outline(model: Any) -> PreTrainedModel:
    """The model without its weights, and without whatever was wrapped around its parts."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.device("meta"):
        return type(base)(base.config)


def _sides(model: PreTrainedModel) -> list[Any]:
    return [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model]


def _is_in_a_layer(name: str) -> bool:
    """Layers stand in lists, by number."""
    return any(part.isdigit() for part in name.split("."))


def _tokens_through(name: str, side: int) -> int:
    """Whose tokens a matrix is multiplied with."""
    return SOURCE if CROSS_ATTENTION.search(name) and KEYS_AND_VALUES.search(name) else side


def _attention(part: Any, side: int) -> Counter[AttentionFlops]:
    """Numbers of each mask in the layers of one side."""
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
    """Attention layers of a stock model: transformers' know whether they are causal."""
    chosen = getattr(part.config, CONFIG_ENTRY, None)
    for name, module in part.named_modules():
        if not hasattr(module, "is_causal") or isinstance(module, PreTrainedModel):
            continue
        if CROSS_ATTENTION.search(name):
            yield AttentionFlops(Full(), side, SOURCE)
        elif chosen is not None:
            yield AttentionFlops(parse(chosen), side, side)
        else:
            mask = Causal() if module.is_causal else Full()
            window = getattr(module, "sliding_window", getattr(part.config, "sliding_window", None))
            yield AttentionFlops(mask & Window(window - 1, window - 1) if window else mask, side, side)


# --- Pairs -----------------------------------------------------------------------------------------------------------


def allowed_pairs(mask: Mask, queries: int, keys: int) -> int:
    """Pairs that a mask without fields allows in one sequence; see [`count_pairs`]."""
    return count_pairs(mask, torch.tensor([(queries, keys)]))


def plan_pairs(*plans: MaskPlan) -> int:
    """Pairs that plans of one mask allow in all; see [`count_pairs`]. They are counted on the CPU."""
    layouts = [[side.trimmed().to("cpu") for side in (plan.layout, plan.key_layout)] for plan in plans]
    fields = {name: _joined([plan.fields.tables[name].cpu() for plan in plans]) for name in plans[0].fields.tables}
    sizes = [_joined([side.lengths for side in sides]) for sides in zip(*layouts, strict=True)]
    positions = None
    if any(side.has_gaps for sides in layouts for side in sides):
        positions = [_joined(list(map(_positions, sides))) for sides in zip(*layouts, strict=True)]
    return count_pairs(plans[0].mask, torch.stack(sizes, 1), fields, positions)


def _positions(layout: SequenceLayout) -> Tensor:
    """Positions `(S, P)` of the tokens that each of the batch's sequences has."""
    return pad_sequence(list(layout.positions.split(layout.sizes)), batch_first=True)


def _joined(tables: list[Tensor]) -> Tensor:
    """Tables of several batches, `(S, ...)` each, as one of the largest sizes. One entry stands for any number, such as
    heads; in other places that no sequence has there are zeros."""
    sizes = [max(of_tables) for of_tables in zip(*(table.shape[1:] for table in tables), strict=True)]
    wide = []
    for table in tables:
        table = table.expand(-1, *(size if own == 1 else own for own, size in zip(table.shape[1:], sizes, strict=True)))
        missing = [size - own for own, size in zip(table.shape[1:], sizes, strict=True)]
        wide.append(nn.functional.pad(table, [number for size in reversed(missing) for number in (0, size)]))
    return torch.cat(wide)
