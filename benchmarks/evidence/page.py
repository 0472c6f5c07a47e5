"""Pages of results such as `docs/results.md`, and the README's table, written from the results and never by hand."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

from localize import CHOICES
from localize_report import FEW_PAIRS, LEAST_PAIRS

from p2d_peft import P2DConfig
from p2d_peft.files import read_json
from p2d_peft.heads import HeadScores

from . import bigbench, claims
from .choose import HEADS
from .claims import ALL_TARGETS, EPOCHS, HELD, MORE_SAMPLES, NOT_HELD, P2D, PAPER, Claim, coupling, judge, variants
from .compare import compare
from .defaults import TRIED, measured
from .profile import ANY, Parameters, Profile
from .summary import Evidence, Line, Result, read_evidence


PICTURES = {
    "aer.svg": "Exact match against AER, a point for each line of the mixed pool's table; P2D in orange",
    "stages.svg": "Seconds by stage, of P2D and of full fine-tuning on all rows",
    "ratios.svg": "Exact match over the share of the heads and over the share of the rows, all else as by P2DTrainer's "
    "defaults; most with one seed",
    "heads.svg": "Scores of the heads by `proxy` for each target; framed are those that it would train",
}
SETTINGS_TEXT = {
    "mixed": "One task in a mixed pool: eight tasks, as many rows of each",
    "own": "A pool of the task's own rows",
    "corrupted": "The mixed pool with wrong answers in three rows of ten",
    "absent": "The mixed pool without the target's task",
}
PROFILES = Path(__file__).parent / "profiles"
FULL, CONFIRM, GSM8K = (PROFILES / f"{name}.yaml" for name in ("full", "confirm", "gsm8k"))
# what published arms' commands name that is in no commit: excerpts of full.yaml
GONE = ("claims.yaml", "claims2.yaml", "claims3.yaml", "fifth.yaml", "late.yaml", "qo.yaml")
# where our results are, and the folder of those that stand on the main page
RESULTS, MAIN = Path(__file__).parent.parent / "results", "evidence"
# and the folder and the page of the tasks that were run when all defaults but one, that heads are drawn, had been chosen
OTHERS, OTHERS_PAGE = "evidence_other_tasks", "other-tasks.md"
# and some of the main folder's arms, run once more on another machine
RERUN = "evidence_rerun"
# looked up by hand: the runner compares whole prompts, which begin with the question and end with its options
ALMOST_HELD_OUT = (
    "No prompt of these is in a pool or a target; one of the 100 test questions of `unit_identification` is, with other options, in the "
    "third seed's pool. "
)
README_START, README_END = "<!-- results: made by benchmarks/run_evidence.py report -->", "<!-- end of results -->"


def read_results(results: Path) -> Evidence:
    """Everything in a folder of results; with our main results what was run once more."""
    return dataclasses.replace(read_evidence(results), again=_beside_main(results, RERUN))


def read_others(results: Path) -> Evidence | None:
    """Beside our main results, those of the other tasks, as far as there are any."""
    return _beside_main(results, OTHERS)


def _beside_main(results: Path, name: str) -> Evidence | None:
    """What the folder of that name holds, if there is one beside our main results and `results` are these."""
    folder = results.with_name(name)
    return read_evidence(folder) if results.name == MAIN and folder.is_dir() else None


def page(evidence: Evidence, results: Path, pictures: list[str], others: Evidence | None) -> str:
    """The page, as Markdown; `pictures` are addresses as seen from it, and `others` what [`read_others`] finds."""
    problem, training = evidence.settings["problem"], evidence.settings["training"]
    parts = [
        _title(evidence, results),
        "How good P2D is on a small model, against what one would pick instead. Written by `python "
        f"benchmarks/run_evidence.py report` from the files in `{_folder(results)}`, one for each training; {evidence.arms} so far. {_to_rerun(evidence, results)}",
        "Rows are named by what chooses them: `SCORER:HEADS`, `/fifth` or `/first` where only heads of the first fifth or third "
        "of the layers score, `/robin` where the target's samples take turns, `/diverse` where rows are picked against their likeness to those picked before, `/from10` where they are scored by so many of the target's samples. Weights are named by what is trained: "
        f"`heads:METHOD`, `/late` or `/last` for heads of the last two thirds or the last third, `-groups` for one at most of those that share keys and values, `heads-qo` without keys and values; `{P2D[0]}` with `{P2D[1]}` is what `P2DTrainer` does by default where it is given {problem['target_rows']} samples of the target; of more it takes {P2DConfig.target_samples} at most. `@` is a share other "
        "than a tenth.",
        f"The model is {evidence.settings['model']}, the rows are {_source(evidence)}. {_pools(evidence)}; heads and rows are chosen with {problem['target_rows']} samples of the target that are not in it, the "
        f"learning rate with {problem['validation_rows']} held-out rows and the first seed, and tested are "
        f"{problem['test_rows']} other held-out rows. {ALMOST_HELD_OUT * (_planned(evidence) == FULL)}Batches of {training['batch_size']}, {training['dtype']}. Exact match is "
        "that of greedy answers. AER is the cost of all stages over that of full fine-tuning on the whole pool for as "
        "many epochs, both measured; on a CPU it is counted in the process's own seconds, in which what else a machine does shows less than by "
        f"the clock (not in it is the waiting, in it what shared caches and cores slow down). {_untimed(evidence)}Forgetting is the rise of the NLL of unrelated passages over the base model's. "
        "Peak memory on a CPU is that of the whole process, with what its earlier arms left in it.",
        "Intervals are 95 % of paired bootstraps. For exact match the seeds and the test rows of each target are resampled, the same "
        "for both sides; three seeds are few, so that these are rather too narrow. With one seed it is the rows alone, and what "
        "differs between trainings is not in it. For NLL pairs of target and "
        f"seed are resampled. {FEW_PAIRS} Of fewer than {LEAST_PAIRS} pairs the smallest and the largest are given (`pairs:`), which "
        "is no interval. The targets are fixed: nothing is said about other tasks.",
        "**Not run:** any model but this one, and the paper's own models and data, for which there are profiles "
        "(`paper_llama.yaml` and `paper_qwen.yaml` in `benchmarks/evidence/profiles`). What a run costs on a GPU, with random "
        "weights, is in [Benchmarks](benchmarks.md#what-does-a-run-cost-on-a-gpu)."
        + " What else there is to compare is [at the end](#what-was-not-run)."
        * bool(_planned(evidence)),
        "## The claims",
        _chosen_by(evidence),
        f"While results of some of the {ALL_TARGETS} targets are missing that could change its verdict, a claim is not decided.",
        _claims(evidence, others),
        _variants(evidence),
        *(_picture(address) for address in pictures),
        _overlap(evidence, results),
        "## The defaults",
        _defaults(evidence),
        "## The base model: format or skill",
        _base(evidence),
    ]
    for setting, text in SETTINGS_TEXT.items():
        for target in evidence.targets:
            lines = [line for line in evidence.lines.values() if (line.setting, line.target) == (setting, target)]
            if lines:
                parts += [f"## {text}: `{target}`", _table(evidence, lines)]
    parts += [
        "## The learning rates that were tried",
        "With the first seed. The tables above have the rate with the lowest NLL on the validation rows, which are few; a "
        "rate that is hardly better there may forget a lot more.",
        _edges(evidence),
        _rate_of_reference(evidence),
        _means_by_rate(evidence),
        _rates(evidence),
        "## Where it was run",
        _provenance(evidence),
        _again(evidence, results),
        _gone_profiles(evidence),
    ]
    if planned := _planned(evidence):
        missing = _not_run(evidence, planned)
        parts += [
            "## What was not run",
            f"Cells of `benchmarks/evidence/profiles/{planned.name}` that have no arm: pool, weights, rows; where other targets have one, for which there is none."
            if missing
            else f"All cells of `benchmarks/evidence/profiles/{planned.name}` have arms.",
            missing,
            _seeds_not_run(evidence, planned),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _folder(results: Path) -> str:
    ours = results.resolve().parent == RESULTS.resolve()
    return f"benchmarks/results/{results.name}" if ours else results.name


def _planned(evidence: Evidence) -> Path | None:
    """The profile of all that there is to compare on these tasks."""
    for tasks, profile in ((bigbench.TASKS, FULL), (bigbench.MORE_TASKS, CONFIRM), (("gsm8k",), GSM8K)):
        if set(evidence.targets) <= set(tasks):
            return profile
    return None


def _source(evidence: Evidence) -> str:
    return "BIG-bench's" if _planned(evidence) in (FULL, CONFIRM) else f"those of {', '.join(evidence.targets)}"


def _pools(evidence: Evidence) -> str:
    problem = evidence.settings["problem"]
    settings = {line.setting for line in evidence.lines.values()}
    if settings == {"own"}:
        return f"A pool has {problem['own_rows']} rows"
    return f"A pool has {problem['pool_rows']} rows of each task"


def _title(evidence: Evidence, results: Path) -> str:
    if results.name == MAIN:
        return "# Results"
    return f"# Results: {results.name.removeprefix(MAIN + '_').replace('_', ' ')}"


def _to_rerun(evidence: Evidence, results: Path) -> str:
    if results.name == MAIN:
        return "To rerun the small profile, from a clean clone, into the folder `rerun`:\n\n```bash\nbash scripts/evidence.sh\n```"
    commands = "\n".join(evidence.commands)
    return f"They are of:\n\n```bash\n{commands}\n```"


def _untimed(evidence: Evidence) -> str:
    untimed = [line for line in evidence.lines.values() if not evidence.timed(line)]
    reasons = []
    measured_elsewhere = any(evidence.aer(line) is not None for line in untimed)
    if any(line.alone for line in untimed):
        reasons.append("arms and what they are measured by were run on several machines")
    if not all(line.alone for line in untimed):
        reasons.append("processes shared a GPU, where what one of them takes is no measure of what it takes alone")
    if not reasons:
        return ""
    elsewhere = (
        "Lines of the machine that [some arms were run on once more](#once-more-on-another-machine) have their AER by full "
        "fine-tuning there, and no seconds. " * measured_elsewhere
    )
    return f"{elsewhere}Where it and the seconds are left out, {', or '.join(reasons)}. "


def _not_run(evidence: Evidence, planned: Path) -> str:
    """A profile's cells that have no result, weights by weights; of which targets, where others have one."""
    there = {(line.setting, line.target, line.data, line.parameters, line.epochs) for line in evidence.lines.values()}
    targets: dict[tuple[str, str, str, int], dict[str, bool]] = {}
    for cell in Profile.read(planned).cells():
        of_cell = targets.setdefault((cell.setting, str(cell.parameters), str(cell.data), cell.epochs), {})
        for target in evidence.targets if cell.target == ANY else [cell.target]:
            key = (cell.setting, target, str(cell.data), str(cell.parameters), cell.epochs)
            of_cell[target] = key in there
    missing: dict[tuple[str, str, int, str], list[str]] = {}
    for (setting, parameters, data, epochs), run in targets.items():
        lacking = [target for target, is_there in run.items() if not is_there]
        if lacking:
            which = f" (only {', '.join(lacking)})" if len(lacking) < len(run) else ""
            missing.setdefault((setting, parameters, epochs, which), []).append(f"`{data}`")
    return "\n".join(
        f"- {setting}, `{parameters}`{'' if epochs == EPOCHS else f', {epochs} epoch'}: {', '.join(rows)}{which}"
        for (setting, parameters, epochs, which), rows in missing.items()
    )


def _seeds_not_run(evidence: Evidence, planned: Path) -> str:
    """Of how many of a profile's cells for which there are results a seed has none."""
    there: dict[str, set[int]] = {}
    for line in evidence.lines.values():
        for seed, arm in line.results.items():
            there.setdefault(_name_of(arm), set()).add(seed)
    missing: Counter[int] = Counter()
    n_cells = 0
    for cell, seeds in Profile.read(planned).cells().items():
        if str(cell) in there:
            n_cells += 1
            missing.update(set(seeds) - there[str(cell)])
    said = [f"seed {seed} in {count}" for seed, count in sorted(missing.items())]
    return (
        f"Of the {n_cells} cells and targets that have arms, these seeds are missing: {', '.join(said)}."
        if said
        else ""
    )


def _picture(address: str) -> str:
    text = PICTURES[Path(address).name]
    return f"![{text}]({address})\n\n*{text}.*"


def _claims(evidence: Evidence, others: Evidence | None) -> str:
    """The verdicts and their figures, where there are any; on the main page with those of the other tasks."""
    header = ["", "claim", "", "figures"]
    judged = judge(evidence)
    rows = [
        [str(number), claim.text, _verdict(claim), "<br>".join(claim.figures)]
        for number, claim in enumerate(judged, 1)
    ]
    if others is not None:
        header.insert(3, f"on [other tasks]({OTHERS_PAGE})")
        for row, claim in zip(rows, judge(others), strict=True):
            row.insert(3, _verdict(claim))
    there = [row for row, claim in zip(rows, judged, strict=True) if claim.figures]
    table = _markdown(header, there)
    if len(there) == len(rows):
        return table
    return f"{table}\n\nNothing that was run here says anything on the others of the {len(rows)} claims."


def _verdict(claim: Claim) -> str:
    return {HELD: "**held**", NOT_HELD: "**not held**"}.get(claim.verdict, claim.verdict)


def _chosen_by(evidence: Evidence) -> str:
    """What the claims' verdicts are worth: whether they were made on the rows that the defaults were chosen by."""
    before = "The claims and their bounds were set before the arms were run. "
    planned = _planned(evidence)
    if planned == FULL:
        return (
            f"{before}The defaults that they are judged by were not: they were changed four times, each time after earlier ones "
            "had been looked at on these targets' test rows. So what holds here was chosen among several by the rows that it is "
            f"judged on. [Other tasks]({OTHERS_PAGE}), which no default was chosen by but that heads are drawn, say how much of it stays."
        )
    if planned == CONFIRM:
        return (
            f"{before}So were, in `{planned.name}`, these targets, the learning rates and the arms with found heads but for those of "
            "`bm25/robin`. (Profile and first results came in one commit, so that the order has to be taken on trust.) No default was "
            "chosen by these tasks, but for one: that heads are drawn was decided when found heads had been no better on the first tasks, nor on "
            f"these. So what holds here of found heads holds on tasks that nobody had looked at; the arms of `{P2D[0]}` with `{P2D[1]}` were "
            "added when its halves had been seen here beside found heads, and before they were seen together, and those of "
            f"`{MORE_SAMPLES[0]}` when more samples had been seen to teach more on the first tasks. "
            f"{_seeds_so_far(evidence, planned)} The two sides of a pair may be of different machines and versions."
        )
    return ""


def _seeds_so_far(evidence: Evidence, planned: Path) -> str:
    run = {seed for line in evidence.lines.values() for seed in line.results}
    n_planned = len(Profile.read(planned).seeds)
    return f"Of {n_planned} seeds that were planned {len(run)} were run, and the verdicts are by these."


def _variants(evidence: Evidence) -> str:
    """Claims 4 and 5 for the defaults and what they were chosen among."""
    judged = variants(evidence)
    there = [variant for variant in judged if variant.exact_match]
    if len(there) < 2:  # with nothing to compare it with, it is in the claims' table
        return ""
    gone = [variant.side for variant in judged if not variant.exact_match]
    rows = [
        [
            f"`{variant.side[0]}`",
            f"`{variant.side[1]}`",
            claims.points(variant.exact_match),
            str(variant.pairs),
            "" if variant.aer is None else f"{variant.aer:.3f}",
            variant.whole,
            variant.forgetting,
        ]
        for variant in there
        if variant.exact_match
    ]
    header = [
        "rows chosen by",
        "weights trained",
        "exact match, minus full fine-tuning's",
        "pairs",
        "AER",
        "claim 4",
        "claim 5",
    ]
    both = sum(variant.whole == variant.forgetting == HELD for variant in there)
    text = (
        "What the defaults were chosen among, the first line being what they are. Each is compared with LoRA on its own rows. Claim 4 "
        f"holds for {sum(variant.whole == HELD for variant in there)} of these {len(there)}, claim 5 for "
        f"{sum(variant.forgetting == HELD for variant in there)}, and both for {both or 'none'}."
    )
    if gone:
        text += f" No arms are in the folder of {', '.join(f'`{data}` with `{weights}`' for data, weights in gone)}."
    return f"{text}\n\n{_markdown(header, rows)}"


def _defaults(evidence: Evidence) -> str:
    rows = [
        [
            f"`{alternative.default}`",
            alternative.instead,
            alternative.same,
            f"{alternative.setting}: {', '.join(comparison.of_targets)}",
            claims.points(comparison.exact_match),
            claims.nll_text(comparison),
            "" if seconds is None else f"{seconds:.2f}",
            str(comparison.pairs),
        ]
        for alternative, comparison, seconds in measured(evidence)
    ]
    if not rows:
        return ""
    header = [
        "default",
        "instead",
        "on both sides",
        "pool",
        "exact match, default minus other",
        "NLL, the same",
        "seconds, over the other's",
    ]
    return (
        "Each row has one choice of P2DTrainer's defaults against another, everything else being the same; some were compared with "
        "heads that `proxy` found on both sides, when these were the default. Earlier, shares of heads and of rows "
        f"were tried with `{TRIED[0]}` and `{TRIED[1]}`.\n\n"
        f"{_markdown([*header, 'pairs'], rows)}"
    )


def _order(evidence: Evidence, line: Line) -> tuple[bool, int, float]:
    return (line.data, line.parameters) != P2D, -line.epochs, -line.mean("exact_match")


def _table(evidence: Evidence, lines: list[Line]) -> str:
    rows = []
    for line in sorted(lines, key=lambda line: _order(evidence, line)):
        aer = evidence.aer(line)
        first = next(iter(line.results.values()))
        options = [test["options_accuracy"] for test in line.tests.values() if "options_accuracy" in test]
        kinds = {result["memory_kind"] for result in line.results.values()}
        whole = line.data == "full" or line.target not in {result["target"] for result in line.results.values()}
        rows.append(
            [
                f"`{line.data}`",
                f"`{line.parameters}`",
                str(line.epochs),
                f"{line.lr:g}",
                str(len(line.tests)),
                _percent(line.mean("exact_match")) + _spread([test["exact_match"] for test in line.tests.values()]),
                f"{line.mean('nll'):.3f}",
                _percent(sum(options) / len(options)) if options else "",
                f"{evidence.forgotten(line):+.3f}",
                "" if aer is None else f"{aer:.3f}",
                "" if whole else _percent(line.mean_of_arm("rows_of_target") / line.mean_of_arm("rows")),
                _percent(line.mean_of_arm("rows_right") / line.mean_of_arm("rows"))
                if line.setting == "corrupted"
                else "",
                " + ".join(f"{line.seconds(stage):.0f}" for stage in ("localize", "select", "train"))
                if evidence.timed(line)
                else "",
                f"{first['trained_parameters'] / 1e6:.2f} M",
                f"{first['checkpoint_bytes'] / 1e6:.1f} MB",
                f"{line.mean_of_arm('peak_memory_bytes') / 1e9:.2f} GB" if len(kinds) == 1 else "",
            ]
        )
    header = ["data", "parameters", "epochs", "lr", "seeds", "exact match", "NLL", "options", "forgetting", "AER"]
    header += ["of target", "right", "s localize + select + train", "trained", "checkpoint", "peak memory"]
    kept = [column for column in range(len(header)) if any(row[column] for row in rows)]
    return _markdown([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _edges(evidence: Evidence) -> str:
    """How often the best rate is the lowest or the highest that was tried, by the kind of what is trained."""
    tried: dict[tuple[str, ...], set[float]] = {}
    for arm in evidence.tried:
        tried.setdefault(_cell_of(arm), set()).add(arm["lr"])
    best = {_cell_of(result): line.lr for line in evidence.lines.values() for result in line.results.values()}
    found: dict[str, Counter[str]] = {}
    for cell, rates in tried.items():
        if len(rates) > 1:
            where = {min(rates): "the lowest", max(rates): "the highest"}.get(best[cell], "between")
            found.setdefault(Parameters.read(cell[3]).adapter, Counter())[where] += 1
    if not found:
        return ""
    said = [
        f"`{adapter}` in {sum(counts.values()) - counts['between']} of {sum(counts.values())} cells (the lowest in "
        f"{counts['the lowest']}, the highest in {counts['the highest']})"
        for adapter, counts in sorted(found.items())
    ]
    text = (
        f"The best rate is at an edge of those that were tried, where a rate beyond may be better still, for {', for '.join(said)}. "
        "Where two rates were tried it can't be elsewhere."
    )
    differing = [
        f"`{target}` ({ours:g}, and {theirs:g} for `{comparison.theirs[0]}`)"
        for comparison in coupling(evidence)
        for target, (ours, theirs) in comparison.rates.items()
        if ours != theirs
    ]
    if differing:
        text += (
            " The rate is chosen for each cell, so two sides of a comparison may differ in it, too. Claim 3's do for "
            f"{', '.join(differing)}: there the difference may be the rate's."
        )
    return text


def _rate_of_reference(evidence: Evidence) -> str:
    """Where a training that is for all targets would have had another rate, had it been chosen for one of them."""
    tried: dict[tuple[str, ...], list[Result]] = {}
    for arm in evidence.tried:
        if arm["target"] == ANY:
            tried.setdefault(_cell_of(arm), []).append(arm)
    said = []
    for (setting, _, data, parameters, epochs), arms in tried.items():
        for target in sorted(set.intersection(*(set(arm["validation"]) for arm in arms))):
            line = evidence.lines.get((setting, target, data, parameters, int(epochs)))
            best = min(arms, key=lambda arm: arm["validation"][target]["nll"])
            if line is None or best["lr"] == line.lr:
                continue
            chosen = next(arm for arm in arms if arm["lr"] == line.lr)
            said.append(
                f"{target}, {epochs} epochs: {best['lr']:g}, with which its first seed has "
                f"{_percent(best['test'][target]['exact_match'])} % exact match, {_percent(chosen['test'][target]['exact_match'])} "
                f"with {line.lr:g}"
            )
    if not said:
        return ""
    return (
        "Full fine-tuning on the whole pool is one training for all targets, with one rate for all, where the others have a rate for "
        f"each target. Chosen for each it would have been another for some: {'; '.join(said)}."
    )


def _means_by_rate(evidence: Evidence) -> str:
    """What rises and falls with the learning rate: means over the cells of an adapter in which all of its rates were tried."""
    of_adapters: dict[str, dict[tuple[str, ...], dict[float, Result]]] = {}
    for arm in evidence.tried:
        cells = of_adapters.setdefault(Parameters.read(arm["parameters"]).adapter, {})
        cells.setdefault(_cell_of(arm), {})[arm["lr"]] = arm
    rows = []
    for adapter, cells in sorted(of_adapters.items()):
        rates = sorted({lr for tried in cells.values() for lr in tried})
        whole = [tried for tried in cells.values() if len(tried) == len(rates)]
        for lr in rates if len(rates) > 1 and whole else []:
            tests = [test for tried in whole for test in tried[lr]["test"].values()]
            forgotten = sum(tried[lr]["passages_nll"] for tried in whole) / len(whole) - evidence.base_passages_nll
            rows.append(
                [
                    f"`{adapter}`",
                    f"{lr:g}",
                    _percent(sum(test["exact_match"] for test in tests) / len(tests)),
                    f"{sum(test['nll'] for test in tests) / len(tests):.3f}",
                    f"{forgotten:+.3f}",
                    str(len(whole)),
                ]
            )
    if not rows:
        return ""
    header = ["weights", "lr", "exact match", "test NLL", "forgetting", "cells"]
    return f"Means over all cells in which all of a kind of weights' rates were tried:\n\n{_markdown(header, rows)}"


def _cell_of(arm: Result) -> tuple[str, ...]:
    return tuple(str(arm[name]) for name in ("setting", "target", "data", "parameters", "epochs"))


def _name_of(arm: Result) -> str:
    """The name of its cell, as profiles have it."""
    return f"{' '.join(_cell_of(arm))} epochs"


def _rates(evidence: Evidence) -> str:
    rows = []
    names = ("setting", "target", "data", "parameters", "epochs", "lr")
    for arm in sorted(evidence.tried, key=lambda arm: tuple(arm[name] for name in names)):
        for target, test in arm["test"].items():
            validated = arm["validation"][target]
            rows.append(
                [
                    arm["setting"],
                    target,
                    f"`{arm['data']}`",
                    f"`{arm['parameters']}`",
                    str(arm["epochs"]),
                    f"{arm['lr']:g}",
                    f"{validated['nll']:.3f}",
                    f"{test['nll']:.3f}",
                    _percent(test["exact_match"]),
                    f"{arm['passages_nll'] - evidence.base_passages_nll:+.3f}",
                ]
            )
    header = ["setting", "target", "data", "parameters", "epochs", "lr", "validation NLL", "test NLL", "exact match"]
    return _markdown([*header, "forgetting"], rows)


def _base(evidence: Evidence) -> str:
    rows = []
    for target, result in evidence.base.items():
        test, few = result["test"], result["few_shot"]
        options = (
            f"{_percent(test['options_accuracy'])} (a guess: {_percent(test['options_guess'])})"
            if "options_accuracy" in test
            else "no options"
        )
        shots = [_percent(few["exact_match"]), f"{few['nll']:.3f}"]
        rows.append([target, _percent(test["exact_match"]), f"{test['nll']:.3f}", *shots, options])
    header = ["target", "exact match", "NLL", "exact match, 4 shots", "NLL, 4 shots", "likeliest option is right"]
    return _markdown(header, rows)


def _overlap(evidence: Evidence, results: Path) -> str:
    """How many of the chosen heads pairs of targets share, and pairs of seeds of one target."""
    sets = {}
    for path in sorted((results / HEADS).glob("*-proxy-seed*.json")):
        target, _, rest = path.stem.partition("-proxy-seed")
        scores = HeadScores.from_dict(read_json(path)["scores"])
        sets[target, int(rest)] = CHOICES["late"](scores, P2DConfig.head_ratio)
    between: dict[str, list[float]] = {"of two seeds of one target": [], "of two targets": []}
    for ((target, seed), a), ((other, other_seed), b) in itertools.combinations(sets.items(), 2):
        share = len(a & b) / len(a)
        if target == other:
            between["of two seeds of one target"].append(share)
        elif seed == other_seed:
            between["of two targets"].append(share)
    said = [f"{_percent(sum(shares) / len(shares))} % {who}" for who, shares in between.items() if shares]
    return (
        f"Of the heads that `proxy` chooses to train, these are shared on average: {', '.join(said)}." if said else ""
    )


def _provenance(evidence: Evidence) -> str:
    return "\n".join(
        f"- {_machine(where['machine'])}; threads a process: {where['threads']}; "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        for where in evidence.provenance
    )


def _again(evidence: Evidence, results: Path) -> str:
    """Whether what was run once more ended the same, and what it cost there."""
    if evidence.again is None:
        return ""
    folder = results.with_name(RERUN)
    found = compare(folder, results)
    there, here = found["cpu_seconds"]
    rows = []
    for key, line in evidence.again.lines.items():
        first = evidence.lines.get(key)
        aers = [evidence.again.aer(line), first and evidence.aer(first)]
        if line.data != "full" and None not in aers:
            rows.append([line.target, f"`{line.data}`", f"`{line.parameters}`", *(f"{aer:.3f}" for aer in aers[::-1])])
    return (
        f"### Once more on another machine\n\n{found['arms']} of the arms were run once more (`{_folder(folder)}`), on:\n\n"
        f"{_provenance(evidence.again)}\n\nOf {found['judgements']} judgements, NLL and exact match, {found['equal']} are equal "
        f"to the last digit. It took {there / here:.2f} times the CPU seconds. The AER is not the same, since what a stage "
        "takes of a training differs from one machine to another:\n\n"
        + _markdown(["target", "rows chosen by", "weights trained", "AER", "AER there"], sorted(rows))
    )


def _gone_profiles(evidence: Evidence) -> str:
    """What the arms' commands name that is not there any more, and what to call in its place."""
    gone = [f"`{name}`" for name in GONE if any(f" run {name} " in called for called in evidence.commands)]
    if not gone:
        return ""
    there = {str(cell) for cell in Profile.read(FULL).cells()}
    run = {_name_of(arm) for line in evidence.lines.values() for arm in line.results.values()}
    others = ", ".join(f"`{name}`" for name in sorted(run - there))
    return (
        f"Each arm's file has its command. {', '.join(gone)} in these were excerpts of the cells that `full.yaml` had at the time, and "
        "are gone; and what stands behind `--only` was then cut at each `/`. The same cell is run today by its name, which is made "
        f"of what the file says{f' (but for {others}, which is in no profile any more)' * bool(others)}:\n\n```bash\n"
        "python benchmarks/run_evidence.py run benchmarks/evidence/profiles/full.yaml --output rerun "
        f"--only 'mixed qasc {P2D[0]} {P2D[1]} {EPOCHS} epochs'\n```"
    )


def _machine(machine: dict[str, str]) -> str:
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    return f"{gpu}{machine['cpu']}, {machine['cpus']} CPUs, {machine['system']}"


def readme_tables(evidence: Evidence, others: Evidence | None) -> str:
    """The README's tables: of these results, and of what [`read_others`] finds."""
    if others is None:
        return readme_table(evidence)
    return (
        f"{readme_table(evidence)}\n\nAnd on [other tasks](docs/{OTHERS_PAGE}), which no default was chosen by but that heads are drawn:\n\n"
        f"{readme_table(others)}"
    )


def readme_table(evidence: Evidence) -> str:
    """The short table, of the paper's form and what has as many seeds as our line: means over the targets of the mixed pool."""
    sides: dict[tuple[str, str], dict[str, Line]] = {}
    for line in evidence.lines.values():
        if line.setting == "mixed" and line.epochs == EPOCHS and "@" not in line.data + line.parameters:
            sides.setdefault((line.data, line.parameters), {})[line.target] = line
    ours = sides.get(P2D, {})
    seeds = {
        side: [len(lines[target].tests) for target in ours] for side, lines in sides.items() if set(lines) >= set(ours)
    }
    full = {
        side: sides[side]
        for side, counts in seeds.items()
        if side == PAPER or all(count >= least for count, least in zip(counts, seeds[P2D], strict=True))
    }
    rows = []
    for side in sorted(full, key=lambda side: (side != P2D, -_mean(full[side], ours, "exact_match"))):
        lines = [full[side][target] for target in ours]
        aers = [aer for line in lines if (aer := evidence.aer(line)) is not None]
        rows.append(
            [
                f"`{side[0]}`",
                f"`{side[1]}`",
                str(min(seeds[side])),
                _percent(_mean(full[side], ours, "exact_match")),
                f"{_mean(full[side], ours, 'nll'):.3f}",
                f"{sum(aers) / len(aers):.3f}" if len(aers) == len(lines) else "",
                f"{sum(evidence.forgotten(line) for line in lines) / len(lines):+.3f}",
            ]
        )
    header = ["rows chosen by", "weights trained", "seeds", "exact match", "NLL", "AER", "forgetting"]
    if not any(row[5] for row in rows):
        header.pop(5)
        rows = [row[:5] + row[6:] for row in rows]
    return f"Means over {', '.join(f'`{target}`' for target in sorted(ours))}:\n\n{_markdown(header, rows)}"


def with_results(readme: str, table: str) -> str:
    """
    The README with the table between its two marks.

    Raises:
        `ValueError`: if the marks are not there.
    """
    before, start, rest = readme.partition(README_START)
    _, end, after = rest.partition(README_END)
    if not start or not end:
        raise ValueError(f"README.md lacks the lines '{README_START}' and '{README_END}'.")
    return f"{before}{start}\n\n{table}\n\n{end}{after}"


def _mean(lines: dict[str, Line], targets: dict[str, Line], name: str) -> float:
    return sum(lines[target].mean(name) for target in targets) / len(targets)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _spread(values: list[float]) -> str:
    return f" ({_percent(min(values))} to {_percent(max(values))})" if len(values) > 1 else ""


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    table = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)
