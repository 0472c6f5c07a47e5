"""
Tries each part of P2D on a tiny model of each attention layout, and writes what worked into docs/compatibility.md and, in
short, into README.md.

    python -m tests.compatibility

A cell is "yes" where the part ran and its result was checked, "refused" where an error of ours said why not before
anything was changed, and empty where the part is not made for such models. Anything else ends the script.
tests/test_compatibility.py holds both pages to it.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel
from trl import SFTConfig

from p2d_peft import HeadSet, HeadSparseConfig, P2DConfig, P2DDataSelector, P2DTrainer, localize_heads
from p2d_peft.heads import ModelGeometry
from p2d_peft.tuners.head_sparse import save_as_lora

from .tiny_models import LAYOUTS, Layout, random_batch, tiny_tokenizer


ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "compatibility.md", ROOT / "README.md"


def is_causal(layout: Layout) -> bool:
    return layout.auto == "AutoModelForCausalLM"


def is_language_model(layout: Layout) -> bool:
    return is_causal(layout) or layout.inputs == "text to text"


def output(model: PreTrainedModel | PeftModel, layout: Layout) -> torch.Tensor:
    with torch.no_grad():
        return model(**layout.batch())[0]


def adapted(layout: Layout) -> PeftModel:
    """A model with an adapter on one head of each stack, in the state after some training."""
    # frozen, as PEFT freezes it: PyTorch rounds differently in Mamba layers where no weight wants a gradient
    model = layout.model().requires_grad_(False)
    heads = HeadSet([(layer, 2) for layer in layout.projections])
    return get_peft_model(model, HeadSparseConfig(heads=heads, init_weights=False))


def train(layout: Layout, folder: Path) -> None:
    model = adapted(layout)
    before = copy.deepcopy(model.state_dict())
    model(**layout.batch())[0].float().square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "head_sparse_delta" in name}, changed


def save_and_load(layout: Layout, folder: Path) -> None:
    model = adapted(layout)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(layout.model(), folder)
    assert torch.equal(output(loaded, layout), output(model, layout))


def merge(layout: Layout, folder: Path) -> None:
    model = adapted(layout)
    expected = output(model, layout)
    torch.testing.assert_close(output(model.merge_and_unload(), layout), expected, atol=1e-5, rtol=1e-4)


def export_lora(layout: Layout, folder: Path) -> None:
    model = adapted(layout)
    report = save_as_lora(model, folder)
    assert report.error == 0
    loaded = PeftModel.from_pretrained(layout.model(), folder)
    torch.testing.assert_close(output(loaded, layout), output(model, layout), atol=1e-5, rtol=1e-4)


def localize_by(method: str) -> Callable[[Layout, Path], None]:
    def check(layout: Layout, folder: Path) -> None:
        batch = random_batch()
        if not is_causal(layout):
            batch["labels"] = random_batch(tokens=7, seed=1)["labels"]  # the decoder's, of a length of their own
        model = layout.model()
        scores = localize_heads(model, [batch], method=method)
        assert scores.n_heads == len(ModelGeometry.of(model).heads)
        assert len(scores.values[scores.values.isfinite()].unique()) > 1

    return check


def sums(n: int) -> Dataset:
    """Rows of six tokens: eight demonstrations and a query fit into the shortest context among the tiny models."""
    draws = [divmod(i, 10) for i in range(n)]
    return Dataset.from_list([{"prompt": f"{a}+{b}=", "completion": str((a + b) % 10)} for a, b in draws])


def select_by(scorer: str) -> Callable[[Layout, Path], None]:
    def check(layout: Layout, folder: Path) -> None:
        if "sliding_window" in layout.changes:  # one that reaches back to the demonstrations of `icl`
            layout = dataclasses.replace(layout, changes={**layout.changes, "sliding_window": 64})
        model = layout.model()
        args = SFTConfig(bf16=False, report_to="none")
        heads = HeadSet([(layer, 2) for layer in layout.projections])
        selector = P2DDataSelector(
            model, tiny_tokenizer(), heads=heads, target=sums(4), scorer=scorer, args=args, num_samples=3
        )
        assert len(selector.select(sums(16))) == 3
        assert len(selector.scores.unique()) > 3

    return check


def run_trainer(layout: Layout, folder: Path) -> None:
    config = P2DConfig(
        str(folder), bf16=False, use_cpu=True, max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        reference_steps=0, gradient_checkpointing=False, head_ratio=0.25, data_ratio=0.25, learning_rate=1e-2,
        localize_method="proxy",
    )  # fmt: skip
    pool = sums(16)
    trainer = P2DTrainer(
        layout.model(), config, train_dataset=pool, target_dataset=sums(4), processing_class=tiny_tokenizer()
    )
    trainer.train()
    deltas = [p for name, p in trainer.model.named_parameters() if "head_sparse_delta" in name]
    assert trainer.report.selected_rows == 4 and deltas and any((delta != 0).any() for delta in deltas)


# what is tried -> on which models it is meant to work, and how it is tried
Check = tuple[Callable[[Layout], bool], Callable[[Layout, Path], None]]
CHECKS: Mapping[str, Check] = {
    "trains": (lambda _: True, train),
    "saves and loads": (lambda _: True, save_and_load),
    "merges": (lambda _: True, merge),
    "exact LoRA": (lambda _: True, export_lora),
    "`proxy`": (is_language_model, localize_by("proxy")),
    "`gate`": (is_language_model, localize_by("gate")),
    "`affinity`": (is_causal, select_by("affinity")),
    "`icl`": (is_causal, select_by("icl")),
    "`gradient`": (is_causal, select_by("gradient")),
    "`influence`": (is_causal, select_by("influence")),
    "`P2DTrainer`": (is_causal, run_trainer),
}
# the columns of the table in short, and what is behind each
PARTS = {
    "HeadSparse: train, save, merge, exact LoRA": ("trains", "saves and loads", "merges", "exact LoRA"),
    "localizing: `proxy`, `gate`": ("`proxy`", "`gate`"),
    "selecting: `affinity`, `gradient`, `influence`": ("`affinity`", "`gradient`", "`influence`"),
    "selecting: `icl`": ("`icl`",),
    "`P2DTrainer`": ("`P2DTrainer`",),
}
SIGNS = {"yes": "✓", "refused": "✗", "": ""}


def outcome(layout: Layout, check: Check) -> str:
    """A cell of the table: `"yes"`, `"refused"` or, where the part is not made for such models, `""`."""
    meant, tried = check
    if not meant(layout):
        return ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tried(layout, Path(folder))
        except ValueError as error:
            if "use " not in str(error):  # ours tell the way out
                raise
            return "refused"
    return "yes"


def name_of(layout: Layout) -> str:
    return layout.config.removesuffix("Config").removesuffix("Text").replace("_", ".")


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join([row(header), row(["---", *[":---:"] * (len(header) - 1)]), *map(row, rows)])


Outcomes = Mapping[str, Mapping[str, str]]  # by layout, by check


def full_table(outcomes: Outcomes) -> str:
    """A row for each layout, a column for each check."""
    rows = [
        [f"{name_of(LAYOUTS[name])} (`{name}`)", *(SIGNS[cells[c]] for c in CHECKS)]
        for name, cells in outcomes.items()
    ]
    return table(["model", *CHECKS], rows)


def short_table(outcomes: Outcomes) -> str:
    """A row for all architectures of which the same works."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, cells in outcomes.items():
        signs = []
        for checks in PARTS.values():
            found = {cells[check] for check in checks}
            assert len(found) == 1, (name, checks)  # else the parts have to be cut in another way
            signs.append(SIGNS[found.pop()])
        names = alike.setdefault(tuple(signs), [])
        if name_of(LAYOUTS[name]) not in names:
            names.append(name_of(LAYOUTS[name]))
    return table(["architectures", *PARTS], [[", ".join(names), *signs] for signs, names in alike.items()])


def replaced(page: str, made: str) -> str:
    """A page with a new table between its marks."""
    before, begin, rest = page.partition("<!-- made by python -m tests.compatibility -->\n")
    _, end, after = rest.partition("<!-- end -->")
    assert begin and end, "the page lacks the marks of the table"
    return f"{before}{begin}\n{made}\n\n{end}{after}"


def main() -> None:
    torch.set_num_threads(1)
    outcomes: dict[str, dict[str, str]] = {}
    for name, layout in LAYOUTS.items():
        outcomes[name] = {check: outcome(layout, CHECKS[check]) for check in CHECKS}
        print(name, outcomes[name])
    for page, made in ((PAGE, full_table(outcomes)), (README, short_table(outcomes))):
        page.write_text(replaced(page.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
