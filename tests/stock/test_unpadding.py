"""Stock models on ordinary padded rows: no layer of a base model computes padding, and outputs are the stock ones."""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_stock_attention import (
    CLOSE,
    DOCUMENTS,
    FAMILIES,
    TOKENS_OF_DOCUMENTS,
    WITHOUT_FLAT,
    model_of,
    new_model,
    padded_batch,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    BertPreTrainedModel,
    CLIPTextModel,
    DynamicCache,
    SiglipTextModel,
    Trainer,
    TrainingArguments,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel
from transformers.pytorch_utils import Conv1D

from hf_dynmask import set_mask
from hf_dynmask.stock import unpadding
from hf_dynmask.stock.unpadding import why_rows
from operators import Operators

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

TOKENS = sum(map(len, DOCUMENTS))
SETTINGS = {"classes": {"num_labels": 3}, "answers": {"num_labels": 2}}
HEADS: dict[str, Any] = {
    "a class": AutoModelForSequenceClassification,
    "classes of tokens": AutoModelForTokenClassification,
    "masked LM": AutoModelForMaskedLM,
    "causal LM": AutoModelForCausalLM,
    "multiple choice": AutoModelForMultipleChoice,
    "answers": AutoModelForQuestionAnswering,
}
# Rows that begin with padding are computed as they are where a model may look at its first column, or where it is not
# known how it counts positions.
RIGHT_ALONE = {
    *("albert", "bert", "bert-generation", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "esm"),
    *("eurobert", "gemma3_text", "gpt2", "gte", "jina_embeddings_v3", "modernbert", "nomic_bert", "roberta"),
    *("roberta-prelayernorm", "t5", "xlm-roberta", "xlm-roberta-xl"),
}


@contextmanager
def computed_tokens(model):
    """The numbers of tokens that linear layers of a base model compute; a pooler is no such layer."""
    counts, layers = (
        set(),
        [name for name, part in model.base_model.named_modules() if isinstance(part, nn.Linear | Conv1D)],
    )
    layers = [name for name in layers if not any(part in name for part in ("pooler", "expert", "lm_head"))]
    parts = [model.base_model.get_submodule(name) for name in layers]
    hooks = [
        part.register_forward_pre_hook(lambda part, args: counts.add(args[0].shape[:-1].numel())) for part in parts
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def run(model, **batch):
    with torch.no_grad(), computed_tokens(model) as counts:
        return model(**batch), counts


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_computes_padding(family, side):
    batch, model = padded_batch(side), model_of(family, "dynmask")
    found, counts = run(model, **batch, output_hidden_states=True)
    is_flat = side == "right" or family not in RIGHT_ALONE
    assert counts == {TOKENS if is_flat else batch["input_ids"].numel()}
    expected, _ = run(model_of(family, "eager"), **batch, output_hidden_states=True)
    here = batch["attention_mask"].bool()
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[here], theirs[here], **CLOSE)
    torch.testing.assert_close(found.last_hidden_state[here], expected.last_hidden_state[here], **CLOSE)
    if is_flat:
        assert found.last_hidden_state[~here].count_nonzero() == 0
    if side == "right" and expected.get("pooler_output") is not None:
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, **CLOSE)


@pytest.mark.parametrize("model_class", [CLIPTextModel, SiglipTextModel])
def test_models_that_pool_inside(model_class):
    batch, found = padded_batch("right"), []
    sizes = FAMILIES["bert"] | {"max_position_embeddings": 16, "projection_size": 8, "projection_dim": 8}
    for implementation in ("dynmask", "eager"):
        torch.manual_seed(0)
        config = model_class.config_class(**sizes, attn_implementation=implementation)
        found.append(run(model_class(config).eval(), **batch)[0])
    here = batch["attention_mask"].bool()
    torch.testing.assert_close(found[0].last_hidden_state[here], found[1].last_hidden_state[here], **CLOSE)
    if model_class is CLIPTextModel:  # the other reads off the last column, padding or not
        torch.testing.assert_close(found[0].pooler_output, found[1].pooler_output, **CLOSE)


def test_classes_that_others_make():
    made = type("Made", (BertModel,), {})
    batch = padded_batch("right")
    _, counts = run(made(BertConfig(**FAMILIES["bert"], attn_implementation="dynmask")).eval(), **batch)
    assert counts == {TOKENS}


def test_why_models_compute_rows():
    found = {family: why_rows(model_of(family, "dynmask")) for family in [*FAMILIES, *WITHOUT_FLAT]}
    assert {family: why for family, why in found.items() if why is not None} == {
        "bart": "it has a decoder",
        "esm with dropout": "its tokens meet outside attention: `token_dropout`",
        "fnet": "its masks are its own",
        "layoutlm": "its masks are its own",
        "lfm2": "its tokens meet outside attention: layers of type conv",
        "mobilebert": "its tokens meet outside attention: `trigram_input`",
        "umt5": "it takes no `position_ids`",
    }


# --- Heads -------------------------------------------------------------------------------------------------------


def with_head(family, head, implementation):
    torch.manual_seed(0)
    labels = 2 if head == "answers" else 3
    config = AutoConfig.for_model(family, **FAMILIES[family], num_labels=labels)
    model = HEADS[head].from_config(config, attn_implementation=implementation).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=0.2)
    return model


def batch_of(head, side):
    """And which of the logits are of real tokens."""
    batch = padded_batch(side)
    here = batch["attention_mask"].bool()
    if head == "a class":
        return batch | {"labels": torch.tensor([0, 2, 1])}, slice(None)
    if head == "multiple choice":
        batch = {name: torch.stack([values, values.flip(0)], 1) for name, values in batch.items()}
        return batch | {"labels": torch.tensor([0, 1, 0])}, slice(None)
    if head == "answers":
        first = here.int().argmax(1)
        return batch | {"start_positions": first + 1, "end_positions": first + 2}, here
    # Stock models predict the first token of a row from the padding before it.
    has_target = here & (here.cumsum(1) > 1) if head == "causal LM" else here
    targets = batch["input_ids"] % 3 if head == "classes of tokens" else batch["input_ids"]
    return batch | {"labels": targets.where(has_target, -100)}, here


def step(model, **batch):
    output = model(**batch)
    output.loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    logits = output.logits if "logits" in output else output.start_logits
    return output.loss.detach(), logits.detach(), grads


CASES = [
    (family, head)
    for head, auto_class in HEADS.items()
    for family, sizes in FAMILIES.items()
    if head != "answers" and family != "t5" and type(AutoConfig.for_model(family, **sizes)) in auto_class._model_mapping
]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family, head", CASES)
def test_heads_equal_the_stock_ones(family, head, side):
    if side == "left" and family == "modernbert" and head == "a class":
        pytest.skip("it looks at padding")
    batch, here = batch_of(head, side)
    ours, theirs = (with_head(family, head, implementation) for implementation in ("dynmask", "eager"))
    with computed_tokens(ours) as counts:
        loss, logits, grads = step(ours, **batch)
    if side == "right":
        assert counts == {int(batch["attention_mask"].sum())}
    expected_loss, expected_logits, expected_grads = step(theirs, **batch)
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    torch.testing.assert_close(logits[here], expected_logits[here], **CLOSE)
    scale = max(float(grad.abs().max()) for grad in expected_grads.values())
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert float((grad - expected_grads[name]).abs().max()) <= 1e-4 * scale, name


def test_a_loss_over_padding_keeps_rows():
    """The stock question answering loss normalizes over all columns."""
    batch, here = batch_of("answers", "right")
    ours, theirs = (with_head("bert", "answers", implementation) for implementation in ("dynmask", "eager"))
    with computed_tokens(ours) as counts:
        loss, logits, _ = step(ours, **batch)
    expected_loss, expected_logits, _ = step(theirs, **batch)
    assert counts == {batch["input_ids"].numel()}
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    torch.testing.assert_close(logits, expected_logits, **CLOSE)


class Answers(BertPreTrainedModel):
    """A head for answers of another name, whose loss runs over padding as well."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, start_positions=None):
        scores = self.bert(input_ids, attention_mask=attention_mask)[0][..., 0]
        return (nn.functional.cross_entropy(scores, start_positions),)


def test_the_loss_of_a_head_for_answers_by_another_name():
    losses = []
    for implementation in ("dynmask", "eager"):
        torch.manual_seed(0)
        model = Answers._from_config(BertConfig(**FAMILIES["bert"]), attn_implementation=implementation).eval()
        losses.append(model(**padded_batch("right"), start_positions=torch.tensor([1, 2, 3]))[0])
    torch.testing.assert_close(*losses, **CLOSE)


def test_a_head_that_reads_off_the_last_column_keeps_rows():
    """As Llama's does where it is given no ids, with a warning."""
    model, batch = with_head("llama", "a class", "dynmask"), padded_batch("right")
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    assert run(model, **batch, inputs_embeds=embeds)[1] == {27}


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "roberta", "gpt2"])
def test_a_row_changes_no_other_by_one_bit(family):
    model, batch = model_of(family, "dynmask"), padded_batch("right")
    before, _ = run(model, **batch)
    changed = batch["input_ids"].clone()
    changed[1, :6] = 7
    after, _ = run(model, **batch | {"input_ids": changed})
    assert not torch.equal(before.last_hidden_state[1], after.last_hidden_state[1])
    assert torch.equal(before.last_hidden_state[[0, 2]], after.last_hidden_state[[0, 2]])


# --- Arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "modernbert", "opt"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("given", ["inputs_embeds", "position_ids", "one row of position_ids", "a tuple"])
def test_other_arguments(family, side, given):
    batch, outputs = padded_batch(side), []
    here, columns = batch["attention_mask"].bool(), torch.arange(batch["input_ids"].shape[1])
    for implementation in ("dynmask", "eager"):
        model = model_of(family, implementation)
        inputs = dict(batch)
        if given == "inputs_embeds":
            inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        elif given == "a tuple":
            inputs["return_dict"] = False
        else:
            inputs["position_ids"] = (2 + columns)[None] if "one row" in given else (3 + columns).expand(here.shape)
        output, _ = run(model, **inputs)
        assert isinstance(output, tuple) == (given == "a tuple")
        outputs.append(output[0][here])
    torch.testing.assert_close(*outputs, **CLOSE)


@pytest.mark.parametrize("rows", [3, 2])
def test_positions_of_three_dimensions(rows):
    """Those of Qwen2-VL, `(3, B, T)`; of three rows of three columns, they have the shape of a batch of embeddings."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    sizes = FAMILIES["llama"] | {"rope_parameters": rope}
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])[:rows]
    columns = mask.cumsum(1) - 1
    batch = {"input_ids": TOKENS_OF_DOCUMENTS[: 3 * rows].view(rows, 3), "attention_mask": mask}
    batch["position_ids"] = torch.stack([columns, 2 * columns, columns + 1]).clamp(0)
    found = []
    for implementation in ("dynmask", "eager"):
        torch.manual_seed(0)
        config = AutoConfig.for_model("qwen2_vl_text", **sizes)
        model = Qwen2VLTextModel._from_config(config, attn_implementation=implementation).eval()
        found.append(run(model, **batch)[0].last_hidden_state[mask.bool()])
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_token_types_and_checkpointing():
    batch = padded_batch("right")
    batch["token_type_ids"] = batch["input_ids"] % 2
    batch["labels"] = torch.tensor([0, 1, 2])
    ours, theirs = (with_head("bert", "a class", implementation).train() for implementation in ("dynmask", "eager"))
    for model in (ours, theirs):
        model.gradient_checkpointing_enable()
        for part in model.modules():
            part.p = 0.0 if isinstance(part, nn.Dropout) else getattr(part, "p", None)
    (loss, _, grads), (expected, _, expected_grads) = step(ours, **batch), step(theirs, **batch)
    torch.testing.assert_close(loss, expected, **CLOSE)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("text, fields", [
    ("causal & window(2, 0)", {}),
    ("causal | prefix", {"prefix_lengths": torch.tensor([2, 0, 4])}),
    ("segments", {"segment_ids": torch.arange(9).expand(3, 9) // 3}),
])  # fmt: skip
def test_masks_and_their_fields(text, fields):
    batch, model = padded_batch("right"), new_model("llama", "dynmask")
    set_mask(model, text)
    found, counts = run(model, **batch, **fields)
    assert counts == {TOKENS}
    model.config.dynmask_unpad = False
    expected, counts = run(model, **batch, **fields)
    assert counts == {batch["input_ids"].numel()}
    here = batch["attention_mask"].bool()
    torch.testing.assert_close(found.last_hidden_state[here], expected.last_hidden_state[here], **CLOSE)


def test_a_field_that_the_trainer_drops():
    """The `forward` of a stock model does not name it."""
    model = new_model("llama", "dynmask")
    set_mask(model, "causal | prefix")
    with pytest.raises(
        ValueError, match=r"lacks \(the Trainer drops columns .* `TrainingArguments\(remove_unused_columns"
    ):
        model(**padded_batch("right"))


HOLES = torch.tensor([[1, 0, 1, 1, 1, 0, 0, 0, 0], [1] * 6 + [0] * 3, [1] * 9])
EMPTY = torch.tensor([[0] * 9, [1] * 6 + [0] * 3, [1] * 9])


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "family, arguments",
    [
        ("bert", {"attention_mask": HOLES}),
        ("bert", {"attention_mask": torch.zeros(3, 9, dtype=torch.long)}),
        ("bert", {"attention_mask": torch.ones(3, 1, 9, 9, dtype=torch.bool)}),
        ("bert", {"attention_mask": torch.ones(3, 9, dtype=torch.long)}),
        ("llama", {"use_cache": True}),
        ("llama", {"past_key_values": DynamicCache()}),
    ],
    ids=["holes", "nothing", "an explicit mask", "no padding", "a cache that is asked for", "a cache"],
)
def test_what_is_computed_in_rows(family, arguments):
    batch = padded_batch("right") | arguments
    here = batch["attention_mask"].bool() if batch["attention_mask"].dim() == 2 else torch.ones(3, 9, dtype=torch.bool)
    found, counts = run(model_of(family, "dynmask"), **batch)
    assert counts == {27}
    if "past_key_values" in arguments:
        batch["past_key_values"] = DynamicCache()
    expected, _ = run(model_of(family, "eager"), **batch)
    torch.testing.assert_close(found.last_hidden_state[here], expected.last_hidden_state[here], **CLOSE)


def test_rows_without_tokens_beside_others():
    batch = padded_batch("right") | {"attention_mask": EMPTY}
    found, counts = run(model_of("bert", "dynmask"), **batch)
    expected, _ = run(model_of("bert", "eager"), **batch)
    here = EMPTY.bool()
    assert counts == {15}
    torch.testing.assert_close(found.last_hidden_state[here], expected.last_hidden_state[here], **CLOSE)


def test_a_model_that_returns_no_model_output(monkeypatch):
    model = new_model("bert", "dynmask")
    own = unpadding.Unpadded.in_rows
    monkeypatch.setattr(unpadding.Unpadded, "in_rows", lambda self, output: own(self, output.to_tuple()))
    message = r"BertModel must return a ModelOutput .*; got tuple \(`model.config.dynmask_unpad = False` lets it"
    with pytest.raises(TypeError, match=message):
        model(**padded_batch("right"))


def test_a_mask_of_other_numbers():
    batch = padded_batch("right")
    with pytest.raises(ValueError, match="`attention_mask` must hold only 0 and 1"):
        model_of("bert", "dynmask")(**batch | {"attention_mask": batch["attention_mask"] * 2})


def test_a_language_model_that_may_go_on():
    """The cache of a forward pass without labels is of rows; with labels or in training nobody goes on from it."""
    batch, model = padded_batch("right"), with_head("llama", "causal LM", "dynmask")
    assert run(model, **batch, labels=None)[0].past_key_values is not None
    for inputs, is_training, tokens in (batch, False, 27), (batch | {"labels": batch["input_ids"]}, False, 20), (
        batch, True, 20
    ):  # fmt: skip
        model.train(is_training)
        output, counts = run(model, **inputs)
        assert counts == {tokens}
        assert (output.past_key_values is None) == (tokens == 20)


# --- Training, reads -----------------------------------------------------------------------------------------------


def test_a_stock_training_follows_the_stock_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 10, (40,), generator=generator).tolist()
    data = [{"input_ids": torch.randint(5, 99, (size,), generator=generator).tolist()} for size in sizes]

    def collate(rows):
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return {"input_ids": padded, "attention_mask": (padded > 0).long(), "labels": padded[:, 0] % 3}

    losses = []
    for implementation in ("dynmask", "eager"):
        model = with_head("bert", "a class", implementation)
        for part in model.modules():
            part.p = 0.0 if isinstance(part, nn.Dropout) else getattr(part, "p", None)
        model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
        arguments = TrainingArguments(
            str(tmp_path), max_steps=50, logging_steps=1, use_cpu=True, report_to="none", save_strategy="no",
            learning_rate=1e-3, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, collate, data)
        with computed_tokens(model) as counts:
            trainer.train()
        assert (max(counts) < 72) == (implementation == "dynmask")
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses[0]) == 50
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
@pytest.mark.filterwarnings("ignore:aten.*an autograd kernel was not registered:UserWarning")
def test_rows_are_read_once(family, is_padded):
    """On a device without values, where the mask reads as two tokens, or as all."""
    config = AutoConfig.for_model(family, **FAMILIES[family])
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation="dynmask").train()
    rows = torch.zeros(3, 9, dtype=torch.long, device="meta")
    with Operators(value=2 * 8 + 1 if is_padded else 27 * 8 + 1) as operators, computed_tokens(model) as counts:
        model(input_ids=rows, attention_mask=rows, labels=rows[:, 0]).loss.backward()
    assert operators.reads == 1
    assert counts == {2 if is_padded else 27}
