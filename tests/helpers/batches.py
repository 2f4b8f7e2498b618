"""Compares batches of collators with expected ones."""

import torch


def assert_equal(batch, **expected):
    """Asserts the same columns, values and dtypes."""
    assert set(batch) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(batch[name], torch.as_tensor(values), rtol=0, atol=0)


def assert_rows(batch, **expected):
    """The same for rows, whose mask must agree with `lengths`."""
    width = next(iter(batch.values())).shape[1]
    present = torch.arange(width) < torch.as_tensor(expected["lengths"])[:, None]
    assert_equal(batch, attention_mask=present.long(), **expected)
