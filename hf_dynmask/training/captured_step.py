"""Training steps that run as one CUDA graph, for batches of one shape."""

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
    Trainer = object  # heavy to import, and there already in any class that mixes this in

Batch = Mapping[str, Any]
Gradients = list[Tensor | None]

WARM_UP = 3  # steps before a capture, as torch's notes on CUDA graphs have it; kernels are compiled and chosen in them
GRAPHS_OF_THEIR_OWN = ("reduce-overhead", "max-autotune")  # modes of torch.compile
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # in transformers before 5.24, and since
ITEMS, ACCUMULATED = "num_items_in_batch", "current_gradient_accumulation_steps"


class CapturedStepMixin(Trainer):
    """
    Makes a [`~transformers.Trainer`] run the forward and backward pass of training as one CUDA graph, so that the host
    has one thing to launch in place of a thousand. It pays where a step is short: small models, small batches.

    Batches must have one shape: fixed flat rows, `DataCollatorWithLengths(tokenizer, flat=True, max_tokens=...,
    max_sequences=...)`, or rows padded to one width. The first steps run as ever, on a stream of their own, with what
    compiles and chooses kernels; the next is captured, and from then on replayed with each batch copied into the
    captured tensors. Gradients of the first batch of an optimizer step are written, those of others are added, by a
    second graph. Everything else is the Trainer's own: gradient accumulation, `num_items_in_batch`, clipping, the
    optimizer, logging, checkpoints and resuming, evaluation (which is not captured). Dropout draws from the same
    generator, and goes on with it.

    With `TrainingArguments(torch_compile=True)` the graph has the compiled kernels. `optim="adamw_torch_fused"` (the
    default) and `logging_nan_inf_filter=False` (by default each step waits for its loss) keep the rest short, too.

    What Python decides in a forward pass is decided when the step is captured. It is captured again when the mask
    changes, as [`MaskSchedule`] has it, or which weights are trained. Memory of the graph stays with it while training.

    Args:
        args, kwargs: The Trainer's own.

    Raises:
        ValueError: When training begins: the step cannot be captured, as there is no CUDA device, or since there are
            several processes or devices, float16 with a scaler of gradients, gradient checkpointing, layers dropped at
            random, a mode of `torch_compile` that captures graphs itself, an optimizer that steps in the backward
            pass, `torch_empty_cache_steps` or `auto_find_batch_size`. In training: a batch has another shape, or
            other tensors, than the first.
        RuntimeError: In training: the model cannot be captured, as it waits for a value on the device, for example.

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
        self._captured: tuple[Any, CapturedStep] | None = None  # and what the model was like then

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
            self._captured = None  # the next one may have its memory
            self._captured = settings, CapturedStep(lambda batch: self._step(model, batch), parameters)
        step, device = self._captured[1], self.args.device
        batch = dict(self._prepare_inputs(inputs))
        batch[ACCUMULATED] = torch.full((), float(self.current_gradient_accumulation_steps), device=device)
        if num_items_in_batch is not None:
            batch[ITEMS] = torch.as_tensor(num_items_in_batch, device=device)
        if step.is_ready():  # what the Trainer and hooks on the model do in Python does not come with the graph
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
        """The Trainer's own, which gets as tensors what may be another number in each step."""
        number = self.current_gradient_accumulation_steps
        self.current_gradient_accumulation_steps = batch.pop(ACCUMULATED)
        try:
            return super().training_step(model, batch, batch.pop(ITEMS, None))
        finally:
            self.current_gradient_accumulation_steps = number


def why_not_captured(trainer: Any) -> str | None:
    """What keeps the steps of a Trainer from being captured, if anything does."""
    args, accelerator, model = trainer.args, trainer.accelerator, unwrapped(trainer.model)
    config = getattr(model, "config", None)
    dropped = [name for name in getattr(config, "__dict__", ()) if name.endswith("layerdrop") and getattr(config, name)]
    checkpoints = any(getattr(args, name, False) for name in CHECKPOINTING)
    checkpoints = checkpoints or any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    captures_itself = args.torch_compile and args.torch_compile_mode in GRAPHS_OF_THEIR_OWN
    steps_in_backward = any(part in str(args.optim) for part in ("lomo", "layerwise"))
    kind = accelerator.distributed_type.value
    reasons = [
        (args.device.type != "cuda", f"it needs a CUDA device; got {args.device.type!r}"),
        (accelerator.use_distributed, f"it needs one process; got {args.world_size}, {kind}"),
        (args.n_gpu > 1 or trainer.is_model_parallel, "it needs one device; the model is on several GPUs"),
        (accelerator.scaler is not None, "fp16=True scales gradients by numbers of the host; use bf16=True"),
        (checkpoints, "gradient checkpointing reads the state of random numbers on the host"),
        (bool(dropped), f"{' and '.join(dropped)} of the model has Python choose the layers that run; set it to 0"),
        (captures_itself, f"torch_compile_mode={args.torch_compile_mode!r} captures graphs of its own; leave it out"),
        (steps_in_backward, f"optim={str(args.optim)!r} steps in the backward pass"),
        (args.torch_empty_cache_steps is not None, "torch_empty_cache_steps frees memory in the midst of a step"),
        (args.auto_find_batch_size, "auto_find_batch_size changes the shape of batches"),
    ]
    return next((reason for holds, reason in reasons if holds), None)


class CapturedStep:
    """
    A function that computes a loss and adds its gradients, run as one CUDA graph on batches of one shape.

    Args:
        step (`Callable[[dict[str, Any]], Tensor]`):
            Gives the loss of a batch, after its backward pass. It waits for no value on the device.
        parameters (`Iterable[Parameter]`): Whose gradients it adds to `grad`.

    Raises:
        ValueError: A batch is not as the first one was.
        RuntimeError: The step cannot be captured.

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
    ...     optimizer.zero_grad()  # sets them to None, by which the next step knows to write and not to add
    ```
    """

    def __init__(self, step: Callable[[dict[str, Any]], Tensor], parameters: Iterable[nn.Parameter]):
        self._step = step
        self._parameters = list(parameters)
        self._device = _CudaGraphs()
        self._batch: dict[str, Any] = {}  # what the graphs read
        self._signature: dict[str, Any] = {}
        self._gradients: Gradients = []  # what they write
        self._num_eager = 0
        self._graphs: dict[bool, Callable[[], Tensor]] = {}  # by whether they add gradients

    def is_ready(self) -> bool:
        """Whether the next step is a replay, and no step of Python."""
        gradients = self._current_gradients()
        is_first = all(gradient is None for gradient in gradients)
        return self._num_eager >= WARM_UP and (is_first or self._are_written(gradients))

    def __call__(self, batch: Batch) -> Tensor:
        """The loss, a tensor of its own."""
        self._check(batch)
        if not self.is_ready():
            self._num_eager += 1
            return self._device.run(lambda: self._step(dict(batch)))
        for name, values in batch.items():
            if name in self._batch and isinstance(values, Tensor):
                self._batch[name].copy_(values, non_blocking=True)
            else:
                self._batch[name] = values.clone() if isinstance(values, Tensor) else values
        adds = self._are_written(self._current_gradients())
        if adds not in self._graphs:
            self._graphs[adds] = self._device.capture(lambda: self._step(dict(self._batch)))
            self._gradients = self._current_gradients()
        loss = self._graphs[adds]()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return loss.clone()

    def _current_gradients(self) -> Gradients:
        return [parameter.grad for parameter in self._parameters]

    def _are_written(self, gradients: Gradients) -> bool:
        """Whether these are what the graphs have written."""
        return bool(self._graphs) and all(a is b for a, b in zip(gradients, self._gradients, strict=True))

    def _check(self, batch: Batch) -> None:
        signature = {name: _signature(values) for name, values in batch.items()}
        known = self._signature or signature
        if known.keys() != signature.keys():
            raise ValueError(
                f"batches of a captured step must all have {', '.join(known)}, as the first one; got {', '.join(batch)}"
            )
        for name, found in signature.items():
            if found != known[name]:
                raise ValueError(
                    f"`{name}` of a captured step must be {known[name]} in each batch, as in the first one; got "
                    f"{found}. DataCollatorWithLengths(tokenizer, flat=True, max_tokens=..., max_sequences=...) gives "
                    "all batches one shape"
                )
        self._signature = known


def _signature(values: Any) -> str:
    return f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)


class _CudaGraphs:
    """Runs and captures on one stream, with one pool of memory."""

    def __init__(self):
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, step: Callable[[], Tensor]) -> Tensor:
        """As ever, on the stream of the captures: what is made for a stream at its first use is there then."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = step()
        current.wait_stream(self._stream)
        return loss

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """A graph of the step, which has not run yet; what it returns is its loss, overwritten by the next one."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may pin memory for the next batches meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                loss = step()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # which a capture that fails does not
            is_second = error.__context__ is not None and error.__cause__ is None  # what ends the capture fails, too
            first: Any = error.__context__ if is_second else error
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise RuntimeError(
                f"the step cannot be captured as a CUDA graph: {first}. A captured step waits for no value on the "
                "device; `torch.cuda.set_sync_debug_mode('error')` shows where the step without the mixin does"
            ) from error

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay
