"""Fields in the signatures of forward passes, where the Trainer finds the columns that it must not remove."""

import re
from inspect import Parameter, signature

import pytest

import hf_dynmask
from hf_dynmask.modeling.field_shapes import BATCH_FIELDS, takes_fields

MODELS = [name for name in hf_dynmask.__all__ if re.match(r"DynMask(\w*For|(Seq2Seq)?Model$)", name)]


@pytest.mark.parametrize("name", MODELS)
def test_forward_passes_name_the_fields(name):
    sides = ("", "decoder_") if "Seq2Seq" in name or "Conditional" in name else ("",)
    fields = {side + field for side in sides for field in BATCH_FIELDS}
    assert len(MODELS) == 13
    assert fields <= signature(getattr(hf_dynmask, name).forward).parameters.keys()


def test_fields_come_by_keyword_behind_other_arguments():
    @takes_fields("", "decoder_")
    def forward(self, input_ids=None, **kwargs):
        return input_ids, kwargs

    parameters = signature(forward).parameters
    fields = [*BATCH_FIELDS, *(f"decoder_{name}" for name in BATCH_FIELDS)]
    assert list(parameters) == ["self", "input_ids", *fields, "kwargs"]
    assert {parameters[name].kind for name in fields} == {Parameter.KEYWORD_ONLY}
    assert forward(None, 1, segment_ids=2) == (1, {"segment_ids": 2})
