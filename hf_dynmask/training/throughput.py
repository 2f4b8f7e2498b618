"""The throughput of training, measured in real tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from operator import add
from pathlib import Path
from typing import Any, NamedTuple
from weakref import finalize, ref

import torch
from accelerate.utils import gather
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.utils.import_utils import is_cuda_stream_capturing

from ..modeling.batch import layout_of_batch
from ..modeling.layout import IGNORE_INDEX, eager_only
from ..modeling.masks import Mask
from ..modeling.modeling_dynmask import DynMaskPreTrainedModel
from ..modeling.modeling_dynmask_recurrent import DynMaskRecurrentPreTrainedModel
from ..modeling.plan import MaskPlan
from ..stock.masks import CONFIG_ENTRY
from .callbacks import log, unwrapped
from .flops import AttentionFlops, ModelFlops, Sizes, model_flops, plan_pairs

OURS = (DynMaskPreTrainedModel, DynMaskRecurrentPreTrainedModel)
INPUTS = ("input_ids", "inputs_embeds", "input_features")
PREFIXES = ("", "decoder_")  # of the argument names on each side
PASSES = 3  # the work of a training step in forward passes: the backward pass takes two
MOST_BATCHES = 1024  # the number of batches after which they are counted
MOST_HELD = 2**26  # the bytes of fields after which batches are counted


class ThroughputCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that logs the throughput of training, measured in real tokens.

    The figures go to the Trainer's log, and so to the progress bar and every tracker in `report_to`. They are logged
    whenever the Trainer logs its loss, and at the end for the whole training, with `train_` before each name:

    - `real_tokens_per_second`: tokens, or frames of `input_features`, without padding; for an encoder-decoder on both
      sides.
    - `padding_avoided`: the share of places in the padded rows of these batches for which nothing was computed. Flat
      batches count as if they were padded rows. It is 0 for a stock model on padded rows, and 1 minus the share of real
      tokens for flat batches and for a DynMask model with `lengths` or `attention_mask`. Unused places of a flat row of
      fixed size count as computed.
    - `real_flops_per_second`: floating-point operations that the real tokens need,
      `6 * weights * tokens + 12 * layers * H * D * pairs` (see [`hf_dynmask.training.flops`]), regardless of what was
      actually computed. Pairs are those that the mask allows.
    - `share_of_matmul_peak`: `real_flops_per_second` as a share of the rate at which the devices multiplied large
      matrices before training, in the dtype of the training.
    - `peak_memory_gib`: the peak memory of a process. On an accelerator, since the start or the last
      `torch.accelerator.reset_peak_memory_stats`; on the CPU, its resident memory, if the system reports it.

    All figures are totals over all processes, except memory, which is the maximum over the processes. Evaluation,
    saving and counting are left out, and so is their time. `train_real_tokens` and `train_real_flops` are the totals of
    a `train()` call.

    A hook on the model's forward pass reads the batches. Their lengths, and the fields that masks read, stay on the
    device until something is logged, or until there are 1,024 batches or 64 MiB of them. Only then are pairs counted;
    see [`hf_dynmask.training.pairs.count_pairs`]. In cross-attention and after convolutions, a mask that reads fields
    counts as if it allowed all pairs.

    Raises:
        ValueError: During training: the model gets no tokens, embeddings or frames to count, or a stock model gets
            frames.

    Example:

    ```python
    >>> trainer = Trainer(model, args, train_dataset=dataset, data_collator=collator, callbacks=[ThroughputCallback()])
    ```
    """

    def __init__(self):
        self._hook: Any = None

    def on_train_begin(self, args: TrainingArguments, state, control, *, model: nn.Module, **kwargs):
        inner = unwrapped(model)
        self._remove_hook()
        self._batches = _Batches(inner)
        self._hook = inner.register_forward_pre_hook(_hook_of(self._batches), with_kwargs=True)
        finalize(self, self._hook.remove)  # `on_train_end` is not called if training is interrupted
        self._peak = matmul_peak(args.device, _dtype(args, inner))
        self._total = _Measured()
        self._seconds = 0.0
        self._since = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state, control: TrainerControl, **kwargs):
        if control.should_log:
            synchronize(args.device)  # the step ends when the device has finished it
        now = time.perf_counter()
        self._seconds += now - self._since
        self._since = now
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state, control: TrainerControl, **kwargs):
        if control.should_log:
            counted = self._batches.counted()
            self.on_evaluate(args, state, control)
            _log_rates(state, control, self._measured(args, counted))

    def on_evaluate(self, args, state, control, **kwargs):
        self._since = time.perf_counter()  # the time since the last step was not spent on training

    on_save = on_evaluate

    def on_predict(self, args, state, control, metrics, **kwargs):
        self.on_evaluate(args, state, control)

    def on_train_end(self, args: TrainingArguments, state, control: TrainerControl, **kwargs):
        self._remove_hook()
        self._measured(args, self._batches.counted())
        totals = self._total.counted
        logs = {"real_tokens": totals.tokens, "real_flops": totals.flops} | self._total.rates()
        log(state, control, {f"train_{name}": value for name, value in logs.items()})

    def see(self, batch: Mapping[str, Any]) -> None:
        """Count a training batch that the hook does not see, because a CUDA graph is replayed.

        Args:
            batch (`dict[str, Any]`): The arguments of the forward pass.
        """
        self._batches.see(self._batches.model, (), batch)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _measured(self, args: TrainingArguments, counted: _Counted) -> _Measured:
        """What all processes have measured since the last call. Also adds it to the total."""
        own = [*counted, self._seconds, self._peak, peak_memory(args.device) or 0]
        self._seconds = 0.0
        device = args.device if args.world_size > 1 else "cpu"
        table = gather(torch.tensor([own], dtype=torch.float64, device=device))
        *sums, seconds, peak, memory = table.unbind(1)  # type: ignore[union-attr]
        measured = _Measured(
            _Counted._make(values.sum().item() for values in sums),
            seconds.mean().item(),
            peak.sum().item(),
            memory.max().item(),
        )
        self._total = self._total.and_then(measured)
        return measured


def _log_rates(state: TrainerState, control: TrainerControl, measured: _Measured) -> None:
    if measured.counted.tokens:  # the last step of an epoch may have been logged already
        log(state, control, measured.rates())


class _Counted(NamedTuple):
    """Totals over batches: real tokens, places in padded rows, computed places, floating-point operations."""

    tokens: float = 0
    places: float = 0
    computed: float = 0
    flops: float = 0


class _Measured(NamedTuple):
    """Figures of all processes: totals over batches, seconds, peak operations per second, bytes of memory."""

    counted: _Counted = _Counted()
    seconds: float = 0
    peak: float = 0
    memory: float = 0

    def and_then(self, later: _Measured) -> _Measured:
        counted = _Counted._make(map(add, self.counted, later.counted))
        return _Measured(counted, self.seconds + later.seconds, later.peak, max(self.memory, later.memory))

    def rates(self) -> dict[str, float]:
        """The figures under their names in the log. Empty if nothing was measured."""
        tokens, places, computed, flops = self.counted
        if not (tokens and self.seconds):
            return {}
        rates = {
            "real_tokens_per_second": tokens / self.seconds,
            "padding_avoided": 1 - computed / places,
            "real_flops_per_second": flops / self.seconds,
            "share_of_matmul_peak": flops / self.seconds / self.peak,
        }
        return rates | ({"peak_memory_gib": self.memory / 2**30} if self.memory else {})


# --- Batches ---------------------------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """One side of a batch of S sequences, in rows or flat.

    Attributes:
        lengths (`Tensor` of shape `(S,)`): Tokens or frames of each sequence.
        in_layers (`Tensor` of shape `(S,)`): Tokens of each sequence in the layers; fewer if convolutions subsample.
        shape (`tuple[int, int]`): Rows and columns of the batch.
        is_flat (`bool`): Whether a row holds several sequences.
        computes_all (`bool`): Whether layers compute all places, including those of absent tokens.
    """

    lengths: Tensor
    in_layers: Tensor
    shape: tuple[int, int]
    is_flat: bool
    computes_all: bool


class _Held(NamedTuple):
    """What is kept of one side of a batch to count its pairs, if masks read fields.

    Attributes:
        shape (`tuple[int, int]`): Rows and columns of the batch.
        presence (`tuple[Tensor | None, Tensor | None, Tensor | None]`): `lengths`, a 0/1 mask, and `missing`.
        fields (`dict[str, Tensor]`): The fields that the masks read.
    """

    shape: tuple[int, int]
    presence: tuple[Tensor | None, ...]
    fields: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        tensors = [*self.presence, *self.fields.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def plan(self, mask: Mask) -> MaskPlan:
        lengths, attention_mask, missing = (None if each is None else each.cpu() for each in self.presence)
        layout = layout_of_batch(self.shape, torch.device("cpu"), lengths, attention_mask, missing)
        return MaskPlan(mask, layout, fields={name: self.fields[name].cpu() for name in mask.fields & set(self.fields)})


@dataclass
class _Batches:
    """The training batches of a model since they were last counted."""

    model: Any
    masks: list[Any] = field(default_factory=list)
    before: _Counted = _Counted()  # batches that were counted early: the masks changed, or there were too many
    seen: list[tuple[list[_Side], Tensor | None]] = field(default_factory=list)  # the sides, the number of targets
    held: dict[int, list[_Held]] = field(default_factory=dict)  # by side
    bytes: int = 0  # size of all that is in `held`

    def __post_init__(self):
        self._follow_masks()

    def see(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Reads a batch. Waits for the device only if tokens are missing or if batches have to be counted."""
        if not (module.training and torch.is_grad_enabled()):
            return
        self._follow_masks()
        if len(self.seen) == MOST_BATCHES or self.bytes > MOST_HELD:
            self.before = self.counted()
        given = dict(zip(signature(self.model.forward).parameters, args, strict=False)) | dict(kwargs)
        given = {name: value for name, value in given.items() if value is not None}
        sides: list[_Side] = []
        for prefix in PREFIXES[: len(self.work.weights)]:
            name, shape = self._inputs(given, prefix)
            reads_source = prefix != "" and name in INPUTS
            sides.append(sides[0] if reads_source else self._side(given, prefix, name, shape))
        labels = given.get("labels") if self.work.output_weights else None
        self.seen.append((sides, None if labels is None else (labels != IGNORE_INDEX).sum()))

    def _follow_masks(self) -> None:
        """If the model's masks have changed, counts the batches so far under the old masks."""
        masks = masks_of_config(self.model.config)
        if masks != self.masks:
            if self.seen:
                self.before = self.counted()
            self.work: ModelFlops = model_flops(self.model)
            self.masks = masks

    def counted(self) -> _Counted:
        """The counts. Waits for the device."""
        tokens = places = computed = targets = 0
        examples: list[Sizes] = []
        for sides, num_targets in self.seen:
            for side in sides:
                lengths = [length for length in side.lengths.tolist() if length]
                rows, width = side.shape
                in_rows = len(lengths) * max(lengths, default=0) if side.is_flat else rows * width
                tokens, places = tokens + sum(lengths), places + in_rows
                computed += rows * width if side.computes_all else sum(lengths)
            sizes = zip(*(side.in_layers.tolist() for side in sides), strict=True)
            batch = [example for example in sizes if any(example)]
            examples += batch
            targets += sum(example[-1] for example in batch) if num_targets is None else int(num_targets)
        flops = PASSES * self.work.forward_flops(examples, targets, self._pairs())
        counted = _Counted._make(map(add, self.before, (tokens, places, computed, flops)))
        self.before = _Counted()
        self.seen.clear()
        self.held.clear()
        self.bytes = 0
        return counted

    def _pairs(self) -> dict[AttentionFlops, int]:
        """The number of pairs that each mask with fields allows in self-attention."""
        pairs = {}
        for work in self.work.attention:
            if work.mask.fields and work.queries == work.keys and work.queries in self.held:
                pairs[work] = plan_pairs(*(batch.plan(work.mask) for batch in self.held[work.queries]))
        return pairs

    def _side(self, given: dict[str, Any], prefix: str, name: str, shape: tuple[int, ...]) -> _Side:
        """The tokens of a side."""
        lengths = self._lengths(given, prefix, shape)
        has_frames = name == "input_features"
        if len(shape) == 2 and not has_frames:
            self._hold(given, prefix, shape, lengths)
        in_layers = self.model.output_lengths(lengths) if has_frames else lengths
        rows = math.prod(shape[:-1])
        is_flat = lengths.numel() != rows
        computes_all = not isinstance(self.model, OURS) or (is_flat and f"{prefix}missing" not in given)
        return _Side(lengths, in_layers, (rows, shape[-1]), is_flat, computes_all)

    def _inputs(self, given: dict[str, Any], prefix: str) -> tuple[str, tuple[int, ...]]:
        """The name of a side's input, and its shape in tokens, `(B, T)` or `(1, N)`."""
        names = [f"{prefix}input_ids", f"{prefix}inputs_embeds", *(["labels", *INPUTS] if prefix else INPUTS[2:])]
        if not isinstance(self.model, OURS):
            names = [name for name in names if name != "input_features"]  # its meaning differs among stock models
        for name in names:
            if name in given and (name != "labels" or given[name].dim() > 1):
                shape = tuple(given[name].shape)
                return name, shape if name.endswith(("input_ids", "labels")) else shape[:-1]
        raise ValueError(
            f"ThroughputCallback needs a batch with one of {', '.join(f'`{name}`' for name in names)} to count its "
            f"tokens; {type(self.model).__name__} got {', '.join(f'`{name}`' for name in given) or 'nothing'}"
        )

    def _lengths(self, given: dict[str, Any], prefix: str, shape: tuple[int, ...]) -> Tensor:
        """Tokens of each sequence. Waits for the device only if tokens are missing."""
        lengths, mask, missing = _presence(given, prefix, shape)
        if missing is not None:
            return layout_of_batch((shape[0], shape[1]), missing.device, lengths, mask, missing).lengths
        if lengths is not None:
            return lengths.flatten()
        if mask is not None:
            return (mask != 0).sum(-1).flatten()  # in the models of transformers, any number other than 0 is a token
        labels, positions = given.get("labels"), given.get("position_ids")
        if prefix and labels is not None and tuple(labels.shape) == shape:
            return (labels != IGNORE_INDEX).sum(-1)
        if positions is not None and tuple(positions.shape) == (1, shape[-1]):
            return _lengths_of_runs(positions[0])
        return torch.full((math.prod(shape[:-1]),), shape[-1])

    def _hold(self, given: dict[str, Any], prefix: str, shape: tuple[int, ...], lengths: Tensor) -> None:
        """Keep what is needed to count the pairs of a side later, if its masks read fields."""
        side = PREFIXES.index(prefix)
        names = {name for work in self.work.attention if work.queries == work.keys == side for name in work.mask.fields}
        if names:
            own, mask, missing = _presence(given, prefix, shape)
            own = lengths if own is None and mask is None else own
            fields = {name: given[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in given}
            held = _Held((shape[0], shape[1]), (own, mask, missing), fields)
            self.held.setdefault(side, []).append(held)
            self.bytes += held.bytes


def _hook_of(batches: _Batches) -> Callable:
    """A forward hook that reads batches, and does not keep `batches` alive."""
    reference = ref(batches)

    @eager_only
    def see(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        batches = reference()
        if batches is not None and not is_cuda_stream_capturing():  # a capture computes nothing
            batches.see(module, args, kwargs)

    return see


def masks_of_config(config: Any) -> list[Any]:
    """All masks in a configuration and in the configurations of its sides."""
    sides = [config, *(getattr(config, side) for side in getattr(config, "sub_configs", {}))]
    names = ("mask", "layer_masks", "cross_mask", CONFIG_ENTRY)
    return [getattr(side, name, None) for side in sides for name in names]


def _presence(given: dict[str, Any], prefix: str, shape: tuple[int, ...]) -> tuple[Tensor | None, ...]:
    """The arguments that say which tokens are real: `lengths`, a 0/1 mask, and `missing`."""
    lengths, mask, missing = (given.get(f"{prefix}{name}") for name in ("lengths", "attention_mask", "missing"))
    if lengths is None and not prefix and "cu_seq_lens_q" in given:
        lengths = given["cu_seq_lens_q"].diff()
    return lengths, mask if mask is not None and tuple(mask.shape) == shape else None, missing


def _lengths_of_runs(position_ids: Tensor) -> Tensor:
    """Lengths `(T,)` of the sequences in a row whose positions `(T,)` restart, padded with 0."""
    run = (position_ids.diff() != 1).cumsum(0)
    run = nn.functional.pad(run, (1, 0))
    return torch.zeros_like(run).scatter_add(0, run, torch.ones_like(run))


# --- The machine -----------------------------------------------------------------------------------------------------


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """
    The rate at which a device multiplies large square matrices, in floating-point operations per second.

    Args:
        device (`torch.device`): The device. Matrices have 8,192 rows, or 1,024 on a CPU.
        dtype (`torch.dtype`): The dtype of the matrices.

    Returns:
        `float`: The rate of the fastest of five runs, after one warm-up run.
    """
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)  # draws no random numbers
    seconds = []
    with torch.no_grad():
        for _ in range(6):
            seconds.append(seconds_of(partial(torch.mm, matrix, matrix), device))
    return 2 * size**3 / min(seconds[1:])


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """How many seconds a device takes for a run."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished its work. A CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _dtype(args: TrainingArguments, model: Any) -> torch.dtype:
    """The dtype of matrix products in training."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes: of tensors on an accelerator, or else of this process (`VmHWM` in proc(5)). `None` if the
    system does not report it."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
