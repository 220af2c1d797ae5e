"""Command line: `mmlm-fast report | train | accelerate | doctor`."""

import argparse
import functools
import json
import shlex
import sys
import time
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmlm_fast import __version__, doctor

TRAIN_NEEDS = {
    "accelerate": "accelerate",
    "sklearn": "scikit-learn",
    "jiwer": "jiwer",
    "sacrebleu": "sacrebleu",
    "PIL": "pillow",
    "soundfile": "soundfile",
}
COMMITTED = Path("committed baseline")  # what --against alone means
REPORT_NEEDS = {"matplotlib": "matplotlib", "PIL": "pillow"}
HEARS = {
    "log_mel",
    "kaldi",
    "mel_spectrogram",
    "resample",
    "streaming",
    "model",
    "curves",
    "learning",
}  # jobs that read recordings


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 something failed and is reported, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="mmlm-fast", description="Custom kernels for multimodal language models: check, measure, report."
    )
    parser.add_argument("--version", action="version", version=f"mmlm-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    report = commands.add_parser(
        "report",
        help="check and time on real input what decides, in three minutes; write an HTML report",
        description="Of every op and audio family the case that says most, a thin model and an accelerated model of "
        "Hugging Face, on the speech, picture and text that ship with the package: equality first, then interleaved "
        "times and peak memory, against eager PyTorch, torch.compile and each audio library that is installed. Takes "
        "three minutes on two cores and ends then: what did not fit is listed with its command. --ops measures some of "
        "it with all cases, --full everything. With --model it is about your own model.",
        epilog="exit codes: 0 done, 1 a case failed or is slower than in --against, 2 wrong usage, 130 interrupted "
        "(--resume goes on)",
    )
    report.add_argument(
        "--ops",
        nargs="+",
        metavar="JOB",
        help="all cases of: an op's name, or some of: log_mel, kaldi, mel_spectrogram, resample, streaming, model, "
        "accelerated, curves (over length, batch and threads; cold starts), learning",
    )
    report.add_argument(
        "--model",
        help="of your own model instead: a folder, a config.json (random weights, as many layers as fit) or a name on "
        "the hub: shares of time and memory, what accelerate() does, and what a forward pass, a training step and "
        "generation gain",
    )
    report.add_argument("--data", type=Path, help='with --model: lines of text, or .jsonl with a "text" each')
    report.add_argument("--layers", type=int, help="with --model: at most so many layers of each stack, random weights")
    report.add_argument("--dtype", default="auto", help="with --model: of its weights (default: as they are saved)")
    report.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default: %(default)s)")
    report.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    report.add_argument("--learning", action="store_true", help="also train and judge the presets on real data")
    report.add_argument(
        "--full",
        action="store_true",
        help="all cases of everything, with what takes minutes: compilations, large batches, trainings",
    )
    report.add_argument("--resume", action="store_true", help="go on with the run that --out holds the results of")
    report.add_argument(
        "--seconds", type=float, default=0.4, help="timed per case; more is steadier (default: %(default)s)"
    )
    report.add_argument(
        "--budget",
        type=float,
        help="seconds after which no case is begun any more (default: 155; with --ops, --learning and --full: none)",
    )
    report.add_argument(
        "--against",
        type=Path,
        nargs="?",
        const=COMMITTED,
        metavar="FILE",
        help="earlier results.json of this kind of machine (default: the committed baseline): exit code 1 where ours "
        "gains clearly less than then, as a ratio to the others in the same run",
    )
    report.add_argument("--threads", type=int, help="threads of torch and of the native core (default: torch's)")
    report.add_argument("--quiet", action="store_true", help="no progress bar")
    report.set_defaults(run=_report, parser=report)

    train = commands.add_parser(
        "train",
        help="train, evaluate and describe a model as a configuration file says",
        description="Train the thin model with transformers' Trainer as CONFIG says; evaluate it, also with each "
        "modality shuffled; write model, processor, metrics.json, predictions.jsonl, a model card and TensorBoard logs "
        "into its output folder. CONFIG is a .toml, .yaml or .json file, or the name of one that comes with the "
        "package (--list). Its sections and keys are those of mmlm_fast.training.settings.",
        epilog="exit codes: 0 done, 1 a bad sample or failed training, 2 wrong usage or settings, 130 interrupted",
    )
    train.add_argument("config", nargs="?", metavar="CONFIG", help="file, or name of a shipped configuration")
    train.add_argument("--list", action="store_true", help="name the shipped configurations and presets")
    train.add_argument("--output", help="folder of the results (default: the configuration's)")
    train.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change settings, such as training.max_steps=10 or model.fusion=mean",
    )
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    train.add_argument("--overwrite", action="store_true", help="start anew although the output folder holds results")
    train.add_argument("--quiet", action="store_true", help="no progress bars, no log of losses")
    train.set_defaults(run=_train, parser=train)

    fast = commands.add_parser(
        "accelerate",
        help="what accelerate() replaces in a Hugging Face model, and what it leaves",
        description="Say what mmlm_fast.accelerate(model) replaces in MODEL, what it leaves and why, a line a kind of "
        "place. By default its weights are loaded and every replacement is proved on them; --plan reads its "
        "configuration alone.",
    )
    fast.add_argument("model", metavar="MODEL", help="a folder, a config.json, or a name on the hub")
    fast.add_argument("--plan", action="store_true", help="without weights, nothing proved")
    fast.add_argument("--dtype", default="auto", help="of the weights (default: as they are saved)")
    fast.add_argument("--json", action="store_true", help="one JSON object in place of lines")
    fast.set_defaults(run=_accelerate, parser=fast)

    told = commands.add_parser(
        "doctor",
        help="versions, instruction set, CUDA, and which path each op takes here and why",
        description="Print versions, instruction set, CUDA, and which path each op takes on this machine and why.",
    )
    told.add_argument("op", nargs="?", metavar="OP", help="one op, such as glu: what it takes and why")
    told.add_argument("--dtype", help="of its tensors, such as bfloat16")
    told.add_argument("--size", type=int, help="of its tensors: numbers, or scores, logits or pairs")
    told.add_argument("--device", default="cpu", help="of its tensors: cpu or cuda")
    told.set_defaults(run=_doctor, parser=told)
    args = parser.parse_args(argv)
    return args.run(args)


def _doctor(args: argparse.Namespace) -> int:
    try:
        print(doctor(args.op, dtype=args.dtype, size=args.size, device=args.device))
    except ValueError as error:
        args.parser.error(str(error))
    return 0


def _accelerate(args: argparse.Namespace) -> int:
    import transformers

    from mmlm_fast.hf import planning

    if args.plan and args.dtype != "auto":
        args.parser.error("--dtype is of weights, which --plan does not load")
    transformers.logging.set_verbosity_error()
    try:
        done = planning.plan(args.model) if args.plan else planning.prove(args.model, args.dtype)
    except (ValueError, OSError) as error:
        args.parser.exit(2, f"mmlm-fast accelerate: error: {_in_one_line(error)}\n")
    print(json.dumps(done.as_dict(), indent=1) if args.json else done)
    return 0 if done.replaced else 1


def _report(args: argparse.Namespace) -> int:
    for name in ("threads", "seconds", "budget", "layers"):
        given = getattr(args, name)
        if given is not None and not given > 0:
            args.parser.error(f"--{name} must be more than 0, got {given}")
    jobs = tuple(args.ops or ())
    if args.model is not None and (jobs or args.full or args.learning or args.resume):
        args.parser.error("--model is a report of its own: without --ops, --full, --learning and --resume")
    if args.model is None and (args.data or args.layers or args.dtype != "auto"):
        args.parser.error("--data, --layers and --dtype are of --model, which is not given")
    learns = args.full or args.learning or "learning" in jobs
    needs = REPORT_NEEDS | (TRAIN_NEEDS if learns else {})
    needs |= {"soundfile": "soundfile"} if args.model is None and (not jobs or HEARS & set(jobs)) else {}
    missing = [package for module, package in needs.items() if find_spec(module) is None]
    if missing:
        print(f"mmlm-fast report needs {', '.join(missing)}: pip install 'mmlm-fast[report]'", file=sys.stderr)
        return 2
    import torch

    # By name, as the arrow from the command line to the benchmarks is the only one that way.
    measure = import_module("mmlm_benchmarks.report.measure")
    render = import_module("mmlm_benchmarks.report.render")
    findings = import_module("mmlm_benchmarks.report.findings")
    unknown = sorted(set(jobs) - set(measure.JOBS))
    if unknown:
        args.parser.error(f"--ops must be among {', '.join(measure.JOBS)}, got {', '.join(unknown)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        args.parser.error("--device cuda, but torch finds no CUDA device (see mmlm-fast doctor)")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    budget = args.budget or (None if jobs or args.full or args.learning else measure.BUDGET)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = measure.Options(device, jobs, args.full, args.learning, args.seconds, budget)
    start = time.perf_counter()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        begun = json.loads((args.out / "results.json").read_text(encoding="utf-8")) if args.resume else None
        if args.against == COMMITTED:
            baseline = import_module("mmlm_benchmarks.report.baseline")
            args.against = baseline.committed(import_module("mmlm_benchmarks.harness").environment(device))
        earlier = None if args.against is None else json.loads(args.against.read_text(encoding="utf-8"))
        if args.model is not None:
            own = {"layers": args.layers, "dtype": args.dtype, "data": args.data}
            results = measure.collect_own(args.model, options, progress=not args.quiet, **own)
            render.write_report(results, args.out)
        else:
            save = functools.partial(render.write_report, out=args.out)
            results = measure.collect(options, progress=not args.quiet, resume=begun, save=save)
        slower = [] if earlier is None else findings.slower_than(results, earlier)
    except (OSError, ValueError) as error:
        print(f"mmlm-fast report: {_in_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join([*_given(args), "--resume"])
        print(f"{args.out / 'index.html'}: what was measured so far; to go on: {again}", file=sys.stderr)
        return 130
    for line in findings.sentences(results) if args.model is not None else ():
        print(line)
    rows = len(results["rows"]) + len(results["accelerated"])
    print(f"{args.out / 'index.html'}: {rows} rows in {time.perf_counter() - start:.0f} s")
    for skipped in dict.fromkeys(s["command"] for s in results["skipped"]):
        print(f"did not fit into the time: {skipped}")
    for failure in results["failures"]:
        print(f"FAILED {failure['case']}: {failure['error']}", file=sys.stderr)
    for case in slower:
        print(f"SLOWER than in {args.against}: {case}", file=sys.stderr)
    return 1 if results["failures"] or slower else 0


def _given(args: argparse.Namespace) -> list[str]:
    """The command line of a report, without ``--resume``."""
    words = ["mmlm-fast", "report", *(["--ops", *args.ops] if args.ops else [])]
    for name in ("full", "learning", "quiet"):
        words += [f"--{name}"] if getattr(args, name) else []
    for name in ("out", "device", "seconds", "budget", "against", "threads"):
        value = getattr(args, name)
        words += [f"--{name}", str(value)] if value not in (None, args.parser.get_default(name)) else []
    return words


def _train(args: argparse.Namespace) -> int:
    missing = [package for module, package in TRAIN_NEEDS.items() if find_spec(module) is None]
    if missing:
        print(f"mmlm-fast train needs {', '.join(missing)}: pip install 'mmlm-fast[train]'", file=sys.stderr)
        return 2
    import transformers

    from mmlm_fast.models.presets import PRESETS
    from mmlm_fast.training import BadSampleError, TrainingError, read_settings, shipped, train
    from mmlm_fast.training.card import summary_lines
    from mmlm_fast.training.running import whole_checkpoints

    if args.list:
        print("configurations: " + ", ".join(shipped()))
        print("presets: " + ", ".join(PRESETS))
        return 0
    files = [item for item in args.set if "=" not in item]
    if args.config is None and len(files) == 1:  # train --set key=value my.toml
        args.config = files[0]
        args.set.remove(files[0])
    if args.config is None:
        args.parser.error("CONFIG is required: a file, or one of " + ", ".join(shipped()))
    if args.resume and args.overwrite:
        args.parser.error("--resume goes on, --overwrite starts anew: got both")
    output = [] if args.output is None else [f"output={json.dumps(args.output)}"]
    try:
        settings = read_settings(args.config, [*args.set, *output])
    except ValueError as error:
        args.parser.exit(2, f"mmlm-fast train: error: {_in_one_line(error)}\n")
    if args.quiet:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    others = whole_checkpoints(settings) if args.overwrite else {}  # of an earlier run
    try:
        result = train(settings, resume=args.resume, overwrite=args.overwrite, progress=not args.quiet)
    except BadSampleError as error:
        print(f'bad sample: {_in_one_line(error)} (data.bad_samples = "skip" leaves such out)', file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"mmlm-fast train: {_in_one_line(error)}", file=sys.stderr)
        return 2
    except TrainingError as error:
        traceback.print_exc()
        print(f"mmlm-fast train: training failed at {_in_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mmlm-fast train: interrupted; to go on: {_resuming(args, settings, others)}", file=sys.stderr)
        return 130
    print("\n".join(summary_lines(result)))
    print(f"{settings.output}: model, README.md, metrics.json, predictions.jsonl")
    return 0


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _resuming(args: argparse.Namespace, settings: Any, others: dict[Path, int]) -> str:
    """The command that goes on with an interrupted training, or starts it again where nothing of it is saved yet but
    `others`, checkpoints of an earlier run."""
    from mmlm_fast.training.running import whole_checkpoints

    words = ["mmlm-fast", "train", args.config, *(["--output", args.output] if args.output is not None else [])]
    words += [*(["--set", *args.set] if args.set else []), *(["--quiet"] if args.quiet else [])]
    own = whole_checkpoints(settings).items() - others.items()
    return shlex.join([*words, "--resume" if own else "--overwrite"])


if __name__ == "__main__":
    sys.exit(main())
