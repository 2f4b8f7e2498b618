"""A pass that is interrupted, wherever it is, leaves nothing alive and nothing undone: the next one is right."""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false

import gc
import random
import signal
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_dynmask import (
    DataCollatorWithLengths,
    DynMaskConfig,
    DynMaskForCausalLM,
    DynMaskModel,
    DynMaskSeq2SeqConfig,
    DynMaskSeq2SeqModel,
    ThroughputCallback,
)
from hf_dynmask.modeling import graph_layout
from hf_dynmask.modeling.layout import eager_only
from hf_dynmask.stock import attention as stock_attention
from hf_dynmask.stock import masks as stock_masks
from hf_dynmask.stock import models as stock_models
from hf_dynmask.stock.batches import current_batches
from stock_models import random_stock

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # of PEFT
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning"),
]

SIZES: dict[str, Any] = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2}
ATTENTION: dict[str, Any] = {"num_attention_heads": 2, "intermediate_size": 19, "attention_probs_dropout_prob": 0.0}
OWN: dict[str, Any] = SIZES | ATTENTION | {"hidden_dropout_prob": 0.0, "max_position_embeddings": 41}
LENGTHS = [4, 5]


def ready(family, task):
    model = random_stock(family, task)
    model.set_attn_implementation("dynmask")
    return model


def own(head, **settings):
    torch.manual_seed(0)
    return head(DynMaskConfig(**OWN | settings)).eval()


def random_tokenizer():
    return SimpleNamespace(pad_token_id=0)


def seq2seq():
    torch.manual_seed(0)
    config = DynMaskSeq2SeqConfig(**SIZES, **ATTENTION, decoder_start_token_id=1, pad_token_id=0)
    return DynMaskSeq2SeqModel(config).eval()


def with_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "query"])).eval()


MODELS = {
    "bert": lambda: ready("bert", "base"),
    "llama with a head": lambda: ready("llama", "causal-lm"),
    "bart": lambda: ready("bart", "base"),
    "llama, PEFT": lambda: with_lora(ready("llama", "causal-lm")),
    "ours": lambda: own(DynMaskModel, mask="causal & window(2, 0)"),
    "ours, eager": lambda: own(DynMaskModel, attn_implementation="eager"),
    "ours, sdpa": lambda: own(DynMaskForCausalLM, attn_implementation="sdpa"),
    "ours, both sides": seq2seq,
}


def inputs_of(name):
    if name in ("bart", "ours, both sides"):
        ids = torch.randint(5, 37, (2, 5))
        return {"input_ids": ids, "lengths": torch.tensor(LENGTHS), "decoder_input_ids": ids.clone()}
    return {"input_ids": torch.randint(5, 37, (1, 9)), "lengths": torch.tensor(LENGTHS)}


def cloned(inputs):
    return {name: value.clone() for name, value in inputs.items()}


def layers_of(model):
    found = [module for name, module in model.named_modules() if name.split(".")[-1].isdecimal()]
    return [module for module in found if not isinstance(module, nn.Linear)]


def hooks_of(model):
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def tensors_alive():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


class Bell:
    """Raises when it rings for the nth time; 0: never."""

    def __init__(self, error, nth=1):
        self.error, self.left = error, nth

    def __call__(self, *args, **kwargs):
        self._ring()

    @eager_only
    def _ring(self):
        self.left -= 1
        if self.left == 0:
            raise self.error


def check_interrupted(run, error, inputs):
    """`run(inputs)` ends in the error and keeps none of its inputs."""
    kept = [weakref.ref(value) for value in inputs.values() if isinstance(value, torch.Tensor)]
    try:
        run(inputs)
    except error:
        pass
    else:
        pytest.fail("it was not interrupted")
    inputs.clear()
    gc.collect()
    assert not [each for each in kept if each() is not None]
    assert current_batches() == ()
    assert not len(graph_layout._known)


@pytest.fixture(scope="module")
def other():
    """A flat batch of another model, and what is right."""
    model, ids = ready("bert", "masked-lm"), torch.randint(5, 37, (1, 9))
    with torch.no_grad():
        return model, ids, torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)


def check_next(model, inputs, right, other):
    """The next passes, of this model and of the other, are right."""
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], right, atol=1e-5, rtol=1e-4)
        stranger, ids, expected = other
        torch.testing.assert_close(stranger(ids, lengths=LENGTHS).logits, expected)


PLACES = {
    "first layer, before": lambda model, bell: layers_of(model)[0].register_forward_pre_hook(bell),
    "last layer, behind": lambda model, bell: layers_of(model)[-1].register_forward_hook(bell),
    "embeddings": lambda model, bell: [module for module in model.modules() if isinstance(module, nn.Embedding)][
        -1
    ].register_forward_hook(bell),
    "the model, before": lambda model, bell: model.register_forward_pre_hook(bell),
    "the model, behind": lambda model, bell: model.register_forward_hook(bell),
}


@pytest.mark.parametrize(
    "place, error", [*((place, KeyboardInterrupt) for place in PLACES), ("first layer, before", SystemExit)]
)
@pytest.mark.parametrize("name", MODELS)
def test_an_interrupt_in_a_hook(name, place, error, other):
    model, inputs = MODELS[name](), inputs_of(name)
    with torch.no_grad():
        right = model(**inputs)[0]
    hooks = hooks_of(model)
    handle = PLACES[place](model, Bell(error))
    with torch.no_grad():
        check_interrupted(lambda given: model(**given), error, cloned(inputs))
    handle.remove()
    assert hooks_of(model) == hooks
    check_next(model, inputs, right, other)


@pytest.mark.parametrize(
    "name, error", [("bert", SystemExit), ("llama, PEFT", KeyboardInterrupt), ("ours", KeyboardInterrupt)]
)
def test_an_interrupt_in_a_compiled_model(name, error, other):
    torch.compiler.reset()
    model, inputs, bell = MODELS[name](), inputs_of(name), Bell(error, 0)
    layers_of(model)[0].register_forward_pre_hook(bell)
    run = torch.compile(model, backend="eager")
    with torch.no_grad():
        right = model(**inputs)[0]
        for nth in (1, 2):  # while it is compiled, and when it runs
            bell.left = nth
            check_interrupted(lambda given: [run(**given), run(**given)], error, cloned(inputs))
            check_next(run, inputs, right, other)


@pytest.mark.parametrize("name", ["bert", "ours"])
def test_an_interrupt_of_the_compiler(name, other):
    torch.compiler.reset()
    bell = Bell(KeyboardInterrupt)

    def backend(graph_module, example_inputs):
        bell()
        return graph_module

    model, inputs = MODELS[name](), inputs_of(name)
    run = torch.compile(model, backend=backend)
    with torch.no_grad():
        right = model(**inputs)[0]
        check_interrupted(lambda given: run(**given), KeyboardInterrupt, cloned(inputs))
        check_next(run, inputs, right, other)


def backward(model, given):
    output = model(**given)[0]
    output.square().sum().backward()


def with_bell(output, bell):
    """A hook on the gradient of a layer's states."""
    states = output[0] if isinstance(output, tuple) else output
    states.register_hook(bell)


@pytest.mark.parametrize("name", MODELS)
def test_an_interrupt_in_a_backward_pass(name, other):
    model, inputs = MODELS[name](), inputs_of(name)
    right = model(**inputs)[0].detach()
    bell = Bell(KeyboardInterrupt)
    handle = layers_of(model)[-1].register_forward_hook(lambda module, given, output: with_bell(output, bell))
    check_interrupted(lambda given: backward(model, given), KeyboardInterrupt, cloned(inputs))
    assert bell.left == 0
    handle.remove()
    check_next(model, inputs, right, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama with a head", "ours", "ours, eager", "bart"])
def test_an_interrupt_while_a_checkpoint_is_computed_again(name, use_reentrant, other):
    model, inputs = MODELS[name](), inputs_of(name)
    right = model(**inputs)[0].detach()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train().enable_input_require_grads()
    bell = Bell(KeyboardInterrupt, 2)
    last = next(module for module in layers_of(model)[-1].modules() if isinstance(module, nn.Linear))
    handle = last.register_forward_hook(bell)  # called in the forward pass, and again in the backward pass
    check_interrupted(lambda given: backward(model, given), KeyboardInterrupt, cloned(inputs))
    assert bell.left == 0
    handle.remove()
    model.gradient_checkpointing_disable()
    model.eval()
    check_next(model, inputs, right, other)


class Processor(LogitsProcessor):
    def __init__(self, bell):
        self.bell = bell

    def __call__(self, input_ids, scores):
        self.bell()
        return scores


class Criterion(StoppingCriteria):
    def __init__(self, bell):
        self.bell = bell

    def __call__(self, input_ids, scores, **kwargs):
        self.bell()
        return torch.zeros(len(input_ids), dtype=torch.bool)


WAYS = {
    "logits": lambda bell: {"logits_processor": LogitsProcessorList([Processor(bell)])},
    "stopping": lambda bell: {"stopping_criteria": StoppingCriteriaList([Criterion(bell)])},
    "static cache": lambda bell: {
        "stopping_criteria": StoppingCriteriaList([Criterion(bell)]),
        "cache_implementation": "static",
        "disable_compile": True,
    },
    "layer": lambda bell: {},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama with a head", "llama, PEFT", "ours, sdpa"])
def test_an_interrupt_of_generation(name, way, other):
    model = MODELS[name]()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    prompts = {"input_ids": torch.tensor([[5, 6, 7], [0, 8, 9]]), "attention_mask": torch.tensor([[1] * 3, [0, 1, 1]])}
    right = model.generate(**prompts, **settings)
    bell = Bell(KeyboardInterrupt, 3)
    handle = layers_of(model)[0].register_forward_pre_hook(bell if way == "layer" else lambda *_: None)
    check_interrupted(
        lambda given: model.generate(**given, **settings, **WAYS[way](bell)), KeyboardInterrupt, cloned(prompts)
    )
    handle.remove()
    assert torch.equal(model.generate(**prompts, **settings), right)
    stranger, ids, expected = other
    torch.testing.assert_close(stranger(ids, lengths=LENGTHS).logits, expected)


@pytest.mark.parametrize("name", ["attention", "the mask", "the end"])
def test_an_interrupt_in_attention(name, other, monkeypatch):
    """Of our own code, between what it has read and what it is to give."""
    model, inputs = MODELS["llama with a head"](), inputs_of("llama with a head")
    with torch.no_grad():
        right = model(**inputs)[0]
        with monkeypatch.context() as patch:
            places = {
                "attention": (stock_attention, "attend_by_plan"),
                "the mask": (stock_masks.DeferredMask, "_plan"),
                "the end": (stock_models, "_leave"),
            }
            patch.setattr(*places[name], Bell(KeyboardInterrupt))
            check_interrupted(lambda given: model(**given), KeyboardInterrupt, cloned(inputs))
        check_next(model, inputs, right, other)


def test_an_exit_of_a_thread(other):
    """What a thread was given ends with it, and other threads never saw it."""
    model, seen = MODELS["bert"](), []
    layers_of(model)[0].register_forward_pre_hook(lambda *_: seen.append(len(current_batches())))
    layers_of(model)[1].register_forward_pre_hook(Bell(SystemExit))

    def run():
        with pytest.raises(SystemExit):
            model(**inputs_of("bert"))
        seen.append(len(current_batches()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [1, 0]
    assert current_batches() == ()
    with torch.no_grad():
        stranger, ids, expected = other
        torch.testing.assert_close(stranger(ids, lengths=LENGTHS).logits, expected)


class Examples(torch.utils.data.Dataset):
    def __init__(self, bell):
        self.bell = bell

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.bell()
        return {"input_ids": list(range(5, 7 + index))}


@pytest.mark.parametrize("flat", [False, True])
def test_an_interrupt_of_a_collator(flat):
    collate = DataCollatorWithLengths(random_tokenizer(), flat=flat)
    expected = list(DataLoader(Examples(Bell(KeyboardInterrupt, 0)), batch_size=4, collate_fn=collate))
    bell = Bell(KeyboardInterrupt, 6)
    batches = iter(DataLoader(Examples(bell), batch_size=4, collate_fn=collate))
    first = next(batches)
    assert torch.equal(first["input_ids"], expected[0]["input_ids"])
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    again = list(DataLoader(Examples(bell), batch_size=4, collate_fn=collate))
    for found, wanted in zip(again, expected, strict=True):
        assert torch.equal(found["input_ids"], wanted["input_ids"])


def interrupts(seed):
    """Raise KeyboardInterrupt at a moment of a pass that nobody chose."""
    signal.setitimer(signal.ITIMER_REAL, random.Random(seed).uniform(1e-5, 6e-3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of those that fall into finalizers
@pytest.mark.parametrize("name", ["bart", "llama with a head", "ours"])
def test_interrupts_at_any_moment(name, other):
    model, inputs = MODELS[name](), inputs_of(name)
    with torch.no_grad():
        right = model(**inputs)[0]
        before, interrupted = signal.signal(signal.SIGALRM, signal.default_int_handler), 0
        try:
            for seed in range(40):
                try:
                    interrupts(seed)
                    for _ in range(100):
                        model(**cloned(inputs))
                except KeyboardInterrupt:
                    interrupted += 1
                assert current_batches() == ()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert interrupted > 20  # one that falls into a finalizer is lost: Python ignores what is raised there
        check_next(model, inputs, right, other)


def steps(model, count, every=10):
    """Training steps of which every tenth is interrupted; tensors that are alive, and hooks, after each such."""
    optimizer, figures = torch.optim.SGD(model.parameters(), lr=1e-3), []
    bell = Bell(KeyboardInterrupt, 0)
    layers_of(model)[-1].register_forward_hook(bell)
    for step in range(count):
        if step % every == every - 1:
            bell.left = 1
        try:
            model(**inputs_of("bert"))[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        except KeyboardInterrupt:
            optimizer.zero_grad(set_to_none=False)
        if step % every == every - 1:  # once the error, and what it has passed through, is gone
            figures.append((tensors_alive(), hooks_of(model)))
    return figures


@pytest.mark.parametrize("name", ["bert", "llama with a head", "llama, PEFT", "ours", "ours, eager"])
def test_memory_and_hooks_stay_as_they_are(name):
    figures = steps(MODELS[name](), 40)
    assert len(figures) == 4
    assert len(set(figures)) == 1


class Interrupting(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupt_of_a_training(tmp_path, other):
    """What it was counted by is gone with it; a training that goes on counts once."""
    model = MODELS["ours, sdpa"]()
    hooks = hooks_of(model)
    examples = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    settings = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
    for _ in range(3):
        trainer = Trainer(model, settings, DataCollatorWithLengths(random_tokenizer()), examples)
        trainer.add_callback(ThroughputCallback())
        trainer.add_callback(Interrupting())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert hooks_of(model) <= hooks + 3
    del trainer
    gc.collect()
    assert hooks_of(model) == hooks
    inputs = inputs_of("ours")
    with torch.no_grad():
        check_next(model.eval(), inputs, model(**inputs)[0], other)
