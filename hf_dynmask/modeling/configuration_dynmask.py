"""Configuration of the DynMask models."""

# The optional sizes are `None` only until `__post_init__` has run.
# pyright: reportOperatorIssue=false, reportOptionalOperand=false, reportReturnType=false
# pyright: reportOptionalSubscript=false, reportOptionalIterable=false

from math import prod
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.modeling_rope_utils import RopeParameters

from .configuration_base import DynMaskBaseConfig
from .configuration_fields import (
    LARGEST,
    activation,
    at_least,
    check_padding,
    checked_settings,
    each,
    is_by_layer_type,
    not_negative,
    one_of,
    positive,
    probability,
    ranges,
    rotary,
)
from .configuration_former import LAYER_TYPES
from .masks import Custom, Mask, parse


def masks_of(config: "DynMaskConfig") -> list[Mask]:
    """[`DynMaskConfig.masks`] as a function, which models call.

    Transformers loads a checkpoint's code twice, for the configuration and for the model. A model must not mix the mask
    classes of the two, and so does not call methods of the configuration that return masks.
    """
    return [parse(text) for text in mask_texts(config)]


def mask_texts(config: "DynMaskConfig") -> list[str]:
    """The text of each layer's mask."""
    texts = config.layer_masks
    return texts if texts is not None else distinct_mask_texts(config) * config.num_hidden_layers


def distinct_mask_texts(config: "DynMaskConfig") -> list[str]:
    """The distinct masks of the layers. Unlike [`mask_texts`], it makes no list with an entry per layer."""
    if config.layer_masks is not None:
        return list(dict.fromkeys(config.layer_masks))
    return ["full" if config.mask is None else config.mask]


def _mask(name: str, value: str) -> None:
    """Raises if a value is not an expression of the mask language."""
    try:
        parse(value)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from None


@strict
@ranges(
    vocab_size=at_least(1),
    hidden_size=at_least(1),
    embedding_size=at_least(1),
    num_features=at_least(1),
    conv_kernel=each(at_least(1)),
    conv_stride=each(at_least(1)),
    num_hidden_layers=at_least(1),
    num_attention_heads=at_least(1),
    num_key_value_heads=at_least(1),
    head_dim=at_least(1),
    value_head_dim=at_least(1),
    query_pre_attn_scalar=positive,
    intermediate_size=at_least(1),
    hidden_act=activation,
    norm_type=one_of("layer_norm", "rms_norm", "zero_centered_rms_norm"),
    norm_placement=one_of("pre", "post", "both"),
    norm_eps=positive,
    embedding_scale=positive,
    position_type=one_of("learned", "sinusoidal", "rotary", "none"),
    position_offset=at_least(0),
    max_position_embeddings=at_least(1),
    rope_parameters=rotary,
    layer_types=each(one_of(*LAYER_TYPES)),
    type_vocab_size=at_least(0),
    hidden_dropout_prob=probability,
    attention_probs_dropout_prob=probability,
    classifier_dropout=probability,
    pooler_act=activation,
    pooler_dropout=probability,
    lm_head_act=activation,
    classifier_pooling=one_of("first", "last", "mean", "late"),
    classifier_transform=one_of("pooler", "lm_head", "none"),
    mask=_mask,
    layer_masks=each(_mask),
    cross_mask=_mask,
    apply_mask_to=one_of("scores", "weights"),
    ctc_loss_reduction=one_of("mean", "sum"),
    initializer_range=not_negative,
)
class DynMaskConfig(DynMaskBaseConfig):
    r"""
    Configuration of [`DynMaskModel`] and its heads. One configurable block covers BERT-like and Llama-like encoders.

    Args:
        vocab_size (`int`, *optional*, defaults to 10000): Number of token ids.
        hidden_size (`int`, *optional*, defaults to 512): Width of the residual stream.
        embedding_size (`int`, *optional*):
            Width of the token embeddings; projected to `hidden_size` where it differs (ELECTRA). `None`: `hidden_size`.
        num_features (`int`, *optional*):
            Features per frame of `input_features`, which the model then reads instead of token ids: log-mel bins, the
            pixels of a patch, the channels of a time series. `None`: the model reads token ids.
        conv_kernel (`list[int]`, *optional*, defaults to `()`):
            Kernel size of each convolution over the frames (odd). `()`: frames are projected without convolutions.
        conv_stride (`list[int]`, *optional*, defaults to `()`):
            Stride of each convolution, which makes `ceil(n / stride)` of n frames. Whisper has kernels `[3, 3]` and
            strides `[1, 2]`.
        num_hidden_layers (`int`, *optional*, defaults to 6): Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 8): Query heads.
        num_key_value_heads (`int`, *optional*):
            Key/value heads; must divide the query heads (grouped-query attention). `None`: as many as query heads.
        head_dim (`int`, *optional*): Size of a query/key head. `None`: `hidden_size / num_attention_heads`.
        value_head_dim (`int`, *optional*): Size of a value head. `None`: `head_dim`.
        query_pre_attn_scalar (`float`, *optional*):
            Scores are divided by its square root (Gemma 3). `None`: `head_dim`.
        intermediate_size (`int`, *optional*, defaults to 2048): Inner width of the feed-forward layer.
        hidden_act (`str`, *optional*, defaults to `"gelu"`): Activation of the feed-forward layer.
        gated_feed_forward (`bool`, *optional*, defaults to `False`):
            `down(act(gate(x)) * up(x))` (GLU variants, arXiv:2002.05202) in place of `down(act(up(x)))`.
        norm_type (`str`, *optional*, defaults to `"layer_norm"`):
            `"layer_norm"`, `"rms_norm"` or `"zero_centered_rms_norm"`, which multiplies by 1 + weight (Gemma).
        norm_placement (`str`, *optional*, defaults to `"post"`):
            `"post"` normalises each residual sum (BERT). `"pre"` normalises each sublayer's input and the last output
            (Llama). `"both"` is `"pre"` and also normalises each sublayer's output (Gemma 3).
        norm_eps (`float`, *optional*, defaults to 1e-5): Epsilon of every norm.
        norm_bias (`bool`, *optional*, defaults to `True`): Whether a LayerNorm has a bias.
        first_attention_norm (`bool`, *optional*, defaults to `True`):
            Whether the first layer has a norm before its attention, unless `norm_placement="post"` (ModernBERT has
            none, as its embeddings are normalised).
        embedding_scale (`float`, *optional*, defaults to 1.0): Factor of the token embeddings (BART, Gemma).
        embedding_norm (`bool`, *optional*, defaults to `True`): Whether the summed embeddings are normalised.
        position_type (`str`, *optional*, defaults to `"learned"`):
            `"learned"`, `"sinusoidal"` (arXiv:1706.03762), `"rotary"` (arXiv:2104.09864) or `"none"`.
        sinusoidal_in_halves (`bool`, *optional*, defaults to `False`):
            Whether sinusoidal positions have all sines before all cosines (Marian, Whisper) rather than alternating.
        position_offset (`int`, *optional*, defaults to 0):
            Row of the position table for position 0 (RoBERTa: `pad_token_id + 1`). Explicit `position_ids` are rows of
            the table, unless they count every sequence from 0, as collators do. Then the offset is added to them.
        max_position_embeddings (`int`, *optional*, defaults to 10000): Rows of the position table.
        rope_parameters (`dict`, *optional*):
            Rotary parameters as in transformers (`rope_theta`, `rope_type`, …): one dictionary for all layers, or a
            dictionary of them for each type in `layer_types` (ModernBERT, Gemma 3).
        layer_types (`list[str]`, *optional*):
            Each layer's type, `"full_attention"`, `"sliding_attention"` or `"chunked_attention"`, if `rope_parameters`
            is by layer type. The type only selects rotary parameters; `layer_masks` decides which keys a layer sees.
        type_vocab_size (`int`, *optional*, defaults to 0): Number of token types; with 0 `token_type_ids` are ignored.
        attention_bias (`bool`, *optional*, defaults to `True`): Whether the attention projections have biases.
        attention_output_bias (`bool`, *optional*): Whether the output projection has one. `None`: `attention_bias`.
        use_qk_norm (`bool`, *optional*, defaults to `False`):
            Whether queries and keys are RMS-normalised head by head before rotary positions (Qwen3, Gemma 3).
        mlp_bias (`bool`, *optional*, defaults to `True`): Whether the feed-forward projections have biases.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.1): Dropout of embeddings and sublayer outputs.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.1): Dropout of the attention weights.
        classifier_dropout (`float`, *optional*): Dropout before a classifier. `None`: `hidden_dropout_prob`.
        use_pooler (`bool`, *optional*, defaults to `True`): Whether the bare model has a pooler.
        pooler_act (`str`, *optional*, defaults to `"tanh"`): Activation of the pooler.
        pooler_dropout (`float`, *optional*, defaults to 0.0): Dropout before the pooler.
        classifier_pooling (`str`, *optional*, defaults to `"first"`):
            Input of a pooler and of a sequence classifier: the `"first"` token (BERT), the `"last"` token whose id is
            not `pad_token_id` (Llama), the `"mean"` of all tokens, or the mean of the transformed tokens, `"late"`. It
            must be left out in an encoder-decoder, whose classifier reads the decoder's last token.
        classifier_transform (`str`, *optional*, defaults to `"pooler"`):
            Module between the states and a classifier: the `"pooler"`, in sequence classification only (BERT); dense
            layer, activation and norm of an `"lm_head"`, also in token classification and question answering
            (ModernBERT); or `"none"` (Llama).
        classifier_bias (`bool`, *optional*, defaults to `True`): Whether a classifier of sequences has a bias.
        lm_head_transform (`bool`, *optional*, defaults to `True`):
            Whether a masked-LM head has a dense layer, activation and norm before its decoder (EuroBERT has none).
        lm_head_act (`str`, *optional*, defaults to `"gelu"`): Activation inside the masked-LM head.
        lm_head_bias (`bool`, *optional*, defaults to `True`): Whether the dense layer of the masked-LM head has a bias.
        decoder_bias (`bool`, *optional*, defaults to `True`): Whether the decoder of the masked-LM head has a bias.
        mask (`str`, *optional*):
            Mask expression of every layer; see [`hf_dynmask.masks`]. `None`: `"full"`, or `"causal"` in a causal
            language model.
        layer_masks (`list[str]`, *optional*): One mask expression per layer; takes precedence over `mask`.
        add_cross_attention (`bool`, *optional*, defaults to `False`):
            Whether each layer also attends to an encoder's states, as in the decoder of a [`DynMaskSeq2SeqModel`].
        cross_mask (`str`, *optional*, defaults to `"full"`): Mask expression of the cross-attention.
        apply_mask_to (`str`, *optional*, defaults to `"scores"`):
            `"scores"` masks the scores before the softmax. `"weights"` masks the weights after the softmax without
            renormalising them, as some texts define it (computed by the dense reference).
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether a causal language model returns keys and values when it is not training.
        ctc_loss_reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"`: the CTC loss of each sequence is divided by the length of its target, then averaged. `"sum"`: the
            losses are summed.
        ctc_zero_infinity (`bool`, *optional*, defaults to `False`):
            Whether a target that is too long for its frames has a loss of 0 instead of raising an error.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of initial weights.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether input and output embeddings share their weights.
        source_model_type (`str`, *optional*): `model_type` of the stock checkpoint that this one was converted from.

    Raises:
        StrictDataclassError: A field has the wrong type or is out of its range, fields contradict each other, or a mask
            does not parse. (`huggingface_hub` wraps the `ValueError` of every check; its message is kept.)
    """

    model_type = "dynmask"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 10000
    hidden_size: int = 512
    embedding_size: int | None = None
    num_features: int | None = None
    conv_kernel: list[int] | tuple[int, ...] = ()
    conv_stride: list[int] | tuple[int, ...] = ()
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    value_head_dim: int | None = None
    query_pre_attn_scalar: float | int | None = None
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    gated_feed_forward: bool = False
    norm_type: str = "layer_norm"
    norm_placement: str = "post"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    first_attention_norm: bool = True
    embedding_scale: float | int = 1.0
    embedding_norm: bool = True
    position_type: str = "learned"
    sinusoidal_in_halves: bool = False
    position_offset: int = 0
    max_position_embeddings: int = 10000
    rope_parameters: RopeParameters | dict | None = None
    layer_types: list[str] | None = None
    type_vocab_size: int = 0
    attention_bias: bool = True
    attention_output_bias: bool | None = None
    use_qk_norm: bool = False
    mlp_bias: bool = True
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    use_pooler: bool = True
    pooler_act: str = "tanh"
    pooler_dropout: float | int = 0.0
    classifier_pooling: str = "first"
    classifier_transform: str = "pooler"
    classifier_bias: bool = True
    lm_head_transform: bool = True
    lm_head_act: str = "gelu"
    lm_head_bias: bool = True
    decoder_bias: bool = True
    mask: str | None = None
    layer_masks: list[str] | None = None
    add_cross_attention: bool = False
    cross_mask: str = "full"
    apply_mask_to: str = "scores"
    use_cache: bool = True
    ctc_loss_reduction: str = "mean"
    ctc_zero_infinity: bool = False
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True
    source_model_type: str | None = None

    def __post_init__(self, **kwargs):
        if self.embedding_size is None:
            self.embedding_size = self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self._size_of_heads()
        if self.value_head_dim is None:
            self.value_head_dim = self.head_dim
        if self.query_pre_attn_scalar is None:
            self.query_pre_attn_scalar = self.head_dim
        self.conv_kernel, self.conv_stride = list(self.conv_kernel), list(self.conv_stride)
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.position_type == "rotary" and self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**checked_settings(self, kwargs))
        if self.position_type != "rotary":
            self.rope_parameters = None  # transformers fills it in for any config that has the field

    def _size_of_heads(self) -> int:
        heads = self.num_attention_heads
        if self.hidden_size % heads:
            raise ValueError(
                f"`hidden_size` must be a multiple of num_attention_heads={heads}, or `head_dim` must be given; "
                f"got {self.hidden_size}"
            )
        return self.hidden_size // heads

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Frames of the input per frame after the convolutions."""
        return prod(self.conv_stride)

    def check_shareable(self) -> None:
        """Raises a `ValueError` if a mask has a Python predicate, which cannot be saved with a checkpoint."""
        custom = [mask for mask in map(parse, self._mask_texts()) if mask.holds(Custom)]
        if custom:
            raise ValueError(
                "a model with a `custom(...)` mask cannot be saved: its predicate is Python code of this process; got "
                f"{', '.join(repr(str(mask)) for mask in custom)}"
            )

    def masks(self) -> list[Mask]:
        """The mask of each layer (a list of `num_hidden_layers`)."""
        return masks_of(self)

    def rope_by_type(self) -> dict[str, dict[str, Any]]:
        """The rotary parameters of each type in `layer_types`; empty if they are not by layer type."""
        if not is_by_layer_type(self.rope_parameters):
            return {}
        return {kind: self.rope_parameters[kind] for kind in self.layer_types}

    def rope_by_layer(self) -> list[dict[str, Any] | None]:
        """Each layer's rotary parameters (a list of `num_hidden_layers`); `None` without rotary positions."""
        by_type = self.rope_by_type()
        return (
            [by_type[kind] for kind in self.layer_types] if by_type else [self.rope_parameters] * self.num_hidden_layers
        )

    @property
    def sliding_window(self) -> int:
        """Tokens that transformers' caches keep in `"sliding_attention"` layers: all, since masks may change."""
        if not self.layer_types:
            raise AttributeError("a configuration without `layer_types` has no `sliding_window`; see `layer_masks`")
        return LARGEST

    @property
    def attention_chunk_size(self) -> int:
        """The same for layers of type `"chunked_attention"`."""
        return self.sliding_window

    def convert_rope_params_to_dict(self, **kwargs):
        given: Any = kwargs.pop("rope_scaling", None) or self.rope_parameters  # `rope_scaling` is its name before 5.0
        self.rope_parameters = given
        if not is_by_layer_type(given):
            return super().convert_rope_params_to_dict(**kwargs)
        for name in ("rope_theta", "partial_rotary_factor"):
            if (value := kwargs.pop(name, None)) is not None:
                raise ValueError(f"`{name}` must be in the entries of `rope_parameters`, by layer type; got {value}")
        for kind in self.layer_types or [None]:
            if kind not in given:
                raise ValueError(f"`layer_types` must name types in `rope_parameters`, {list(given)}; got {kind!r}")
        self.rope_parameters = {
            kind: {"rope_theta": self.default_theta, **parameters} for kind, parameters in given.items()
        }
        self.standardize_rope_params()
        return kwargs

    def validate_sizes(self):
        if self.num_features is None:
            check_padding(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_key_value_heads` must divide num_attention_heads={self.num_attention_heads}; "
                f"got {self.num_key_value_heads}"
            )
        if self.position_type == "rotary" and self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even with rotary positions; got {self.head_dim}")
        for parameters in self.rope_by_type().values() or [self.rope_parameters or {}]:
            partial = parameters.get("partial_rotary_factor", 1.0)
            if partial != 1.0:
                raise ValueError(f"`partial_rotary_factor` must be 1.0: heads are rotated whole; got {partial}")

    def validate_lm_head(self):
        if not self.lm_head_transform and self.embedding_size != self.hidden_size:
            raise ValueError(
                f"`embedding_size` must be hidden_size={self.hidden_size} with lm_head_transform=False; "
                f"got {self.embedding_size}"
            )

    def validate_features(self):
        if self.num_features is None and self.conv_kernel:
            raise ValueError(f"`num_features` must be given with convolutions; got conv_kernel={self.conv_kernel}")
        if len(self.conv_kernel) != len(self.conv_stride):
            raise ValueError(
                f"`conv_stride` must have one entry a convolution, as conv_kernel={self.conv_kernel} has; "
                f"got {self.conv_stride}"
            )
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            if kernel % 2 == 0:
                raise ValueError(f"`conv_kernel` must hold odd numbers; got {kernel}")
            if not 1 <= stride <= kernel:
                raise ValueError(f"`conv_stride` must be from 1 to the window's {kernel} frames; got {stride}")

    def validate_norms(self):
        if self.norm_placement == "post" and not self.first_attention_norm:
            raise ValueError("`first_attention_norm` must be True with norm_placement='post'; got False")

    def validate_rope(self):
        try:
            super().validate_rope()
        except KeyError as error:
            raise ValueError(
                f"`rope_parameters` must have what its `rope_type` needs; got {self.rope_parameters}: {error}"
            ) from error

    def validate_layer_type(self):
        self._check_one_a_layer("layer_types")
        if self.layer_types is not None and not is_by_layer_type(self.rope_parameters):
            raise ValueError(
                "`layer_types` must be None unless `rope_parameters` is by layer type (which keys a layer sees is in "
                f"`layer_masks`); got {self.layer_types} with position_type={self.position_type!r}"
            )

    def _check_one_a_layer(self, name: str) -> None:
        entries = getattr(self, name)
        if entries is not None and len(entries) != self.num_hidden_layers:
            raise ValueError(
                f"`{name}` must have one entry a layer, num_hidden_layers={self.num_hidden_layers}; got {len(entries)}"
            )

    def validate_masks(self):
        self._check_one_a_layer("layer_masks")
        for text in self._mask_texts():
            parse(text).head_borders(self.num_attention_heads)

    def _mask_texts(self) -> list[str]:
        """The distinct masks, the cross-attention's included."""
        return list(dict.fromkeys([*distinct_mask_texts(self), self.cross_mask]))


__all__ = ["DynMaskConfig"]
