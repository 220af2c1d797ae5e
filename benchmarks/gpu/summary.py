"""From facts to committed results, README's table, and what to mend, the most valuable first."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Fact = dict[str, Any]
NOT_ROWS = ("kind", "second", "stage", "job", "differs")
# Who meets it, relative: a gap in what every step of every model runs counts more than one in a rare layer.
USERS = {
    "interval_attention": 10, "attention": 10, "linear_cross_entropy": 8, "qk_norm_rope": 6, "add_norm": 6, "glu": 6,
    "merge_embeddings": 5, "language_model": 5, "decoding": 5, "audio": 4, "log_mel": 4, "clip_loss": 3,
    "siglip_loss": 3, "patch_embed": 2, "norm_pixel_shuffle": 2, "concat_linear": 2, "fuse_modalities": 2,
    "thin_model": 2, "gated_add": 1,
}  # fmt: skip
# Goals on a Hopper card: (words in the case's name, provider or "", at least so many times its speed).
GOALS = (
    ("attention, .*forward$", "SDPA, repeated keys, dense mask", 4.0),
    ("attention, .*backward", "SDPA, repeated keys, dense mask", 3.0),
    ("attention, ", "FlexAttention", 1.2),
    ("packed vision attention, .*windows", "transformers' loop, sdpa", 20.0),
    ("decoding", "SDPA, repeated keys, dense mask", 3.0),
    ("clip_loss", "torch.compile", 1.3),
    ("siglip_loss", "eager", 3.0),
    ("siglip_loss", "torch.compile", 1.5),
    ("merge_embeddings", "eager", 4.0),
    ("merge_embeddings", "torch.compile", 2.0),
    ("rope", "eager", 6.0),
    ("rope", "torch.compile", 1.5),
    ("add_norm", "eager", 4.0),
    ("glu", "eager", 2.5),
    ("concat_linear", "eager", 1.05),
    ("fuse_modalities", "eager", 2.5),
    ("fuse_modalities", "torch.compile", 1.1),
    ("pixel shuffle", "eager", 3.0),
    ("pixel shuffle", "torch.compile", 1.2),
    ("patchify", "eager", 3.0),
    ("log-mel on the device", "torch.stft chain", 6.0),
)
# (words in the case's name, milliseconds at most, GiB at most)
CEILINGS = (
    ("linear_cross_entropy, 152k classes, forward", 65.0, 6.0),
    ("linear_cross_entropy, 152k classes, 30 %", 22.0, 6.0),
)


def what_to_mend(facts: list[Fact]) -> tuple[list[str], bool]:
    """Lines for a person, the most valuable first, and whether all was checked and holds; a missed goal is no fault."""
    is_rehearsal = any(f["kind"] == "probe" and f["stand_in"] for f in facts)
    broken = _broken(facts)
    slow = [] if is_rehearsal else _missed_goals(facts)
    checks, tests = [f for f in facts if f["kind"] == "check"], tests_of(facts)
    lines = [f"{len(facts)} facts; checks: {sum(bool(c['ok']) for c in checks)} of {len(checks)} hold; "
             f"{sum(f['kind'] == 'time' for f in facts)} timings"]  # fmt: skip
    if tests is not None:
        end = "" if tests["finished"] else ", cut off"
        lines.append(f"tests: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped{end}")
    if is_rehearsal:
        lines.append("a rehearsal: nothing here says anything about a GPU")
    lines.append("" if broken or slow else "nothing to mend" if checks else "nothing was checked")
    lines += [text for _, text in sorted(broken, key=lambda item: -item[0])]
    lines += [text for _, text in sorted(slow, key=lambda item: -item[0])]
    return lines, bool(checks) and not broken


def _broken(facts: list[Fact]) -> list[tuple[float, str]]:
    return [*_lost_jobs(facts), *_failed_checks(facts), *_failed_calls(facts), *_failed_tests(facts)]


def merged(parts: list[list[Fact]]) -> list[Fact]:
    """Facts of several calls: a later one replaces what was known of a job, a timed case or a file of tests."""
    facts: list[Fact] = []
    for part in parts:
        before, found = _found(facts), _found(part)
        files = {path for f in part if f["kind"] == "tests" for path in f["files"]}
        facts = [f for f in facts if _key(f) not in found and not (f["kind"] == "test failed" and _file(f) in files)]
        # That it got no time is no news of a job that ran before.
        facts += [f for f in part if not (f["kind"] in ("job", "start") and _key(f) in before - found)]
    return facts


def _key(fact: Fact) -> tuple[Any, ...]:
    """A job; of what is timed, one of its cases."""
    return fact.get("stage"), fact.get("job"), fact["case"] if fact["kind"] in ("time", "not timed") else None


def _file(fact: Fact) -> str:
    return fact["test"].partition("::")[0]


def _found(facts: list[Fact]) -> set[tuple[Any, ...]]:
    """Jobs that found something, and cases that were timed. Tests go by their files."""
    silent = ("start", "try", "job", "not timed", "tests", "test failed")
    died = {_key(f) for f in facts if f["kind"] == "job" and str(f["status"]).startswith(("crashed", "hung", "CUDA"))}
    found = died | {_key(f) for f in facts if f["kind"] not in silent}
    return found | {(stage, job, None) for stage, job, _ in found}


def tests_of(facts: list[Fact]) -> dict[str, Any] | None:
    """Counts over the files of tests, each as it was run last; None where none was."""
    runs = [f for f in facts if f["kind"] == "tests"]
    if not runs:
        return None
    files: dict[str, dict[str, int]] = {}
    for run in runs:
        files.update(run["files"])
    names = ("passed", "failed", "skipped")
    counts = {name: sum(counts[name] for counts in files.values()) for name in names}
    return counts | {"finished": runs[-1]["finished"]}


def users_of(job: str) -> int:
    return next((n for name, n in USERS.items() if job == name or job.startswith(f"{name}_")), 1)


def _lost_jobs(facts: list[Fact]) -> Iterable[tuple[float, str]]:
    ended = {(f["stage"], f["job"]): f for f in facts if f["kind"] == "job"}
    for fact in facts:
        key = (fact.get("stage"), fact.get("job"))
        if fact["kind"] == "start" and key not in ended and key[0] != "warm":
            yield 300.0 + users_of(key[1]), f"LOST    {key[0]} {key[1]}: the suite ended before it did"
    for (stage, job), fact in ended.items():
        status = str(fact["status"])
        if stage == "warm" or status == "done":
            continue
        if status in ("no time", "cut off", "killed with the suite"):
            worth = {"check": 250.0, "tests": 50.0}.get(stage, 20.0)
            yield worth + users_of(job), f"NOT RUN {stage} {job}: {status}{_last_try(facts, stage, job)}"
        elif not status.startswith("failed"):
            yield 400.0 + users_of(job), f"DIED    {stage} {job}: {status}{_last_try(facts, stage, job)}"
        elif not any(_tells_of_a_failure(f, stage, job) for f in facts):
            last = str(fact.get("tail", "")).strip().splitlines()[-1:]
            yield 350.0 + users_of(job), f"FAILED  {stage} {job}: {status}: {''.join(last)[:200]}"


def _tells_of_a_failure(fact: Fact, stage: str, job: str) -> bool:
    if (fact.get("stage"), fact.get("job")) != (stage, job):
        return False
    return fact["kind"] in ("failed", "test failed") or (fact["kind"] == "check" and not fact["ok"])


def _failed_calls(facts: list[Fact]) -> Iterable[tuple[float, str]]:
    """Of ours in what is timed; that a peer cannot do something is in its facts, and nothing to mend here."""
    for f in facts:
        if f["kind"] == "failed" and f["ours"] and f["stage"] != "warm":
            first = str(f["message"]).splitlines()[0][:200]
            yield 150.0 + users_of(f["group"]), f"FAILED  {f['stage']} {f['case']}: {first}"


def _last_try(facts: list[Fact], stage: str, job: str) -> str:
    tried = [f for f in facts if f["kind"] == "try" and (f["stage"], f["job"]) == (stage, job)]
    if not tried:
        return ""
    words = (tried[-1].get(k) for k in ("check", "case", "dtype", "mode"))
    return f", during {', '.join(str(w) for w in words if w)}"


def _failed_checks(facts: list[Fact]) -> Iterable[tuple[float, str]]:
    for f in facts:
        if f["kind"] == "check" and not f["ok"]:
            why = f.get("message") or f"error {f.get('of_allowed')} of what is allowed"
            yield (
                200.0 + users_of(f["job"]),
                f"WRONG   {f['job']}: {f['check']}, {f['dtype']}, {f['mode']}: {str(why).splitlines()[0][:200]}",
            )


def _failed_tests(facts: list[Fact]) -> Iterable[tuple[float, str]]:
    for f in facts:
        if f["kind"] == "test failed":
            stem = Path(f["test"].partition("::")[0]).stem.removeprefix("test_")
            last = f["text"].strip().splitlines()[-1:]
            yield 100.0 + users_of(stem), f"TEST    {f['test']} ({f['when']}): {''.join(last)[:160]}"


def _missed_goals(facts: list[Fact]) -> list[tuple[float, str]]:
    times = [f for f in facts if f["kind"] == "time"]
    ours = {f["case"]: f for f in times if f["ours"]}
    missed = []
    for f in times:
        if f["ours"] or f["case"] not in ours:
            continue
        goals = [goal for words, provider, goal in GOALS if re.search(words, f["case"]) and provider == f["provider"]]
        goal, reached = max([1.0, *goals]), f["ours_faster"]
        if _is_number(reached) and _is_number(f["median_ms"]) and reached < goal:
            text = f"SLOW    {f['case']}: {reached:.2f}x {f['provider']} ({f['median_ms']:.3g} ms), goal {goal:g}x"
            missed.append((users_of(f["group"]) * goal / max(reached, 1e-9), text))
    for case, f in ours.items():
        for words, milliseconds, gib in CEILINGS:
            if words not in case or not _is_number(f["median_ms"]):
                continue
            over = max(f["median_ms"] / milliseconds, (f["peak_mib"] or 0) / 1024 / gib)
            if over > 1:
                reached = f"{f['median_ms']:.3g} ms, {f['peak_mib'] or 0:.0f} MiB"
                text = f"SLOW    {case}: {reached}, goal {milliseconds:g} ms, {gib:g} GiB"
                missed.append((users_of(f["group"]) * over, text))
    return missed


def _is_number(value: Any) -> bool:
    """Facts hold NaN and infinity as words."""
    return isinstance(value, float | int)


def results_of(facts: list[Fact]) -> dict[str, Any]:
    """What benchmarks/results/ holds: the report's rows, and the checks with their errors.

    Raises:
        ValueError: without the facts of the stage `probe`, or of a rehearsal.
    """
    last = {f["kind"]: f for f in facts}
    missing = [kind for kind in ("probe", "environment") if kind not in last]
    if missing:
        raise ValueError(f"facts of the stage probe are needed, these have no {' and no '.join(missing)}")
    environment = {k: v for k, v in last["environment"].items() if k not in NOT_ROWS}
    timed = {(f["case"], f["provider"]): f for f in facts if f["kind"] == "time" and _is_number(f["median_ms"])}
    rows = _without_surroundings(list(timed.values()), "time")
    keep = ("job", "check", "dtype", "mode", "ok", "of_allowed", "relative", "nan", "message")
    checks = [{k: f[k] for k in keep if k in f} for f in facts if f["kind"] == "check"]
    machine = {k: round(v, 1) for k, v in last.get("machine", {}).items() if k.startswith(("copy", "matmul"))}
    _add_fractions(rows, machine)
    return {
        "environment": environment | {"stand_in": last["probe"]["stand_in"], "card": last.get("card", {}).get("smi")},
        "machine": machine,
        "rows": rows,
        "checks": checks,
        "candidates": _without_surroundings(facts, "candidate"),
        "compile_seconds_beside_checks": _without_surroundings(facts, "compile"),
        "tests": tests_of(facts),
        "failures": [text for _, text in sorted(_broken(facts), key=lambda item: -item[0])],
        "not_measured": _not_measured(facts, rows),
    }


def _not_measured(facts: list[Fact], rows: list[dict[str, Any]]) -> list[str]:
    measured = {row["case"] for row in rows}
    missing = dict.fromkeys(f["case"] for f in facts if f["kind"] == "not timed")
    return [case for case in missing if case not in measured]


def _without_surroundings(facts: list[Fact], kind: str) -> list[Fact]:
    return [{k: v for k, v in f.items() if k not in NOT_ROWS} for f in facts if f["kind"] == kind]


def _add_fractions(rows: list[dict[str, Any]], machine: dict[str, float]) -> None:
    """Of the machine's limit, as measured there."""
    if len(machine) < 2:
        return
    for row in rows:
        floor = max(row["bytes_moved"] / machine["copy_gb_per_s"], row["flops"] / machine["matmul_gflop_per_s"]) / 1e6
        row["fraction_of_limit"] = round(floor / row["median_ms"], 4) if floor and row["median_ms"] else None


def file_name(results: dict[str, Any]) -> str:
    """``h100-2026-11-26.json``."""
    environment = results["environment"]
    known = re.search(r"\b(GH200|[ABHLV]\d{2,3}S?|RTX\s?(?:PRO\s?)?\d{4})\b", environment["device"])
    words = known[1] if known else environment["device"]
    return f"{re.sub(r'[^a-z0-9]+', '-', words.lower()).strip('-')}-{environment['date']}.json"


def results_of_a_gpu(facts: list[Fact]) -> dict[str, Any]:
    """Results that may be kept: those of a rehearsal are refused.

    Raises:
        ValueError: for a rehearsal's facts, or without those of the stage probe.
    """
    results = results_of(facts)
    if results["environment"]["stand_in"] or results["environment"]["device_type"] != "cuda":
        raise ValueError("these facts are a rehearsal's, not a GPU's: they are no results")
    return results


def onto(earlier: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Results with what an earlier call found and these did not measure again.

    Raises:
        ValueError: for results of another card.
    """
    cards = [of["environment"]["device"] for of in (earlier, results)]
    if cards[0] != cards[1]:
        raise ValueError(f"results of one card go together: got {cards[0]} and {cards[1]}")
    timed, jobs = {row["case"] for row in results["rows"]}, {check["job"] for check in results["checks"]}
    rows = results["rows"] + [row for row in earlier["rows"] if row["case"] not in timed]
    return results | {
        "rows": rows,
        "checks": [check for check in earlier["checks"] if check["job"] not in jobs] + results["checks"],
        "candidates": earlier["candidates"] + results["candidates"],
        "tests": results["tests"] or earlier["tests"],
        "not_measured": [
            case for case in results["not_measured"] if case not in {row["case"] for row in earlier["rows"]}
        ],
    }


def write_results(results: dict[str, Any], folder: Path) -> Path:
    """Write results into `folder`, which is made if need be, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(results)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
