"""Stock models made ready for `attn_implementation="dynmask"`: however they are called, and with the mask they have."""

# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

import copy
import logging
import pickle
import re
import subprocess
import sys
from contextlib import contextmanager
from functools import partial, wraps
from inspect import signature
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    CLIPVisionConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from hf_dynmask import set_mask
from hf_dynmask.stock.models import Ready
from stock_models import VOCABULARY, random_stock

DOCUMENTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13]]
FLAT = torch.tensor([sum(DOCUMENTS, [])])
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
TOLD: dict[str, dict[str, Any]] = {
    "lengths": {"lengths": torch.tensor([4, 5])},
    "position_ids": {"position_ids": POSITIONS},
    "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 4, 9])},
    "seq_idx": {"seq_idx": torch.tensor([[0] * 4 + [1] * 5])},
}
ROWS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]])
PRESENT = (ROWS != 0).long()
MASK = "causal & window(2, 0)"
TASKS = {"bert": "masked-lm", "llama": "causal-lm"}


def ready(family, task=None, **settings):
    model = random_stock(family, task or TASKS[family], **settings)
    model.set_attn_implementation("dynmask")
    return model


def states(call, **inputs):
    with torch.no_grad():
        return call(**inputs)[0]


# --- Ways to a forward pass ---


def replica_of(model):
    replica = model._replicate_for_data_parallel()
    replica._parameters = model._parameters
    return replica


def with_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "q_proj"])).eval()


WAYS = {
    "called": lambda model: model,
    "forward": lambda model: model.forward,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "forward of the class": lambda model: type(model).forward.__get__(model),
    "replica": replica_of,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "PEFT": with_lora,
    "compiled PEFT": lambda model: torch.compile(with_lora(model), backend="eager"),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of PEFT
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family, task", [*TASKS.items(), ("bert", "base"), ("llama", "base")])
def test_ways_to_a_forward_pass(family, task, way):
    model = ready(family, task)
    single = torch.cat([states(model, input_ids=torch.tensor([document])) for document in DOCUMENTS], dim=1)
    rows = states(model, input_ids=ROWS, attention_mask=PRESENT)
    call = WAYS[way](model)
    for told in TOLD.values():
        if way != "replica" or "lengths" not in told:  # of a flat batch, which DataParallel takes apart
            torch.testing.assert_close(states(call, input_ids=FLAT, **told), single)
    torch.testing.assert_close(states(call, input_ids=ROWS, attention_mask=PRESENT), rows)
    torch.testing.assert_close(states(call, input_ids=ROWS, lengths=torch.tensor([5, 3])), rows)


@pytest.mark.parametrize("family", TASKS)
def test_a_model_that_is_unpickled_elsewhere(family, tmp_path):
    model = ready(family)
    torch.save((model, FLAT, POSITIONS, states(model, input_ids=FLAT, position_ids=POSITIONS)), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, tokens, position_ids, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model.forward(input_ids=tokens, position_ids=position_ids)[0], expected)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


@pytest.mark.parametrize("other_class", [BertForMaskedLM, BertForTokenClassification])
def test_models_of_one_configuration(other_class):
    model = random_stock("bert", "masked-lm")
    other = other_class(model.config).eval()
    expected = states(other, input_ids=ROWS, attention_mask=PRESENT)
    model.set_attn_implementation("dynmask")
    found = states(other, input_ids=ROWS, attention_mask=PRESENT)
    torch.testing.assert_close(found[PRESENT.bool()], expected[PRESENT.bool()])
    single = torch.cat([states(other, input_ids=torch.tensor([document])) for document in DOCUMENTS], dim=1)
    for told in TOLD.values():
        torch.testing.assert_close(states(other, input_ids=FLAT, **told), single)


@pytest.mark.parametrize("family", TASKS)
def test_layers_are_compiled(family):
    counter = CompileCounter()
    torch._dynamo.reset()
    states(torch.compile(ready(family), backend=counter), input_ids=ROWS, attention_mask=PRESENT)
    assert counter.op_count > 30


def test_arguments_by_place():
    model = ready("bert")
    expected = states(model, input_ids=ROWS, attention_mask=PRESENT)
    assert torch.equal(model(ROWS, PRESENT)[0], expected)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(ROWS, input_ids=ROWS)
    with pytest.raises(TypeError, match="positional arguments"):
        model(*[None] * 40)


def test_a_class_keeps_its_signature():
    expected = ["self", "input_ids", "attention_mask"]
    ready("bert")
    assert list(signature(BertForMaskedLM.forward).parameters)[:3] == expected
    assert list(signature(random_stock("bert", "masked-lm").forward).parameters)[:2] == expected[1:]


def test_models_of_the_class_that_run_otherwise():
    ready("llama")
    stock = random_stock("llama", "causal-lm")
    found = states(stock, input_ids=FLAT, legnths=None, position_ids=POSITIONS)
    assert torch.equal(found, states(stock, input_ids=FLAT, position_ids=POSITIONS))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failed_pass_leaves_nothing_behind(error):
    def fail(*args):
        raise error

    model, other = ready("bart", "base"), ready("bert")
    next(iter(model.decoder.layers)).register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(input_ids=ROWS, decoder_input_ids=ROWS)
    states(other, input_ids=FLAT, lengths=[4, 5])


@contextmanager
def unwrapped(model_class):
    """As if the class were never made ready, or another package had replaced its `forward`."""
    ours = model_class.forward
    pieces = {name: cell.cell_contents for name, cell in zip(ours.__code__.co_freevars, ours.__closure__, strict=True)}
    model_class.forward = pieces["forward"]
    try:
        yield
    finally:
        model_class.forward = ours


@pytest.mark.parametrize("model_class, family", [(BertModel, "bert"), (LlamaModel, "llama")])
def test_a_model_that_is_not_ready(model_class, family):
    model = ready(family, "base")
    expected = states(model, input_ids=ROWS, attention_mask=PRESENT)
    with unwrapped(model_class):
        found = states(model, input_ids=ROWS, attention_mask=PRESENT)
        torch.testing.assert_close(found[PRESENT.bool()], expected[PRESENT.bool()])
        for name, told in TOLD.items():
            with pytest.raises(ValueError, match=f"`{name}` must be given to a model that is made ready"):
                states(model, input_ids=FLAT, **told)
        with pytest.raises(ValueError, match="`lengths` must be given to a model that is made ready"):
            states(model, input_ids=ROWS, lengths=torch.tensor([5, 3]))
        Ready(model_class)
        torch.testing.assert_close(states(model, input_ids=ROWS, lengths=torch.tensor([5, 3])), expected)


# --- Keywords ---


@pytest.mark.parametrize("family, task", [*TASKS.items(), ("bart", "seq2seq-lm")])
@pytest.mark.parametrize(
    "keyword, near",
    {
        "legnths": "lengths",
        "length": "lengths",
        "cu_seqlens": "cu_seq_lens_q",
        "cu_seq_lens": "cu_seq_lens_q",
        "positon_ids": "position_ids",
        "atention_mask": "attention_mask",
        "segment_id": "segment_ids",
        "hidden_span": "hidden_spans",
        "max_seqlen_q": "max_length_q",
        "seq_ids": "seq_idx",
    }.items(),
)
def test_keywords_that_no_part_knows(keyword, near, family, task):
    model = ready(family, task)
    with pytest.raises(TypeError, match=rf"no part of \w+ knows the keyword `{keyword}`; did you mean `{near}`\?$"):
        model(input_ids=ROWS, **{keyword: None})


def test_a_keyword_like_no_other():
    with pytest.raises(TypeError, match="no part of BertForMaskedLM knows the keyword `missing`$"):
        ready("bert")(input_ids=ROWS, missing=ROWS > 99)
    model = ready("bart", "seq2seq-lm")
    with pytest.raises(TypeError, match="knows the keyword `decoder_lenghts`; did you mean `decoder_lengths`"):
        model(input_ids=ROWS, decoder_lenghts=None)
    model(input_ids=ROWS, labels=ROWS, decoder_use_cache=None)


@pytest.mark.parametrize("family", TASKS)
@pytest.mark.parametrize(
    "keywords",
    [
        {"labels": ROWS, "num_items_in_batch": 3},
        {"labels": ROWS, "ignore_index": 0},
        {"output_attentions": False, "output_hidden_states": True, "output_router_logits": False},
        {"return_dict": True, "use_cache": False},
        {"token_type_ids": torch.zeros_like(ROWS)},
        {"segment_ids": torch.zeros_like(ROWS)},
        {"is_causal": None, "max_length_q": 9, "max_length_k": 9},
    ],
    ids=lambda keywords: ", ".join(keywords),
)
def test_keywords_that_transformers_sends(keywords, family):
    assert ready(family)(input_ids=ROWS, attention_mask=PRESENT, **keywords).logits.isfinite().all()


class Reader(PreTrainedModel):
    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        assert kwargs.get("colour") == "red"
        return self.model(input_ids)


def test_a_keyword_that_is_read_by_name():
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = Reader._from_config(config, attn_implementation="dynmask")
    model(ROWS, colour="red")
    with pytest.raises(TypeError, match="no part of Reader knows the keyword `color`"):
        model(ROWS, color="red")


def test_a_class_of_a_notebook():
    """Its code cannot be read: which keywords it knows, and which attention it has, is then not known."""
    code = (
        "import torch, hf_dynmask\n"
        "from transformers import BertConfig, BertModel, BertPreTrainedModel\n"
        "class Mine(BertPreTrainedModel):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.bert = BertModel(config)\n"
        "        self.post_init()\n"
        "    def forward(self, input_ids, **kwargs):\n"
        "        return self.bert(input_ids) if kwargs['colour'] else None\n"
        "config = BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)\n"
        "model = Mine._from_config(config, attn_implementation='dynmask')\n"
        "model(torch.tensor([[1, 2]]), colour='red')\n"
        "model = Mine(config)\n"
        "model.set_attn_implementation('dynmask')\n"
        "assert model.bert.config._attn_implementation == 'dynmask'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Which attention runs ---


def test_attention_code_of_its_own_is_not_passed_over():
    """Transformers would log it, and keep the attention that the model has."""
    model = AutoModel.from_config(AutoConfig.for_model("mpnet", hidden_size=12, num_hidden_layers=1))
    for implementation in ("dynmask", {"": "dynmask"}):
        with pytest.raises(ValueError, match="interface; MPNetModel computes attention by itself"):
            model.set_attn_implementation(implementation)


@pytest.mark.parametrize("after", ["dynmask", "sdpa"])
def test_an_encoder_decoder_made_of_two_models(after):
    """Its sides get configurations of its own; the layers of the encoder keep that of their model."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    decoder = BertLMHeadModel(BertConfig(**sizes, is_decoder=True, add_cross_attention=True))
    model = EncoderDecoderModel(encoder=BertModel(BertConfig(**sizes)), decoder=decoder).eval()
    batch = {"input_ids": ROWS, "attention_mask": PRESENT, "decoder_input_ids": ROWS.flip(0)}
    expected = states(model, **batch)
    model.set_attn_implementation("dynmask")
    torch.testing.assert_close(states(model, **batch), expected)
    model.set_attn_implementation(after)
    torch.testing.assert_close(states(model, **batch), expected)
    layers = [part for part in model.modules() if type(part).__name__ == "BertSelfAttention"]
    assert {layer.config._attn_implementation for layer in layers} == {after}


# --- Masks ---


@pytest.fixture
def masked():
    model = ready("llama")
    set_mask(model, MASK)
    return model


@pytest.fixture
def folder(masked, tmp_path):
    masked.save_pretrained(tmp_path / "masked")
    return tmp_path / "masked"


def of_configuration(config, weights):
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(weights)
    return model


def of_saved_configuration(masked, folder):
    masked.config.save_pretrained(folder / "config")
    return of_configuration(AutoConfig.from_pretrained(folder / "config"), masked.state_dict())


@pytest.mark.parametrize(
    "make",
    {
        "saved": lambda masked, folder: AutoModelForCausalLM.from_pretrained(folder).eval(),
        "saved, by name": lambda masked, folder: AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="dynmask"
        ).eval(),
        "configuration": lambda masked, folder: of_configuration(masked.config, masked.state_dict()),
        "configuration loaded": lambda masked, folder: of_configuration(
            AutoConfig.from_pretrained(folder), masked.state_dict()
        ),
        "configuration saved": of_saved_configuration,
        "configuration as a dictionary": lambda masked, folder: of_configuration(
            LlamaConfig.from_dict(masked.config.to_dict()), masked.state_dict()
        ),
        "deepcopy": lambda masked, folder: copy.deepcopy(masked),
        "pickle": lambda masked, folder: pickle.loads(pickle.dumps(masked)),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_mask_is_kept(make, masked, folder):
    expected = states(masked, input_ids=FLAT)
    plain = ready("llama")
    assert not torch.allclose(expected, states(plain, input_ids=FLAT), atol=1e-2)
    model = make[1](masked, folder)
    assert model.config._attn_implementation == "dynmask"
    assert torch.equal(states(model, input_ids=FLAT), expected)


NOT_FOLLOWED = (
    "of LlamaForCausalLM has the mask '" + re.escape(MASK) + "', which attn_implementation='dynmask' alone can"
)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention", "flash_attention_2", {"": "sdpa"}])
def test_another_attention_cannot_follow_a_mask(implementation, masked, folder):
    name = implementation[""] if isinstance(implementation, dict) else implementation
    with pytest.raises(ValueError, match=f"{NOT_FOLLOWED} follow; got '{name}'"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation)
    with pytest.raises(ValueError, match=f"{NOT_FOLLOWED} follow; got '{name}'"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation=implementation)
    for model in (masked, copy.deepcopy(masked), AutoModelForCausalLM.from_pretrained(folder)):
        with pytest.raises(ValueError, match=f"{NOT_FOLLOWED} follow; got '{name}'"):
            model.set_attn_implementation(implementation)
        states(model, input_ids=FLAT)


def test_another_attention_that_nobody_checked(masked):
    masked.config._attn_implementation = "sdpa"
    for call in (masked, masked.forward, masked.model):
        with pytest.raises(
            ValueError, match="alone can follow; got 'sdpa' .`set_mask.model, None.` takes the mask away"
        ):
            call(input_ids=FLAT)


def test_a_mask_that_is_taken_away(masked, tmp_path):
    set_mask(masked, None)
    masked.set_attn_implementation("sdpa")
    expected = states(random_stock("llama", "causal-lm"), input_ids=FLAT)
    assert torch.equal(states(masked, input_ids=FLAT), expected)
    masked.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(states(loaded, input_ids=FLAT), expected)


@pytest.mark.parametrize(
    "model_type, mask, message",
    [
        ("bert", "causal &", "mask does not parse at column 9"),
        (
            "bert",
            "heads(full, full, full, full, causal)",
            "`heads` must be given a number of masks that divides the 12 heads; got 5",
        ),
        ("bert", "", "mask does not parse at column 1"),
        ("bert", "causal # and no more", "mask does not parse at column 8"),
        ("bert", "topk(3)", "the mask of a stock model must do without `topk`, which needs scores"),
        ("bart", "causal", "`model` must have self-attention only; BartModel has cross-attention"),
        ("llava", "causal", "`model` must be one part of a model; LlavaModel has the parts text_config, vision_config"),
        ("bloom", "causal", "BloomModel computes attention by itself"),
    ],
)
def test_a_configuration_with_a_mask_that_its_model_cannot_follow(model_type, mask, message):
    config = AutoConfig.for_model(model_type)
    config.dynmask_mask = mask
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        AutoModel.from_config(config)


def test_a_mask_of_one_part(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=8, patch_size=4),
        text_config=LlamaConfig(**sizes, vocab_size=VOCABULARY),
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": "dynmask"})
    set_mask(model.model.language_model, MASK)
    expected = states(model, input_ids=FLAT)
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(states(loaded, input_ids=FLAT), expected)
    error = "the configuration of LlamaModel has the mask"
    with pytest.raises(ValueError, match=error):
        loaded.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=error):
        LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")


def test_set_mask_needs_dynmask():
    with pytest.raises(
        ValueError, match="must run with attn_implementation='dynmask'; LlamaForCausalLM runs with 'sdpa'"
    ):
        set_mask(random_stock("llama", "causal-lm"), MASK)


# --- Adapters ---

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of PEFT
ALONE = r"an adapter is saved without the mask of its model, 'causal & window\(2, 0\)': .* call `set_mask\(model, "


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def adapters(peft):
    task = {"task_type": "CAUSAL_LM"}
    return {
        "lora": peft.LoraConfig(**task, target_modules=["q_proj"], init_lora_weights=False),
        "prompt tuning": peft.PromptTuningConfig(**task, num_virtual_tokens=5),
        "P-tuning": peft.PromptEncoderConfig(**task, num_virtual_tokens=5, encoder_hidden_size=8),
        "prefix tuning": peft.PrefixTuningConfig(**task, num_virtual_tokens=5),
    }


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["lora", "prompt tuning"])
def test_an_adapter_saved_alone(name, when, peft, tmp_path):
    model = ready("llama")
    if when == "before":
        set_mask(model, MASK)
    adapted = peft.get_peft_model(model, adapters(peft)[name])
    if when == "after":
        set_mask(adapted, MASK)
    with pytest.warns(UserWarning, match=ALONE):
        adapted.save_pretrained(tmp_path)
    set_mask(adapted, None)
    adapted.save_pretrained(tmp_path)


def test_an_adapter_of_a_saved_mask(peft, folder, tmp_path):
    """The model that the adapter names has the mask."""
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder).eval(), adapters(peft)["lora"])
    adapted.save_pretrained(tmp_path)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(states(loaded, input_ids=FLAT), states(adapted, input_ids=FLAT))


def test_merging_keeps_the_mask(masked, peft, tmp_path):
    adapted = peft.get_peft_model(masked, adapters(peft)["lora"]).eval()
    expected = states(adapted, input_ids=FLAT)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    for model in (merged, LlamaForCausalLM.from_pretrained(tmp_path)):
        torch.testing.assert_close(states(model, input_ids=FLAT), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # of PEFT
@pytest.mark.parametrize("name", ["prompt tuning", "P-tuning", "prefix tuning"])
def test_tokens_in_front(name, peft):
    def loss(model, **told):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(copy.deepcopy(model), adapters(peft)[name]).eval()
        return adapted(input_ids=ROWS, labels=ROWS.masked_fill(ROWS == 0, -100), **told).loss

    stock, model = random_stock("llama", "causal-lm"), ready("llama")
    torch.testing.assert_close(loss(model, attention_mask=PRESENT), loss(stock, attention_mask=PRESENT))
    lengths = torch.tensor([5, 3])
    with pytest.raises(ValueError, match="PEFT's prompt methods.*`DataCollatorWithPadding`"):
        loss(model, attention_mask=PRESENT, lengths=lengths)
    with pytest.raises(
        ValueError, match="`lengths` with `inputs_embeds` must reach|`lengths` with a cache in use must"
    ):
        loss(model, lengths=lengths)


def test_a_field_that_no_mask_reads_is_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = ready("llama")
    with caplog.at_level("WARNING"):
        model(input_ids=ROWS, prefix_lengths=torch.ones(len(ROWS), dtype=torch.long))
    assert "LlamaForCausalLM got `prefix_lengths`, but no mask of it reads this field" in caplog.text
    caplog.clear()
    set_mask(model, "causal | prefix")
    with caplog.at_level("WARNING"):
        model(input_ids=ROWS, prefix_lengths=torch.ones(len(ROWS), dtype=torch.long))
    assert "prefix_lengths" not in caplog.text


# --- Beside other packages -------------------------------------------------------------------------------------------


def calling(ours, with_name):
    """What another package puts in place of a `forward` that it calls."""

    def forward(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    return wraps(ours)(forward) if with_name else forward


def naming(ours):
    """The same with names of its own, as kernels for one model have them."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
        return ours(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    return forward


REPLACED = {
    "wraps": partial(calling, with_name=True),
    "no names": partial(calling, with_name=False),
    "names": naming,
}
CLASSES = {"bert": (BertModel, BertForMaskedLM), "llama": (LlamaModel, LlamaForCausalLM)}


def check_every_way(model, expected=None):
    single = torch.cat([states(model, input_ids=torch.tensor([document])) for document in DOCUMENTS], dim=1)
    if expected is not None:
        torch.testing.assert_close(single, expected)
    for told in TOLD.values():
        torch.testing.assert_close(states(model, input_ids=FLAT, **told), single)
    rows = states(model, input_ids=ROWS, attention_mask=PRESENT)
    torch.testing.assert_close(states(model, input_ids=ROWS, lengths=torch.tensor([5, 3])), rows)
    torch.testing.assert_close(model(ROWS, PRESENT)[0].detach(), rows)
    return single


@pytest.mark.parametrize("by", REPLACED)
@pytest.mark.parametrize("when", ["before", "after", "both"])
@pytest.mark.parametrize("family", CLASSES)
def test_a_class_whose_forward_another_package_replaces(family, when, by, monkeypatch):
    for each in CLASSES[family]:  # as if it were not ready
        monkeypatch.setattr(each, "forward", getattr(each.forward, "announces", each.forward))
    if when != "after":
        for each in CLASSES[family]:
            monkeypatch.setattr(each, "forward", REPLACED[by](each.forward))
    model = ready(family)
    expected = check_every_way(model)
    if when != "before":
        for each in CLASSES[family]:
            monkeypatch.setattr(each, "forward", REPLACED[by](each.forward))
    check_every_way(model, expected)
    check_every_way(ready(family), expected)  # of a class that says no longer that it is ready


@pytest.mark.parametrize("family", CLASSES)
def test_a_class_whose_forward_is_put_back(family, monkeypatch):
    """By one that kept what was there before us, and does not call ours: obeyed in rows, or an error."""
    model = ready(family)
    rows = states(model, input_ids=ROWS, attention_mask=PRESENT)
    for each in CLASSES[family]:
        monkeypatch.setattr(each, "forward", each.forward.announces)
    here = PRESENT.bool()
    torch.testing.assert_close(states(model, input_ids=ROWS, attention_mask=PRESENT)[here], rows[here])
    for told in TOLD.values():
        with pytest.raises(ValueError, match="must be given to a model that is made ready"):
            states(model, input_ids=FLAT, **told)
    if family == "llama":
        set_mask(model, MASK)
        masked = states(model, input_ids=FLAT)
        model.config._attn_implementation = "sdpa"
        with pytest.raises(ValueError, match="alone can follow; got 'sdpa'"):
            states(model, input_ids=FLAT)
        model.config._attn_implementation = "dynmask"
        assert torch.equal(states(model, input_ids=FLAT), masked)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", CLASSES)
def test_hooks_of_accelerate(family, when, monkeypatch):
    hooks = pytest.importorskip("accelerate.hooks")
    for each in CLASSES[family]:
        monkeypatch.setattr(each, "forward", getattr(each.forward, "announces", each.forward))
    model = random_stock(family, TASKS[family])
    if when == "after":
        model.set_attn_implementation("dynmask")
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            hooks.add_hook_to_module(part, hooks.ModelHook())
    if when == "before":
        model.set_attn_implementation("dynmask")
    expected = check_every_way(model)
    hooks.remove_hook_from_module(model, recurse=True)
    check_every_way(model, expected)
    check_every_way(copy.deepcopy(model), expected)


def test_a_forward_of_one_instance():
    model = ready("llama")
    expected, calls = check_every_way(model), []
    forward = model.forward

    def of_another(*args, **kwargs):
        calls.append(kwargs)
        return forward(*args, **kwargs)

    model.forward = of_another
    check_every_way(model, expected)
    assert calls


def test_a_class_that_has_no_source():
    """Made at run time, with a `forward` that names nothing."""
    body = {"forward": lambda self, *args, **kwargs: BertModel.forward(self, *args, **kwargs)}
    model = type("Made", (BertModel,), body)(random_stock("bert", "base").config).eval()
    model.set_attn_implementation("dynmask")
    check_every_way(model)
