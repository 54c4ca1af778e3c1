"""A captioner as ONNX graphs and one script: a folder that captions by itself, without torch.

`encoder.onnx`: pixels (B, 3, S, S) -> grid (B, G, C). `concepts.onnx`, where the model reads concepts: grid -> their word pieces (B, K).
`prefix.onnx`: grid -> its keys and values, layer by layer. `decoder.onnx`: those and a token -> logits. The last two share the weights in
`decoder.onnx.data`, so that none is stored twice; one graph for both would take a tenth longer a step, for what a step has no use for.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from compress import graphs, runtime
from compress.artifact import Artifact
from compress.config import Export
from compress.context import Context
from compress.errors import ModelError
from compress.runtime import SETTINGS
from compress.stages.export.decoder import prefix_graph, step_graph, write_decoder
from compress.stages.export.encoder import encoder_graph
from compress.stages.export.extractor import concepts_graph
from compress.training.start import read_captioner

REQUIREMENTS = "numpy>=2\nonnxruntime>=1.22\npillow>=11.3\ntokenizers>=0.21\n"


def export(artifact, out: str | Path) -> None:
    """Writes into the folder `out` (made if absent) the artifact's captioner, in its own precision, with caption.py and requirements.txt.

    `artifact` has a `.path`. ModelError where it cannot be read.
    """
    source, out = Artifact(artifact.path).check(), Path(out)
    if source.foreign:
        raise ModelError(f"{source.path} is a {source.foreign}, and lightcap exports its own captioners alone: distil one from it")
    out.mkdir(parents=True, exist_ok=True)
    if source.graphs:
        copied = [path.name for path in source.files()]
    else:
        model, _, _ = read_captioner(source.path)
        graphs.write(graphs.clean(encoder_graph(model)), out / "encoder.onnx")
        write_decoder(prefix_graph(model), step_graph(model), out)
        if model.config.concepts:
            graphs.write(graphs.clean(concepts_graph(model)), out / "concepts.onnx")
        copied = SETTINGS
    for name in copied:
        shutil.copyfile(source.path / name, out / name)
    write_program(out)


def write_program(out: Path) -> None:
    shutil.copyfile(runtime.__file__, out / "caption.py")
    (out / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")


def run(parent: Artifact, config: Export, context: Context) -> Artifact:
    """The stage `export`: `parent` as a folder that captions by itself, in `context.output`."""
    export(parent, context.output)
    if parent.warning is not None:
        context.progress.log(f"{context.stage.name}: {parent.warning}")
    return Artifact(context.output)
