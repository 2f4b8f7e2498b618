"""Configuration of the recurrent baseline."""

# The optional sizes are `None` only until `__post_init__` has run.
# pyright: reportOperatorIssue=false, reportOptionalOperand=false

from huggingface_hub.dataclasses import strict

from .configuration_base import DynMaskBaseConfig
from .configuration_fields import at_least, check_padding, checked_settings, not_negative, one_of, probability, ranges


@strict
@ranges(
    vocab_size=at_least(1),
    hidden_size=at_least(1),
    embedding_size=at_least(1),
    num_hidden_layers=at_least(1),
    cell=one_of("lstm", "gru"),
    hidden_dropout_prob=probability,
    classifier_dropout=probability,
    initializer_range=not_negative,
)
class DynMaskRecurrentConfig(DynMaskBaseConfig):
    r"""
    Configuration of [`DynMaskRecurrentModel`] and its heads, a recurrent baseline for comparison with attention.

    Args:
        vocab_size (`int`, *optional*, defaults to 10000): Number of token ids.
        hidden_size (`int`, *optional*, defaults to 512):
            Width of a layer's output; in a bidirectional layer, each direction has half of it.
        embedding_size (`int`, *optional*): Width of the token embeddings. `None`: `hidden_size`.
        num_hidden_layers (`int`, *optional*, defaults to 2): Number of layers.
        cell (`str`, *optional*, defaults to `"lstm"`): `"lstm"` or `"gru"`, as in `torch.nn`.
        bidirectional (`bool`, *optional*, defaults to `True`): Whether each layer also reads from the end.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.1): Dropout of each layer's input.
        classifier_dropout (`float`, *optional*): Dropout before a classifier. `None`: `hidden_dropout_prob`.
        classifier_bias (`bool`, *optional*, defaults to `True`): Whether a classifier of sequences has a bias.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of initial embeddings and classifiers; recurrent weights start as in `torch.nn`.

    Raises:
        StrictDataclassError: A field has the wrong type or is out of its range. (`huggingface_hub` wraps the
            `ValueError` of every check; its message is kept.)
    """

    model_type = "dynmask_recurrent"

    vocab_size: int = 10000
    hidden_size: int = 512
    embedding_size: int | None = None
    num_hidden_layers: int = 2
    cell: str = "lstm"
    bidirectional: bool = True
    hidden_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    classifier_bias: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        super().__post_init__(**checked_settings(self, kwargs))

    def validate_sizes(self):
        check_padding(self)
        if self.bidirectional and self.hidden_size % 2:
            raise ValueError(f"`hidden_size` must be even: each direction has half of it; got {self.hidden_size}")


__all__ = ["DynMaskRecurrentConfig"]
