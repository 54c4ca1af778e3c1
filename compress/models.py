"""What MODEL means: an artifact's folder, a run's folder (that of the last captioner in its ledger), or a name on the hub. An artifact may
be a captioner that others made, in its makers' layout (`teachers.layouts`)."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from compress import ledger
from compress.artifact import GRAPH_PATTERNS, MODEL_FILES, Artifact, pickles, refuse_pickle
from compress.config import CHOICES
from compress.errors import ModelError, beside
from teachers.layouts import ALL, WEIGHTS

PRESETS = CHOICES[("preset",)]
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(model: str | Path) -> Artifact:
    """The artifact that `model` means. ModelError, one line, for anything else, presets too.

    OWNER/NAME is a repository of the hub where there is no folder OWNER here; it is fetched once, into the hub's own cache.
    """
    path = Path(model)
    if os.path.isfile(path):  # unlike Path's, false where its folder may not be read
        refuse_pickle(path)
        raise ModelError(f"{path} is a file; name the folder that holds the model")
    if not os.path.isdir(path):
        if HUB_NAME.fullmatch(str(model)) and not os.path.isdir(path.parent):
            return Artifact(fetched(str(model))).check()
        if str(model) in PRESETS:
            raise ModelError(f"'{model}' is a preset, which has no weights and which `lightcap profile` alone takes; name a run's or an "
                             f"artifact's folder, or OWNER/NAME on the hub{_near(path)}")
        raise ModelError(f"no model '{model}': neither an artifact's folder nor a run's folder{_near(path)}")
    if (path / "config.json").is_file() or Artifact(path).foreign:
        return Artifact(path).check()
    if (path / "ledger.jsonl").is_file():
        rows = [row for row in ledger.read(path / "ledger.jsonl") if row["stage"] not in ("baseline", "concepts")]
        if not rows:
            raise ModelError(f"{path} is a run without a finished captioner; `lightcap run` it first")
        last = Artifact(path / rows[-1]["artifact"])
        if not last.path.is_dir():
            raise ModelError(f"{path}: the artifact of '{rows[-1]['name']}' is gone ({os.path.normpath(last.path)} is not there); run the "
                             "recipe again, or copy runs/.cache beside a run that was moved")
        return last.check()
    raise ModelError(f"{path} is neither an artifact (no config.json) nor a run (no ledger.jsonl){pickles(path)}")


def fetched(name: str) -> Path:
    """The folder that holds the files of an artifact that the hub keeps as `name` (OWNER/NAME). ModelError where it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*MODEL_FILES, *GRAPH_PATTERNS, *ALL]))
        if (kind := Artifact(folder).foreign) and not (folder / WEIGHTS[kind][0]).is_file():
            folder = Path(snapshot_download(name, allow_patterns=[*ALL, WEIGHTS[kind][1]]))
        if (folder / "config.json").is_file() or Artifact(folder).foreign:
            return folder
        why = "the hub's repository of that name holds no captioner (no config.json or open_clip_config.json)"
    except RepositoryNotFoundError:
        why = "the hub has no such public repository"
    except LocalEntryNotFoundError:
        why = "the hub cannot be reached, and not all of it was fetched before"
    except Exception as error:  # of the hub, of the HTTP library below it, or of a name that no repository can have
        why = f"the hub gives: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    raise ModelError(f"no model '{name}': there is no such folder here, and {why}")


def _near(path: Path) -> str:
    around = [child for folder in (path, Path("runs") / "NAME") for child in map(folder.with_name, beside(folder))]
    there = {child.name: child for child in around if os.path.isdir(child) and not child.name.startswith(".")}
    close = difflib.get_close_matches(path.name, there, n=1, cutoff=0.5)
    return f"; did you mean '{there[close[0]]}'?" if close else ""
