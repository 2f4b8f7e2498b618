"""Training steps captured as a CUDA graph, for batches of one shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .callbacks import unwrapped
from .throughput import ThroughputCallback, masks_of_config

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # slow to import; a class that uses the mixin has imported it already

Batch = Mapping[str, Any]
Gradients = list[Tensor | None]

WARM_UP = 3  # eager steps before a capture, as in torch's notes on CUDA graphs
MODES_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # of torch.compile
# The argument's name before transformers 5.24, and since then.
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
ITEMS, ACCUMULATED = "num_items_in_batch", "current_gradient_accumulation_steps"


class CapturedStepMixin(Trainer):
    """
    Makes a [`~transformers.Trainer`] capture the forward and backward pass of its training step as one CUDA graph and
    replay it for every batch. The CPU then launches one graph instead of a thousand kernels, which pays off for steps
    that are limited by the CPU: small models and small batches.

    All batches must have the same shape: flat rows of a fixed size (`DataCollatorWithLengths(tokenizer, flat=True,
    max_tokens=..., max_sequences=...)`), or rows padded to a fixed width. The first three steps run eagerly, so that
    kernels are compiled and selected. The next step is captured. The rest of the Trainer is unchanged: gradient
    accumulation, `num_items_in_batch`, gradient clipping, the optimizer, logging, checkpoints, resuming. Evaluation is
    not captured. Every replay draws new dropout masks, the same ones that eager steps would draw.

    - `TrainingArguments(torch_compile=True)` compiles the model before the step is captured.
    - `TrainingArguments(logging_nan_inf_filter=False)` saves a synchronization in each step.
    - A graph repeats the decisions that Python made during the capture. The step is captured again if the model's mask
      changes ([`MaskSchedule`]), or if parameters are frozen or unfrozen.
    - The memory of the graph stays allocated until training ends.

    Args:
        args, kwargs: The arguments of the Trainer.

    Raises:
        ValueError: When training begins, if the step cannot be captured: no CUDA device; several processes or devices;
            float16 with gradient scaling; gradient checkpointing; LayerDrop; a mode of `torch_compile` that captures
            CUDA graphs itself; an optimizer that steps during the backward pass; `torch_empty_cache_steps`;
            `auto_find_batch_size`. During training, if the names, shapes and dtypes of a batch differ from the first
            batch.
        RuntimeError: During training, if the capture fails, for example because the model synchronizes with the device.

    Example:

    ```python
    >>> class CapturedTrainer(CapturedStepMixin, TokenBudgetMixin, Trainer):
    ...     pass

    >>> collator = DataCollatorWithLengths(tokenizer, flat=True)
    >>> trainer = CapturedTrainer(model, args, train_dataset=dataset, data_collator=collator, max_tokens=8192)
    ```
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._captured: tuple[Any, CapturedStep] | None = None  # the settings it was captured with, and the step

    def train(self, *args: Any, **kwargs: Any):
        if reason := why_not_captured(self):
            raise ValueError(f"the training step cannot be captured as a CUDA graph: {reason}")
        self._captured = None
        try:
            return super().train(*args, **kwargs)
        finally:
            self._captured = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        inner = unwrapped(model)
        parameters = list(inner.parameters())
        settings = masks_of_config(getattr(inner, "config", None)), [each.requires_grad for each in parameters]
        if self._captured is None or self._captured[0] != settings:
            self._captured = None  # frees the memory of the old graph before the new capture
            self._captured = settings, CapturedStep(lambda batch: self._step(model, batch), parameters)
        step, device = self._captured[1], self.args.device
        batch = dict(self._prepare_inputs(inputs))
        batch[ACCUMULATED] = torch.full((), float(self.current_gradient_accumulation_steps), device=device)
        if num_items_in_batch is not None:
            batch[ITEMS] = torch.as_tensor(num_items_in_batch, device=device)
        if step.is_ready():  # a replay runs none of the Python code of a step, so the parts that matter run here
            if not model.training:
                model.train()
            optimizer: Any = self.optimizer
            if hasattr(optimizer, "train"):
                optimizer.train()
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ThroughputCallback):
                    callback.see(inputs)
        return step(batch)

    def _step(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The Trainer's step. Numbers that change from step to step are tensors, which every replay reads."""
        number = self.current_gradient_accumulation_steps
        self.current_gradient_accumulation_steps = batch.pop(ACCUMULATED)
        try:
            return super().training_step(model, batch, batch.pop(ITEMS, None))
        finally:
            self.current_gradient_accumulation_steps = number


def why_not_captured(trainer: Any) -> str | None:
    """The reason why a Trainer's step cannot be captured, or `None`."""
    args, accelerator, model = trainer.args, trainer.accelerator, unwrapped(trainer.model)
    config = getattr(model, "config", None)
    layerdrop = [
        name for name in getattr(config, "__dict__", ()) if name.endswith("layerdrop") and getattr(config, name)
    ]
    checkpoints = any(getattr(args, name, False) for name in CHECKPOINTING)
    checkpoints = checkpoints or any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    captures_itself = args.torch_compile and args.torch_compile_mode in MODES_WITH_CUDA_GRAPHS
    steps_in_backward = any(part in str(args.optim) for part in ("lomo", "layerwise"))
    kind = accelerator.distributed_type.value
    reasons = [
        (args.device.type != "cuda", f"it needs a CUDA device; got {args.device.type!r}"),
        (accelerator.use_distributed, f"it needs one process; got {args.world_size}, {kind}"),
        (args.n_gpu > 1 or trainer.is_model_parallel, "it needs one device; the model uses several"),
        (accelerator.scaler is not None, "fp16=True needs a gradient scaler; use bf16=True"),
        (checkpoints, "gradient checkpointing reads the random number generator's state; turn it off"),
        (bool(layerdrop), f"{' and '.join(layerdrop)} chooses layers at random in Python; set it to 0"),
        (captures_itself, f"torch_compile_mode={args.torch_compile_mode!r} captures CUDA graphs itself; leave it out"),
        (steps_in_backward, f"optim={str(args.optim)!r} steps during the backward pass"),
        (args.torch_empty_cache_steps is not None, "torch_empty_cache_steps frees memory within a step; leave it out"),
        (args.auto_find_batch_size, "auto_find_batch_size changes the shape of the batches; leave it out"),
    ]
    return next((reason for holds, reason in reasons if holds), None)


class CapturedStep:
    """
    A function that computes a loss and its gradients, captured as a CUDA graph and replayed for batches of one shape.

    If the parameters have no gradients (`grad` is `None`), a replay writes them. If they have the gradients of the last
    replay, a second graph adds to them. With any other gradients, the step runs eagerly.

    Args:
        step (`Callable[[dict[str, Any]], Tensor]`):
            Runs forward and backward on a batch, and returns its loss. It must not synchronize with the device.
        parameters (`Iterable[Parameter]`): The parameters whose gradients it computes.

    Raises:
        ValueError: The names, shapes and dtypes of a batch differ from the first batch.
        RuntimeError: The capture fails.

    Example:

    ```python
    >>> def step(batch):
    ...     loss = model(**batch).loss
    ...     loss.backward()
    ...     return loss.detach()

    >>> captured = CapturedStep(step, model.parameters())
    >>> for batch in batches:
    ...     loss = captured(batch)
    ...     optimizer.step()
    ...     optimizer.zero_grad()  # to None
    ```
    """

    def __init__(self, step: Callable[[dict[str, Any]], Tensor], parameters: Iterable[nn.Parameter]):
        self._step = step
        self._parameters = list(parameters)
        self._device = _CudaGraphs()
        self._batch: dict[str, Any] = {}  # the inputs of the graphs
        self._signature: dict[str, Any] = {}
        self._gradients: Gradients = []  # the outputs of the graphs
        self._num_eager = 0
        self._graphs: dict[bool, Callable[[], Tensor]] = {}  # keyed by whether they add to existing gradients

    def is_ready(self) -> bool:
        """Whether the next step is a replay."""
        gradients = self._current_gradients()
        has_none = all(gradient is None for gradient in gradients)
        return self._num_eager >= WARM_UP and (has_none or self._are_from_replay(gradients))

    def __call__(self, batch: Batch) -> Tensor:
        """Returns the loss of the batch: a copy, which later replays do not overwrite."""
        self._check(batch)
        if not self.is_ready():
            self._num_eager += 1
            return self._device.run(lambda: self._step(dict(batch)))
        for name, values in batch.items():
            if name in self._batch and isinstance(values, Tensor):
                self._batch[name].copy_(values, non_blocking=True)
            else:
                self._batch[name] = values.clone() if isinstance(values, Tensor) else values
        adds = self._are_from_replay(self._current_gradients())
        if adds not in self._graphs:
            self._graphs[adds] = self._device.capture(lambda: self._step(dict(self._batch)))
            self._gradients = self._current_gradients()
        loss = self._graphs[adds]()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return loss.clone()

    def _current_gradients(self) -> Gradients:
        return [parameter.grad for parameter in self._parameters]

    def _are_from_replay(self, gradients: Gradients) -> bool:
        """Whether these tensors are the outputs of the graphs."""
        return bool(self._graphs) and all(a is b for a, b in zip(gradients, self._gradients, strict=True))

    def _check(self, batch: Batch) -> None:
        signature = {name: _signature(values) for name, values in batch.items()}
        known = self._signature or signature
        if known.keys() != signature.keys():
            raise ValueError(
                f"batches of a captured step must have {', '.join(known)}, like the first one; got {', '.join(batch)}"
            )
        for name, found in signature.items():
            if found != known[name]:
                raise ValueError(
                    f"`{name}` of a captured step must be {known[name]} in every batch, as in the first one; got "
                    f"{found}. DataCollatorWithLengths(tokenizer, flat=True, max_tokens=..., max_sequences=...) gives "
                    "all batches one shape"
                )
        self._signature = known


def _signature(values: Any) -> str:
    return f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)


class _CudaGraphs:
    """Runs and captures steps on one stream, with one memory pool."""

    def __init__(self):
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        """Runs the step eagerly, on the capture stream, since libraries create some of their state per stream."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = step()
        current.wait_stream(self._stream)
        return loss

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Captures the step without running it. Returns a function that replays it and returns always the same tensor,
        the loss."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # "thread_local", since a thread of the data loader may pin memory during the capture.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                loss = step()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a failed capture does not restore the stream
            # After a first error, ending the capture raises a second one, whose context is the first.
            is_second = error.__context__ is not None and error.__cause__ is None
            first: Any = error.__context__ if is_second else error
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise RuntimeError(
                f"the step cannot be captured as a CUDA graph: {first}. A captured step must not synchronize "
                "with the device; `torch.cuda.set_sync_debug_mode('error')` shows where an eager step does"
            ) from error

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay
