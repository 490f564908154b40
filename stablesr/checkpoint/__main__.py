"""`python -m stablesr.checkpoint`: pull, convert and verify weights."""

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

import torch

from stablesr import hub
from stablesr.checkpoint import convert
from stablesr.config import PRESETS
from stablesr.errors import StableSRError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: Collection[str] | None = None) -> int:
    """Parse and do; user errors are one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m stablesr.checkpoint",
        description="Weights of StableSR. " + hub.LICENCE_NOTICE,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    pull = commands.add_parser("pull", help="download the published files of a preset")
    pull.add_argument("preset", choices=sorted(hub.RELEASED))

    make = commands.add_parser("convert", help="make one model file of released checkpoints")
    make.add_argument("stablesr", type=Path, help="stablesr_*.ckpt")
    make.add_argument("cfw", type=Path, help="vqgan_cfw_*.ckpt")
    make.add_argument(
        "--preset", required=True, choices=sorted(hub.RELEASED), help="what stablesr_*.ckpt was trained as"
    )
    make.add_argument("--output", "-o", type=Path, required=True, help="a .safetensors file")
    make.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")

    verify = commands.add_parser("verify", help="read the downloaded files of a preset against their checksums")
    verify.add_argument("preset", choices=sorted(hub.RELEASED))

    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        if options.command == "pull":
            print(hub.LICENCE_NOTICE, file=sys.stderr)
            for path in hub.pull(options.preset, progress=_show_progress):
                print(path)
        elif options.command == "convert":
            print(
                convert(options.stablesr, options.cfw, options.output, PRESETS[options.preset], DTYPES[options.dtype])
            )
        else:
            hub.verify(options.preset)
            print("ok")
    except (StableSRError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _show_progress(done: int, total: int | None) -> None:
    share = f" of {total / 1e9:.2f} GB, {done / total:.0%}" if total else ""
    print(f"\r{done / 1e9:.2f} GB{share}", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
