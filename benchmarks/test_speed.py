"""``pytest benchmarks --suite quick|table|cpu|gpu|full``: every case of a suite against each of its peers."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import Case


def test_speed(case: Case, peer: str, duel: tuple[Any, Any], benchmark: Any) -> None:
    fight, keep = duel
    benchmark.group = str(case)
    timing = fight.run(benchmark)
    benchmark.extra_info.update(keep(timing))
