"""Fresh adapters of every algorithm of the registry, by name: algorithm and options of `init`, for
weights of 12 outputs and 8 inputs."""

from __future__ import annotations

from typing import Any

Start = tuple[str, dict[str, Any]]
STARTS: dict[str, Start] = {
    "lora": ("lora", {"rank": 2}),
    "dora": ("lora", {"rank": 2, "dora": True}),
    "dora-in": ("lora", {"rank": 2, "dora": "in"}),
    "loha": ("loha", {"rank": 2}),
    "lokr": ("lokr", {"rank": 1}),
    "full": ("full", {}),
    "set": ("set", {}),
    "oft": ("oft", {"rank": 2}),
    "oft-out": ("oft", {"block_size": 4, "acts_on": "out"}),
    "boft": ("boft", {"rank": 2}),
    "boft-out": ("boft", {"block_size": 4, "form": "lycoris"}),
    "hra": ("hra", {"rank": 2}),
    "ia3": ("ia3", {}),
    "ia3-in": ("ia3", {"acts_on": "in"}),
    "glora": ("glora", {"rank": 2}),
    "road": ("road", {"group": 4}),
    "road-4": ("road", {"group": 2, "variant": 4}),
    "delora": ("delora", {"rank": 2}),
    "hira": ("hira", {"rank": 2}),
    "tokens": ("tokens", {"indices": (1, 6, 3)}),
    "adalora": ("adalora", {"rank": 2}),
    "vera": ("vera", {"rank": 2}),
    "fourierft": ("fourierft", {"frequencies": 5}),
    "c3a": ("c3a", {"block_size": 4}),
    "miss": ("miss", {"rank": 4}),
    "bat": ("bat", {"rank": 4}),
    "shira": ("shira", {"rank": 2}),
}
