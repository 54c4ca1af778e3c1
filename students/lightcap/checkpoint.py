"""Checkpoints from elsewhere: the file that a setting names, here or on the hub, and its tensors."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

NAMES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
CLIP_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", *NAMES)


def checkpoint_file(source: str, what: str, key: str, words: Sequence[str] = (), names: Sequence[str] = NAMES) -> Path:
    """A file as it is; of a folder, or of OWNER/NAME on the hub, the first of `names` that is there.

    FileNotFoundError, in one line, says what the setting `key` may be; `words` are those that it knows, `what` says whose weights they are.
    """
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return path
    if path.is_dir():
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"{path}: neither {' nor '.join(names)} there; put one there, or change {key}")
        return found
    close = difflib.get_close_matches(source, words, n=1)
    found, why = None, ""
    if not source.endswith(SUFFIXES) and ("/" in source or (names is NAMES and not close)):  # such as bert-base-uncased
        found, why = of_hub(source, names)
    if found is None:
        hint = f"; did you mean '{close[0]}'?" if close else ""
        known = f" or {', '.join(words)}" if words else ""
        raise FileNotFoundError(f"no weights for {what} at '{source}'{why}; set {key} to a file, a folder, OWNER/NAME of the hub"
                                f"{known}{hint}")
    return found


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Nothing is logged within: open_clip logs a failure that it raises, too."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def of_hub(source: str, names: Sequence[str]) -> tuple[Path | None, str]:
    """The first of `names` that a repository has, from the hub's cache or else fetched; or None, and why not. Where the hub cannot be
    reached, the first that the cache has."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        cached = [path if isinstance(path := try_to_load_from_cache(source, name), str) else None for name in names]
    except Exception as error:  # a name that the hub does not allow
        return None, f", neither here nor on the hub ({type(error).__name__})"
    for name, path in zip(names, cached, strict=True):
        if path is not None:
            return Path(path), ""
        try:
            return Path(hf_hub_download(source, name)), ""
        except RemoteEntryNotFoundError:  # the repository has other files
            continue
        except Exception as error:  # of the net, or of the hub; asked once, since each time can take half a minute
            known = next((path for path in cached if path is not None), None)
            return (Path(known), "") if known else (None, f", neither here nor on the hub ({type(error).__name__})")
    return None, f": the hub's repository has neither {' nor '.join(names)}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file, or from a PyTorch file read with `weights_only=True`. ValueError where it is neither."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(f"{path}: weights must be .safetensors, or a .bin, .pt or .pth of tensors only")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: refused, it holds more than tensors or is damaged ({reason}); convert it to safetensors") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: not a flat state dict of tensors; convert it to safetensors")
    return state
