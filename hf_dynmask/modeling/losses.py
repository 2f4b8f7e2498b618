"""Losses over real tokens, averaged over the targets of a batch or of all batches of a step.

Shape legend: B rows of width T, S sequences, N real tokens, V vocabulary, L labels of a sequence.
"""
# transformers' own typing of `**kwargs` repeats named parameters, and its configurations' fields are optional.
# pyright: reportGeneralTypeIssues=false, reportPrivateImportUsage=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOptionalIterable=false

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from .layout import IGNORE_INDEX, SequenceLayout, eager_only, integers, out_of_range, reads_are_free, rolled

HINT = " (integer labels name one class per sequence; float labels have a value for each class)"


def aligned_targets(labels: Tensor | None, shift_labels: Tensor | None, layout: SequenceLayout) -> Tensor | None:
    """Targets `(1, N)`, each at the token that predicts it; `None` without labels."""
    if shift_labels is not None:
        return flat_labels("shift_labels", shift_labels, layout)
    return None if labels is None else _next_tokens(flat_labels("labels", labels, layout), layout)


def flat_labels(name: str, labels: Tensor, layout: SequenceLayout) -> Tensor:
    """Labels `(B, T)` of tokens as `(1, N)` int64; -100 in the tail."""
    _check_shape(name, labels, layout.shape)
    return layout.flatten_values(integers(name, labels), fill=IGNORE_INDEX)


def _check_shape(name: str, labels: Tensor, *shapes: Sequence[int], hint: str = "") -> None:
    if not any(tuple(labels.shape) == tuple(shape) for shape in shapes):
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"`{name}` must have shape {wanted}; got {tuple(labels.shape)}{hint}")


def _in_full_precision(values: Tensor) -> Tensor:
    """The values in float32 or better: a loss adds up many, and labels may be large numbers."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _next_tokens(labels: Tensor, layout: SequenceLayout) -> Tensor:
    """Labels `(1, N)` moved to the token before, -100 at the end of each sequence."""
    return rolled(labels.masked_fill(layout.begins, IGNORE_INDEX), -1)


def _averaged(total: Tensor, count: Tensor | int, num_items_in_batch: Tensor | int | None) -> Tensor:
    """A summed loss divided by the number of targets; 0 if there are none."""
    items = count if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(items, device=total.device).clamp(min=1)


def token_loss(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Cross-entropy of `logits (..., classes)` against `labels (...)`, averaged over the targets."""
    labels, scores = integers("labels", labels).flatten(), _in_full_precision(logits.flatten(0, -2))
    _check_shape("labels", labels, scores.shape[:1])
    try:
        total = nn.functional.cross_entropy(scores, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    except IndexError as error:  # of a CPU; other devices are not read
        raise out_of_range("labels", labels[labels != IGNORE_INDEX], logits.shape[-1]) from error
    return _averaged(total, (labels != IGNORE_INDEX).sum(), num_items_in_batch)


@eager_only
def ctc_loss(
    logits: Tensor,
    labels: Tensor,
    layout: SequenceLayout,
    config: PreTrainedConfig,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """CTC loss of `logits (1, N, V)` against `labels (S, L)`, reduced by `config.ctc_loss_reduction`."""
    layout, logits = layout.trimmed(), logits[:, : sum(layout.sizes)]
    targets, target_lengths = _ctc_targets(labels, layout, config)
    if not layout.num_tokens:
        return logits.sum()  # 0; torch does not accept a batch without frames
    in_rows = SequenceLayout.from_lengths(layout.lengths, (layout.num_sequences, layout.max_length))
    log_probs = in_rows.unflatten(logits.log_softmax(-1, dtype=torch.float32))
    losses = nn.functional.ctc_loss(
        log_probs.transpose(0, 1),
        targets,
        layout.lengths,
        target_lengths,
        blank=config.pad_token_id,
        reduction="none",
        zero_infinity=config.ctc_zero_infinity,
    )
    if config.ctc_loss_reduction == "sum":
        return losses.sum()
    if num_items_in_batch is None:
        losses = losses / target_lengths.clamp(min=1)
    is_unused = _unused(layout)
    count = len(losses) if is_unused is None else (~is_unused).sum()
    return _averaged(losses.sum(), count, num_items_in_batch)


def _ctc_targets(labels: Tensor, layout: SequenceLayout, config: PreTrainedConfig) -> tuple[Tensor, Tensor]:
    """Labels `(S, L)` moved to the left edge, and their number in each sequence `(S,)`.

    Raises:
        ValueError: The labels have the wrong shape or are no token ids, or they do not fit the frames of a sequence.
    """
    if labels.dim() != 2 or len(labels) != layout.num_sequences:
        raise ValueError(
            f"`labels` must have shape (sequences, L), with {layout.num_sequences} sequences; got {tuple(labels.shape)}"
        )
    labels = integers("labels", labels)
    real = (labels != IGNORE_INDEX) & (labels != config.pad_token_id)
    if (wrong := labels[real & ((labels < 0) | (labels >= config.vocab_size))]).numel():
        raise ValueError(f"`labels` must be from 0 to vocab_size - 1 = {config.vocab_size - 1}; got {wrong[0].item()}")
    lengths = real.sum(1)
    order = (~real).long().argsort(dim=1, stable=True)
    targets, real = labels.gather(1, order), real.gather(1, order)
    needed = lengths + (real[:, 1:] & (targets[:, 1:] == targets[:, :-1])).sum(1)
    if not config.ctc_zero_infinity and (needed > layout.lengths).any():
        place = int((needed - layout.lengths).argmax())
        raise ValueError(
            f"a CTC target must fit the frames of its sequence: the {lengths[place]} labels of sequence "
            f"{place} need {needed[place]} frames (with one for the blank between repeated labels); "
            f"got {layout.lengths[place]}. Leave it out, subsample less, or set ctc_zero_infinity=True"
        )
    return targets.where(real, 0), lengths


def position_loss(
    scores: Tensor, name: str, positions: Tensor, layout: SequenceLayout, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """Cross-entropy of `scores (1, N)` over each sequence's tokens against `positions (S,)`, which come as `name`."""
    _check_shape(name, positions, (layout.num_sequences,), (layout.num_sequences, 1))
    positions = integers(name, positions).flatten()
    ids, values = layout.sequence_ids, _in_full_precision(scores[0])
    slots = layout.num_sequences + layout.has_tail
    largest = values.new_full((slots,), -torch.inf).scatter_reduce(0, ids, values.detach(), "amax")
    exponentials = (values - largest[ids]).exp()
    log_sums = largest + values.new_zeros(slots).index_add(0, ids, exponentials).log()
    targets = nn.functional.pad(positions, (0, 1), value=IGNORE_INDEX)[ids]  # the last is that of a tail
    is_target = (layout.positions == targets) & layout.is_real
    total = (log_sums[ids] - values).where(is_target, 0).sum()
    return _averaged(total, is_target.sum(), num_items_in_batch)


def sequence_loss(
    logits: Tensor,
    labels: Tensor,
    layout: SequenceLayout,
    config: PreTrainedConfig,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """Loss of `logits (S, num_labels)` for `config.problem_type`, which is inferred from the labels if it is `None`.

    Labels of the unused slots of a flat batch are ignored.
    """
    is_unused = _unused(layout)
    problem = config.problem_type
    if problem is None and config.num_labels == 1:
        problem = "regression"
    elif problem is None:
        problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    sequences, size = logits.shape
    one_each = [(sequences,), (sequences, 1)]
    if problem == "single_label_classification":
        _check_shape("labels", labels, *one_each, hint=HINT)
        labels = labels.flatten()
        labels = labels if is_unused is None else labels.masked_fill(is_unused, IGNORE_INDEX)
        return token_loss(logits, labels, num_items_in_batch)
    shapes = one_each if size == 1 else [(sequences, size)]
    _check_shape("labels", labels, *shapes, hint="" if problem == "regression" else HINT)
    criteria = {
        "regression": nn.functional.mse_loss,
        "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
    }
    logits = _in_full_precision(logits)
    labels = labels.to(logits.dtype).view_as(logits)
    if is_unused is None:
        return _averaged(criteria[problem](logits, labels, reduction="sum"), labels.numel(), num_items_in_batch)
    losses = criteria[problem](logits, labels, reduction="none").masked_fill(is_unused[:, None], 0)
    count = (~is_unused).sum() * labels.shape[1]
    return _averaged(losses.sum(), count, num_items_in_batch)


def _unused(layout: SequenceLayout) -> Tensor | None:
    """Bool `(S,)`: the unused slots of a flat batch, which are the empty ones at its end; `None` if there are none."""
    if layout.num_sequences == layout.shape[0] or (reads_are_free(layout.device) and all(layout.sizes[-1:])):
        return None
    return layout.lengths.flip(0).cumsum(0).flip(0) == 0
