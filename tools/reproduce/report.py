"""reproduction.json and reproduction.md: every figure beside the published one, and all that they depend on."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.reproduce import figures
from tools.reproduce.commands import PlannedStage
from tools.reproduce.figures import Figure
from tools.reproduce.options import Options
from tools.reproduce.plan import STAND_IN, Plan
from tools.reproduce.training import training_figures
from util.files import replacing, write_json

SWEEP = "guidance-"
NOT_COMPARED = {
    "quick": "Quick run: 5,000 images and 64 iterations. Nothing is compared with the published figures: fewer images "
    "make FID higher, fewer iterations change the images. FID∞ is an estimate.",
    "demo": f"{STAND_IN[0].upper()}{STAND_IN[1:]}. The scores mean nothing; the run shows that the stages work.",
}


def collect_figures(options: Options, plan: Plan, records: Sequence[dict]) -> list[Figure]:
    """The lines of the report, from the records of the stages."""
    measured = {record["name"]: record.get("result", {}) for record in records}
    if options.train:
        found = measured[f"train-{options.train}"]
        return training_figures(options.train, found) if found else []
    wanted = figures.catalogue(plan.iterations, fid_infinity=options.quick)
    lines = [w.figure(measured[w.stage], options.comparable) for w in wanted if w.stage in measured]
    for model in ("large", "huge"):
        for cfg, fid in measured.get(f"guidance-{model}", {}).items():
            lines.append(Figure(f"{model}: FID at cfg {cfg}", None, fid))
    return lines


def build_report(
    options: Options, plan: Plan, stages: Sequence[PlannedStage], records: Sequence[dict]
) -> dict[str, object]:
    """The content of reproduction.json."""
    named = list(zip(stages, records, strict=True))
    what = f"the first {options.steps} steps of the published training of {options.train}" if options.train else ""
    kind = "" if options.train else "demo" if options.demo else "quick" if options.quick else ""
    machines = [record["machine"] for record in records]
    return {
        "what": (what or "the published figures") + (f" ({STAND_IN})" if options.demo else ""),
        "beside": "band" if options.train else "published",
        "not_compared": NOT_COMPARED.get(kind, ""),
        "figures": [figure.to_dict() for figure in collect_figures(options, plan, records)],
        "stages": [stage_entry(stage, record) for stage, record in named],
        "differs": {s.name: r["result"]["differs"] for s, r in named if r.get("result", {}).get("differs")},
        "files": {one["path"]: {key: one[key] for key in ("bytes", "sha256")} for r in records for one in r["inputs"]},
        "machines": [machine for i, machine in enumerate(machines) if machine not in machines[:i]],
        "plots": [
            f"{stage.name.removeprefix(SWEEP)}/eval_sweep.png"
            for stage, record in named
            if stage.name.startswith(SWEEP) and "result" in record
        ],
    }


def stage_entry(stage: PlannedStage, record: Mapping[str, object]) -> dict[str, object]:
    """What the report says of a stage besides its figures."""
    about = {"name": stage.name, "command": shlex.join(stage.command), "published": stage.published}
    return about | {"added": list(stage.added)} | {key: record[key] for key in ("error", "seconds") if key in record}


def problems(report: Mapping[str, object]) -> list[str]:
    """Sentences on stages that failed, and on figures that are out of tolerance or were not measured."""
    failed = [f"{stage['name']} failed ({stage['error']})" for stage in report["stages"] if "error" in stage]
    compared = [figure for figure in report["figures"] if figure["tolerance"] is not None]
    missing = [figure["name"] for figure in compared if figure["measured"] is None]
    out = [figure["name"] for figure in compared if figure["within"] is False]
    named = {"out of tolerance": out, "not measured": missing}
    return failed + [f"{what}: {', '.join(names)}" for what, names in named.items() if names]


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.4g}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def figure_rows(lines: Sequence[Mapping[str, object]], beside: str = "published") -> list[str]:
    """The table of figures; reasons are numbered. beside: title of what they are compared with."""
    reasons = list(dict.fromkeys(line["reason"] for line in lines if line["reason"]))
    rows = [_row(("figure", beside, "measured", "difference", "tolerance", "within", "note")), "|---" * 7 + "|"]
    for line in lines:
        limit = f"±{_number(line['tolerance'])} [{reasons.index(line['reason']) + 1}]" if line["reason"] else ""
        within = {None: "not compared", True: "yes", False: "**no**"}[line["within"]]
        measured = _number(line["measured"]) or "not measured"
        numbers = _number(line["published"]), measured, _number(line["difference"], "+"), limit, within
        rows.append(_row((line["name"], *numbers, line["note"])))
    return [*rows, "", *(f"[{i}] {reason}" + "  " for i, reason in enumerate(reasons, 1))]


def as_markdown(report: Mapping[str, object]) -> str:
    """The report for people."""
    wrong, compared = problems(report), [f for f in report["figures"] if f["within"] is not None]
    parts = [f"# Reproduction of {report['what']}", ""]
    counts = f"{sum(f['within'] for f in compared)} of {len(compared)} compared figures are within their tolerance."
    good = report["not_compared"] or (counts if compared else "No figure is compared.")
    parts += [good, *(f"- {sentence}" for sentence in wrong), "", *figure_rows(report["figures"], report["beside"]), ""]
    parts += ["## Stages", ""]
    for stage in report["stages"]:
        parts += [f"**{stage['name']}**, " + ("failed" if "error" in stage else f"{stage['seconds']:.0f} s"), ""]
        parts += ["```text", stage["command"], "```", ""] if stage["command"] else []
        differs = report["differs"].get(stage["name"])
        parts += (
            [f"Added to the published command or changed: {'; '.join(stage['added'])}", ""] if stage["added"] else []
        )
        parts += [f"Settings other than published: {'; '.join(differs)}", ""] if differs else []
    parts += ["The random numbers always differ from the published run's (docs/differences.md).", ""]
    parts += [f"![FID and Inception Score against guidance]({plot})" for plot in report["plots"]]
    parts += ["## Files", "", _row(("file", "bytes", "SHA-256")), "|---" * 3 + "|"]
    parts += [_row((path, f"{about['bytes']:,}", about["sha256"])) for path, about in report["files"].items()]
    parts += ["", "## Machine", ""]
    parts += [", ".join(f"{name} {value}" for name, value in machine.items()) for machine in report["machines"]]
    return "\n".join(parts) + "\n"


def write_report(report: Mapping[str, object], out: Path) -> None:
    """OUT/reproduction.json and OUT/reproduction.md."""
    write_json(out / "reproduction.json", report)
    with replacing(out / "reproduction.md") as file:
        file.write(as_markdown(report).encode())
