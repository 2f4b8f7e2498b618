"""Formats values for error messages."""


def shown(value: object) -> str:
    """The text of a value, shortened if it is long."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python does not convert more than 4300 digits to text
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"
