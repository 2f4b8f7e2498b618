"""Captured steps: what a graph is made of and when, on a CPU with a capture that only runs again, and on CUDA."""

import re
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_dynmask import (
    CapturedStepMixin,
    DataCollatorWithLengths,
    DynMaskConfig,
    DynMaskForTokenClassification,
    MaskSchedule,
    ThroughputCallback,
    TokenBudgetMixin,
)
from hf_dynmask.training import CapturedStep, captured_step, throughput

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SIZES |= {"vocab_size": 50}
WIDTH = 8
LENGTHS = [3, 8, 1, 4, 6, 2, 7, 5, 8, 2]


class CapturedTrainer(CapturedStepMixin, Trainer):
    pass


def rows(number, columns=("lengths",)):
    """Examples of one width, padded."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for k in range(number):
        length = LENGTHS[k % len(LENGTHS)]
        is_there = torch.arange(WIDTH) < length
        ids = torch.randint(1, 50, (WIDTH,), generator=generator) * is_there
        labels = (ids % 2).masked_fill(~is_there, -100)
        known = {"lengths": length, "attention_mask": is_there.long()}
        examples.append({"input_ids": ids, "labels": labels} | {name: known[name] for name in columns})
    return examples


def make_model(kind="ours", dropout=0.0):
    torch.manual_seed(0)
    settings = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, **SIZES}
    if kind == "stock":
        return BertForTokenClassification(BertConfig(**settings))
    return DynMaskForTokenClassification(DynMaskConfig(**settings))


def train(trainer_class, folder, model, data, *callbacks, resume=None, **settings):
    defaults = {"per_device_train_batch_size": 2, "max_steps": 10, "save_strategy": "no", "learning_rate": 1e-2}
    defaults |= {"logging_steps": 1, "use_cpu": not torch.cuda.is_available(), "report_to": "none"}
    defaults |= {"disable_tqdm": True, "lr_scheduler_type": "constant"}
    trainer = trainer_class(
        model,
        TrainingArguments(str(folder), **{**defaults, **settings}),
        default_data_collator,
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def check_same_training(found, expected, **tolerance):
    torch.testing.assert_close(losses(found), losses(expected), **tolerance)
    for (name, weight), other in zip(found.model.named_parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(weight, other, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# --- a capture that only runs again ----------------------------------------------------------------------------------


@pytest.fixture
def captures(monkeypatch):
    """Whether each graph that was captured adds to gradients. A capture makes the tensors that replays write to."""
    found: list[bool] = []

    @contextmanager
    def within_a_graph():
        with monkeypatch.context() as patch:
            patch.setattr(throughput, "is_cuda_stream_capturing", lambda: True)
            yield

    class Pretended:
        def run(self, step):
            return step()

        def capture(self, step):
            parameters = parameters_of(step)
            before = [None if each.grad is None else each.grad.clone() for each in parameters]
            adds = any(gradient is not None for gradient in before)
            found.append(adds)
            with torch.random.fork_rng(), within_a_graph():
                loss = step()
            held = [each.grad for each in parameters]
            for gradient, value in zip(held, before, strict=True):
                if value is not None and gradient is not None:
                    gradient.copy_(value)

            def replay():
                for parameter, gradient in zip(parameters, held, strict=True):
                    assert parameter.grad is gradient or not adds and parameter.grad is None
                    parameter.grad = gradient if adds else None
                with within_a_graph():
                    loss.copy_(step())
                for parameter, gradient in zip(parameters, held, strict=True):
                    if gradient is not None and parameter.grad is not None:
                        gradient.copy_(parameter.grad)
                    parameter.grad = None  # a replay does nothing that Python sees
                return loss

            return replay

    def parameters_of(step):
        (captured,) = (cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, CapturedStep))
        return captured._parameters

    monkeypatch.setattr(captured_step, "_CudaGraphs", Pretended)
    monkeypatch.setattr(captured_step, "why_not_captured", lambda trainer: None)
    return found


def compare(folder, data, *, kind="ours", callbacks=lambda: (), dropout=0.0, **settings):
    trainers = [
        train(of, folder / of.__name__, make_model(kind, dropout), data, *callbacks(), **settings)
        for of in (Trainer, CapturedTrainer)
    ]
    check_same_training(*trainers, rtol=0, atol=0)
    return trainers


@pytest.mark.parametrize("kind, columns", [("ours", ["lengths"]), ("stock", ["attention_mask"])])
@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [False]),
        ({"gradient_accumulation_steps": 3}, [False, True]),  # of 20 batches, so the last window has two
        ({"max_grad_norm": 0.05}, [False]),
        ({"max_grad_norm": 0}, [False]),
        ({"bf16": True}, [False]),
        ({"label_smoothing_factor": 0.1}, [False]),
        ({"eval_strategy": "steps", "eval_steps": 3}, [False]),
        ({"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}, [False, True]),
        ({"max_steps": 3}, []),
    ],
    ids=str,
)
def test_the_course_is_the_trainers_own(kind, columns, settings, expected, captures, tmp_path):
    compare(tmp_path, rows(40, columns), kind=kind, **settings)
    assert captures == expected


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_mean_over_batches_of_a_model_that_counts_no_items(accumulation, captures, tmp_path, monkeypatch):
    """The Trainer divides by the batches of the step: three, or the two that are left of an epoch."""
    init = Trainer.__init__

    def counting_none(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.model_accepts_loss_kwargs = False

    monkeypatch.setattr(Trainer, "__init__", counting_none)
    data = rows(40, ["attention_mask"])
    settings = {"gradient_accumulation_steps": accumulation, "max_steps": 15}
    plain, captured = (
        train(of, tmp_path / of.__name__, make_model("stock"), data, **settings) for of in (Trainer, CapturedTrainer)
    )
    check_same_training(captured, plain, rtol=1e-5, atol=1e-6)
    assert captures == ([False] if accumulation == 1 else [False, True])


def test_dropout_goes_on(captures, tmp_path):
    compare(tmp_path, rows(20), dropout=0.5)


def test_resuming(captures, tmp_path):
    data = rows(20)
    unbroken = train(CapturedTrainer, tmp_path, make_model(dropout=0.2), data, save_strategy="steps", save_steps=6)
    resumed = train(CapturedTrainer, tmp_path, make_model(dropout=0.2), data, resume=str(tmp_path / "checkpoint-6"))
    assert captures == [False, False]
    check_same_training(resumed, unbroken, rtol=0, atol=0)


def test_training_again(captures, tmp_path):
    trainer = train(CapturedTrainer, tmp_path, make_model(), rows(20))
    trainer.train()
    assert captures == [False, False]


def test_a_mask_that_changes_is_captured_once(captures, tmp_path):
    compare(
        tmp_path,
        rows(20),
        callbacks=lambda: [MaskSchedule({0: "window(1)", 5: "causal", 10: "full"})],
        max_steps=15,
    )
    assert captures == [False, False, False]


class Freezing(TrainerCallback):
    def on_step_begin(self, args, state, control, *, model: Any, **kwargs):
        model.base_model.requires_grad_(state.global_step < 5)


def test_weights_that_are_frozen_meanwhile(captures, tmp_path):
    compare(tmp_path, rows(20), callbacks=lambda: [Freezing()])
    assert captures == [False, False]


class InnerMaskChange(TrainerCallback):
    """Changes the mask between the batches of an optimizer step."""

    def on_substep_end(self, args, state, control, *, model: Any, **kwargs):
        if state.global_step == 4:
            model.set_mask("causal")


def test_a_mask_that_changes_within_an_optimizer_step(captures, tmp_path):
    settings: dict[str, Any] = {"gradient_accumulation_steps": 3, "max_steps": 8}
    compare(tmp_path, rows(60), callbacks=lambda: [InnerMaskChange()], **settings)
    assert captures == [False, True, False, True]


def test_throughput_counts_all_batches(captures, tmp_path, monkeypatch):
    """In a capture, which computes nothing, none."""
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, dtype: 1e9)
    plain, captured = compare(tmp_path, rows(20), callbacks=lambda: [ThroughputCallback()], logging_steps=10)
    tokens = [trainer.state.log_history[-1]["train_real_tokens"] for trainer in (plain, captured)]
    assert tokens[0] == sum(LENGTHS) * 2
    assert captures == [False]
    assert tokens == [tokens[0], tokens[0]]


# --- fixed flat rows -------------------------------------------------------------------------------------------------

MOST, SEQUENCES = 40, 6  # of a fixed flat row


def flat_rows(number):
    """Batches of a fixed flat row each, with places behind the last sequence that are absent."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for k in range(number):
        lengths = torch.tensor([LENGTHS[(k + place) % len(LENGTHS)] for place in range(SEQUENCES - k % 2)])
        lengths = nn.functional.pad(lengths, (0, SEQUENCES - len(lengths)))
        is_there = torch.arange(MOST) < lengths.sum()
        ids = torch.randint(1, 50, (MOST,), generator=generator) * is_there
        batches.append({"input_ids": ids, "lengths": lengths, "labels": (ids % 2).masked_fill(~is_there, -100)})
    return batches


def collate_flat(batches):
    (batch,) = batches
    return {name: values if name == "lengths" else values[None] for name, values in batch.items()}


class FlatTrainer(Trainer):
    def __init__(self, model, args, data_collator, **kwargs):
        args.per_device_train_batch_size = args.per_device_eval_batch_size = 1
        super().__init__(model, args, collate_flat, **kwargs)


class CapturedFlatTrainer(CapturedStepMixin, FlatTrainer):
    pass


def trainers_of(kind, number):
    """Without and with capture, and so many batches: of ours fixed flat rows, of stock BERT rows of one width."""
    if kind == "ours":
        return (FlatTrainer, CapturedFlatTrainer), flat_rows(number)
    return (Trainer, CapturedTrainer), rows(2 * number, ["attention_mask"])


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 3}, {"eval_strategy": "epoch"}], ids=str)
def test_fixed_flat_rows(settings, captures, tmp_path):
    classes, data = trainers_of("ours", 8)
    plain, captured = (
        train(of, tmp_path / of.__name__, make_model(dropout=0.2), data, max_steps=12, **settings) for of in classes
    )
    check_same_training(captured, plain, rtol=0, atol=0)
    assert captures == ([False, True] if "gradient_accumulation_steps" in settings else [False])


class BudgetTrainer(TokenBudgetMixin, Trainer):
    pass


class CapturedBudgetTrainer(CapturedStepMixin, TokenBudgetMixin, Trainer):
    pass


def test_a_budget_of_tokens_gives_batches_of_one_shape(captures, tmp_path):
    """On the way from texts to a captured step a user has nothing to set but the budget."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0})), pad_token="[PAD]")
    texts = [torch.randint(1, 50, (LENGTHS[k % len(LENGTHS)],)).tolist() for k in range(60)]
    data: Any = [{"input_ids": ids, "labels": [token % 2 for token in ids]} for ids in texts]
    trainers = []
    for of in (BudgetTrainer, CapturedBudgetTrainer):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=10, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
        )
        collator = DataCollatorWithLengths(tokenizer, flat=True)
        trainers.append(of(make_model(), arguments, collator, train_dataset=data, eval_dataset=data[:6], max_tokens=20))
        trainers[-1].train()
        trainers[-1].evaluate()
    check_same_training(trainers[1], trainers[0], rtol=0, atol=0)
    assert captures == [False]


def test_a_flat_row_of_another_size(captures, tmp_path):
    data = flat_rows(6)
    data[4] = {name: values[:-1] for name, values in data[4].items()}
    message = r"`(lengths|input_ids|labels)` of a captured step must be .*max_tokens=..., max_sequences=..."
    with pytest.raises(ValueError, match=message):
        train(CapturedFlatTrainer, tmp_path, make_model(), data)


# --- one step --------------------------------------------------------------------------------------------------------


def make_step(model):
    def step(batch):
        loss = model(batch["x"]).square().mean()
        loss.backward()
        return loss.detach()

    return CapturedStep(step, model.parameters())


def test_a_step_of_ones_own(captures):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    step = make_step(model)
    for k in range(8):
        x = torch.randn(3, 4)
        expected = model(x).square().mean()
        gradients = torch.autograd.grad(expected, list(model.parameters()))
        assert step.is_ready() == (k >= captured_step.WARM_UP)
        torch.testing.assert_close(step({"x": x}), expected)
        torch.testing.assert_close([each.grad for each in model.parameters()], list(gradients))
        model.zero_grad()
    assert captures == [False]


def test_losses_are_not_overwritten(captures):
    step = make_step(nn.Linear(4, 2))
    found = [step({"x": torch.full((1, 4), float(k))}) for k in range(8)]
    assert len({loss.item() for loss in found}) == 8


def test_gradients_of_others_are_added_to(captures):
    """They are no tensors of the graph, so the step runs as ever."""
    model = nn.Linear(4, 2)
    step = make_step(model)
    x = torch.ones(1, 4)
    for _ in range(5):
        step({"x": x})
        one = [each.grad.clone() for each in model.parameters() if each.grad is not None]
        model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert not step.is_ready()
    step({"x": x})
    torch.testing.assert_close([each.grad for each in model.parameters()], [1 + each for each in one])


@pytest.mark.parametrize("late", [1, 5])
@pytest.mark.parametrize(
    "batch, message",
    [
        (
            {"x": torch.zeros(2, 4), "n": 1},
            r"`x` of a captured step must be torch.float32 of shape \(3, 4\) in every batch, as in the first one; got "
            r"torch.float32 of shape \(2, 4\). DataCollatorWithLengths\(tokenizer, flat=True, max_tokens=...",
        ),
        ({"x": torch.zeros(3, 4).double(), "n": 1}, r"got torch.float64 of shape \(3, 4\)"),
        ({"x": torch.zeros(1, 3, 4), "n": 1}, r"got torch.float32 of shape \(1, 3, 4\)"),
        ({"x": torch.zeros(0, 4), "n": 1}, r"got torch.float32 of shape \(0, 4\)"),
        ({"x": torch.zeros(3, 4), "n": 2}, r"`n` of a captured step must be 1 in every batch.*got 2"),
        ({"x": torch.zeros(3, 4), "n": None}, r"`n` of a captured step must be 1 in every batch.*got None"),
        ({"x": torch.zeros(3, 4), "n": torch.tensor(1)}, r"must be 1 in every batch.*got torch.int64 of shape \(\)"),
        ({"x": None, "n": 1}, r"`x` of a captured step .*got None"),
        ({"x": torch.zeros(3, 4)}, r"must have x, n, like the first one; got x$"),
        ({"x": torch.zeros(3, 4), "n": 1, "y": 2}, r"must have x, n, like the first one; got x, n, y"),
    ],
    ids=str,
)
def test_batches_have_one_shape(batch, message, late, captures):
    model = nn.Linear(4, 2)
    step = make_step(model)
    for _ in range(late):
        step({"x": torch.zeros(3, 4), "n": 1})
        model.zero_grad()
    with pytest.raises(ValueError, match=message):
        step(batch)


def test_the_order_of_the_columns_may_be_another(captures):
    model = nn.Linear(4, 2)
    step = make_step(model)
    for k in range(6):
        batch = {"x": torch.ones(3, 4), "n": 1}
        step(batch if k % 2 else dict(reversed(batch.items())))
        model.zero_grad()
    assert captures == [False]


def test_a_last_batch_that_is_smaller(captures, tmp_path):
    with pytest.raises(ValueError, match=r"`input_ids` .* must be .* \(2, 8\) in every batch, .* got .* \(1, 8\)"):
        train(CapturedTrainer, tmp_path, make_model(), rows(11))


# --- what cannot be captured -----------------------------------------------------------------------------------------


def stub(model=None, accelerator=None, parallel=False, **settings):
    defaults = {"device": torch.device("cuda"), "n_gpu": 1, "world_size": 1, "gradient_checkpointing": False}
    defaults |= {"torch_compile": False, "torch_compile_mode": None, "optim": "adamw_torch_fused"}
    defaults |= {"torch_empty_cache_steps": None, "auto_find_batch_size": False}
    of_accelerator = {"use_distributed": False, "scaler": None, "distributed_type": SimpleNamespace(value="MULTI_GPU")}
    return SimpleNamespace(
        args=SimpleNamespace(**{**defaults, **settings}),
        accelerator=SimpleNamespace(**{**of_accelerator, **(accelerator or {})}),
        model=model or make_model(),
        is_model_parallel=parallel,
    )


def checkpointing():
    model: Any = make_model("stock")
    model.base_model.encoder.gradient_checkpointing = True
    return model


def dropping_layers(probability):
    settings = {**SIZES, "layerdrop": probability}
    return BertForTokenClassification(BertConfig(**settings))


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"device": torch.device("cpu")}, "it needs a CUDA device; got 'cpu'"),
        ({"device": torch.device("mps")}, "it needs a CUDA device; got 'mps'"),
        ({"accelerator": {"use_distributed": True}, "world_size": 2}, "it needs one process; got 2, MULTI_GPU"),
        ({"n_gpu": 2}, "it needs one device"),
        ({"parallel": True}, "it needs one device"),
        ({"accelerator": {"scaler": object()}}, "fp16=True needs .* use bf16=True"),
        ({"gradient_checkpointing": True}, "gradient checkpointing reads"),
        ({"activation_checkpointing": True}, "gradient checkpointing reads"),
        ({"model": checkpointing()}, "gradient checkpointing reads"),
        ({"model": dropping_layers(0.1)}, "^layerdrop chooses layers"),
        ({"torch_compile": True, "torch_compile_mode": "reduce-overhead"}, "torch_compile_mode='reduce-overhead'"),
        (
            {"torch_compile": True, "torch_compile_mode": "max-autotune"},
            "torch_compile_mode='max-autotune' captures CUDA",
        ),
        ({"optim": "adalomo"}, "optim='adalomo' steps during the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise' steps"),
        ({"torch_empty_cache_steps": 5}, "torch_empty_cache_steps"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_why_a_step_is_not_captured(given, reason):
    found = captured_step.why_not_captured(stub(**given))
    assert found is not None
    assert re.search(reason, found)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"torch_compile": True},
        {"torch_compile_mode": "reduce-overhead"},
        {"torch_compile": True, "torch_compile_mode": "max-autotune-no-cudagraphs"},
        {"model": dropping_layers(0.0)},
        {"model": nn.Linear(1, 1)},
        {"optim": "adafactor"},
    ],
    ids=str,
)
def test_what_is_captured(given):
    assert captured_step.why_not_captured(stub(**given)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there a step can be captured")
def test_a_training_without_cuda_does_not_begin(tmp_path):
    with pytest.raises(ValueError, match="cannot be captured as a CUDA graph: it needs a CUDA device; got 'cpu'"):
        train(CapturedTrainer, tmp_path, make_model(), rows(4))


class Failing:
    """A capture that ends in an error once something in it has failed, as torch's does."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        pass

    def __exit__(self, kind, error, traceback):
        if error is not None:
            raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (
            RuntimeError("a value was read"),
            RuntimeError,
            "cannot be captured as a CUDA graph: a value was read. A capt",
        ),
        (ValueError("a wrong value"), RuntimeError, "cannot be captured as a CUDA graph: a wrong value. A captured st"),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError, "^no memory$"),
    ],
    ids=str,
)
def test_what_a_capture_that_fails_says(error, kind, message, monkeypatch):
    streams = []
    for name in ("Stream", "graph_pool_handle", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: name)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch.cuda, "graph", Failing)

    def step():
        raise error

    with pytest.raises(kind, match=message):
        captured_step._CudaGraphs().capture(step)
    assert streams == ["current_stream"]


# --- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_captures(monkeypatch):
    found = []
    capture = captured_step._CudaGraphs.capture
    monkeypatch.setattr(
        captured_step._CudaGraphs, "capture", lambda self, step: [found.append(1), capture(self, step)][1]
    )
    return found


CLOSE = {"rtol": 2e-3, "atol": 2e-3}  # kernels add up in any order


def compare_on_cuda(folder, kind, *, callbacks=lambda: (), dropout=0.0, close=CLOSE, **settings):
    """Twenty steps; of an optimizer that does not blow up the least gradients, unless the settings say otherwise."""
    settings = {"max_steps": 20, "optim": "sgd", "learning_rate": 0.1, **settings}
    classes, data = trainers_of(kind, 20)
    plain, captured = (
        train(of, folder / of.__name__, make_model(kind, dropout), data, *callbacks(), **settings) for of in classes
    )
    check_same_training(captured, plain, **close)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["stock", "ours"])
@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, 1),
        ({"gradient_accumulation_steps": 3}, 2),
        ({"max_grad_norm": 0.05}, 1),
        ({"bf16": True, "close": {"rtol": 2e-2, "atol": 2e-2}}, 1),
        ({"optim": "adamw_torch_fused", "learning_rate": 1e-3, "adam_epsilon": 1e-3}, 1),
        ({"eval_strategy": "steps", "eval_steps": 7}, 1),
        ({"logging_nan_inf_filter": False}, 1),
    ],
    ids=str,
)
def test_captured_training_is_that_of_eager_steps(settings, expected, kind, real_captures, tmp_path):
    compare_on_cuda(tmp_path, kind, **settings)
    assert len(real_captures) == expected


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch.compile's
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_compiled_and_captured(kind, real_captures, tmp_path):
    compare_on_cuda(tmp_path, kind, torch_compile=True)
    assert len(real_captures) == 1
    torch.compiler.reset()


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_dropout_draws_in_replays_what_it_draws_in_eager_steps(kind, real_captures, tmp_path):
    compare_on_cuda(tmp_path, kind, dropout=0.5)
    assert len(real_captures) == 1


@pytest.mark.cuda
def test_dropout_differs_between_replays():
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5)).cuda()
    step = make_step(model)
    x = torch.ones(8, 64, device="cuda")
    found = []
    for _ in range(10):
        found.append(step({"x": x}).item())
        model.zero_grad()
    assert len(set(found)) == 10


@pytest.mark.cuda
def test_a_mask_that_changes_on_cuda(real_captures, tmp_path):
    compare_on_cuda(tmp_path, "ours", callbacks=lambda: [MaskSchedule({0: "window(1)", 8: "causal"})])
    assert len(real_captures) == 2


@pytest.mark.cuda
def test_resuming_on_cuda(real_captures, tmp_path):
    data = flat_rows(20)
    settings: dict[str, Any] = {"max_steps": 20, "save_strategy": "steps", "save_steps": 12, "optim": "sgd"}
    unbroken = train(CapturedFlatTrainer, tmp_path, make_model(dropout=0.1), data, **settings)
    checkpoint = str(tmp_path / "checkpoint-12")
    resumed = train(CapturedFlatTrainer, tmp_path, make_model(dropout=0.1), data, resume=checkpoint, **settings)
    check_same_training(resumed, unbroken, **CLOSE)


@pytest.mark.cuda
def test_what_reads_a_value_says_so():
    model = nn.Linear(4, 2).cuda()

    def step(batch):
        loss = model(batch["x"]).square().mean()
        if loss > 0:
            loss.backward()
        return loss.detach()

    captured = CapturedStep(step, model.parameters())
    with pytest.raises(RuntimeError, match="the step cannot be captured as a CUDA graph"):
        for _ in range(5):
            captured({"x": torch.ones(3, 4, device="cuda")})
            model.zero_grad()
