"""Weights split, joined and transposed on their way to us and back."""

import torch

from hf_dynmask.conversion.weights import Link, to_ours, to_theirs

LINKS = {"c_attn": Link(("q", "k", "v"), transposed=True), "wi": Link(("gate", "up")), "wte": Link(("words",))}


def test_fused_weights_are_split_and_joined_again():
    theirs = {"c_attn.weight": torch.randn(4, 15), "c_attn.bias": torch.randn(15), "wi.weight": torch.randn(6, 4)}
    ours = to_ours(theirs, LINKS)
    assert ours.keys() == {"q.weight", "k.weight", "v.weight", "q.bias", "k.bias", "v.bias", "gate.weight", "up.weight"}
    torch.testing.assert_close(ours["k.weight"], theirs["c_attn.weight"][:, 5:10].t(), rtol=0, atol=0)
    torch.testing.assert_close(ours["k.bias"], theirs["c_attn.bias"][5:10], rtol=0, atol=0)
    torch.testing.assert_close(ours["gate.weight"], theirs["wi.weight"][:3], rtol=0, atol=0)
    places = [weight.untyped_storage().data_ptr() for weight in ours.values()]
    assert len(set(places)) == len(places) and all(weight.is_contiguous() for weight in ours.values())
    restored = to_theirs(ours, LINKS, theirs)
    assert restored.keys() == theirs.keys()
    assert all(
        torch.equal(restored[name], weight) and restored[name].is_contiguous() for name, weight in theirs.items()
    )


def test_what_is_only_renamed_is_not_copied():
    weight = torch.randn(3, 2)
    ours = to_ours({"wte.weight": weight}, LINKS)
    assert ours["words.weight"] is weight
    assert to_theirs(ours, LINKS, ["wte.weight"])["wte.weight"] is weight


def test_unknown_names_stay():
    weights = {"other.weight": torch.randn(2), "bare": torch.randn(2)}
    assert to_ours(weights, LINKS) == weights
    assert to_theirs(weights, LINKS, ["wte.weight", "bare"]) == weights
