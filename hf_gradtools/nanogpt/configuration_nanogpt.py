"""Configuration of a nanoGPT-style model: which variant each of its parts is."""

# No `from __future__ import annotations`: @strict checks no field whose type is a string.

import math
from difflib import get_close_matches
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging

from .caching import RECURRENT
from .components import VARIANTS, TokenMixer
from .registry import variant


logger = logging.get_logger(__name__)

# Field -> kind of component it names. A list is cycled over the layers, except for those in ONE_FOR_ALL.
NAMED_VARIANTS = {
    "attention_variant": "attention",
    "mlp_variant": "mlp",
    "norm_variant_attn": "norm",
    "norm_variant_output": "norm",
    "activation_variant": "activation",
    "softmax_variant_attn": "softmax",
    "softmax_variant_output": "softmax",
    "linear_variant_attn": "linear",
    "linear_variant_attn_proj": "linear",
    "linear_variant_mlp": "linear",
    "linear_variant_mlp_up": "linear",
    "linear_variant_mlp_down": "linear",
    "kan_base_activation": "activation",
}
# Where a field of its own is left open, the layer takes this one.
FALLBACKS = {
    "linear_variant_attn_proj": "linear_variant_attn",
    "linear_variant_mlp_up": "linear_variant_mlp",
    "linear_variant_mlp_down": "linear_variant_mlp",
}
AT_LEAST_ONE = (
    "vocab_size",
    "block_size",
    "n_layer",
    "n_head",
    "n_kv_group",
    "n_embd",
    "n_qk_head_dim",
    "n_v_head_dim",
    "mla_latent_dim",
    "mla_rotary_dim",
    "window_size",
    "mlp_size",
    "mlp_expansion_factor",
    "ssm_mamba_expand",
    "ssm_conv_kernel_size",
    "ssm_dt_rank",
    "ssm_d_state",
    "fire_mlp_width",
    "kan_poly_order",
    "kan_middle_layers",
)
POSITIVE = (
    "norm_eps",
    "rope_theta",
    "fire_init_c",
    "fire_init_L",
    "fire_log_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "consmax_initial_gamma",
    "consmax_base",
    "strongermax_divisor",
    "sigmoidmax_divisor",
    "relumax_divisor",
    "relu2max_divisor",
    "softplus_divisor",
    "squareplus_divisor",
    "polymax_divisor",
    "polymax_power",
    "hsnorm_radius",
)


@strict
class NanoGPTConfig(PreTrainedConfig):
    r"""
    Sizes of the model, and the variant of each of its parts by name.

    A field that names a part of a layer (`attention_variant`, `mlp_variant`, `norm_variant_attn`,
    `activation_variant`, `softmax_variant_attn`, `linear_variant_*`) and the sizes `n_kv_group`, `window_size` and
    `mlp_size` take a list too, which is cycled over the layers: `attention_variant=["causal", "ssm"]`.

    Args:
        vocab_size (`int`, defaults to 50304): size of the vocabulary.
        block_size (`int`, defaults to 1024): tokens the model is trained on at once. Absolute positions go no
            further.
        n_layer, n_head, n_embd (`int`): blocks, heads of an attention, width.
        n_kv_group (`int`, *optional*): heads of keys and values, each shared by `n_head / n_kv_group` heads; default
            `n_head`.
        dropout (`float`, defaults to 0): of embeddings, attention weights, and what is added to the residual stream.
        bias (`bool`, defaults to `False`): whether linear maps and LayerNorms have biases.
        tie_word_embeddings (`bool`, defaults to `True`): whether the output layer is the embedding; also as
            `wte_weight_tying`.
        attention_variant (`str` or list, defaults to `"causal"`): "causal", "infinite" (heads of free size, summed),
            "mla" (keys and values from one latent), "linear", "ssm" (a Mamba-1 head) or "identity".
        n_qk_head_dim, n_v_head_dim (`int`, *optional*): head sizes of "infinite"; default `n_embd / n_head`.
        mla_latent_dim (`int`, *optional*), mla_rotary_dim (`int`, defaults to 32): numbers a token that "mla" caches,
            without positions (default `n_embd / 4`) and with rotary ones.
        use_concat_heads (`bool`): whether "infinite" concatenates its heads.
        window_size (`int` or list, *optional*): how many keys a query sees, itself included. In a list, None stands
            for all; the numbers in it must be equal.
        use_qk_norm, use_qk_norm_scale (`bool`): queries and keys of length 1; a learned scale of their products.
        attn_logit_softcapping, final_logit_softcapping (`float`, *optional*): scores or logits x become
            cap * tanh(x / cap).
        use_flash_lobo, use_flash_lobo_per_head, use_flash_obo_const (`bool`): adds a learned C = e^c to the softmax's
            denominator; one per head; not learned.
        flash_lobo_log_const (`float`, defaults to 0): c at the start.
        softmax_variant_attn (`str` or list, defaults to `"softmax"`): what makes scores weights.
        softmax_variant_output (`str`, defaults to `"softmax"`): what makes logits probabilities when sampling.
        mlp_variant (`str` or list, defaults to `"mlp"`): "mlp", "swiglu", "kan" or "identity".
        mlp_expansion_factor, mlp_size (`int`): hidden size, in widths or absolute.
        activation_variant (`str` or list, *optional*): any of ours or of `ACT2FN`; default GELU in "mlp", SiLU in
            "swiglu", `kan_base_activation` in "kan".
        norm_variant_attn, norm_variant_output (`str`, defaults to `"rmsnorm"`): norms of the blocks (a list is
            cycled), and before the output layer.
        use_pre_ln, use_peri_ln, use_post_ln (`bool`): norms before a part, on what it adds, after it was added.
        use_parallel_mlp (`bool`): attention and MLP of a block read the same input.
        use_rotary_embeddings, use_fire_embeddings, use_abs_pos_embeddings (`bool`): positions; they combine.
        linear_variant_attn, linear_variant_mlp (`str` or list, defaults to `"linear"`): "linear", "bitlinear_1p58" or
            "quantized_linear", with `linear_variant_attn_proj`, `linear_variant_mlp_up` and `..._down` to tell apart.
        initializer_range (`float`, defaults to 0.02): standard deviation of the weights at the start; those that
            add to the residual stream get it over sqrt(2 n_layer).

    Raises:
        ValueError: a name is unknown, a number out of range, or two choices exclude each other.
    """

    model_type = "nanogpt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_group",
        "max_position_embeddings": "block_size",
        "wte_weight_tying": "tie_word_embeddings",
    }

    vocab_size: int = 50304
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_kv_group: int | list[int] | None = None
    n_embd: int = 768
    dropout: float | int = 0.0
    bias: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float | int = 0.02
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    attention_variant: str | list[str] = "causal"
    n_qk_head_dim: int | None = None
    n_v_head_dim: int | None = None
    mla_latent_dim: int | None = None
    mla_rotary_dim: int = 32
    use_concat_heads: bool = False
    window_size: int | list[int | None] | None = None
    use_qk_norm: bool = False
    use_qk_norm_scale: bool = False
    attn_logit_softcapping: float | int | None = None
    final_logit_softcapping: float | int | None = None
    use_flash_lobo: bool = False
    use_flash_lobo_per_head: bool = False
    use_flash_obo_const: bool = False
    flash_lobo_log_const: float | int = 0.0
    ssm_mamba_expand: int = 2
    ssm_conv_kernel_size: int = 3
    ssm_dt_rank: int = 8
    ssm_d_state: int = 16
    ssm_io_bias: bool = False

    softmax_variant_attn: str | list[str] = "softmax"
    softmax_variant_output: str = "softmax"
    consmax_initial_beta: float | int = 2.5
    consmax_initial_gamma: float | int = 100.0
    consmax_use_euler_base: bool = True
    consmax_base: float | int = 2.0
    consmax_v2_clamping: bool = True
    consmax_v2_clamp_value: float | int = 80.0
    softermax_use_xmax: bool = True
    strongermax_strength: float | int = math.e
    strongermax_use_xmax: bool = True
    strongermax_div_by_sum_of_terms: bool = True
    strongermax_divisor: float | int = 1.0
    strongermax_obo: float | int = 0.0
    strongermax_use_learned_obo: bool = False
    strongermax_use_learned_obo_per_head: bool = False
    sigmoidmax_divisor: float | int = 256.0
    relumax_divisor: float | int = 256.0
    relu2max_divisor: float | int = 256.0
    softplus_divisor: float | int = 256.0
    squareplus_divisor: float | int = 256.0
    polymax_x_intercept: float | int = -100.0
    polymax_y_intercept: float | int = 1.0
    polymax_power: float | int = 2.0
    polymax_divisor: float | int = 1000.0

    mlp_variant: str | list[str] = "mlp"
    mlp_expansion_factor: int = 4
    mlp_size: int | list[int] | None = None
    activation_variant: str | list[str] | None = None
    kan_poly_order: int = 3
    kan_base_activation: str = "silu"
    kan_middle_layers: list[int] | None = None

    norm_variant_attn: str | list[str] = "rmsnorm"
    norm_variant_output: str = "rmsnorm"
    norm_eps: float | int = 1e-5
    use_pre_ln: bool = True
    use_peri_ln: bool = False
    use_post_ln: bool = False
    use_parallel_mlp: bool = False
    prmsnorm_pct: float | int = 0.0625
    hsnorm_radius: float | int | None = None
    hsnorm_gain: bool = False
    dact_alpha_init: float | int = 1.0
    dact_use_gamma: bool = True
    dact_use_beta: bool = True

    use_rotary_embeddings: bool = True
    rope_theta: float | int = 10000.0
    use_fire_embeddings: bool = False
    fire_log_bias: float | int = 1.0
    fire_init_c: float | int = 0.1
    fire_init_L: float | int = 512.0
    fire_mlp_width: int = 32
    use_abs_pos_embeddings: bool = False

    linear_variant_attn: str | list[str] = "linear"
    linear_variant_attn_proj: str | list[str] | None = None
    linear_variant_mlp: str | list[str] = "linear"
    linear_variant_mlp_up: str | list[str] | None = None
    linear_variant_mlp_down: str | list[str] | None = None
    quantize_linear_bits: int = 8

    def __post_init__(self, **kwargs: Any) -> None:
        if "sliding_window" in kwargs:
            raise ValueError(f"sliding_window={kwargs['sliding_window']!r}: say window_size, which it follows from.")
        kwargs.pop("layer_types", None)  # follows from attention_variant; transformers may have written it
        self._warn_of_typos(kwargs)
        super().__post_init__(**kwargs)  # takes n_layer and the like by their other names: nothing before it
        for name in set(self.attribute_map.values()):
            setattr(self, name, getattr(self, name))  # checks the type of what came by another name
        # @strict runs these too, and wraps what they raise in an error of its own that is no ValueError.
        self.validate_numbers()
        self.validate_variants()
        self.validate_architecture()
        self.validate_pairs()

    def _warn_of_typos(self, kwargs: dict[str, Any]) -> None:
        """transformers keeps names it does not know as attributes, where nothing reads them."""
        fields = [*self.__dataclass_fields__, *self.attribute_map]
        for name in kwargs:
            is_position = name[4:-11] in VARIANTS["position"]  # use_..._embeddings of a position that was registered
            if name not in fields and not is_position and (close := get_close_matches(name, fields, n=1, cutoff=0.85)):
                logger.warning(f"NanoGPTConfig has no field {name!r}, and ignores it. Is {close[0]!r} meant?")

    @property
    def layer_types(self) -> list[str]:
        """What each layer caches: transformers' name, read by its caches."""
        return [self._layer_type(layer) for layer in range(self.n_layer)]

    def of_layer(self, field: str, layer_idx: int) -> Any:
        """What a field says of one layer: itself, the element of a list, or that of the field it falls back to."""
        value = getattr(self, field)
        if value == []:
            raise ValueError(f"{field}=[] says nothing of any layer. Pass one value, or a list of at least one.")
        if value is None and field in FALLBACKS:
            return self.of_layer(FALLBACKS[field], layer_idx)
        return value[layer_idx % len(value)] if isinstance(value, list) else value

    @property
    def latent_dim(self) -> int:
        """Numbers of a token's latent in "mla" attention."""
        return self.mla_latent_dim or max(1, self.n_embd // 4)

    @property
    def position_variants(self) -> list[str]:
        """Names of the positions that are switched on."""
        return [name for name in VARIANTS["position"] if getattr(self, f"use_{name}_embeddings", False)]

    @property
    def rotation_variant(self) -> str | None:
        """The position that turns q and k, if one is switched on."""
        turning = [name for name in self.position_variants if variant("position", name).place == "rotation"]
        return turning[0] if turning else None

    @property
    def sliding_window(self) -> int | None:
        """The window of those layers that have one: transformers' name, read by its caches."""
        windows = self.window_size if isinstance(self.window_size, list) else [self.window_size]
        return next((window for window in windows if window is not None), None)

    def _uses_keys(self, layer_idx: int) -> bool:
        attention = VARIANTS["attention"].get(self.of_layer("attention_variant", layer_idx))
        return isinstance(attention, type) and issubclass(attention, TokenMixer) and attention.uses_keys

    def _layer_type(self, layer_idx: int) -> str:
        if not self._uses_keys(layer_idx):
            return RECURRENT
        return "full_attention" if self.of_layer("window_size", layer_idx) is None else "sliding_attention"

    # What follows is called by @strict, one after the other.

    def validate_layer_type(self) -> None:
        """Replaces the check against transformers' own types: ours follow from `attention_variant`."""

    def validate_numbers(self) -> None:
        """Numbers in range."""
        for field in AT_LEAST_ONE:
            value = getattr(self, field)
            for number in value if isinstance(value, list) else [value]:
                if number is not None and number < 1:
                    raise ValueError(f"{field}={value} must be at least 1.")
        for field in POSITIVE:
            value = getattr(self, field)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field}={value} must be positive.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1.")
        if not 0 < self.prmsnorm_pct <= 1:
            raise ValueError(f"prmsnorm_pct={self.prmsnorm_pct} must be above 0 and at most 1.")
        if not 2 <= self.quantize_linear_bits <= 16:
            raise ValueError(f"quantize_linear_bits={self.quantize_linear_bits} must be from 2 to 16.")
        if self.polymax_x_intercept >= 0:
            raise ValueError(f"polymax_x_intercept={self.polymax_x_intercept} must be negative.")
        if self.strongermax_strength <= 1 or (self.strongermax_obo < 0):
            raise ValueError(
                f"strongermax_strength={self.strongermax_strength} must be above 1 and "
                f"strongermax_obo={self.strongermax_obo} at least 0."
            )

    def validate_variants(self) -> None:
        """Names that are registered."""
        for field, kind in NAMED_VARIANTS.items():
            value = getattr(self, field)
            for name in value if isinstance(value, list) else [value]:
                if name is None and field in (*FALLBACKS, "activation_variant"):
                    continue
                try:
                    variant(kind, name)
                except ValueError as error:
                    raise ValueError(f"{field}={value!r}: {error}") from None

    def validate_architecture(self) -> None:
        """Sizes that fit together."""
        if self.initializer_range <= 0:
            raise ValueError(f"initializer_range={self.initializer_range} must be positive.")
        attentions = {self.of_layer("attention_variant", layer) for layer in range(self.n_layer)}
        if self.n_embd % self.n_head and attentions - {"infinite", "ssm", "identity"}:
            raise ValueError(
                f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}, or attention_variant 'infinite'."
            )
        for layer in range(self.n_layer):
            groups = self.of_layer("n_kv_group", layer)
            if groups is not None and self.n_head % groups:
                raise ValueError(f"n_kv_group={self.n_kv_group} must divide n_head={self.n_head}.")
        if self.rotation_variant:
            sizes = {
                "causal": self.n_embd // self.n_head,
                "infinite": self.n_qk_head_dim or self.n_embd // self.n_head,
                "mla": self.mla_rotary_dim,
            }
            for name in attentions & set(sizes):
                if sizes[name] % 2:
                    raise ValueError(
                        f"use_{self.rotation_variant}_embeddings=True turns pairs of numbers, and heads of attention "
                        f"{name!r} have {sizes[name]}. Choose n_embd / n_head, n_qk_head_dim or mla_rotary_dim even."
                    )
        windows = self.window_size if isinstance(self.window_size, list) else [self.window_size]
        if 1 in windows:
            raise ValueError(
                f"window_size={self.window_size}: a query that sees itself alone mixes nothing. Use >= 2."
            )
        if len({window for window in windows if window is not None}) > 1:
            raise ValueError(f"window_size={self.window_size} has several sizes. Mix one size with none at all.")

    def validate_pairs(self) -> None:
        """Choices that do not exclude each other."""
        scored = [layer for layer in range(self.n_layer) if self._uses_keys(layer)]
        needs_scores = {
            "use_fire_embeddings": self.use_fire_embeddings,
            "use_flash_lobo": self.use_flash_lobo,
            "use_qk_norm": self.use_qk_norm,
            "attn_logit_softcapping": self.attn_logit_softcapping is not None,
            "window_size": self.sliding_window is not None,
        }
        for field, is_used in needs_scores.items():
            if is_used and not scored:
                raise ValueError(
                    f"{field}={getattr(self, field)!r} acts on scores of keys, and attention_variant="
                    f"{self.attention_variant!r} has none. Give at least one layer 'causal' or 'infinite' attention."
                )
        for layer in scored if self.use_flash_lobo else []:
            name = self.of_layer("softmax_variant_attn", layer)
            if name != "softmax":
                raise ValueError(
                    f"use_flash_lobo=True adds to the denominator of softmax; softmax_variant_attn={name!r} "
                    "has none, or its own. Choose 'softmax', or 'strongermax' with strongermax_obo."
                )
        turning = [name for name in self.position_variants if variant("position", name).place == "rotation"]
        if len(turning) > 1:
            flags = " and ".join(f"use_{name}_embeddings" for name in turning)
            raise ValueError(f"{flags} both turn q and k. Switch one off.")
        if self.use_qk_norm and "mla" in {self.of_layer("attention_variant", layer) for layer in scored}:
            raise ValueError(
                "use_qk_norm=True norms each head's keys, and attention_variant 'mla' never makes them. Choose one."
            )
        for flag in ("use_flash_lobo_per_head", "use_flash_obo_const"):
            if getattr(self, flag) and not self.use_flash_lobo:
                raise ValueError(f"{flag}=True has no effect alone. Set use_flash_lobo=True too.")
        if self.use_flash_lobo_per_head and self.use_flash_obo_const:
            raise ValueError("use_flash_lobo_per_head=True learns what use_flash_obo_const=True fixes. Choose one.")
        if self.use_qk_norm_scale and not self.use_qk_norm:
            raise ValueError("use_qk_norm_scale=True scales normalised products. Set use_qk_norm=True too.")
        learned = self.strongermax_use_learned_obo or self.strongermax_use_learned_obo_per_head
        if (learned or self.strongermax_obo) and not self.strongermax_div_by_sum_of_terms:
            raise ValueError(
                "strongermax_obo adds to the sum that strongermax_div_by_sum_of_terms=False leaves out. Choose one."
            )
