"""LoRA adapters on disk: saved with the digest of their base, or two joined into one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from speed_core.files import UserError, write_json
from speed_core.models.loading import resolve, weights_id


def save_adapter(model: Any, folder: Path, base: str, state: Any = None) -> None:
    """Write the adapter and, beside it, the digest of the weights that it belongs to.

    PEFT writes the folder of the base into two files, and the adapted layers in an order that differs from process to
    process: with either, equal adapters would differ in digest. `state`: the weights of a model that is split over processes.
    """
    model.save_pretrained(str(folder), state_dict=state)
    weights = weights_id(resolve(base))
    name = f"merged weights {weights}" if os.path.isabs(base) else base
    write_json(folder / "base.json", {"name": name, "weights": weights})
    for path in (folder / "adapter_config.json", folder / "README.md"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(resolve(base), name), encoding="utf-8")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
    write_json(folder / "adapter_config.json", config)


def joined_adapter(first: Path, second: Path, output: Path) -> Path:
    """One LoRA adapter that does what `first`, and `second` trained on top of it, do together; exact, rank r1 + r2.

    W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1, s2 B2] [A1; A2]. So a server that knows the base alone can serve the senior,
    whose adapter belongs to base and junior. Writes a PEFT folder and returns it.
    """
    import torch
    from safetensors.torch import load_file, save_file

    configs = [json.loads((f / "adapter_config.json").read_text(encoding="utf-8")) for f in (first, second)]
    weights = [load_file(f / "adapter_model.safetensors") for f in (first, second)]
    if set(weights[0]) != set(weights[1]):
        raise UserError(
            f"adapters {first.name} and {second.name}: they change different layers; train both with the same lora.targets"
        )
    scales = [c["lora_alpha"] / c["r"] for c in configs]
    out = {}
    for name, one in weights[0].items():
        other = weights[1][name]
        if ".lora_A." in name:
            out[name] = torch.cat([one, other]).contiguous()
        elif ".lora_B." in name:
            out[name] = torch.cat([scales[0] * one, scales[1] * other], dim=1).contiguous()
        else:
            raise UserError(f"adapter {first.name}: {name} is no LoRA weight; only plain LoRA adapters can be joined")
    rank = configs[0]["r"] + configs[1]["r"]
    output.mkdir(parents=True, exist_ok=True)
    save_file(out, output / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(output / "adapter_config.json", configs[0] | {"r": rank, "lora_alpha": rank})
    return output
