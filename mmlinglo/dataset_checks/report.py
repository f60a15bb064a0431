# Copyright (c) mmlinglo contributors. Licensed under Apache-2.0.
"""The findings of the checks."""

from dataclasses import dataclass, field
from typing import Dict, List, Tuple

from .checks import CHECKS


@dataclass
class Finding:
    """All places where one kind of defect was found in one data set.

    Attributes:
        check: Key of :data:`CHECKS`.
        dataset: ``train``, ``val``, ``test`` or several of them; ``config``.
        places: One text per place, with what was found there.
    """

    check: str
    dataset: str
    places: List[str] = field(default_factory=list)

    @property
    def severity(self) -> str:
        return CHECKS[self.check].severity


class Report:
    """Findings by kind, and the data sets that were checked."""

    def __init__(self) -> None:
        self.datasets: Dict[str, dict] = {}
        self._findings: Dict[Tuple[str, str], Finding] = {}

    def add(self, check: str, dataset: str, place: str) -> None:
        """Note a defect.

        Args:
            check: Key of :data:`CHECKS`.
            dataset: Name of the data set.
            place: File, entry and value.
        """
        self._findings.setdefault((check, dataset), Finding(check, dataset)).places.append(place)

    @property
    def findings(self) -> List[Finding]:
        """All findings, errors first, each kind in the order of :data:`CHECKS`."""
        order = list(CHECKS)
        return sorted(
            self._findings.values(),
            key=lambda finding: (finding.severity, order.index(finding.check), finding.dataset),
        )

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def format(self, num_places: int = 3) -> str:
        """Format the report for a terminal.

        Args:
            num_places: Places to print for each finding.
        """
        lines = []
        for name, facts in self.datasets.items():
            keys = [key for key in ('pictures', 'opened', 'boxes', 'classes') if key in facts]
            lines.append(
                ', '.join([f'{name}: {facts["type"]}', *(f'{facts[k]} {k}' for k in keys)])
            )
        for finding in self.findings:
            check, more = CHECKS[finding.check], len(finding.places) - num_places
            times = f', {len(finding.places)} times' if len(finding.places) > 1 else ''
            lines += [
                '',
                f'{check.severity} in {finding.dataset}{times}: {check.problem} [{finding.check}]',
                *(f'    {place}' for place in finding.places[:num_places]),
                *([f'    and {more} more'] if more > 0 else []),
                f'  remedy: {check.remedy}',
            ]
        counts = [(self.count(severity), severity) for severity in ('error', 'warning')]
        summary = ', '.join(f'{count} {what}{"s" * (count > 1)}' for count, what in counts if count)
        return '\n'.join([*lines, '', summary or 'no findings'])

    def as_dict(self) -> dict:
        """Return the whole report, with all places, for JSON."""
        findings = [
            dict(
                check=finding.check,
                dataset=finding.dataset,
                count=len(finding.places),
                places=finding.places,
                **CHECKS[finding.check]._asdict(),
            )
            for finding in self.findings
        ]
        counts = dict(errors=self.count('error'), warnings=self.count('warning'))
        return dict(datasets=self.datasets, **counts, findings=findings)
