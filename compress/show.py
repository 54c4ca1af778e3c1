"""What the commands draw for people; under --json the same values are printed as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table

from compress import comparison


def recipes(listed: Sequence[Mapping]) -> Table:
    return _table(("recipe", "what it does"), [(entry["recipe"], entry["description"]) for entry in listed])


def plan(planned: Mapping) -> Group:
    state = {(True, True): "cached", (True, False): "to measure", (False, False): "to do"}
    rows = [
        (stage["name"], stage["stage"], state[stage["cached"], stage["measured"]], _tmacs(stage), _time(stage), (stage["lock"] or "")[:12])
        for stage in planned["stages"]
    ]
    waiting = [stage for stage in planned["stages"] if not stage["cached"]]
    known = [stage["seconds"] for stage in waiting if stage["seconds"] is not None]
    counted = [stage for stage in waiting if stage["stage"] != "pretrained"]  # what a finished captioner takes is its own
    measured = sum(stage["cached"] and not stage["measured"] for stage in planned["stages"])
    if not waiting:
        last = "everything is cached" + (f"; {measured} to be measured again" if measured else "")
    elif len(known) == len(counted):
        last = f"{len(waiting)} stages to do, about {_duration(sum(known))}"
        last += ", and what the finished captioner takes" * (len(counted) < len(waiting))
    else:
        last = f"{len(waiting)} stages to do; times appear once a stage of the kind, and near in size, has run here"
    note = "TMACs: 1e12 multiply-accumulates, counted on the architectures, to make the artifact and to evaluate it"
    drawn = _table(("name", "stage", "", "TMACs", "time", "lock"), rows, title=planned["recipe"])
    return Group(drawn, *_changed(planned["stages"]), last, note, *([planned["imagined"]] if "imagined" in planned else []))


def _changed(stages: Sequence[Mapping]) -> list[str]:
    """A line for each difference from what the run's folder was last made by, with the stages that it reaches first."""
    reached: dict[str, list[str]] = {}
    for stage in stages:
        for what in stage["changed"]:
            reached.setdefault(what, []).append(stage["name"])
    return [f"changed since the last run: {what} ({', '.join(names[:2])}{f' and {len(names) - 2} more' if len(names) > 2 else ''})"
            for what, names in reached.items()]


HEADINGS = ("name", "CIDEr [95 %]", "delta [95 %]", "params", "GMACs", "MB", "ms (parent)")


def cells(values: Mapping) -> tuple[str, ...]:
    """A row as the table shows it, in the order of HEADINGS; what was not measured is empty."""

    def number(key: str, form: str, scale: float = 1.0) -> str:
        return "" if values.get(key) is None else format(values[key] / scale, form)

    def with_interval(key: str, form: str, interval: str) -> str:
        low, high = values.get(interval) or (None, None)
        return number(key, form) + ("" if low is None or values.get(key) is None else f" [{low:{form}}, {high:{form}}]")

    own, parents = ((values.get(key) or {}).get("p50") for key in ("latency_ms", "parent_latency_ms"))
    milliseconds = "" if own is None else f"{own:.1f}" if parents is None else f"{own:.1f} ({parents:.1f})"
    params = "" if values.get("params") is None else _count(values["params"])
    megabytes = number("bytes", ".2f", 1e6)
    return (
        values["name"],
        with_interval("cider", ".1f", "cider_ci95"),
        with_interval("delta_cider", "+.1f", "delta_ci95"),
        params,
        number("gmacs_caption", ".3f"),
        megabytes,
        milliseconds,
    )


def _count(number: int) -> str:
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.0f}k"


def table(rows: Sequence[Mapping], title: str = "") -> Table:
    """The rows as a rich table."""
    drawn = Table(title=title or None, title_justify="left")
    for index, heading in enumerate(HEADINGS):
        drawn.add_column(heading, justify="right" if index else "left", no_wrap="95 %" not in heading)  # narrow terminals fold intervals
    for values in rows:
        drawn.add_row(*cells(values))
    return drawn


def compare(value: Mapping) -> Group:
    flat, _, best = comparison.drawn(value)
    drawn = Table()
    for index, heading in enumerate(("run", *HEADINGS, "best")):
        folds = index < 2 or "95 %" in heading  # in a narrow terminal; a number is never cut
        drawn.add_column(heading, justify="left" if index < 2 else "right", no_wrap=not folds, overflow="fold")
    for index, (run, row) in enumerate(flat):
        first = index == 0 or run != flat[index - 1][0]
        if first:
            drawn.add_section()
        drawn.add_row(_short(run, value["runs"]) if first else "", *cells(row), "*" if index in best else "")
    note = "* nothing measured on the same images is at least as good in CIDEr, bytes and, in the same runtime, time, and better in one"
    return Group(drawn, note, *([_differences(value)] if value["differences"] else []))


def _differences(value: Mapping) -> Table:
    rows = [(_short(entry["run"], value["runs"]), *comparison.cells(entry)) for entry in value["differences"]]
    first = _short(value["differences"][0]["against"], value["runs"])
    return _table(("run", "name", "difference [95 %]", "p"), rows, title=f"CIDEr less that of {first}, on the same images")


def _short(run: str, runs: Sequence[Mapping]) -> str:
    """A run's folder without the folders that all of several runs lie in."""
    parents = {str(Path(entry["run"]).parent) for entry in runs}
    return Path(run).name if len(runs) > 1 and len(parents) == 1 else run


def fit(value: Mapping) -> Group:
    said = (
        f"{'met' if value['ok'] else 'not met'}: {value['macs']:g} of MACs, {value['mb']:.2f} MB, {value['ms']:.1f} ms, "
        f"CIDEr {0.0 - value['drop_cider']:+.2f} against '{value['against']}'"
    )
    return Group(table(value["ledger"], title=value["run"]), said)


def scores(value: Mapping) -> Table:
    low, high = value["cider_ci95"]
    rows = [("CIDEr-D", f"{value['cider']:.2f}  [{low:.2f}, {high:.2f}]")]
    rows += [(f"BLEU-{n}", f"{value[f'bleu{n}']:.2f}") for n in (1, 2, 3, 4)]
    rows += [("ROUGE-L", f"{value['rouge_l']:.2f}")]
    rows += [(name, f"{value[name.lower()]:.2f}") for name in ("METEOR", "SPICE") if name.lower() in value]
    rows += [("images", str(value["images"]))]
    return _table(("x100", "value"), rows)


def profile(row: Mapping) -> Group:
    cost = [("parameters", f"{row['params']:,}")]
    cost += [(f"  {part}", f"{count:,}") for part, count in (row.get("params_by_part") or {}).items()]
    for key, what, form in (
        ("params_fusion", "fusion: embeddings and layers", ","),
        ("params_without_alignment", "all but alignment", ","),
        ("gmacs_encoder", "GMACs, encoder", ".4f"),
        ("gmacs_caption", "GMACs, caption", ".4f"),
        ("gflops_caption", "GFLOPs, caption (2 x MACs)", ".4f"),
        ("gbops_caption", "Gbit-operations, caption", ",.1f"),
        ("bytes", "bytes on disk", ",.0f"),
    ):
        if row.get(key) is not None:
            cost.append((what, format(row[key], form)))
    latency = row.get("latency_ms")
    if latency and latency.get("p50") is not None:
        cost.append(("ms per caption, median", f"{latency['p50']:.1f} (p90 {latency['p90']:.1f}, threads: {latency['threads']})"))
    return Group(_table(("cost", row.get("name") or ""), cost))


def doctor(found: Mapping) -> Group:
    versions = _table(("package", "version"), list(found["versions"].items()))
    cpu = _table(("processor", ""), [(key, _words(value)) for key, value in found["cpu"].items()])
    missing = [(entry["what"], entry["install"]) for entry in found["missing"]]
    last = _table(("missing", "how to get it"), missing) if missing else "nothing is missing"
    return Group(versions, cpu, last)


def _words(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _tmacs(stage: Mapping) -> str:
    return "" if stage["tmacs"] is None else f"{stage['tmacs']:,.{0 if stage['tmacs'] >= 100 else 2}f}"


def _time(stage: Mapping) -> str:
    if stage["seconds"] is None:
        return ""
    return f"took {_duration(stage['seconds'])}" if stage["cached"] else f"about {_duration(stage['seconds'])}"


def _duration(seconds: float) -> str:
    """In the first unit that fewer than a hundred of say it with."""
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds / length < 99.5:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    drawn = Table(title=title, title_justify="left")
    for heading in headings:
        drawn.add_column(heading)
    for row in rows:
        drawn.add_row(*row)
    return drawn
