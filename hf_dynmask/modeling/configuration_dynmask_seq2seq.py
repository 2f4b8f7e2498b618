"""Configuration of the DynMask encoder-decoder."""

# The sides may be dictionaries or `None` only until `__post_init__` has run.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from dataclasses import fields
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from transformers.configuration_utils import PreTrainedConfig

from .configuration_base import DynMaskBaseConfig
from .configuration_dynmask import DynMaskConfig
from .configuration_fields import checked_settings

OF_BOTH_SIDES = {field.name for field in fields(DynMaskConfig)} - {field.name for field in fields(DynMaskBaseConfig)}
OF_A_DECODER = {
    "mask": "causal",
    "layer_masks": None,
    "add_cross_attention": True,
    "num_features": None,
    "conv_kernel": (),
    "conv_stride": (),
}


@strict
class DynMaskSeq2SeqConfig(DynMaskBaseConfig):
    """
    Configuration of a [`DynMaskSeq2SeqModel`] and its heads, with one [`DynMaskConfig`] per side.

    Fields of [`DynMaskConfig`] that are given here apply to both sides, except that `mask`, `layer_masks` and the
    fields for frames apply only to the encoder. Fields in `encoder` and `decoder` take precedence. The three masks are
    `encoder.mask` (`"full"` unless given), `decoder.mask` (`"causal"`) and `decoder.cross_mask` (`"full"`).

    Args:
        encoder ([`DynMaskConfig`] or `dict`, *optional*): The encoder's configuration, or the fields that differ in it.
        decoder ([`DynMaskConfig`] or `dict`, *optional*): The decoder's configuration, or the fields that differ in it.
        share_embeddings (`bool`, *optional*):
            Whether encoder and decoder share one token embedding, which is then also the output embedding. `None`:
            `True` if the encoder reads tokens and `tie_word_embeddings` is `True`.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the decoder's input and output embeddings share their weights.
        decoder_start_token_id (`int`, *optional*): First token of the decoder inputs that are made from labels.
        pad_token_id (`int`, *optional*, defaults to 0): Id of padding; it replaces ignored labels in decoder inputs.
        source_model_type (`str`, *optional*): `model_type` of the stock checkpoint that this one was converted from.

    Raises:
        StrictDataclassError: A side is not a valid [`DynMaskConfig`], or the sides do not match.

    Example:

    ```python
    >>> config = DynMaskSeq2SeqConfig(hidden_size=384, encoder={"num_hidden_layers": 3, "mask": "window(64)"})
    >>> config.encoder.num_hidden_layers, config.decoder.num_hidden_layers, config.decoder.mask
    (3, 6, 'causal')
    ```
    """

    model_type = "dynmask_seq2seq"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"encoder": DynMaskConfig, "decoder": DynMaskConfig}

    encoder: DynMaskConfig | dict[str, Any] | None = None
    decoder: DynMaskConfig | dict[str, Any] | None = None
    share_embeddings: bool | None = None
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    decoder_start_token_id: int | None = None
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    source_model_type: str | None = None

    def __post_init__(self, **kwargs):
        common = {name: kwargs.pop(name) for name in OF_BOTH_SIDES & kwargs.keys()}
        common |= {name: getattr(self, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        common["use_pooler"] = False
        self.encoder = _side("encoder", self.encoder, common)
        self.decoder = _side("decoder", self.decoder, common | OF_A_DECODER)
        if self.share_embeddings is None:
            self.share_embeddings = self.encoder.num_features is None and self.tie_word_embeddings
        super().__post_init__(**checked_settings(self, kwargs, OF_BOTH_SIDES))

    @property
    def use_cache(self) -> bool:
        """Whether the decoder returns keys and values; the Trainer sets it here."""
        return self.decoder.use_cache

    @use_cache.setter
    def use_cache(self, value: bool) -> None:
        self.decoder.use_cache = value

    def check_shareable(self) -> None:
        """Raises a `ValueError` if a mask has a Python predicate, which cannot be saved with a checkpoint."""
        for side in (self.encoder, self.decoder):
            side.check_shareable()

    def validate_sides(self):
        if not self.decoder.add_cross_attention:
            raise ValueError("`add_cross_attention` of the decoder must be True; got False")
        if self.decoder.num_features is not None:
            raise ValueError(f"`num_features` of the decoder must be None; got {self.decoder.num_features}")
        if self.encoder.hidden_size != self.decoder.hidden_size:
            raise ValueError(
                f"`hidden_size` of the encoder must be the decoder's {self.decoder.hidden_size}; "
                f"got {self.encoder.hidden_size}"
            )
        for name, side in (("encoder", self.encoder), ("decoder", self.decoder)):
            if side.classifier_pooling != "first":
                raise ValueError(
                    f"`classifier_pooling` of the {name} must be left out, since the classifier of an encoder-decoder "
                    f"reads the decoder's last token; got {side.classifier_pooling!r}"
                )
        if self.share_embeddings and not self.tie_word_embeddings:
            raise ValueError("`share_embeddings` must be False without `tie_word_embeddings`; got True")
        if self.share_embeddings and self.encoder.num_features is not None:
            raise ValueError(
                "`share_embeddings` must be False where the encoder reads frames; "
                f"got True with num_features={self.encoder.num_features}"
            )
        if self.share_embeddings and self.encoder.vocab_size != self.decoder.vocab_size:
            raise ValueError(
                f"`vocab_size` of the encoder must be the decoder's {self.decoder.vocab_size} where they share "
                f"embeddings; got {self.encoder.vocab_size}"
            )


def _side(name: str, given: DynMaskConfig | dict[str, Any] | None, common: dict[str, Any]) -> DynMaskConfig:
    if isinstance(given, DynMaskConfig):
        return given
    try:
        return DynMaskConfig(**common | (given or {}))
    except (ValueError, StrictDataclassError) as error:
        reason = error.__cause__ if isinstance(error, StrictDataclassError) else error
        raise StrictDataclassFieldValidationError(name, ValueError(str(reason))) from error


__all__ = ["DynMaskSeq2SeqConfig"]
