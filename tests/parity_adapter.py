"""An adapter between recorded cases of the reference implementation and this one.

`Adapter(config, weights)` takes the tables that accompany the recordings (`tiny_config.json` and released keys with
arrays); `run(op, params, inputs)` answers a case. What the reference does around its networks with pixels, padding and
chunks, faults included, is replayed here, around our functions, so that whole pictures can be compared.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablesr.aggregation import Prediction, TileGrid, blend, gaussian_window, tile_starts
from stablesr.autoencoder import posterior_from_moments
from stablesr.blocks import ResidualBlock, SpatialAttention, Transformer, time_embedding
from stablesr.checkpoint import translate
from stablesr.color import adain_correction, channel_statistics, low_frequencies, wavelet_correction
from stablesr.config import (
    AutoencoderConfig,
    CFWConfig,
    DiffusionConfig,
    Parameterization,
    StableSRConfig,
    TextConfig,
    TimeEncoderConfig,
    UNetConfig,
)
from stablesr.keys import cfw_rules, is_dispensable, stablesr_rules
from stablesr.model import Prompt, StableSR
from stablesr.samplers import Step, ddim_table, ddpm_steps, published_ddim_steps, take_step
from stablesr.schedule import add_noise, full_schedule, predicted_x0, space_timesteps, velocity
from stablesr.text import TextTower
from stablesr.tokenizer import tokenize

Arrays = dict[str, Any]


def config_of(tiny: dict[str, Any]) -> StableSRConfig:
    """Our sizes for a `tiny_config.json`."""
    unet, struct, ae, text, diffusion = (
        tiny[k] for k in ("unet", "struct_encoder", "autoencoder", "text", "diffusion")
    )
    sizes = StableSRConfig(
        name=tiny["name"],
        unet=UNetConfig(
            latent_channels=unet["in_channels"],
            width=unet["model_channels"],
            multipliers=tuple(unet["channel_mult"]),
            blocks_per_level=unet["num_res_blocks"],
            attention_factors=tuple(unet["attention_resolutions"]),
            transformer_depth=unet["transformer_depth"],
            head_channels=unet["num_head_channels"],
            context_channels=unet["context_dim"],
            condition_channels=unet["semb_channels"],
        ),
        time_encoder=TimeEncoderConfig(
            latent_channels=struct["in_channels"],
            width=struct["model_channels"],
            multipliers=tuple(struct["channel_mult"]),
            blocks_per_level=struct["num_res_blocks"],
            attention_factors=tuple(struct["attention_resolutions"]),
            heads=struct["num_heads"],
            condition_channels=struct["out_channels"],
        ),
        autoencoder=AutoencoderConfig(
            image_channels=ae["in_channels"],
            latent_channels=ae["z_channels"],
            width=ae["ch"],
            multipliers=tuple(ae["ch_mult"]),
            blocks_per_level=ae["num_res_blocks"],
        ),
        cfw=CFWConfig(
            levels=tuple(tiny["cfw"]["fusion_levels"]),
            dense_blocks=tiny["cfw"]["num_fuse_block"],
            growth=tiny["cfw"]["num_grow_ch"],
        ),
        text=TextConfig(
            width=text["width"],
            heads=text["heads"],
            layers=text["layers"],
            context_length=text["context_length"],
            vocabulary=text["vocab_size"],
        ),
        diffusion=DiffusionConfig(
            timesteps=diffusion["timesteps"],
            beta_start=diffusion["linear_start"],
            beta_end=diffusion["linear_end"],
            latent_scale=diffusion["scale_factor"],
        ),
    )
    return sizes


class Adapter:
    def __init__(self, config: dict[str, Any], weights: dict[str, dict[str, np.ndarray]]) -> None:
        self.config = config_of(config)
        self.model = StableSR(self.config).eval().requires_grad_(False)
        self.tower = TextTower(self.config.text).eval().requires_grad_(False)
        wanted = {k: tuple(v.shape) for k, v in self.model.state_dict().items()}
        wanted |= {f"text.{k}": tuple(v.shape) for k, v in self.tower.state_dict().items()}
        self.rules = {"stablesr": stablesr_rules(self.config), "cfw": cfw_rules(self.config)}
        ours: dict[str, Tensor] = {}
        for name, rules in self.rules.items():
            state = {key: torch.from_numpy(np.asarray(value)) for key, value in weights[name].items()}
            lazy = translate(state, rules, wanted, lambda key: is_dispensable(key, self.config), name)
            ours |= {key: tensor.make() for key, tensor in lazy.items()}
        self.tower.load_state_dict({k.removeprefix("text."): v for k, v in ours.items() if k.startswith("text.")})
        model_state = {k: v for k, v in ours.items() if not k.startswith("text.")}
        self.model.load_state_dict(model_state | {"null_context": self.tower(tokenize([""]))})
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # PyTorch's stubs lack it

    @torch.inference_mode()
    def run(self, op: str, params: dict[str, Any], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
        answer = getattr(self, f"op_{op}")(params, **given)
        return {name: np.asarray(value) for name, value in answer.items()}

    # Schedules

    def op_timestep_embedding(self, params: Arrays, t: Tensor) -> Arrays:
        return {"emb": time_embedding(t, params["dim"])}

    def op_space_timesteps(self, params: Arrays) -> Arrays:
        return {"timesteps": space_timesteps(params["num_timesteps"], params["section_counts"])}

    def op_schedule(self, params: Arrays) -> Arrays:
        full = full_schedule(self.config.diffusion)
        s = full if params["steps"] is None else full.respaced(params["steps"])
        ab = s.alpha_bar
        return {
            "ori_timesteps": s.timesteps,
            "betas": s.betas,
            "alphas_cumprod": ab,
            "alphas_cumprod_prev": s.alpha_bar_prev,
            "sqrt_alphas_cumprod": np.sqrt(ab),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - ab),
            "log_one_minus_alphas_cumprod": np.log(1 - ab),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / ab),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / ab - 1),
            "posterior_variance": s.posterior_variance,
            "posterior_log_variance_clipped": np.log(np.maximum(s.posterior_variance, 1e-20)),
            "posterior_mean_coef1": s.posterior_mean_coef1,
            "posterior_mean_coef2": s.posterior_mean_coef2,
        }

    def op_sampling_plan(self, params: Arrays) -> Arrays:
        steps = ddpm_steps(self.model.schedule.respaced(params["steps"]))
        told = [step.timestep for step in steps]
        return {"schedule_index": np.arange(len(steps))[::-1], "t_unet": told, "t_struct": told}

    def op_ddim_schedule(self, params: Arrays) -> Arrays:
        full, steps, eta = self.model.schedule, params["steps"], params["eta"]
        uniform = full.at(np.arange(0, len(full), len(full) // steps))
        previous = np.concatenate([uniform.alpha_bar[:1], uniform.alpha_bar[:-1]])
        table = ddim_table(uniform.timesteps, uniform.alpha_bar, previous, eta)[::-1]
        return {
            "uniform_timesteps": [step.timestep for step in table],
            "alphas": [step.alpha_bar for step in table],
            "alphas_prev": [step.alpha_bar_prev for step in table],
            "sigmas": [step.sigma for step in table],
            "sqrt_one_minus_alphas": [(1 - step.alpha_bar) ** 0.5 for step in table],
            "space_timesteps": full.respaced(steps).timesteps,
        }

    def op_q_sample(self, params: Arrays, x0: Tensor, noise_in: Tensor, t: Tensor) -> Arrays:
        return {"x_t": add_noise(x0, noise_in, self._alpha_bar(t))}

    def op_train_loss(
        self, params: Arrays, x_start: Tensor, latent: Tensor, context: Tensor, t: Tensor, noise_in: Tensor
    ) -> Arrays:
        x_t = add_noise(x_start, noise_in, self._alpha_bar(t))
        v = velocity(x_start, noise_in, self._alpha_bar(t))
        target = v if params["parameterization"] == "v" else noise_in
        prediction = self.model.predict(x_t, latent, self.model.embed_time(t), self.model.prepare_prompt(context))
        return {"loss": ((prediction - target) ** 2).mean()[None], "x_t": x_t, "v_target": v}

    def _alpha_bar(self, t: Tensor) -> Tensor:
        return torch.from_numpy(self.model.schedule.alpha_bar)[t][:, None, None, None]

    # Networks

    def op_struct_encoder(self, params: Arrays, latent: Tensor, t: Tensor) -> Arrays:
        encoder = self.model.time_encoder
        return {f"feat_{c.shape[-1]}": c for c in encoder(latent, encoder.embed_time(t))}

    def op_unet(self, params: Arrays, x: Tensor, t: Tensor, context: Tensor, **features: Tensor) -> Arrays:
        unet = self.model.unet
        conditions = sorted(features.values(), key=lambda f: -f.shape[-1])
        return {"out": unet(x, unet.embed_time(t), conditions, unet.embed_prompt(context))}

    def op_unet_struct(self, params: Arrays, x: Tensor, t: Tensor, context: Tensor, latent: Tensor) -> Arrays:
        return {"out": self.model.predict(x, latent, self.model.embed_time(t), self.model.prepare_prompt(context))}

    def op_unet_trace(self, params: Arrays, **inputs: Tensor) -> Arrays:
        """Intermediate outputs, by the released name of the module they come out of."""
        seen: Arrays = {}
        hooks = []
        for theirs, ours in self._traced().items():
            name = theirs.replace("model.diffusion_model", "unet").replace("structcond_stage_model", "struct")
            hooks.append(self.model.get_submodule(ours).register_forward_hook(_recorder(seen, name)))
        try:
            seen["out"] = self.op_unet_struct(params, **inputs)["out"]
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    def _traced(self) -> dict[str, str]:
        """Our module whose output is that of theirs, by their name; theirs are often lists of several modules."""
        table: dict[str, str] = {}
        for rule in self.rules["stablesr"]:
            if not rule.ours.startswith(("unet.", "time_encoder.")):
                continue
            theirs, ours = rule.theirs[0].rpartition(".")[0], rule.ours.rpartition(".")[0]
            layer = self._layer_that_holds(ours)
            for pattern, module in (
                (r".*\.(?:input_blocks|output_blocks)\.\d+(?=\.)", layer),  # the last of the list wins
                (r".*\.middle_block(?=\.)", layer),
                (r".*\.(?:in_layers|out_layers|emb_layers)(?=\.)", ours),
                (r".*\.time_embed(?=\.)", ours.rpartition(".")[0]),
                (r".*\.spade(?=\.)", ours.rpartition(".")[0]),
            ):
                if found := re.match(pattern, theirs):
                    table[found[0]] = module
        return table

    def _layer_that_holds(self, ours: str) -> str:
        parts = ours.split(".")
        for n in range(1, len(parts)):
            path = ".".join(parts[:n])
            if isinstance(self.model.get_submodule(path), ResidualBlock | Transformer | SpatialAttention):
                return path
        return ours

    def op_submodule(self, params: Arrays, x: Tensor, **others: Tensor) -> Arrays:
        module: Any = self._submodule(params["checkpoint"], params["prefix"])
        kind = params["kind"]
        if kind == "spatial_transformer":
            return {"out": module(x, module.keys_values(others["context"]))}
        if kind == "resblock_struct":
            return {"out": module(x, module.time_shift(others["emb"]), others["feat"])}
        if kind == "resblock_time":
            return {"out": module(x, module.time_shift(others["emb"]))}
        if kind == "fusion":
            return {"out": module(x, others["enc"], params["w"])}
        assert kind in ("qkv_attention", "vae_resblock", "vae_attention", "text_block"), kind
        return {"out": module(x)}

    def _submodule(self, checkpoint: str, prefix: str) -> nn.Module:
        """Ours that owns exactly the parameters under a released prefix."""
        ours = [rule.ours for rule in self.rules[checkpoint] if rule.theirs[0].startswith(prefix + ".")]
        common = ours[0].split(".")
        for key in ours[1:]:
            parts = key.split(".")
            common = common[: next((i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b), None)]
        root: nn.Module = self.tower if common[0] == "text" else self.model
        return root.get_submodule(".".join(common[1:] if common[0] == "text" else common))

    def op_posterior(self, params: Arrays, moments: Tensor, noise: Tensor) -> Arrays:
        posterior = posterior_from_moments(moments)
        return {
            "mean": posterior.mean,
            "logvar": posterior.logvar,
            "std": torch.exp(0.5 * posterior.logvar),
            "latent": self._scale * posterior.sample(noise[0]),
        }

    @property
    def _scale(self) -> float:
        return self.config.diffusion.latent_scale

    def op_vae_encode(self, params: Arrays, image: Tensor) -> Arrays:
        return self.model.autoencoder.encode(image)._asdict()

    def op_vae_decode(self, params: Arrays, latent: Tensor) -> Arrays:
        return {"image": self.model.autoencoder.decode(latent / self._scale)}

    def op_cfw_encode(self, params: Arrays, image: Tensor) -> Arrays:
        encoded = self.model.cfw.encode_features(image)
        features = {f"fea_{i}": encoded.features[level] for i, level in enumerate(self.config.cfw.levels)}
        return encoded.posterior._asdict() | features

    def op_cfw_decode(self, params: Arrays, latent: Tensor, **features: Tensor) -> Arrays:
        by_level = {level: features[f"fea_{i}"] for i, level in enumerate(self.config.cfw.levels)}
        return {"image": self.model.cfw.decode_wrapped(latent / self._scale, by_level, params["w"])}

    def op_tokenize(self, params: Arrays) -> Arrays:
        return {"tokens": tokenize(params["texts"])}

    def op_text_encode(self, params: Arrays, tokens: Tensor) -> Arrays:
        return {"context": self.tower(tokens)}

    # Sampling

    def _as(self, parameterization: Parameterization) -> StableSR:
        diffusion = replace(self.config.diffusion, parameterization=parameterization)
        self.model.config = replace(self.config, diffusion=diffusion)
        return self.model

    def _prompt(self, params: Arrays, context: Tensor, negative: Tensor | None) -> Prompt:
        return self.model.prepare_prompt(context, negative, params.get("scale") or 1.0)

    def op_p_sample(
        self, params: Arrays, x: Tensor, latent: Tensor, context: Tensor, noise: Tensor, negative: Tensor | None = None
    ) -> Arrays:
        model = self._as(params["parameterization"])
        step = ddpm_steps(model.schedule.respaced(params["steps"]))[::-1][params["index"]]
        prediction = model.predict(x, latent, model.embed_time(step.timestep), self._prompt(params, context, negative))
        return {
            "x_prev": take_step(x, prediction, noise[0], step, params["parameterization"]),
            "x0": predicted_x0(x, prediction, step.alpha_bar, params["parameterization"]),
        }

    def op_sample(self, params: Arrays, latent: Tensor, context: Tensor, noise: Tensor) -> Arrays:
        """Whole images at once: each is a canvas of one tile."""
        height, width = latent.shape[-2:]
        model = self._as(params["parameterization"])
        steps = ddpm_steps(model.schedule.respaced(params["steps"]))
        whole = TileGrid(height, width, height, width, 0)
        images = []
        for i in range(len(latent)):
            draws = iter(noise[1:, i])
            prompt = self._prompt(params, context[i : i + 1], None)
            images.append(model.sample(noise[0, i], latent[i], whole, steps, prompt, lambda _: next(draws)))  # noqa: B023
        return {"latent_out": torch.stack(images)}

    def op_sample_canvas(
        self,
        params: Arrays,
        x_T: Tensor,
        latent: Tensor,
        context: Tensor,
        noise: Tensor,
        negative: Tensor | None = None,
    ) -> Arrays:
        model = self._as(params["parameterization"])
        steps = ddpm_steps(model.schedule.respaced(params["steps"]))
        return self._canvas(params, x_T, latent, self._prompt(params, context, negative), steps, iter(noise))

    def op_ddim_canvas(
        self, params: Arrays, latent: Tensor, context: Tensor, noise: Tensor, negative: Tensor | None = None
    ) -> Arrays:
        model = self._as(params["parameterization"])
        uniform = params["timesteps"] == "uniform"
        steps = published_ddim_steps(model.schedule, params["steps"], params["eta"], uniform=uniform)
        return self._canvas(params, noise[0], latent, self._prompt(params, context, negative), steps, iter(noise[1:]))

    def _canvas(
        self, params: Arrays, x: Tensor, latent: Tensor, prompt: Prompt, steps: Sequence[Step], draws: Iterator[Tensor]
    ) -> Arrays:
        height, width = latent.shape[-2:]
        grid = TileGrid.square(height, width, params["tile_size"], params["tile_overlap"])
        batch = params.get("tile_batch", 1)
        answer = {}
        done = 0
        for until in [*params.get("save_after", []), len(steps)]:
            part = steps[done:until]
            x = self.model.sample(x[0], latent[0], grid, part, prompt, lambda _: next(draws)[0], batch)[None]
            answer["latent_out" if until == len(steps) else f"after_{until}"] = x
            done = until
        return answer

    # Tiles

    def op_tile_plan(self, params: Arrays) -> Arrays:
        grid = TileGrid.square(params["h"], params["w"], params["tile_size"], params["tile_overlap"])
        return {"yx": [(tile.top, tile.left) for tile in grid]}

    def op_gaussian_weights(self, params: Arrays) -> Arrays:
        return {"weights": gaussian_window(params["tile_height"], params["tile_width"])}

    def op_blend(self, params: Arrays, preds: Tensor) -> Arrays:
        grid = TileGrid.square(params["h"], params["w"], params["tile_size"], params["tile_overlap"])
        values = preds.flatten(0, -4)
        predictions = [Prediction(tile, tile, value) for tile, value in zip(grid, values, strict=True)]
        return {"blended": blend(grid, grid.canvas, predictions)[None]}

    # Colour

    def op_wavelet(self, params: Arrays, content: Tensor, style: Tensor) -> Arrays:
        return {"out": wavelet_correction(content, style)}

    def op_wavelet_decompose(self, params: Arrays, image: Tensor) -> Arrays:
        low = low_frequencies(image)
        return {"high": image - low, "low": low}

    def op_adain(self, params: Arrays, content: Tensor, style: Tensor) -> Arrays:
        return {"out": adain_correction(content, channel_statistics(content), channel_statistics(style))}

    # The reference's way with pixels, faults included: enlarging, padding, chunks, truncation

    def op_preprocess(self, params: Arrays, image_u8: Tensor | None = None) -> Arrays:
        image = torch.zeros(*params["hw"], 3) if image_u8 is None else image_u8
        padded, size, _ = self._enlarged(image, params["input_size"], params["upscale"])
        answer = {"upscaled_hw": size, "padded_hw": padded.shape[-2:]}
        return answer if params.get("shape_only") else answer | {"im_lq": padded}

    def _enlarged(self, image_u8: Tensor, input_size: int, upscale: float) -> tuple[Tensor, tuple[int, int], float]:
        image = (image_u8.permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
        height, width = image.shape[-2:]
        scale = max(input_size / min(height, width), upscale)
        size = int(height * scale), int(width * scale)
        image = F.interpolate(image, size=size, mode="bicubic").clamp(-1, 1)
        if size[0] % 32 or size[1] % 32:
            target = [(side // 32 + 1) * 32 for side in size]
            image = F.pad(image, (0, target[1] - size[1], 0, target[0] - size[0]), mode="reflect")
        return image, size, scale

    def op_postprocess(self, params: Arrays, decoded: Tensor) -> Arrays:
        _, size, scale = self._enlarged(
            torch.zeros(params["h"], params["w"], 3), params["input_size"], params["upscale"]
        )
        return {"out_u8": self._finished(decoded, size, scale, params["upscale"])}

    def _finished(self, decoded: Tensor, size: tuple[int, int], scale: float, upscale: float) -> np.ndarray:
        image = ((decoded + 1) / 2).clamp(0, 1)
        if scale > upscale:
            reduced = [int(side * upscale / scale) for side in decoded.shape[-2:]]
            image = F.interpolate(image, size=reduced, mode="bicubic").clamp(0, 1)
        image = image[0].permute(1, 2, 0) * 255
        if tuple(decoded.shape[-2:]) != size:
            image = image[: size[0], : size[1]]
        return image.numpy().astype(np.uint8)

    def op_chop_plan(self, params: Arrays) -> Arrays:
        tops, lefts, boxes = self._chunks(params["h"], params["w"], params["size"], params["stride"])
        return {"h_starts": tops, "w_starts": lefts, "boxes": boxes}

    def _chunks(self, height: int, width: int, size: int, stride: int) -> tuple[list[int], list[int], list[Any]]:
        def starts(length: int) -> list[int]:
            return [0] if length <= size else tile_starts(length, size, stride)

        tops, lefts = starts(height), starts(width)
        boxes = [(t, t + size, le, le + size) for le in lefts for t in tops]
        return tops, lefts, boxes

    def op_chop_weights(self, params: Arrays) -> Arrays:
        w = gaussian_window(params["size"], params["size"])
        middle = params["size"] // 2
        corners = torch.stack([w[0, 0], w[0, -1], w[-1, 0], w[-1, -1], w[middle, middle]])
        return {
            "row0": w[0], "col0": w[:, 0], "middle_row": w[middle], "middle_col": w[:, middle], "corner_values": corners
        }  # fmt: skip

    def op_chop_blend(self, params: Arrays, image: Tensor, patches: Tensor) -> Arrays:
        return {"out": self._chop_blend(image.shape[-2:], params["size"], params["stride"], [*patches])}

    def _chop_blend(self, sides: Sequence[int], size: int, stride: int, patches: list[Tensor]) -> Tensor:
        height, width = sides
        grid = TileGrid.square(height, width, size, size - stride)
        values = [patch.reshape(-1, *patch.shape[-2:]) for patch in patches]
        return blend(grid, grid.canvas, [Prediction(b, b, v) for b, v in zip(grid, values, strict=True)])[None]

    def op_e2e_ddpm(self, params: Arrays, image_u8: Tensor, noise: Tensor) -> Arrays:
        steps = ddpm_steps(self.model.schedule.respaced(params["steps"]))
        return self._end_to_end(params, image_u8, noise, steps, from_noise=False)

    def op_e2e_ddim(self, params: Arrays, image_u8: Tensor, noise: Tensor) -> Arrays:
        steps = published_ddim_steps(self.model.schedule, params["steps"], params["eta"])
        return self._end_to_end(params, image_u8, noise, steps, from_noise=True)

    def _end_to_end(
        self, params: Arrays, image_u8: Tensor, noise: Tensor, steps: Sequence[Step], *, from_noise: bool
    ) -> Arrays:
        model = self._as(params["parameterization"])
        padded, size, scale = self._enlarged(image_u8, params["input_size"], params["upscale"])
        draws = iter(noise)
        context = self.tower(tokenize([params["prompt"]]))
        has_negative = params["negative_prompt"] is not None
        negative = self.tower(tokenize([params["negative_prompt"]])) if has_negative else None
        prompt = self._prompt(params, context, negative)
        saved: dict[str, list[Tensor]] = {name: [] for name in params["save"]}

        def chunk(image: Tensor) -> Tensor:
            posterior = model.autoencoder.encode(image)
            kept = {"im_lq": image}
            kept["init_latent"] = latent = self._scale * posterior.sample(_crop(next(draws), posterior.mean))
            start = _crop(next(draws), latent)
            kept["x_T"] = x = (
                _crop(next(draws), latent) if from_noise else add_noise(latent, start, model.schedule.alpha_bar[-1])
            )
            height, width = latent.shape[-2:]
            grid = TileGrid.square(height, width, params["input_size"] // 8, params["tile_overlap"])
            fresh = [_crop(next(draws), latent)[0] for _ in steps]
            now = iter(fresh)
            kept["latent_out"] = x = model.sample(
                x[0], latent[0], grid, steps, prompt, lambda _: next(now), params["tile_batch"]
            )[None]
            features = model.cfw.encode_features(image).features
            kept["decoded"] = pixels = model.cfw.decode_wrapped(x / self._scale, features, params["dec_w"])
            if params["colorfix"] == "wavelet":
                pixels = wavelet_correction(pixels, image)
            elif params["colorfix"] == "adain":
                pixels = adain_correction(pixels, channel_statistics(pixels), channel_statistics(image))
            kept["corrected"] = pixels
            for name, values in saved.items():
                values.append(kept[name])
            return pixels

        height, width = padded.shape[-2:]
        if max(height, width) > params["chop_size"]:
            _, _, boxes = self._chunks(height, width, params["chop_size"], params["chop_stride"])
            patches = [chunk(padded[..., t:b, le:r]) for t, b, le, r in boxes]
            pixels = self._chop_blend((height, width), params["chop_size"], params["chop_stride"], patches)
        else:
            pixels = chunk(padded)
        answer = {name: torch.cat(values) for name, values in saved.items()}
        return answer | {"out_u8": self._finished(pixels, size, scale, params["upscale"])}


def _recorder(seen: Arrays, name: str) -> Callable[..., None]:
    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        seen[name] = output

    return record


def _crop(draw: Tensor, like: Tensor) -> Tensor:
    """A recorded draw, which may be stored larger than it was used."""
    return draw.reshape(-1, *draw.shape[-3:])[..., : like.shape[-2], : like.shape[-1]]
