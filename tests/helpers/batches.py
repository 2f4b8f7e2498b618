"""What collators give, compared with what is expected."""

import torch


def assert_equal(batch, **expected):
    """Same columns, numbers and dtypes."""
    assert set(batch) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(batch[name], torch.as_tensor(values), rtol=0, atol=0)


def assert_rows(batch, **expected):
    """The same, of rows: they have a mask that says what `lengths` say."""
    width = next(iter(batch.values())).shape[1]
    present = torch.arange(width) < torch.as_tensor(expected["lengths"])[:, None]
    assert_equal(batch, attention_mask=present.long(), **expected)
