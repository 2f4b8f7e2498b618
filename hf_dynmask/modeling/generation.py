"""Generation from prompts that are padded on any side, with fields that are extended for generated tokens.

Shape legend: B rows of width T.
"""
# transformers' own typing of `**kwargs` repeats named parameters, and its configurations' fields are optional.
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalIterable=false

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMixin

from .batch import layout_of_batch
from .field_shapes import TOKEN_FIELDS
from .kv_cache import CACHE_NAME, num_cached_tokens, renamed_cache

FIELDS_PER_TOKEN = (*TOKEN_FIELDS, "missing")
PER_TOKEN = (*FIELDS_PER_TOKEN, "token_type_ids", "inputs_embeds")  # inputs of `generate` with one value per token


class DynMaskGenerationMixin(GenerationMixin):
    """[`~transformers.GenerationMixin`] for rows of prompts with padding anywhere."""

    def generate(self, inputs: Tensor | None = None, *args, lengths: Tensor | None = None, **kwargs):
        r"""
        [`~transformers.GenerationMixin.generate`], which also takes `lengths`, and prompts padded on any side.

        Args:
            inputs (`Tensor` of shape `(B, T)`): The prompts.
            lengths (`Tensor` of shape `(B,)`): Row b holds a prompt of `lengths[b]` tokens from its left edge; an
                alternative to `attention_mask`.

        Returns:
            As in transformers. The first T columns are the prompts as they were given; new tokens follow them.

        Raises:
            ValueError: A prompt is empty; the prompts are not rows of one prompt each; `lengths` and `attention_mask`
                disagree; there is padding after the columns that a given cache holds.
        """
        kwargs = renamed_cache(kwargs)
        prompts = inputs if inputs is not None else kwargs.pop("input_ids", None)
        rows = prompts if prompts is not None else kwargs.get("inputs_embeds")
        if rows is not None and (lengths is not None or kwargs.get("attention_mask") is not None):
            shape = tuple(rows.shape[:2])
            layout = layout_of_batch(shape, rows.device, lengths, kwargs.get("attention_mask"))
            if layout.num_sequences != shape[0]:
                raise ValueError(f"prompts must have a row each; got {layout.num_sequences} in {shape[0]} rows")
            present = layout.unflatten(torch.ones_like(layout.positions)[None])
            if 0 in layout.sizes:
                raise ValueError(f"prompts must have at least one token each; got lengths {present.sum(1).tolist()}")
            seen = num_cached_tokens(kwargs.get(CACHE_NAME))
            if seen and not present[:, seen:].all():
                raise ValueError(
                    f"`attention_mask` must be 1 after the {seen} columns that the cache holds: padding there "
                    f"would move them; got {present[:, seen:].tolist()}"
                )
            order = present.argsort(dim=1, stable=True)  # `generate` needs the last tokens in the last column
            kwargs = {name: _arranged(value, order, name in PER_TOKEN) for name, value in kwargs.items()}
            kwargs["attention_mask"] = present.gather(1, order)
            arranged = _arranged(prompts, order, True)
            outputs = super().generate(arranged, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            return outputs if prompts is None else _with_prompts(outputs, prompts)
        return super().generate(prompts, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **kwargs) -> Tensor | None:
        return attention_mask  # which tokens are real; the plan decides which query may see which key

    # `generate` looks for `inputs_embeds` in this signature.
    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if self.config.position_offset:
            inputs.pop("position_ids", None)  # `generate` makes them without the offset
        return inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, num_new_tokens: int = 1, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, num_new_tokens=num_new_tokens, **kwargs
        )
        return model_kwargs | fields_of_new_tokens(model_kwargs, FIELDS_PER_TOKEN, num_new_tokens)


def fields_of_new_tokens(inputs: dict[str, Any], names: Iterable[str], new: int) -> dict[str, Tensor]:
    """The inputs `(B, T)` of these names, with columns for new tokens.

    New tokens have the value of the last token, except that they are not missing.
    """
    given = {name: inputs[name] for name in names if inputs.get(name) is not None}
    last = {name: field[:, -1:].expand(-1, new) for name, field in given.items()}
    return {
        name: torch.cat([field, torch.zeros_like(last[name]) if name == "missing" else last[name]], dim=1)
        for name, field in given.items()
    }


def _arranged(value, order: Tensor, per_token: bool):
    """An input `(B, T, ...)` with one value per token, columns reordered by `order (B, T)`; other inputs unchanged."""
    if not per_token or not isinstance(value, Tensor):
        return value
    return value.gather(1, order.view(*order.shape, *(1,) * (value.dim() - 2)).expand_as(value))


def _with_prompts(outputs, prompts: Tensor):
    """The result of `generate`, `(B * n, T + new)` or an output with it, with the prompts as they were given."""
    sequences = outputs if isinstance(outputs, Tensor) else outputs.sequences
    sequences[:, : prompts.shape[1]] = prompts.repeat_interleave(len(sequences) // max(len(prompts), 1), dim=0)
    return outputs
