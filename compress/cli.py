"""The `lightcap` command. Each command loads what it needs when it runs, so that `--help` and wrong input answer at once.

Standard output is the command's result, one JSON document under `--json`; progress and errors go to standard error. Exit status: 0; 1 a
failed stage, a missed gate or limit, an unreadable image or a missing package; 2 wrong input; 130 stopped from the keyboard.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import click

from compress import __version__
from compress.answer import answer, command_of, failed, print_drawn, print_json, quietly, say, speaks, unread
from compress.config import CHOICES
from compress.errors import DataError, LightcapError, UsageError, expected, nearest

as_json = click.option("--json", "as_json", is_flag=True, help="Standard output is one JSON document.")
RECIPE = "RECIPE is the name of a shipped recipe, or a YAML file."
ARTIFACT = "a run's folder (its last artifact), an artifact's folder"
OF_ONE = "lightcap: CIDEr of one image is 0 whatever is said: it weighs words by how few of several images have them"
MODEL = f"MODEL is {ARTIFACT}, or OWNER/NAME on the hub."
ANY_MODEL = f"{MODEL.removesuffix('.')}; BLIP, GIT and CoCa, too, in a folder or there."
LAYOUTS = [source for source in CHOICES["data", "source"] if source != "scenes"]
settings = click.option("--set", "sets", multiple=True, metavar="NAME.KEY=VALUE",
                        help="Change one value of a section or stage of the recipe, or seed=N; repeatable.")


def out_option(default: str = "runs/NAME", what: str = "The run's folder"):
    return click.option("--out", type=click.Path(path_type=Path), help=f"{what} (default: {default}); artifacts stay beside it, in .cache.")


class Limit(click.FloatRange):
    """A number, not infinite."""

    def convert(self, value, option, ctx):
        found = super().convert(value, option, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is no limit", option, ctx)
        return found


beam_width = click.option("--beam", type=click.IntRange(min=1), default=5, show_default=True, help="Beam width of decoding.")
java_metrics = click.option("--java", is_flag=True, help="METEOR and SPICE too, which need Java and the extra 'coco'.")


class Commands(click.Group):
    def resolve_command(self, ctx, args):
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            names = self.list_commands(ctx)
            raise click.UsageError(f"no command '{args[0]}'; there are {', '.join(names)}{nearest(args[0], names)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None  # click itself would print an empty line before it

    def list_commands(self, ctx):
        return list(self.commands)  # in the order written here: that of use


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, message="lightcap %(version)s")
def cli() -> None:
    """Train an image captioner, make it small, and see what each step costs in CIDEr. Begin with: lightcap run quickstart"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits with its status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # deprecations inside the libraries say nothing to who runs a recipe
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # where torch logs its own (torchao, which transformers loads)
    status = None
    try:
        status = cli.main(arguments, prog_name="lightcap", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        goes_on = command_of(arguments) in ("run", "sweep", "fit")
        click.echo(f"lightcap: stopped{'; the same command goes on' if goes_on else ''}", err=True)
        failed(arguments, "stopped")
        status = 130
    except click.exceptions.NoArgsIsHelpError as error:  # `lightcap` alone
        error.show()
        status = error.exit_code
    except BrokenPipeError:
        unread()
    except Exception as error:
        status = _report_error(error, arguments)
    sys.exit(status if isinstance(status, int) else 0)


def _report_error(error: Exception, arguments: Sequence[str]) -> int:
    """One line on standard error, and under --json a document that says the same; the exit status."""
    known = expected(error)
    if known is None and isinstance(error, click.ClickException):
        known = UsageError(f"{error.format_message()}{_see_help(error)}")
    if known is None:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        known = LightcapError(f"{text} (LIGHTCAP_TRACE=1 shows where)")
        known.__cause__ = error
    known.show()
    with contextlib.suppress(OSError):  # standard output may be what failed
        failed(arguments, known.message)
    return known.exit_code


def _see_help(error: click.ClickException) -> str:
    ctx = getattr(error, "ctx", None)
    return f" (see {ctx.command_path} --help)" if ctx is not None else ""


@cli.command("recipes")
@as_json
def recipes_command(as_json: bool) -> None:
    """List the shipped recipes. Example: lightcap recipes"""
    from compress import recipe, show

    listed = [{"recipe": name, "description": text} for name, text in recipe.recipes()]
    answer(as_json, listed, lambda: show.recipes(listed))


@cli.command("plan", epilog=RECIPE)
@click.argument("recipe")
@settings
@out_option()
@as_json
def plan_command(recipe: str, sets: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Show what a run would do and what is cached; nothing is run. Example: lightcap plan photos --set pruned.macs=0.5"""
    from compress import pipeline, show
    from compress.recipe import SHIPPED, read_recipe

    wanted = read_recipe(recipe, sets)
    # A shipped recipe's own file of captions only stands for the user's; one that the user names has to be there.
    own = wanted.path.parent == SHIPPED and not any(setting.lstrip().startswith("data.") for setting in sets)
    with quietly():
        planned = pipeline.plan(wanted, out or Path("runs") / wanted.name, imagine=own)
    answer(as_json, planned, lambda: show.plan(planned))


@cli.command("run", epilog=RECIPE)
@click.argument("recipe")
@settings
@out_option()
@as_json
@click.pass_context
def run_command(ctx: click.Context, recipe: str, sets: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Run a recipe, or go on with it after a stop. Example: lightcap run quickstart"""
    from compress import pipeline, show
    from compress.context import Progress
    from compress.parallel import share
    from compress.recipe import read_recipe

    try:
        wanted = read_recipe(recipe, sets)
    except LightcapError as error:
        result = pipeline.Result(out or Path("runs") / Path(recipe).stem, (), error)
    else:
        with quietly():
            mine = share()
            result = pipeline.run(wanted, out or Path("runs") / wanted.name, Progress(), share=mine)
        if mine.rank:  # what is to be said the first process says; but its own failure is its own
            result.check()
            return
    if speaks():
        if as_json:
            print_json(result.json())
        elif result.rows:
            print_drawn(show.table(result.rows, title=str(result.folder)))
        if result.error is not None:
            result.error.show()
    if result.error is not None:
        ctx.exit(result.error.exit_code)


@cli.command("compare")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write an offline HTML report to FILE.")
@as_json
def compare_command(runs: tuple[str, ...], html: Path | None, as_json: bool) -> None:
    """Put runs side by side, with the rows that nothing else beats. Example: lightcap compare runs/a runs/b --html report.html"""
    from compress import comparison, show

    value = comparison.compared(runs)
    if html is not None:
        from compress import report

        report.write(value, html)
        click.echo(f"wrote {html}", err=True)
    answer(as_json, value, lambda: show.compare(value))


@cli.command("sweep", epilog=RECIPE)
@click.argument("recipe")
@click.option("--vary", multiple=True, required=True, metavar="NAME.KEY=A,B,...",
              help="Values to try, each in a run (seed=17,18 too); of several such lists, every combination.")
@settings
@out_option(what="What the runs' folders begin with: each has its settings behind it")
@as_json
@click.pass_context
def sweep_command(
    ctx: click.Context, recipe: str, vary: tuple[str, ...], sets: tuple[str, ...], out: Path | None, as_json: bool
) -> None:
    """Run a recipe with several values, and compare. Example: lightcap sweep photos --vary pruned.macs=0.8,0.65,0.5"""
    from compress import show, sweep
    from compress.context import Progress

    with quietly():
        value = sweep.run(sweep.recipes(recipe, sets, vary, out), Progress())
    answer(as_json, value, lambda: show.compare(value))
    if not value["ok"]:
        ctx.exit(1)


@cli.command("fit", epilog=RECIPE)
@click.argument("recipe")
@click.option("--max-mb", type=Limit(min=0, min_open=True), help="10^6 bytes of the last artifact; this, --max-ms or both.")
@click.option("--max-ms", type=Limit(min=0, min_open=True), help="Milliseconds of 12 word pieces, beam 1, one thread.")
@click.option("--max-drop-cider", type=Limit(min=0), help="CIDEr x100 that may be lost on val (default: any).")
@settings
@out_option("runs/NAME-fit")
@as_json
@click.pass_context
def fit_command(
    ctx: click.Context, recipe: str, max_mb: float | None, max_ms: float | None, max_drop_cider: float | None, sets: tuple[str, ...],
    out: Path | None, as_json: bool,
) -> None:
    """Prune no more MACs than limits of size and time ask for. Example: lightcap fit photos --max-mb 11 --max-ms 16 --max-drop-cider 2"""
    from compress import fit, show
    from compress.context import Progress

    with quietly():
        found = fit.fit(recipe, sets, fit.Limits(max_mb, max_ms, max_drop_cider), out, Progress())
    answer(as_json, found, lambda: show.fit(found))
    if not found["ok"]:
        ctx.exit(1)


@cli.command("caption", epilog=ANY_MODEL)
@click.argument("model")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE|FOLDER...")
@beam_width
@as_json
@click.pass_context
def caption_command(ctx: click.Context, model: str, images: tuple[str, ...], beam: int, as_json: bool) -> None:
    """Caption photos with an artifact, or with the last one of a run. Example: lightcap caption runs/photos holiday.jpg"""
    from compress import captioning, models
    from compress.context import Progress

    chosen = models.resolve(model)
    photos = captioning.photos(images)
    answers, result = [], sys.stdout
    # Without --json the captions themselves are the progress.
    with quietly(), Progress(quiet=not as_json, brief=True).task("captions", len(photos)) as task:
        for said in captioning.captions(chosen, photos, beam):
            answers.append(said)
            task.advance()
            if "error" in said:
                click.echo(f"lightcap: {said['error']}", err=True)
            elif not as_json and not say(f"{click.format_filename(said['image'])}\t{said['caption']}", result):
                break
    if as_json:
        print_json(answers)
    if any("error" in said for said in answers):
        ctx.exit(1)


@cli.command("eval", epilog=ANY_MODEL)
@click.argument("model")
@click.option("--captions", required=True, help="Karpathy or COCO JSON, Flickr8k's text, metadata.csv, or a column's name.")
@click.option("--images", required=True, help="The folder that holds the images, or a data set's name.")
@click.option("--source", type=click.Choice(LAYOUTS), help="Their layout (default: by the file).")
@click.option("--split", help="Which split to measure (default: val; of captions without splits, or with one alone, all).")
@click.option("--max-unreadable", type=click.FloatRange(0, 1), default=0.01, show_default=True, help="Share of images that may be.")
@beam_width
@java_metrics
@as_json
def eval_command(
    model: str, captions: str, images: str, source: str | None, split: str | None, max_unreadable: float, beam: int, java: bool,
    as_json: bool,
) -> None:
    """Measure a model on captioned images. Example: lightcap eval runs/photos --captions dataset.json --images images --split test"""
    from compress import config, data, models, show
    from compress.context import Progress
    from compress.data.layout import guess

    chosen = models.resolve(model)
    source = source or guess(captions)
    with quietly():
        asked = config.Data(source=source or "karpathy", captions=captions, images=images, val_split=split or "val",
                            max_unreadable=max_unreadable)
        try:
            wanted = data.load(asked, only=asked.val_split, or_all=split is None, progress=Progress())
        except DataError as error:
            raise DataError(_as_options(error.message) + ("" if source else "; a column of a data set: --source datasets")) from None
        if wanted.left_out:
            click.echo(f"lightcap: {wanted.left_out}", err=True)
        from compress import evaluate, foreign

        say = functools.partial(foreign.captions, foreign.read(chosen)) if chosen.foreign else None
        scores = evaluate.evaluate(chosen, wanted, beam, Progress(), _java if java else None, say)
    if scores["images"] == 1:
        click.echo(OF_ONE, err=True)
    answer(as_json, scores, lambda: show.scores(scores))


def _as_options(message: str) -> str:
    """What is wrong with captions and images, for who gave them as options and not as a recipe's keys."""
    for key in ("captions", "images", "max_unreadable"):
        option = f"--{key.replace('_', '-')}"
        message = message.replace(f"--set data.{key}=", f"{option} ").replace(f"data.{key}", option)
    return message.replace("--set data.source=", "--source ")


def _java(written: Sequence[str], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """METEOR and SPICE as far as they can run here; what they lack is said on standard error."""
    from compress.doctor import without_java
    from compress.metrics import java

    for scores, what, how in without_java():
        click.echo(f"not measured: {scores}: no {what} here; {how}", err=True)
    return java.extra_scores(written, wanted)


@cli.command("score")
@click.option("--candidates", required=True, type=click.Path(path_type=Path), help='COCO results: [{"image_id", "caption"}].')
@click.option("--references", required=True, type=click.Path(path_type=Path), help="COCO or Karpathy JSON.")
@click.option("--subset", is_flag=True, help="Score the images that have a candidate; without it one that has none is an error.")
@java_metrics
@as_json
def score_command(candidates: Path, references: Path, subset: bool, java: bool, as_json: bool) -> None:
    """Score captions that any model wrote. Example: lightcap score --candidates results.json --references captions_val2014.json"""
    from compress import metrics, results, show

    written, wanted = results.read(candidates, references, subset)
    with quietly():
        scores = metrics.score(written, wanted).row() | (_java(written, wanted) if java else {})
    if scores["images"] == 1:
        click.echo(OF_ONE, err=True)
    answer(as_json, scores, lambda: show.scores(scores))


@cli.command("profile", epilog=f"{ANY_MODEL} Or a preset, such as lightcap.")
@click.argument("model")
@click.option("--tokens", type=click.IntRange(min=1), default=12, show_default=True, help="Length of the caption that is counted.")
@as_json
def profile_command(model: str, tokens: int, as_json: bool) -> None:
    """Count a model's parameters, MACs, bytes and time per caption. Example: lightcap profile lightcap"""
    with quietly():
        from compress import profile, show

        row = profile.profile(model, tokens)
    answer(as_json, row, lambda: show.profile(row))


@cli.command("export", epilog=MODEL)
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to write; it must not be there yet, or be empty.")
@as_json
def export_command(model: str, out: Path, as_json: bool) -> None:
    """Write a folder that captions without torch. Example: lightcap export runs/photos --out captioner"""
    from compress import artifact, models

    chosen = models.resolve(model)
    with artifact.writing(out) as folder, quietly():
        from compress.stages import export

        export.export(chosen, folder)
    if chosen.warning is not None:
        click.echo(f"lightcap: {chosen.warning}", err=True)
    made = artifact.Artifact(out)
    value = {"out": str(out), "bytes": made.bytes(), "digest": made.digest(), "files": sorted(path.name for path in out.iterdir())}
    answer(as_json, value, lambda: f"{out}: {value['bytes'] / 1e6:.2f} MB; try: python {out / 'caption.py'} PHOTO")


@cli.command("doctor")
@as_json
@click.pass_context
def doctor_command(ctx: click.Context, as_json: bool) -> None:
    """Check versions, processor and what is missing. Example: lightcap doctor"""
    from compress import doctor, show

    found = doctor.examine()
    answer(as_json, found, lambda: show.doctor(found))
    if not found["ok"]:
        ctx.exit(1)
