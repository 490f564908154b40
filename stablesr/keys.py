"""The key table: what the released checkpoints call each tensor, and what we do. Strict, and read in both directions.

Released names follow the classes that were trained; ours follow the paper. Some of their tensors lie stacked in one of
ours (queries, keys and values; gamma and beta), 1x1 convolutions that serve attention are linear layers here, and the
time-aware encoder's attention has its rows grouped by head, ours by query, key and value.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stablesr.config import AutoencoderConfig, StableSRConfig


@dataclass(frozen=True)
class Rule:
    """One of our tensors, and the released tensors it is made of."""

    ours: str
    theirs: tuple[str, ...]
    """Stacked along the first dimension, in this order; all of one shape."""
    trailing: int = 0
    """Dimensions of size 1 at the end of theirs: 2 for a 1x1 convolution, 1 for one over a sequence."""
    heads: int = 0
    """If not 0: their rows come as (head, part, channel), ours as (part, head, channel); parts are q, k and v."""

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        tensors = [tensor.flatten(start_dim=-1 - self.trailing) if self.trailing else tensor for tensor in theirs]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if self.heads:
            tensor = tensor.unflatten(0, (self.heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        return tensor

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        if self.heads:
            ours = ours.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        ours = ours.reshape(*ours.shape, *[1] * self.trailing)
        return [ours] if len(self.theirs) == 1 else list(ours.chunk(len(self.theirs)))


def stablesr_rules(config: StableSRConfig) -> list[Rule]:
    """Of a StableSR checkpoint: UNet, time-aware encoder, first stage and text tower."""
    return [
        *_unet(config),
        *_time_encoder(config),
        *first_stage_rules(config),
        *_text(config),
    ]


def first_stage_rules(config: StableSRConfig) -> list[Rule]:
    """Of the autoencoder within a Stable Diffusion 2.1 or StableSR checkpoint."""
    return list(_autoencoder("autoencoder", "first_stage_model.", config.autoencoder))


def cfw_rules(config: StableSRConfig) -> list[Rule]:
    """Of a CFW checkpoint: an autoencoder and its fusion layers."""
    rules = list(_autoencoder("cfw", "", config.autoencoder))
    for level in config.cfw.levels:
        ours, theirs = f"cfw.fusions.{level}", f"decoder.fusion_layer_{level}"
        wide, narrow = f"{theirs}.encode_enc_1", f"{theirs}.encode_enc_3"
        rules += _autoencoder_block(f"{ours}.block_in", wide, skip="conv_out")
        rules += _autoencoder_block(f"{ours}.block_out", narrow, skip=None)
        for block in range(config.cfw.dense_blocks):
            for dense in range(3):
                for conv in range(5):
                    rules += _layer(
                        f"{ours}.dense.{block}.dense.{dense}.convs.{conv}",
                        f"{theirs}.encode_enc_2.{block}.rdb{dense + 1}.conv{conv + 1}",
                    )
    return rules


SCHEDULE_BUFFERS = frozenset(
    ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
     "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
     "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "logvar", "scale_factor"]
)  # fmt: skip


def is_dispensable(key: str, config: StableSRConfig) -> bool:
    """Whether a released tensor is known and not needed: schedules, averaged copies, training losses, unused text."""
    text = "cond_stage_model.model."
    return (
        key in SCHEDULE_BUFFERS
        or key.startswith(("model_ema.", "loss."))
        or key in (text + "attn_mask", text + "text_projection", text + "logit_scale")
        or key.startswith(f"{text}transformer.resblocks.{config.text.layers - 1}.")
    )


def _layer(ours: str, *theirs: str, bias: bool = True, trailing: int = 0, heads: int = 0) -> Iterator[Rule]:
    yield Rule(f"{ours}.weight", tuple(f"{t}.weight" for t in theirs), trailing, heads)
    if bias:
        yield Rule(f"{ours}.bias", tuple(f"{t}.bias" for t in theirs), 0, heads)


def _diffusion_block(ours: str, theirs: str, *, skip: bool, spade: bool) -> Iterator[Rule]:
    yield from _layer(f"{ours}.norm1", f"{theirs}.in_layers.0")
    yield from _layer(f"{ours}.conv1", f"{theirs}.in_layers.2")
    yield from _layer(f"{ours}.time", f"{theirs}.emb_layers.1")
    yield from _layer(f"{ours}.norm2", f"{theirs}.out_layers.0")
    yield from _layer(f"{ours}.conv2", f"{theirs}.out_layers.3")
    if skip:
        yield from _layer(f"{ours}.skip", f"{theirs}.skip_connection")
    if spade:
        yield from _layer(f"{ours}.spade.norm", f"{theirs}.spade.param_free_norm")
        yield from _layer(f"{ours}.spade.shared", f"{theirs}.spade.mlp_shared.0")
        yield from _layer(f"{ours}.spade.gamma_beta", f"{theirs}.spade.mlp_gamma", f"{theirs}.spade.mlp_beta")


def _transformer(ours: str, theirs: str, depth: int) -> Iterator[Rule]:
    yield from _layer(f"{ours}.norm", f"{theirs}.norm")
    yield from _layer(f"{ours}.proj_in", f"{theirs}.proj_in")
    yield from _layer(f"{ours}.proj_out", f"{theirs}.proj_out")
    for i in range(depth):
        o, t = f"{ours}.blocks.{i}", f"{theirs}.transformer_blocks.{i}"
        for norm in ("norm1", "norm2", "norm3"):
            yield from _layer(f"{o}.{norm}", f"{t}.{norm}")
        yield from _layer(f"{o}.self_attention.qkv", *(f"{t}.attn1.to_{x}" for x in "qkv"), bias=False)
        yield from _layer(f"{o}.self_attention.out", f"{t}.attn1.to_out.0")
        yield from _layer(f"{o}.cross_attention.q", f"{t}.attn2.to_q", bias=False)
        yield from _layer(f"{o}.cross_attention.kv", *(f"{t}.attn2.to_{x}" for x in "kv"), bias=False)
        yield from _layer(f"{o}.cross_attention.out", f"{t}.attn2.to_out.0")
        yield from _layer(f"{o}.feed_forward.inner", f"{t}.ff.net.0.proj")
        yield from _layer(f"{o}.feed_forward.out", f"{t}.ff.net.2")


def _time_mlp(ours: str, theirs: str) -> Iterator[Rule]:
    yield from _layer(f"{ours}.time_mlp.0", f"{theirs}.time_embed.0")
    yield from _layer(f"{ours}.time_mlp.2", f"{theirs}.time_embed.2")


def _unet(config: StableSRConfig) -> Iterator[Rule]:
    unet, root = config.unet, "model.diffusion_model"
    yield from _time_mlp("unet", root)
    yield from _layer("unet.conv_in", f"{root}.input_blocks.0.0")
    deepest = len(unet.widths) - 1
    channels, skips = unet.width, [unet.width]
    number = 1  # their blocks are numbered through, the halvings among them
    for depth, width in enumerate(unet.widths):
        for i in range(unet.blocks_per_level):
            theirs = f"{root}.input_blocks.{number}"
            yield from _diffusion_block(
                f"unet.down.{depth}.blocks.{i}", f"{theirs}.0", skip=channels != width, spade=True
            )
            if 2**depth in unet.attention_factors:
                yield from _transformer(f"unet.down.{depth}.transformers.{i}", f"{theirs}.1", unet.transformer_depth)
            channels, number = width, number + 1
            skips.append(channels)
        if depth < deepest:
            yield from _layer(f"unet.down.{depth}.resize.conv", f"{root}.input_blocks.{number}.0.op")
            number += 1
            skips.append(channels)
    middle = f"{root}.middle_block"
    yield from _diffusion_block("unet.middle_block1", f"{middle}.0", skip=False, spade=True)
    yield from _transformer("unet.middle_transformer", f"{middle}.1", unet.transformer_depth)
    yield from _diffusion_block("unet.middle_block2", f"{middle}.2", skip=False, spade=True)
    number = 0
    for up, (depth, width) in enumerate(reversed(list(enumerate(unet.widths)))):
        attends = 2**depth in unet.attention_factors
        for i in range(unet.blocks_per_level + 1):
            theirs = f"{root}.output_blocks.{number}"
            yield from _diffusion_block(
                f"unet.up.{up}.blocks.{i}", f"{theirs}.0", skip=channels + skips.pop() != width, spade=True
            )
            if attends:
                yield from _transformer(f"unet.up.{up}.transformers.{i}", f"{theirs}.1", unet.transformer_depth)
            channels, number = width, number + 1
        if depth > 0:
            yield from _layer(f"unet.up.{up}.resize.conv", f"{root}.output_blocks.{number - 1}.{1 + attends}.conv")
    yield from _layer("unet.norm_out", f"{root}.out.0")
    yield from _layer("unet.conv_out", f"{root}.out.2")


def _time_encoder(config: StableSRConfig) -> Iterator[Rule]:
    encoder, root = config.time_encoder, "structcond_stage_model"

    def attention(ours: str, theirs: str) -> Iterator[Rule]:
        yield from _layer(f"{ours}.norm", f"{theirs}.norm")
        yield from _layer(f"{ours}.qkv", f"{theirs}.qkv", trailing=1, heads=encoder.heads)
        yield from _layer(f"{ours}.out", f"{theirs}.proj_out", trailing=1)

    yield from _time_mlp("time_encoder", root)
    yield from _layer("time_encoder.conv_in", f"{root}.input_blocks.0.0")
    channels, number = encoder.width, 1
    for depth, width in enumerate(encoder.widths):
        for i in range(encoder.blocks_per_level):
            theirs = f"{root}.input_blocks.{number}"
            ours = f"time_encoder.levels.{depth}"
            yield from _diffusion_block(f"{ours}.blocks.{i}", f"{theirs}.0", skip=channels != width, spade=False)
            if 2**depth in encoder.attention_factors:
                yield from attention(f"{ours}.attentions.{i}", f"{theirs}.1")
            channels, number = width, number + 1
        if depth < len(encoder.widths) - 1:
            yield from _layer(f"time_encoder.levels.{depth}.down.conv", f"{root}.input_blocks.{number}.0.op")
            number += 1
    yield from _diffusion_block("time_encoder.middle_block1", f"{root}.middle_block.0", skip=False, spade=False)
    yield from attention("time_encoder.middle_attention", f"{root}.middle_block.1")
    yield from _diffusion_block("time_encoder.middle_block2", f"{root}.middle_block.2", skip=False, spade=False)
    for i, width in enumerate(encoder.widths):
        skip = width != encoder.condition_channels
        yield from _diffusion_block(f"time_encoder.heads.{i}", f"{root}.fea_tran.{i}", skip=skip, spade=False)


def _autoencoder_block(ours: str, theirs: str, *, skip: str | None) -> Iterator[Rule]:
    for layer in ("norm1", "conv1", "norm2", "conv2"):
        yield from _layer(f"{ours}.{layer}", f"{theirs}.{layer}")
    if skip is not None:
        yield from _layer(f"{ours}.skip", f"{theirs}.{skip}")


def _autoencoder(ours: str, root: str, config: AutoencoderConfig) -> Iterator[Rule]:
    deepest = len(config.widths) - 1
    for side, levels, resize, n_blocks in (
        ("encoder", "down", "downsample", config.blocks_per_level),
        ("decoder", "up", "upsample", config.blocks_per_level + 1),
    ):
        o, t = f"{ours}.{side}", f"{root}{side}"
        for layer in ("conv_in", "norm_out", "conv_out"):
            yield from _layer(f"{o}.{layer}", f"{t}.{layer}")
        yield from _autoencoder_block(f"{o}.middle.block1", f"{t}.mid.block_1", skip=None)
        yield from _autoencoder_block(f"{o}.middle.block2", f"{t}.mid.block_2", skip=None)
        attention = f"{t}.mid.attn_1"
        yield from _layer(f"{o}.middle.attention.norm", f"{attention}.norm")
        yield from _layer(f"{o}.middle.attention.qkv", *(f"{attention}.{x}" for x in "qkv"), trailing=2)
        yield from _layer(f"{o}.middle.attention.out", f"{attention}.proj_out", trailing=2)
        downwards = list(enumerate(config.widths))
        channels = config.width if side == "encoder" else config.widths[-1]
        for depth, width in downwards if side == "encoder" else reversed(downwards):
            for i in range(n_blocks):
                skip = "nin_shortcut" if channels != width else None
                block = f"{levels}.{depth}.block.{i}"
                yield from _autoencoder_block(f"{o}.levels.{depth}.blocks.{i}", f"{t}.{block}", skip=skip)
                channels = width
            if depth != (deepest if side == "encoder" else 0):
                conv = f"{levels}.{depth}.{resize}.conv"
                yield from _layer(f"{o}.levels.{depth}.{levels}.conv", f"{t}.{conv}")
    yield from _layer(f"{ours}.quant", f"{root}quant_conv")
    yield from _layer(f"{ours}.post_quant", f"{root}post_quant_conv")


def _text(config: StableSRConfig) -> Iterator[Rule]:
    root = "cond_stage_model.model"
    yield from _layer("text.token_embedding", f"{root}.token_embedding", bias=False)
    yield Rule("text.positional_embedding", (f"{root}.positional_embedding",))
    for i in range(config.text.layers - 1):  # the last block's output is not used
        ours, theirs = f"text.blocks.{i}", f"{root}.transformer.resblocks.{i}"
        yield from _layer(f"{ours}.norm1", f"{theirs}.ln_1")
        yield Rule(f"{ours}.attention.qkv.weight", (f"{theirs}.attn.in_proj_weight",))
        yield Rule(f"{ours}.attention.qkv.bias", (f"{theirs}.attn.in_proj_bias",))
        yield from _layer(f"{ours}.attention.out", f"{theirs}.attn.out_proj")
        yield from _layer(f"{ours}.norm2", f"{theirs}.ln_2")
        yield from _layer(f"{ours}.mlp.0", f"{theirs}.mlp.c_fc")
        yield from _layer(f"{ours}.mlp.2", f"{theirs}.mlp.c_proj")
    yield from _layer("text.norm_out", f"{root}.ln_final")
