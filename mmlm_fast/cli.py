"""Command line: `mmlm-fast report | doctor`."""

import argparse
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from mmlm_fast import __version__
from mmlm_fast.doctor import doctor

REPORT_NEEDS = {"matplotlib": "matplotlib", "soundfile": "soundfile", "PIL": "pillow"}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 something failed and is reported, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="mmlm-fast", description="Custom kernels for multimodal language models: check, measure, report."
    )
    parser.add_argument("--version", action="version", version=f"mmlm-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    report = commands.add_parser(
        "report",
        help="check and time everything on real input; write an HTML report",
        description="Run the model and every op on the speech, picture and text that ship with the package, in "
        "reference and fast form: equality first, then interleaved times and peak memory, against eager PyTorch, "
        "torch.compile and each audio library that is installed. Takes about three minutes on two cores.",
    )
    report.add_argument(
        "--ops",
        nargs="+",
        metavar="JOB",
        help="some of: concat_linear, fuse_modalities, log_mel, kaldi, mel_spectrogram, resample, streaming, model",
    )
    report.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default: %(default)s)")
    report.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    report.add_argument(
        "--full", action="store_true", help="also what takes minutes: compilations, contrastive losses of large batches"
    )
    report.add_argument(
        "--seconds", type=float, default=0.6, help="timed per case; more is steadier (default: %(default)s)"
    )
    report.add_argument("--threads", type=int, help="threads of torch and of the native core (default: torch's)")
    report.add_argument("--quiet", action="store_true", help="no progress bar")
    report.set_defaults(run=_report, parser=report)

    told = commands.add_parser(
        "doctor",
        help="versions, instruction set, CUDA, and which path each op takes here and why",
        description="Print versions, instruction set, CUDA, and which path each op takes on this machine and why.",
    )
    told.set_defaults(run=lambda args: print(doctor()) or 0)
    args = parser.parse_args(argv)
    return args.run(args)


def _report(args: argparse.Namespace) -> int:
    missing = [package for module, package in REPORT_NEEDS.items() if find_spec(module) is None]
    if missing:
        print(f"mmlm-fast report needs {', '.join(missing)}: pip install 'mmlm-fast[report]'", file=sys.stderr)
        return 2
    import torch

    # By name, as the arrow from the command line to the benchmarks is the only one that way.
    benchmarks = import_module("mmlm_benchmarks.report")
    known = import_module("mmlm_benchmarks.report.collect").JOBS
    unknown = sorted(set(args.ops or ()) - set(known))
    if unknown:
        args.parser.error(f"--ops must be among {', '.join(known)}, got {', '.join(unknown)}")
    if args.threads is not None and args.threads < 1:
        args.parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.device == "cuda" and not torch.cuda.is_available():
        args.parser.error("--device cuda, but torch finds no CUDA device (see mmlm-fast doctor)")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    results = benchmarks.collect(device, args.ops, full=args.full, seconds=args.seconds, progress=not args.quiet)
    benchmarks.write_report(results, args.out)
    print(f"{args.out / 'index.html'}: {len(results['rows'])} rows in {time.perf_counter() - start:.0f} s")
    for failure in results["failures"]:
        print(f"FAILED {failure['case']}: {failure['error']}", file=sys.stderr)
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
