"""How values appear in messages."""


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python does not write more than 4300 digits
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"
