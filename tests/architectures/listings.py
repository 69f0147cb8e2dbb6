"""The key listings of fixtures/keys, cut into components."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from peftsurgery import architectures
from peftsurgery.architectures import Component

KEYS = Path(__file__).parents[2] / "fixtures" / "keys"


@cache
def shapes(listing: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of one listing."""
    keys = json.loads((KEYS / f"{listing}.json").read_text(encoding="utf-8"))["keys"]
    return {k: tuple(v[0] if v and isinstance(v[0], list) else v) for k, v in keys.items()}


@dataclass(frozen=True)
class Case:
    """One component of a listing: these keys, prefix removed, in this vocabulary."""

    listing: str
    prefix: str
    architecture: str
    component: str
    column: str
    home_listing: str  # the same model in home names
    ignored: str = "(?!)"  # keys (prefix removed) that no table names: buffers

    def __str__(self) -> str:
        return f"{self.listing}:{self.prefix}{self.component}-{self.column}"

    @property
    def table(self) -> Component:
        return architectures.get(self.architecture).components[self.component]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        own = {
            key.removeprefix(self.prefix): shape
            for key, shape in shapes(self.listing).items()
            if key.startswith(self.prefix)
        }
        return {k: v for k, v in own.items() if not re.fullmatch(self.ignored, k)}

    def home_shapes(self) -> dict[str, tuple[int, ...]]:
        """Home tensor name -> shape; the names transformers 5 shortens are brought home."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes(self.home_listing).items():
            site = self.table.tensor(self.table.home, name)
            assert site is not None, name
            found[site.parts[0]] = shape
        return found


IDS = r"text_model\.embeddings\.position_ids"
SD1_UNET = ("sd1", "unet")
XL_UNET = ("sdxl", "unet")
FLUX = ("flux", "transformer")
CLIP_L = "base__transformers_clip_l"
CLIP_G = "base__transformers_clip_g"
T5 = "base__transformers_t5_xxl_encoder"
U15, UXL, F1 = "base__diffusers_sd15_unet", "base__diffusers_sdxl_unet", "base__diffusers_flux1"

CASES = (
    Case(U15, "", *SD1_UNET, "diffusers", U15),
    Case("base__sdmecha_sd1-kohya", "unet.", *SD1_UNET, "diffusers", U15),
    Case("base__sdmecha_sd1-kohya", "te.", "sd1", "text_encoder", "hf", CLIP_L),
    Case("base__sdmecha_sd1-ldm", "model.diffusion_model.", *SD1_UNET, "ldm", U15),
    Case(
        "base__sdmecha_sd1-ldm",
        "cond_stage_model.transformer.",
        *("sd1", "text_encoder", "hf", CLIP_L, IDS),
    ),
    Case(
        *("base__diffusers_sd21_unet", "", "sd2", "unet", "diffusers"),
        "base__diffusers_sd21_unet",
    ),
    Case("base__transformers_clip_h", "", "sd2", "text_encoder", "hf", "base__transformers_clip_h"),
    Case(UXL, "", *XL_UNET, "diffusers", UXL),
    Case("base__sdmecha_sdxl-diffusers_unet_only", "", *XL_UNET, "diffusers", UXL),
    Case("base__sdmecha_sdxl-kohya_but_diffusers", "unet.", *XL_UNET, "diffusers", UXL),
    Case("base__sdmecha_sdxl-kohya", "unet.", *XL_UNET, "ldm", UXL),
    Case("base__sdmecha_sdxl-sgm", "model.diffusion_model.", *XL_UNET, "ldm", UXL),
    *(
        Case(f"base__sdmecha_sdxl-{which}", prefix, "sdxl", component, "hf", home, IDS)
        for which in ("kohya", "kohya_but_diffusers")
        for prefix, component, home in (
            ("te1.", "text_encoder", CLIP_L),
            ("te2.", "text_encoder_2", CLIP_G),
        )
    ),
    Case(
        "base__sdmecha_sdxl-sgm",
        "conditioner.embedders.0.transformer.",
        *("sdxl", "text_encoder", "hf", CLIP_L, IDS),
    ),
    Case(
        "base__sdmecha_sdxl-sgm",
        "conditioner.embedders.1.model.",
        *("sdxl", "text_encoder_2", "openclip", CLIP_G, "logit_scale"),
    ),
    Case(F1, "", *FLUX, "diffusers", F1),
    Case("base__sdmecha_flux-flux", "model.diffusion_model.", *FLUX, "bfl", F1),
    Case(
        "base__sdmecha_flux-flux",
        "text_encoders.clip_l.transformer.",
        *("flux", "text_encoder", "hf", CLIP_L),
    ),
    Case(
        "base__sdmecha_flux-flux",
        "text_encoders.t5xxl.transformer.",
        *("flux", "text_encoder_2", "hf", T5),
    ),
    *(
        Case(listing, "", architecture, "controlnet", "diffusers", listing)
        for architecture, listing in (
            ("sd1", "base__diffusers_sd15_controlnet"),
            ("sdxl", "base__diffusers_sdxl_controlnet"),
        )
    ),
)

# What a whole-model listing holds beside the components above.
OTHER_KEYS = (
    r"(first_stage_model|vae)\..*"  # VAE
    r"|alphas_cumprod.*|betas|(log_one_minus|sqrt_)\w*|posterior_\w+"  # noise schedule
    r"|model_ema\..*"  # moving averages of the UNet
    r"|v_pred|ztsnr|edm_vpred\..*"  # markers of the prediction type
)
