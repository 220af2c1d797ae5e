"""What results.json holds, field by field: ``python -m mmlm_benchmarks.report.schema`` prints it as Markdown."""

from typing import Any, NamedTuple

from mmlm_benchmarks.tables import LEFT, markdown_table

NUMBER = (int, float)
MAYBE = (int, float, type(None))


class Field(NamedTuple):
    """One field: the types that it may have, and what it means."""

    types: tuple[type, ...]
    meaning: str


ROW = {
    "group": Field((str,), "audio, model, or the op"),
    "job": Field((str,), "what `mmlm-fast report --ops` calls it"),
    "case": Field((str,), "one job at one size; its rows are one a provider"),
    "shape_from": Field((str,), "the model or setting that the size is taken from"),
    "provider": Field((str,), "who computes it"),
    "ours": Field((bool,), "whether that is mmlm-fast"),
    "median_ms": Field(NUMBER, "of one call; p20_ms and p80_ms: percentiles"),
    "p20_ms": Field(NUMBER, ""),
    "p80_ms": Field(NUMBER, ""),
    "speedup": Field(NUMBER, "over the first provider; ours: median of paired ratios, others: ratio of medians"),
    "speedup_p20": Field(MAYBE, ""),
    "speedup_p80": Field(MAYBE, ""),
    "ours_faster": Field(MAYBE, "its time over ours, median of neighbouring calls; null for ours"),
    "ours_faster_p20": Field(MAYBE, ""),
    "ours_faster_p80": Field(MAYBE, ""),
    "ours_faster_low": Field(MAYBE, "95 % confidence interval of that median"),
    "ours_faster_high": Field(MAYBE, ""),
    "peak_mib": Field(MAYBE, "memory of one call beyond what was held before; null where the system does not tell"),
    "relative_error": Field(MAYBE, "norm, against float64; null where a provider computes another thing"),
    "allowed_error": Field(MAYBE, "what it may be"),
    "threads": Field((int,), "of torch and of the native core"),
    "bytes_moved": Field((int,), "each input read once, each output written once; 0: not stated"),
    "flops": Field((int,), ""),
    "host_us": Field(MAYBE, "until a call returns, on CUDA"),
    "fraction_of_limit": Field(MAYBE, "time that bytes and flops need at the machine's rates, over the time taken"),
}
ACCELERATED = {
    "case": Field((str,), ""),
    "shape": Field((str,), "the configuration, and what of it was left out to fit"),
    "kinds": Field((list,), "kinds of place that were replaced"),
    "threads": Field((int,), ""),
    "load": Field(NUMBER, "load average"),
    "stock_s": Field(NUMBER, "median of a call as transformers has it; ours_s: accelerated"),
    "ours_s": Field(NUMBER, ""),
    "speedup": Field(NUMBER, "median of paired ratios"),
    "speedup_p20": Field(NUMBER, ""),
    "speedup_p80": Field(NUMBER, ""),
    "speedup_low": Field(NUMBER, "95 % confidence interval of that median"),
    "speedup_high": Field(NUMBER, ""),
    "stock_mib": Field(MAYBE, "peak memory; ours_mib: accelerated"),
    "ours_mib": Field(MAYBE, ""),
    "gradients_mib": Field(NUMBER, "part of both"),
}
TOP = {
    "environment": Field((dict,), "device, versions, date, commit, threads, `others_load`: what other programs took"),
    "options": Field((dict,), "what was asked for"),
    "rows": Field((list,), "see below"),
    "accelerated": Field((list,), "Hugging Face models before and after `accelerate`, see below; with `equal` (tokens) "
                         "or `difference` (norm over loss and gradients)"),
    "generation": Field((list,), "greedy generation of the thin model in reference and fast form"),
    "learning": Field((list,), "trainings and their controls, with --learning"),
    "scaling": Field((list,), "log-mel over clip length"),
    "memory": Field((list,), "contrastive losses over the batch"),
    "curves": Field((list,), "time and memory over length, batch, threads: curve, along, x, provider, ms, peak_mib"),
    "starts": Field((list,), "seconds of fresh processes: what, seconds"),
    "rates": Field((list,), "bytes and flops a second, by number of threads, at the start and at the end"),
    "not_measured": Field((list,), "what needs a GPU"),
    "missing_peers": Field((list,), "what could be compared with and is not, each with the reason"),
    "failures": Field((list,), "case and error"),
    "skipped": Field((list,), "cases that did not fit into the time, with the command that runs each"),
    "seconds_by_case": Field((dict,), "how long each took, its check included"),
    "finished": Field((bool,), "false where the run was cut off"),
}  # fmt: skip


def problems(results: dict[str, Any]) -> list[str]:
    """What of `results` is not as described; empty where all is."""
    found = list(_problems("results", results, TOP, {"machine", "last_gpu_result", "own"}))
    for i, row in enumerate(results.get("rows", [])):
        found += _problems(f"rows[{i}]", row, ROW, set())
    for i, row in enumerate(results.get("accelerated", [])):
        found += _problems(f"accelerated[{i}]", row, ACCELERATED, {"equal", "difference", "gradients_difference"})
    return found


def _problems(where: str, found: dict[str, Any], fields: dict[str, Field], others: set[str]) -> list[str]:
    told = [f"{where} lacks {name}" for name in fields.keys() - found.keys()]
    told += [f"{where}.{name} is not described" for name in found.keys() - fields.keys() - others]
    for name, value in found.items():
        if name in fields and type(value) not in fields[name].types:
            told.append(f"{where}.{name} is {type(value).__name__}")
    return told


def markdown() -> str:
    """The description as tables."""
    parts = ["# results.json", ""]
    parts += ["Written by `mmlm-fast report`; this page by `python -m mmlm_benchmarks.report.schema`.", ""]
    more = "Beside these there are `machine` (rates), `last_gpu_result`, and with --model `own`: the model, what "
    more += "accelerate did and left, and the shares of time and memory by what a module is."
    for title, fields in (("The file", TOP), ("A row", ROW), ("A row of accelerated", ACCELERATED)):
        lines = [(f"`{n}`", " or ".join(t.__name__ for t in f.types), f.meaning) for n, f in fields.items()]
        parts += [f"## {title}", "", markdown_table(("field", "type", "meaning"), lines, alignment=[LEFT] * 3), ""]
    return "\n".join([*parts, more, ""])


if __name__ == "__main__":
    print(markdown(), end="")
