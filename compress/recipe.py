"""Reads a recipe: YAML (data only) -> a tree that remembers file and line -> `compress.config.Recipe`. The one parse path.

`extends` names one parent, merged key by key (lists are replaced; with `after: NAME` the parent's stages up to that one come before the
recipe's own); `--set NAME.key=value` changes one value of the merged tree. Whatever is wrong is a `RecipeError` of one line with the file,
the line, the key, what is allowed and the nearest known name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from compress.artifact import PICKLES
from compress.config import STAGES, Data, Recipe, Stage, Student
from compress.conflicts import against_teachers, conflicts
from compress.document import Located, parse, read
from compress.errors import RecipeError, nearest
from compress.values import config_of, keys_of, value_of

# Beside the package, in a clone and in an installed wheel alike; a folder named recipes/ where the user stands cannot shadow it.
SHIPPED = Path(__file__).resolve().parent.parent / "recipes"
SECTIONS = {"data": Data, "student": Student}
TOP = ("name", "extends", "after", "seed", "data", "student", "stages")
NEW = ("concepts", "train")  # kinds that can start a captioner from nothing
OTHERS = "pretrained"  # the kind of captioners that came finished, on which no stage works
SPOKEN = ("scst", "average", "prune", "quantize", "export")  # kinds that work on a captioner that was taught
MOST_PARENTS = 16  # that extend one another
GRAPHS = ("quantize", "export")  # kinds whose artifacts are ONNX graphs, which no later training can change

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
OCTAL = re.compile("[-+]?0[0-7_]+")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def read_recipe(name: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """The recipe that `name` (a shipped recipe's name, or a file) holds, with `settings` ("NAME.key=value") laid over it.

    Raises RecipeError, one line, for anything that cannot be used.
    """
    path = find(str(name))
    tree = _extended(path, ())
    for setting in settings:
        tree = _with_setting(tree, setting)
    return _typed(tree, path)


def recipes() -> list[tuple[str, str]]:
    """(name, the first comment line) of each shipped recipe, in order of name."""
    listed = []
    for path in sorted(SHIPPED.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        listed.append((path.stem, first.lstrip("# ").strip() if first.startswith("#") else ""))
    return listed


def find(name: str, folder: Path | None = None, place: str = "") -> Path:
    """The file of a shipped recipe's name, or of a path (relative to `folder`)."""
    shipped = [stem for stem, _ in recipes()]
    if name in shipped:
        return SHIPPED / f"{name}.yaml"
    path = Path(name) if folder is None else folder / name
    if os.path.isfile(path):  # unlike Path's, false where its folder may not be read
        return path
    what = "is a folder" if os.path.isdir(path) else "is neither a file nor a shipped recipe"
    raise RecipeError(
        f"{place}recipe '{name}' {what}; shipped recipes: {', '.join(shipped)}{nearest(name, shipped)}"
    )


def resolved(recipe: Recipe) -> dict:
    """The recipe as plain data with every default filled in; `read_recipe` of its YAML gives the same recipe again."""
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "data": _plain(recipe.data),
        "student": _plain(recipe.student),
        "stages": [entry(stage) for stage in recipe.stages],
    }


def entry(stage: Stage) -> dict:
    """One of the resolved recipe's `stages`."""
    head = {"as": stage.name} | ({"from": stage.parent} if stage.parent else {})
    if stage.against != _compared(stage.parent, stage.config):
        head["against"] = stage.against
    return {stage.kind: head | _plain(stage.config)}


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe, as a run's recipe.yaml holds it."""
    return yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True, width=120)


def digest(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe."""
    return hashlib.sha256(json.dumps(resolved(recipe), sort_keys=True).encode()).hexdigest()


def _plain(config) -> dict:
    pairs = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in pairs.items() if value is not None}


# ---- extends and --set


def _mapping(tree: Located) -> Located:
    if not isinstance(tree.value, dict):
        raise RecipeError(f"{tree.place}a recipe is a mapping with the keys {', '.join(TOP)}")
    return tree


def _extended(path: Path, seen: tuple[Path, ...]) -> Located:
    tree = _mapping(read(path))
    real = path.resolve()
    parent = tree.value.get("extends")
    after = tree.value.get("after")
    merged = tree
    if after is not None and (parent is None or "stages" not in tree.value):
        raise RecipeError(f"{after.place}key 'after' puts this recipe's stages behind one of its parent's: it needs 'extends' and 'stages'")
    if parent is not None:
        if not isinstance(parent.value, str):
            raise RecipeError(f"{parent.place}key 'extends' names one recipe: a shipped one or a file")
        base = find(parent.value, path.parent, parent.place)
        if len(seen) > MOST_PARENTS:
            raise RecipeError(f"{parent.place}more than {MOST_PARENTS} recipes extend one another; write fewer")
        if base.resolve() in (*seen, real):
            raise RecipeError(f"{parent.place}'extends: {parent.value}' comes back to a recipe that extends this one")
        extended = _extended(base, (*seen, real))
        merged = _merged(extended, tree)
        if after is not None:
            merged.value["stages"] = _continued(extended, after, tree)
    # A name belongs to its own file: a run of a child must not land in its parent's folder.
    name = tree.value.get("name", Located(path.stem, f"{path}:1: "))
    return Located({key: value for key, value in merged.value.items() if key not in ("extends", "after")} | {"name": name}, tree.place)


def _merged(base: Located, over: Located) -> Located:
    if isinstance(base.value, dict) and isinstance(over.value, dict):
        pairs = dict(base.value)
        for key, value in over.value.items():
            pairs[key] = _merged(pairs[key], value) if key in pairs else value
        return Located(pairs, over.place)
    return base if over.value is None and isinstance(base.value, dict) else over  # a section whose keys are all commented out


def _continued(base: Located, after: Located, tree: Located) -> Located:
    """The stages of `base` up to the one that `after` names, then those of `tree`."""
    names = [name for _, name, _ in _stage_entries(base)]
    name = value_of(after, str, "", "after")
    if name not in names:
        raise RecipeError(f"{after.place}key 'after': the parent has no stage '{name}'; it has {', '.join(names)}{nearest(name, names)}")
    _stage_entries(tree)
    own = tree.value["stages"]
    return Located([*base.value["stages"].value[: names.index(name) + 1], *own.value], own.place)


def _comment(text: str) -> str:
    """What YAML leaves out of `text`: a comment."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    return text[node.end_mark.index if node else 0 :].strip()


def _with_setting(tree: Located, setting: str) -> Located:
    """The tree with one `--set`: "seed=3", "data.captions=file", "pruned.macs=0.5"."""
    place = f"--set {setting}: "
    target, equals, text = setting.partition("=")
    target = target.strip()
    if not equals or not target:
        raise RecipeError(f"{place}write it as NAME.key=value")
    value = Located(parse(text, lambda line: place).value, place)
    if left := _comment(text):
        raise RecipeError(f"{place}'{left}' would be a comment; put the value in quotes that the shell leaves: '{target}=\"{text}\"'")
    if OCTAL.fullmatch(text):
        raise RecipeError(f"{place}YAML reads {text} as {value.value}, in octal; write it without the leading zero")
    name, dot, key = target.partition(".")
    top = dict(tree.value)
    if not dot:
        if name not in ("seed", "name"):
            raise RecipeError(f"{place}'{name}' has no key; write NAME.key=value, seed=N or name=NAME")
        return Located(top | {name: value}, tree.place)
    stages = _stage_entries(tree)
    named = [index for index, (_, stage_name, _) in enumerate(stages) if stage_name == name]
    keyed = [index for index, (kind, _, _) in enumerate(stages) if kind == name]
    # The main line has a stage `student` beside the section `student`: the section is meant where it has such a key.
    is_section = name in SECTIONS and (key in keys_of(SECTIONS[name]) or not (named or keyed))
    if is_section:
        section = top.get(name, Located({}, place))
        if not isinstance(section.value, dict):
            raise RecipeError(f"{section.place}'{name}' must be a mapping")
        return Located(top | {name: Located(section.value | {key: value}, section.place)}, tree.place)
    if not named and len(keyed) > 1:
        names = ", ".join(stages[index][1] for index in keyed)
        raise RecipeError(f"{place}{len(keyed)} stages are a '{name}'; use the stage's name: {names}")
    if not (named or keyed):
        kinds = [kind for kind, _, _ in stages]
        once = (kind for kind in kinds if kinds.count(kind) == 1)
        allowed = list(dict.fromkeys([*SECTIONS, *(stage_name for _, stage_name, _ in stages), *once]))
        raise RecipeError(f"{place}no section or stage '{name}' here; there are {', '.join(allowed)}{nearest(name, allowed)}")
    index = (named or keyed)[0]
    kind, _, body = stages[index]
    items = list(top["stages"].value)
    entry = items[index]
    items[index] = Located({kind: Located(body | {key: value}, entry.value[kind].place)}, entry.place)
    return Located(top | {"stages": Located(items, top["stages"].place)}, tree.place)


def _stage_entries(tree: Located) -> list[tuple[str, str, dict[str, Located]]]:
    """(kind, name, settings) of each entry under `stages`."""
    stages = tree.value.get("stages")
    if stages is None or not isinstance(stages.value, list) or not stages.value:
        place = tree.place if stages is None else stages.place
        raise RecipeError(f"{place}key 'stages' must be a list with at least one of {', '.join(STAGES)}")
    entries = []
    for item in stages.value:
        if not isinstance(item.value, dict) or len(item.value) != 1:
            raise RecipeError(f"{item.place}a stage is one key with its settings, such as 'export: {{}}'")
        ((kind, body),) = item.value.items()
        if kind not in STAGES:
            raise RecipeError(f"{body.place}unknown stage '{kind}'; allowed: {', '.join(STAGES)}{nearest(kind, STAGES)}")
        if body.value is not None and not isinstance(body.value, dict):
            raise RecipeError(f"{body.place}the settings of '{kind}' must be a mapping, such as '{kind}: {{}}'")
        settings = body.value or {}
        label = settings.get("as")
        name = kind if label is None else label.value
        if not isinstance(name, str) or not NAME.fullmatch(name) or name == "nearest":
            place = body.place if label is None else label.place
            raise RecipeError(f"{place}key 'as' must be a word of letters, digits, - and _ (and not 'nearest')")
        entries.append((kind, name, settings))
    return entries


# ---- a located tree to dataclasses


def _typed(tree: Located, path: Path) -> Recipe:
    for key, value in tree.value.items():
        if key not in TOP:
            raise RecipeError(f"{value.place}unknown key '{key}'; allowed: {', '.join(TOP)}{nearest(key, TOP)}")
    name = tree.value["name"]
    if not isinstance(name.value, str) or not RUN_NAME.fullmatch(name.value):
        raise RecipeError(f"{name.place}key 'name' must be a word of letters, digits, '.', - and _: it names a folder")
    seed = value_of(tree.value.get("seed", Located(17, "")), int, "", "seed")
    sections = {key: _section(tree.value.get(key, Located(None, "")), key) for key in SECTIONS}
    if sections["student"].tokenizer is None and sections["student"].fusion_weights:  # BERT's weights are of BERT's pieces
        weights = sections["student"].fusion_weights
        of_file = weights.endswith((".safetensors", *PICKLES))  # its vocab.txt lies beside it
        sections["student"] = replace(sections["student"], tokenizer=str(Path(weights).parent) if of_file else weights)
    stages = _stages(tree, sections["student"])
    named = {key: tree.value.get(key, Located(None, "")).value or {} for key in SECTIONS}
    places = {f"{section}.{key}": value.place for section, pairs in named.items() for key, value in pairs.items()}
    return Recipe(name=name.value, seed=seed, **sections, stages=stages, path=path, places=places)


def _section(tree: Located, key: str):
    if tree.value is not None and not isinstance(tree.value, dict):
        raise RecipeError(f"{tree.place}key '{key}' must be a mapping")
    return config_of(SECTIONS[key], tree.value or {}, key)


@dataclass
class _Above:
    """The stages above the one that is read: their kinds by name, those of which nothing was taught to caption, and the names of all."""

    kinds: dict[str, str]
    silent: set[str]
    all: Sequence[str]

    def check(self, kind: str, value: str, located: Located, key: str) -> None:
        """RecipeError where a stage of this kind cannot take `value` as its `key`."""
        if value not in self.kinds:
            why = "comes later" if value in self.all else "is not a stage here"
            there = f"earlier stages: {', '.join(self.kinds) or 'none'}"
            raise RecipeError(f"{located.place}key '{key}': '{value}' {why}; {there}{nearest(value, self.kinds)}")
        its = self.kinds[value]
        if its == OTHERS and key not in ("teachers", "against"):
            raise RecipeError(f"{located.place}key '{key}': '{value}' is a finished captioner ({OTHERS}): it can teach ('distill', "
                              "teachers), and nothing else is made of it")
        if its in GRAPHS and (kind not in GRAPHS or its == "export" or kind == "quantize"):
            made = f"'{value}' is already ONNX graphs ({its})"
            raise RecipeError(f"{located.place}{made}, which '{kind}' cannot work on; name an earlier stage with 'from:'")
        if value in self.silent and (key == "teachers" or kind in SPOKEN):
            raise RecipeError(f"{located.place}'{value}' was not taught to write captions, which '{kind}' needs; put a 'train' or a "
                              "'distill' stage between them")


def _stages(tree: Located, student: Student) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    entries = _stage_entries(tree)
    above = _Above({}, set(), [name for _, name, _ in entries])
    for (kind, name, settings), item in zip(entries, tree.value["stages"].value, strict=True):
        place = next(iter(item.value.values())).place
        if name in above.kinds:
            label = settings.get("as")
            raise RecipeError(f"{label.place if label else place}a second stage is named '{name}'; give it its own 'as: NAME'")
        config = config_of(STAGES[kind], settings, kind, also=("as", "from", "against"))
        settings = {key: value for key, value in settings.items() if key != "from" or value.value is not None}  # as if not written
        before = next((stage.name for stage in reversed(stages) if stage.kind != OTHERS), None)
        parent = _parent(kind, config, settings, before, place, above)
        if kind == "distill":
            config = _with_teachers(config, settings, stages[-1].name if stages else None, place, student, above)
        for other in getattr(config, "others", ()):
            above.check(kind, other, settings["others"], "others")
        for key, what in conflicts(config, parent):
            raise RecipeError(f"{settings[key].place}key '{key}': {what}" if key in settings else f"{place}{what}")
        against = _against(kind, name, config, parent, settings, place, above)
        stages.append(Stage(kind, name, parent, config, against, place))
        above.kinds[name] = kind
        if kind in ("concepts", "vocabulary") and (parent is None or parent in above.silent):
            above.silent.add(name)
    return tuple(stages)


def _parent(kind: str, config, settings: dict[str, Located], before: str | None, place: str, above: _Above) -> str | None:
    """The stage that this one works on: what `from:` names, else the one `before`; None where it starts anew."""
    start, extractor = settings.get("from"), getattr(config, "extractor", None)
    if kind == OTHERS:
        if start is not None:
            raise RecipeError(f"{start.place}key 'from': a finished captioner is made of no stage; leave it out")
        return None
    if start is not None:
        parent = value_of(start, str, kind, "from")
        above.check(kind, parent, start, "from")
        if getattr(config, "preset", None):
            raise RecipeError(f"{start.place}keys 'from' and 'preset' exclude each other: a preset starts anew")
    elif kind == "distill" or (kind in NEW and (config.preset or before is None or extractor)):
        parent = None
    elif before is None:
        raise RecipeError(f"{place}the first stage cannot be '{kind}': there is nothing to work on; begin with 'train'")
    else:
        parent = before
        above.check(kind, parent, Located(None, place), kind)
    if extractor:
        above.check(kind, extractor, settings["extractor"], "extractor")
        if start is not None:
            raise RecipeError(f"{start.place}keys 'from' and 'extractor' exclude each other: an extractor starts a new captioner")
    return parent


def _against(
    kind: str, name: str, config, parent: str | None, settings: dict[str, Located], place: str, above: _Above
) -> str | None:
    """The stage that the row is compared with: what `against:` names, else what `_compared` says."""
    against = _compared(parent, config)
    chosen = settings.get("against")
    if chosen is not None and chosen.value is not None:
        if kind in ("concepts", OTHERS):
            what = "makes no captions to compare" if kind == "concepts" else "is compared with nothing: name it in the others' 'against'"
            raise RecipeError(f"{chosen.place}key 'against': '{kind}' {what}")
        against = value_of(chosen, str, kind, "against")
        if against not in above.kinds or above.kinds[against] == "concepts":
            above.check(kind, against, chosen, "against")
            raise RecipeError(f"{chosen.place}key 'against': '{against}' has no captions to compare with")
    if above.kinds.get(against) == "concepts" and getattr(config, "max_drop_cider", None) is not None:
        key = settings.get("max_drop_cider")
        raise RecipeError(f"{key.place if key else place}key 'max_drop_cider': '{against}', which '{name}' would be compared with, has "
                          "no captions; name a stage that has (against: NAME)")
    return against


def _compared(parent: str | None, config) -> str | None:
    """What a stage's row is compared with where the recipe is silent: its parent, else the first of its teachers."""
    return parent or next(iter(getattr(config, "teachers", ())), None)


def _with_teachers(config, settings: dict[str, Located], before: str | None, place: str, student: Student, above: _Above):
    teachers = config.teachers or ((before,) if before else ())
    where = settings.get("teachers", Located(None, place))
    if not teachers:
        raise RecipeError(f"{where.place}'distill' needs a teacher: put a 'train' stage before it, or name 'teachers'")
    for teacher in teachers:
        above.check("distill", teacher, where, "teachers")
    heads = config.heads or (None if "from" in settings else student.heads)
    if heads and len(teachers) not in (1, heads):
        raise RecipeError(
            f"{where.place}key 'teachers' holds {len(teachers)} teachers for {heads} heads;"
            f" give one, or exactly one per head"
        )
    others = [teacher for teacher in teachers if above.kinds[teacher] == OTHERS]
    if others and "match" not in settings:
        config = replace(config, match=("captions",))
    new = "from" not in settings
    if new and "init" not in settings and (others or student.fusion_weights):
        config = replace(config, init="weights" if student.fusion_weights else "random")
    for key, what in against_teachers(config, teachers, others, new):
        raise RecipeError(f"{settings[key].place if key in settings else place}key '{key}': {what}")
    return replace(config, teachers=teachers)
