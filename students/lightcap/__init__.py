"""The LightCap captioner: `LightCap.from_pretrained(folder)`, `LightCap(preset("lightcap"))`."""

from students.lightcap.config import PRESETS, LightCapConfig, preset
from students.lightcap.model import LightCap

__all__ = ["PRESETS", "LightCap", "LightCapConfig", "preset"]
