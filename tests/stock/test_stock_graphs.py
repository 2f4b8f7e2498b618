"""Stock models on flat batches under `torch.compile`: one graph, and one alone, that gives what eager mode gives."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, Gemma2Config

from graphs import CLOSE, compiled, run
from hf_dynmask import set_mask
from hf_dynmask.stock.batches import IN_GRAPH
from stock_models import VOCABULARY, random_stock

# torch.compile looks at every tensor's `.grad` where a graph ends.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

WIDTH, SEQUENCES = 23, 5
LENGTHS = torch.tensor([7, 3, 4, 1, 8])
TASKS = {"bert": "token-classification", "modernbert": "masked-lm", "llama": "causal-lm"}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "mlp_dropout")


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch.compiler.reset()


def make(family, task=None, **settings):
    settings = {"use_cache": False, "num_hidden_layers": 2} | dict.fromkeys(DROPOUTS, 0.0) | settings
    settings |= {"eos_token_id": 2, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 2}
    if family in ("llama", "gemma2", "modernbert"):
        settings |= {"layer_types": ["sliding_attention" if family != "llama" else "full_attention", "full_attention"]}
    model = random_stock(family, task or TASKS[family], **settings)
    model.set_attn_implementation("dynmask")
    return model.train()


def random_lengths(sequences=SEQUENCES, width=WIDTH) -> torch.Tensor:
    cuts = 1 + torch.randperm(width - 1)[: sequences - 1].sort().values
    return pad(cuts, (1, 1), value=0).index_fill(0, torch.tensor([sequences]), width).diff()


def flat(lengths=LENGTHS, width=WIDTH) -> dict[str, Any]:
    ids = torch.randint(3, VOCABULARY, (1, width))
    labels = torch.where(torch.arange(width) < lengths.sum(), ids % 2, -100)
    return {"input_ids": ids, "labels": labels, "lengths": lengths}


def of_transformers_collator(lengths=LENGTHS) -> dict[str, Any]:
    """As `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` sends it."""
    batch = flat(lengths)
    ends = pad(batch.pop("lengths").cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
    bounds = {"max_length_q": longest, "max_length_k": longest}
    return batch | {"position_ids": positions, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends} | bounds


def with_embeddings(model, batch):
    return batch | {"input_ids": None, "inputs_embeds": model.get_input_embeddings()(batch["input_ids"]).detach()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def assert_compiles(model, batch, function=None):
    function = compiled(model) if function is None else function
    assert_same(run(function, model, dict(batch)), run(model, model, dict(batch)))


@pytest.mark.parametrize("family", TASKS)
def test_one_graph_serves_all_batches_of_a_shape(family):
    model = make(family)
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(model, counter)
    for _ in range(20):
        assert_compiles(model, of_transformers_collator(random_lengths()), function)
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", TASKS)
def test_lengths_of_a_row_with_unused_places_in_one_graph(family):
    model = make(family)
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(model, counter)
    for used in (WIDTH, 17, 20):
        assert_compiles(model, flat(pad(random_lengths(4, used), (0, 2))), function)
    assert counter.frame_count == 1


BATCHES = {
    "embeddings": lambda model: with_embeddings(model, of_transformers_collator()),
    "embeddings and lengths": lambda model: with_embeddings(model, flat()),
    "ends alone": lambda model: {k: v for k, v in of_transformers_collator().items() if "position" not in k},
    "ends of keys": lambda model: {k: v for k, v in of_transformers_collator().items() if k[-1] != "q"},
    "lengths and ends": lambda model: of_transformers_collator() | {"lengths": LENGTHS},
    "int32": lambda model: flat(LENGTHS.int()),
    "empty sequences": lambda model: flat(torch.tensor([0, 7, 0, 16, 0])),
    "one sequence in many": lambda model: flat(torch.tensor([0, 23, 0])),
    "no labels": lambda model: {k: v for k, v in flat().items() if k != "labels"},
    "tuple": lambda model: flat() | {"return_dict": True},
}


@pytest.mark.parametrize("kind", BATCHES)
def test_whatever_tells_where_sequences_begin(kind):
    model = make("bert", num_hidden_layers=1)
    assert_compiles(model, BATCHES[kind](model))


@pytest.mark.parametrize("family", ["roberta", "mistral", "qwen3"])
def test_other_families(family):
    model = make(family, "masked-lm" if family == "roberta" else "causal-lm", layer_types=None, pad_token_id=0)
    assert_compiles(model, flat())


@pytest.mark.parametrize("task", ["base", "sequence-classification"])
def test_each_sequence_is_pooled(task):
    model = make("bert", task)
    labels = {} if task == "base" else {"labels": LENGTHS % 2}
    batch = {name: value for name, value in flat().items() if name != "labels"} | labels
    assert_compiles(model, batch)
    with torch.no_grad():
        name = "pooler_output" if task == "base" else "logits"
        assert model(**batch)[name].shape[0] == SEQUENCES


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_cache_that_is_filled_is_marked(use_cache):
    model = make("llama", use_cache=use_cache)
    batch = of_transformers_collator()
    output = compiled(model)(**batch)
    torch.testing.assert_close(output.logits, model(**batch).logits, **CLOSE)
    cache = output.get("past_key_values", output.get("cache"))
    assert (cache is not None) == use_cache
    if use_cache:
        with pytest.raises(ValueError, match="got one that a flat batch has filled"):
            model(batch["input_ids"][:, :1], past_key_values=cache)


MASKS: dict[str, dict[str, Any]] = {
    "causal & window(3, 0)": {},
    "window(2)": {},
    "causal | prefix": {"prefix_lengths": torch.tensor([2, 0, 4, 1, 3])},
    "segments": {"segment_ids": torch.arange(WIDTH)[None] // 3},
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_by_set_mask(mask):
    model = make("bert")
    set_mask(model, mask)
    assert_compiles(model, of_transformers_collator() | MASKS[mask])


def test_dropout():
    model = make("bert", attention_probs_dropout_prob=0.3)
    batch = of_transformers_collator()
    function = compiled(model)
    losses = [function(**batch).loss.detach() for _ in range(2)]
    assert losses[0] != losses[1]
    assert_compiles(model.eval(), batch, function)


def test_autocast():
    model, batch = make("bert"), of_transformers_collator()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(model)(**batch).logits, model(**batch).logits, atol=0.05, rtol=0.05)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters():
    model = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert_compiles(model, of_transformers_collator())


def test_on_a_device_whose_values_are_not_read():
    model = make("bert").to("meta", torch.bfloat16)
    batch = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in flat().items()}
    compiled(model, "eager")(**batch).loss.backward()


# --- Outside of graphs ---


def test_a_graph_that_ends_between_layers():
    """Layers behind its end find the batch; a forward pass that fails leaves none behind."""
    model, fails = make("bert"), False

    @torch.compiler.disable
    def look(states):
        if fails:
            raise RuntimeError("a hook has failed")
        return states

    model.bert.encoder.layer[0].register_forward_hook(lambda module, inputs, output: look(output))
    function = torch.compile(model, backend="eager")
    assert_compiles(model, of_transformers_collator(), function)
    fails = True
    with pytest.raises(RuntimeError, match="a hook has failed"):
        function(**of_transformers_collator())
    assert IN_GRAPH.batch is None
    fails = False
    assert_compiles(model, of_transformers_collator(random_lengths()), function)


def test_layers_with_scores_end_the_graph():
    sizes = {"hidden_size": 16, "intermediate_size": 19, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(vocab_size=VOCABULARY, num_hidden_layers=2, head_dim=8, use_cache=False, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="dynmask")
    assert_compiles(model, of_transformers_collator(), torch.compile(model, backend="eager"))


ELSEWHERE = {
    "rows": {"input_ids": torch.randint(3, VOCABULARY, (3, 5)), "attention_mask": torch.ones(3, 5).tril(2).long()},
    "a row": {"input_ids": torch.randint(3, VOCABULARY, (1, 5)), "lengths": torch.tensor([4])},
    "positions": {key: of_transformers_collator()[key] for key in ("input_ids", "position_ids")},
    "numbers": {"input_ids": flat()["input_ids"], "seq_idx": torch.arange(WIDTH)[None] // 6},
    "a list": {"input_ids": flat()["input_ids"], "lengths": LENGTHS.tolist()},
    "weights": of_transformers_collator() | {"output_attentions": True},
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_what_no_graph_serves_runs_outside(kind):
    model = make("bert", num_hidden_layers=1)
    function = torch.compile(model, backend="eager")
    for batch in (flat(), ELSEWHERE[kind], flat()):
        assert_compiles(model, batch, function)


@pytest.mark.parametrize(
    "told, message",
    [
        ({"lengths": torch.tensor([7, 20])}, "must add up to at most its width 23; got a sum of 27"),
        ({"lengths": torch.tensor([-1, 3])}, "`lengths` must not be negative; got -1"),
        ({"position_ids": torch.arange(WIDTH)[None]}, "`position_ids` must restart where sequences begin"),
    ],
    ids=str,
)
def test_contradictions(told, message):
    model = make("bert")
    with pytest.raises(ValueError, match=message):
        compiled(model)(**flat() | told)


def test_an_unknown_keyword():
    with pytest.raises(TypeError, match="no part of BertForTokenClassification knows the keyword `lenghts`"):
        torch.compile(make("bert"), backend="aot_eager")(**flat(), lenghts=LENGTHS)
