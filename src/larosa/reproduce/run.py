"""Running experiments by name, and the report of all of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from larosa.errors import LarosaError
from larosa.reproduce import (
    accuracy,
    calibration_sets,
    equal_bytes,
    figure1,
    figure3,
    figure4,
    figure5,
    frontier,
    gaussianity,
    recipe,
    table1,
    table2,
    table3,
    table4,
    table5,
    table6,
    table9,
    table10,
    table19,
)
from larosa.reproduce.cache import write_whole
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import Experiment
from larosa.reproduce.report import Section, page, to_dict, write_section
from larosa.reproduce.results import Results
from larosa.reproduce.settings import ReproduceSettings
from larosa.utils.progress import stderr
from larosa.version import __version__, source_digest

#: Runs every experiment.
ALL = "all"

#: In the order of the report.
EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        table2.EXPERIMENT,
        table1.EXPERIMENT,
        table3.EXPERIMENT,
        table4.EXPERIMENT,
        table5.EXPERIMENT,
        table6.EXPERIMENT,
        calibration_sets.TABLE_7,
        calibration_sets.TABLE_8,
        table9.EXPERIMENT,
        table10.EXPERIMENT,
        table19.EXPERIMENT,
        figure1.EXPERIMENT,
        figure3.EXPERIMENT,
        figure4.EXPERIMENT,
        figure5.EXPERIMENT,
        gaussianity.EXPERIMENT,
        recipe.EXPERIMENT,
        frontier.EXPERIMENT,
        equal_bytes.EXPERIMENT,
        accuracy.EXPERIMENT,
    )
}


@dataclass(frozen=True)
class Reproduction:
    """What a run produced: the sections, and the files written."""

    model: str
    settings: dict[str, Any]
    sections: list[Section]
    files: list[Path]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        sections = {section.name: to_dict(section, self.settings) for section in self.sections}
        return {"model": self.model, "settings": self.settings, "experiments": sections}


def reproduce(name: str, model: str, folder: Path, settings: ReproduceSettings) -> Reproduction:
    """Run one experiment, or all of them, on a dense model and write the results to `folder`.

    Measurements are kept in `folder`/.cache, so that a run that was stopped goes on where it was and an
    experiment uses what another has measured under the same settings.

    Args:
        name: one of `EXPERIMENTS`, or `all`, which leaves out what lacks its data and adds index.html.
        model: folder or hub name of a dense model.
        folder: made if it is not there.

    Raises:
        LarosaError: an unknown name, a folder that cannot be written to, or anything that conversion and
            evaluation refuse.
    """
    if name != ALL and name not in EXPERIMENTS:
        raise LarosaError(f"unknown experiment '{name}': one of {', '.join([*EXPERIMENTS, ALL])}")
    if folder.exists() and not folder.is_dir():
        raise LarosaError(f"{folder}: a file; name a folder with --out")
    if not folder.absolute().parent.is_dir():
        raise LarosaError(f"{folder.absolute().parent}: no such folder")
    context = Context(model, settings, folder / ".cache")
    used = used_settings(context)
    sections: list[Section] = []
    files: list[Path] = []
    for experiment in EXPERIMENTS.values() if name == ALL else [EXPERIMENTS[name]]:
        if stderr.is_terminal:
            stderr.print(f"{experiment.name}: {experiment.title}", highlight=False)
        section = _run(experiment, context, everything=name == ALL)
        sections.append(section)
        if section.missing is None:
            files += write_section(folder, section, used)
        else:
            print(f"larosa: {experiment.name} left out: {section.missing}", file=sys.stderr)
        if name == ALL:  # after each, so that a run that is stopped leaves a page of what it has
            write_whole(folder / "index.html", page(sections, used, model))
    if name == ALL:
        files.insert(0, folder / "index.html")
    return Reproduction(model, used, sections, files)


def _run(experiment: Experiment, context: Context, everything: bool) -> Section:
    lacking = experiment.lacks(context.settings) if everything else None
    results = Results()
    if lacking is None:
        try:
            results = experiment.run(context)
        except LarosaError as error:
            if not (everything and experiment.left_out_where_refused):
                raise
            lacking = str(error)
    return Section(experiment.name, experiment.title, experiment.claim, results, lacking)


def used_settings(context: Context) -> dict[str, Any]:
    """The exact settings, as they stand under each table."""
    return {
        "model": context.path,
        "model fingerprint": context.fingerprint[:16] if Path(context.path).is_dir() else context.fingerprint,
        "model type": context.config.model_type,
        "the paper's model of this shape": context.paper.name if context.paper else "none",
        "larosa": f"{__version__}, source {source_digest()[:16]}",
        "budget": "weights: every row skips the same fraction of weights",
        "tokens that stay dense": "the first of a text, with every method",
        **context.settings.to_dict(),
        "sequence_length": context.sequence_length,
        "device": context.device,
    }
