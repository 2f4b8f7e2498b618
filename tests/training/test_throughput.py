"""ThroughputCallback: what real Trainer runs log, by a clock that ticks once a step and a peak that is known."""

import gc
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_dynmask import (
    DataCollatorForFeatures,
    DataCollatorForSeq2SeqWithLengths,
    DataCollatorWithLengths,
    DynMaskConfig,
    DynMaskForConditionalGeneration,
    DynMaskForCTC,
    DynMaskForMaskedLM,
    DynMaskForMultipleChoice,
    DynMaskForSequenceClassification,
    DynMaskRecurrentConfig,
    DynMaskRecurrentForSequenceClassification,
    DynMaskSeq2SeqConfig,
    DynMaskSeq2SeqForSequenceClassification,
    MaskSchedule,
    ThroughputCallback,
)
from hf_dynmask.training import throughput
from hf_dynmask.training.flops import model_flops
from two_processes import in_two_processes

SIZES: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
SIZES |= {"vocab_size": 20}
BART: dict[str, Any] = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
LENGTHS = [3, 9, 1, 4, 6, 2, 7, 5]  # of eight examples, four steps of two
TARGETS = [2, 1, 4, 3, 5, 2, 1, 6]
PEAK = 1e6
real_matmul_peak, real_peak_memory = throughput.matmul_peak, throughput.peak_memory


TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0, "a": 1})), pad_token="[PAD]")


@pytest.fixture(scope="module", autouse=True)
def few_objects():
    """The Trainer collects garbage before it trains, which takes longer than a run here: of all modules loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """A second between any two looks at the clock, of which there is one a step; the peak of the device."""
    ticks = count()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, dtype: PEAK)
    monkeypatch.setattr(throughput, "peak_memory", lambda device: 3 * 2**29)


# --- Runs ------------------------------------------------------------------------------------------------------------


def examples(**columns):
    """Eight examples of `LENGTHS`; a column is made of the number of the example and its length."""
    return Dataset.from_list(
        [{name: make(k, length) for name, make in columns.items()} for k, length in enumerate(LENGTHS)]
    )


def ids(k, length):
    return [1 + (k + place) % 8 for place in range(length)]


def target(k, length):
    return ids(k, TARGETS[k])


def train(model, collator, data, tmp_path, *callbacks, **settings):
    defaults = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 2, "save_strategy": "no"}
    defaults |= {"train_sampling_strategy": "sequential", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), **{**defaults, **settings})
    trainer = Trainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[ThroughputCallback(), *callbacks],
    )
    trainer.train()
    return trainer.state.log_history


def logged(history, name):
    return [(entry["step"], entry[name]) for entry in history if name in entry]


def padded(*lengths):
    """Places of each batch of two, in rows."""
    return [sum(2 * max(pair) for pair in zip(side[::2], side[1::2], strict=True)) for side in lengths]


CONFIG = DynMaskConfig(**SIZES)
LABELLED = {"input_ids": ids, "labels": lambda k, length: k % 2}
TAGGED = {"input_ids": ids, "labels": lambda k, length: [-100] + ids(k, length - 1)}
PAIRS = {"input_ids": ids, "labels": target}
STOCK_PAIRS = {**PAIRS, "attention_mask": lambda k, length: [1] * length}
FRAMES = {"input_features": lambda k, length: [[0.5]] * 4 * length, "labels": lambda k, length: [1]}
ONE_SIDE, TWO_SIDES = [(length,) for length in LENGTHS], list(zip(LENGTHS, TARGETS, strict=True))


def bert():
    return BertForSequenceClassification(BertConfig(**SIZES))


def bart():
    return BartForConditionalGeneration(BartConfig(**BART, vocab_size=20))


def llama(**settings):
    return LlamaForCausalLM._from_config(LlamaConfig(**SIZES, pad_token_id=0), **settings)


def with_masks(features):
    """Rows padded on the left, with a mask."""
    rows = [feature["input_ids"] for feature in features]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "labels": torch.tensor([feature["labels"] for feature in features]),
    }


def in_choices(features):
    """One question of two choices."""
    batch = DataCollatorWithLengths(TOKENIZER)(features)
    return {name: batch[name][None] for name in ("input_ids", "lengths")} | {"labels": torch.tensor([0])}


# model, collator, columns, sizes of the examples, whether nothing is computed for padding, tokens with logits
RUNS = {
    "rows with lengths": (
        lambda: DynMaskForSequenceClassification(CONFIG),
        DataCollatorWithLengths(TOKENIZER),
        LABELLED,
        ONE_SIDE,
        True,
        0,
    ),
    "rows with masks": (lambda: DynMaskForSequenceClassification(CONFIG), with_masks, LABELLED, ONE_SIDE, True, 0),
    "flat": (
        lambda: DynMaskForSequenceClassification(CONFIG),
        DataCollatorWithLengths(TOKENIZER, flat=True),
        LABELLED,
        ONE_SIDE,
        True,
        0,
    ),
    "choices": (lambda: DynMaskForMultipleChoice(CONFIG), in_choices, LABELLED, ONE_SIDE, True, 0),
    "recurrent": (
        lambda: DynMaskRecurrentForSequenceClassification(DynMaskRecurrentConfig(hidden_size=8)),
        DataCollatorWithLengths(TOKENIZER),
        LABELLED,
        ONE_SIDE,
        True,
        0,
    ),
    "masked LM": (
        lambda: DynMaskForMaskedLM(CONFIG),
        DataCollatorWithLengths(TOKENIZER),
        TAGGED,
        ONE_SIDE,
        True,
        sum(LENGTHS) - 8,
    ),
    "pairs": (
        lambda: DynMaskForConditionalGeneration(DynMaskSeq2SeqConfig(**SIZES, decoder_start_token_id=1)),
        DataCollatorForSeq2SeqWithLengths(TOKENIZER),
        PAIRS,
        TWO_SIDES,
        True,
        sum(TARGETS),
    ),
    "a class of a pair": (  # whose decoder reads the source
        lambda: DynMaskSeq2SeqForSequenceClassification(DynMaskSeq2SeqConfig(**SIZES, decoder_start_token_id=1)),
        DataCollatorWithLengths(TOKENIZER),
        LABELLED,
        [(length, length) for length in LENGTHS],
        True,
        0,
    ),
    "flat pairs": (
        lambda: DynMaskForConditionalGeneration(DynMaskSeq2SeqConfig(**SIZES, decoder_start_token_id=1)),
        DataCollatorForSeq2SeqWithLengths(TOKENIZER, flat=True),
        PAIRS,
        TWO_SIDES,
        True,
        sum(TARGETS),
    ),
    "stock, padded": (bert, with_masks, LABELLED, ONE_SIDE, False, 0),
    "stock pairs, padded": (bart, DataCollatorForSeq2Seq(TOKENIZER), STOCK_PAIRS, TWO_SIDES, False, sum(TARGETS)),
    "stock, flat by positions": (
        lambda: llama(attn_implementation="dynmask"),
        DataCollatorWithFlattening(),
        {"input_ids": ids},
        ONE_SIDE,
        True,
        sum(LENGTHS) - 8,
    ),
    "stock, flat by ends": (
        lambda: llama(attn_implementation="dynmask"),
        DataCollatorWithFlattening(return_flash_attn_kwargs=True),
        {"input_ids": ids},
        ONE_SIDE,
        True,
        sum(LENGTHS) - 8,
    ),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_what_is_logged(name, accumulation, tmp_path):
    make, collator, columns, sizes, no_padding, targets = RUNS[name]
    torch.manual_seed(0)
    model = make()
    steps = 4 // accumulation
    history = train(
        model,
        collator,
        examples(**columns),
        tmp_path,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        logging_steps=2,
    )
    tokens, places = sum(map(sum, sizes)), sum(padded(*zip(*sizes, strict=True)))
    flops = 3 * model_flops(model).forward_flops(sizes, targets)
    assert tokens < places
    expected = {
        "train_real_tokens": tokens,
        "train_real_flops": flops,
        "train_real_tokens_per_second": tokens / steps,
        "train_padding_avoided": 1 - tokens / places if no_padding else 0,
        "train_real_flops_per_second": flops / steps,
        "train_share_of_matmul_peak": flops / steps / PEAK,
        "train_peak_memory_gib": 1.5,
    }
    for key, value in expected.items():
        assert logged(history, key) == [(steps, pytest.approx(value))], key
    halves = [sizes[:4], sizes[4:]] if accumulation == 1 else [sizes]
    rates = [sum(map(sum, half)) / 2 for half in halves]
    assert logged(history, "real_tokens_per_second") == list(zip([2, 4], rates, strict=False))


def test_frames_behind_convolutions(tmp_path):
    """Frames of the input are counted, and the work of those that are left."""
    config = DynMaskConfig(**SIZES, num_features=1, conv_kernel=[3], conv_stride=[2], norm_bias=False)
    model = DynMaskForCTC(config)
    history = train(model, DataCollatorForFeatures(), examples(**FRAMES), tmp_path)
    flops = 3 * model_flops(model).forward_flops([(2 * length,) for length in LENGTHS], targets=8)
    assert logged(history, "train_real_tokens") == [(4, 4 * sum(LENGTHS))]
    assert logged(history, "train_real_flops") == [(4, flops)]
    assert logged(history, "train_padding_avoided") == [(4, pytest.approx(1 - sum(LENGTHS) / sum(padded(LENGTHS))))]


KINDS = {**LABELLED, "segment_ids": lambda k, length: [place % 2 for place in range(length)]}


def by_segments():
    return DynMaskForSequenceClassification(DynMaskConfig(**SIZES, mask="segments"))


def test_masks_that_read_fields(tmp_path):
    """The pairs of each batch are counted: here each token sees the tokens of its kind."""
    model = by_segments()
    history = train(model, DataCollatorWithLengths(TOKENIZER), examples(**KINDS), tmp_path)
    work = model_flops(model)
    (attention,) = work.attention
    pairs = sum((length // 2) ** 2 + (length - length // 2) ** 2 for length in LENGTHS)
    assert logged(history, "train_real_flops") == [(4, 3 * work.forward_flops(ONE_SIDE, pairs={attention: pairs}))]


def test_pairs_are_counted_when_something_is_logged(monkeypatch, tmp_path):
    """Not in the forward pass, and by a clock that stands still."""
    counted = []
    ticks = count()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))

    def slow(*plans):
        counted.append(len(plans))
        for _ in range(100):
            next(ticks)
        return 1

    monkeypatch.setattr(throughput, "plan_pairs", slow)
    history = train(by_segments(), DataCollatorWithLengths(TOKENIZER), examples(**KINDS), tmp_path)
    assert counted == [2, 2]
    assert logged(history, "real_tokens_per_second") == [(2, sum(LENGTHS[:4]) / 2), (4, sum(LENGTHS[4:]) / 2)]


@pytest.mark.parametrize("name, most", [("MOST_BATCHES", 3), ("MOST_HELD", 1)])
def test_what_waits_to_be_counted_has_a_bound(name, most, monkeypatch, tmp_path):
    """Where nothing is logged for long; the sums stay the same."""
    histories, held = [], []
    see = throughput._Batches.see

    def watched(self, *args):
        see(self, *args)
        held.append((len(self.seen), sum(map(len, self.held.values()))))

    for bound in (getattr(throughput, name), most):
        monkeypatch.setattr(throughput, name, bound)
        monkeypatch.setattr(throughput._Batches, "see", watched)
        history = train(by_segments(), DataCollatorWithLengths(TOKENIZER), examples(**KINDS), tmp_path, logging_steps=4)
        histories.append(logged(history, "train_real_flops") + logged(history, "real_tokens_per_second"))
    assert histories[0] == histories[1]
    assert held[:4] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert max(held[4:]) == ((3, 3) if name == "MOST_BATCHES" else (1, 1))


@pytest.mark.parametrize("logging_steps", [1, 4])
def test_masks_that_change(logging_steps, tmp_path):
    """Each batch counts by the mask that it met."""
    model = DynMaskForSequenceClassification(CONFIG)
    schedule = MaskSchedule({0: "causal", 3: "full"})
    settings = {"logging_steps": logging_steps}
    history = train(model, DataCollatorWithLengths(TOKENIZER), examples(**LABELLED), tmp_path, schedule, **settings)
    full = model_flops(model)
    causal = model_flops(DynMaskForSequenceClassification(DynMaskConfig(**SIZES, mask="causal")))
    flops = 3 * (causal.forward_flops(ONE_SIDE[:6]) + full.forward_flops(ONE_SIDE[6:]))
    assert logged(history, "train_real_flops") == [(4, flops)]


def test_missing_tokens_are_not_counted(tmp_path):
    data = examples(**LABELLED, missing=lambda k, length: [place == 1 for place in range(length)])
    model = DynMaskForSequenceClassification(CONFIG)
    history = train(model, DataCollatorWithLengths(TOKENIZER), data, tmp_path)
    assert logged(history, "train_real_tokens") == [(4, sum(LENGTHS) - 7)]


def test_empty_places_of_a_flat_row_of_fixed_size(tmp_path):
    """They are no tokens, and have no work that a model needs, but are computed."""
    collator = DataCollatorWithLengths(TOKENIZER, flat=True, max_tokens=12, max_sequences=3)
    model = DynMaskForMaskedLM(CONFIG)
    history = train(model, collator, examples(**TAGGED), tmp_path)
    flops = 3 * model_flops(model).forward_flops(ONE_SIDE, sum(LENGTHS) - 8)
    assert logged(history, "train_real_tokens") == [(4, sum(LENGTHS))]
    assert logged(history, "train_real_flops") == [(4, flops)]
    assert logged(history, "train_padding_avoided") == [(4, pytest.approx(1 - 4 * 12 / sum(padded(LENGTHS))))]


def test_evaluation_is_not_counted(tmp_path):
    """Nor its time, nor that of saving; every evaluation and checkpoint is a tick of the clock."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    settings |= {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
    history = train(
        DynMaskForSequenceClassification(CONFIG),
        DataCollatorWithLengths(TOKENIZER),
        examples(**LABELLED),
        tmp_path,
        **settings,
    )
    assert len(logged(history, "eval_loss")) == 5
    rates = [float(sum(pair)) for pair in zip(LENGTHS[::2], LENGTHS[1::2], strict=True)]
    assert logged(history, "real_tokens_per_second") == list(zip([1, 2, 3, 4], rates, strict=True))
    assert logged(history, "train_real_tokens_per_second") == [(4, sum(LENGTHS) / 4)]


class Heard(TrainerCallback):
    """What a tracker hears."""

    def __init__(self):
        self.names = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.names.append(set(logs or {}))


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_trackers_hear_it_and_the_loss(strategy, tmp_path):
    heard = Heard()
    settings = {"max_steps": -1, "num_train_epochs": 2, "logging_strategy": strategy, "logging_steps": 4}
    model = DynMaskForSequenceClassification(CONFIG)
    history = train(model, DataCollatorWithLengths(TOKENIZER), examples(**LABELLED), tmp_path, heard, **settings)
    assert logged(history, "real_tokens_per_second") == [(4, sum(LENGTHS) / 4), (8, sum(LENGTHS) / 4)]
    assert len(logged(history, "loss")) == 2
    assert sum("real_tokens_per_second" in names for names in heard.names) == 2
    assert sum("train_real_tokens" in names for names in heard.names) == 1


def test_the_model_is_left_as_it_was(tmp_path):
    model = DynMaskForSequenceClassification(CONFIG)
    train(model, DataCollatorWithLengths(TOKENIZER), examples(**LABELLED), tmp_path)
    assert not model._forward_pre_hooks


def test_several_processes(monkeypatch, tmp_path):
    """Sums of all; the time of a step is the mean, memory the most."""
    of_another = torch.tensor([[100, 300, 100, 1e6, 3, 2 * PEAK, 2**30]], dtype=torch.float64)
    monkeypatch.setattr(throughput, "gather", lambda table: torch.cat([table, of_another]))
    model = DynMaskForSequenceClassification(CONFIG)
    settings = {"max_steps": 1, "logging_steps": 1}
    history = train(model, DataCollatorWithLengths(TOKENIZER), examples(**LABELLED), tmp_path, **settings)
    flops = 1e6 + 3 * model_flops(model).forward_flops(ONE_SIDE[:2])
    first = next(entry for entry in history if "real_tokens_per_second" in entry)
    assert first["real_tokens_per_second"] == (100 + 12) / 2
    assert first["padding_avoided"] == 1 - (100 + 12) / (300 + 18)
    assert first["share_of_matmul_peak"] == pytest.approx(flops / 2 / (3 * PEAK))
    assert first["peak_memory_gib"] == 1.5


def run_of_a_process(folder):
    model = DynMaskForSequenceClassification(CONFIG)
    history = train(model, DataCollatorWithLengths(TOKENIZER), examples(**LABELLED), folder, max_steps=2)
    torch.save(history, folder / f"{torch.distributed.get_rank()}.pt")


def test_two_processes(tmp_path):
    """Each has half of the batches, and both log what is of all."""
    in_two_processes(run_of_a_process, tmp_path, __name__)
    model = DynMaskForSequenceClassification(CONFIG)
    for rank in range(2):
        history = torch.load(tmp_path / f"{rank}.pt")
        assert logged(history, "train_real_tokens") == [(2, sum(LENGTHS))]
        assert logged(history, "train_real_flops") == [(2, 3 * model_flops(model).forward_flops(ONE_SIDE))]
        assert logged(history, "train_padding_avoided") == [(2, 1 - sum(LENGTHS) / sum(padded(LENGTHS)))]


# --- What it cannot count --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, names, given",
    [
        (bert, "`input_ids`, `inputs_embeds`", {"pixel_values": torch.zeros(1, 3)}),
        (bert, "`input_ids`, `inputs_embeds`", {"input_features": torch.zeros(1, 3, 2)}),
        (lambda: DynMaskForSequenceClassification(CONFIG), "`input_ids`, `inputs_embeds`, `input_features`", {}),
    ],
)
def test_batches_without_tokens(make, names, given):
    model = make().train()
    batches = throughput._Batches(model)
    came = ", ".join(f"`{name}`" for name in given) or "nothing"
    with pytest.raises(ValueError, match=f"one of {names} to count its tokens; {type(model).__name__} got {came}"):
        batches.see(model, (), given)


def test_the_machine():
    """Positive figures; how large they are depends on the machine."""
    assert real_matmul_peak(torch.device("cpu"), torch.float32) > 0
    memory = real_peak_memory(torch.device("cpu"))
    assert memory is None or memory > 2**20
